"""One round: what the target is fed, and what of it becomes true."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax import sampling as sampling_lib
from specjax.engine.adapt import UNOBSERVED, passes_of, share_of
from specjax.engine.state import Logprobs, State
from specjax.engine.tree import KeptPath, deepest, depth_of, longest_path
from specjax.platforms import by_platform
from specjax.rows import append, text_at
from specjax.sampling import Counts, RoundDraws, Sampling
from specjax.types import (
    Context,
    Drafter,
    Draw,
    Event,
    Feed,
    LanguageModel,
    Proposal,
    Stats,
    VerifyRule,
    ancestors,
)


@struct.dataclass
class NoDrafter:
    """Proposes nothing, which makes a round a step of plain decoding."""

    num_draft = 0
    capture = ()
    vocab_size = None
    max_positions = None

    def init(self, target, rows, slots):
        del target, rows, slots

    def observe(self, state, context, event):
        del context, event
        return state

    def propose(self, state, context, draw):
        del draw
        rows = context.length_b.shape[0]
        return Proposal(jnp.zeros((rows, 0), jnp.int32), None, jnp.zeros((rows,), jnp.int32)), state


def _room(state: State) -> Array:
    """Returns how many drafts each row can use, -1 for a row that is done.

    A row that may emit r more tokens can use at most r - 1 drafts, since every round also emits one token of the
    target's. Clipping here makes rows stop exactly at their limit.
    """
    return jnp.where(state.done_b, -1, state.request.limit_b - state.length_b - 1)


def one_round(
    target: LanguageModel, state: State, drafter: Drafter | None, verify: VerifyRule, width: int | None = None
) -> State:
    """Returns the state after one round of at most ``width`` drafts, None for all that the drafter has.

    At width 0 the drafter neither drafts nor observes: ``observe_plain`` tells it later of several such rounds.
    """
    drafter = NoDrafter() if drafter is None else drafter
    if drafter.num_draft != state.num_draft:
        raise ValueError(
            f"the drafter proposes {drafter.num_draft} tokens and the state was made for {state.num_draft}: give "
            "prefill and step the same drafter"
        )
    laws = _Laws.of(target, state)
    if width == 0:
        proposal, _ = NoDrafter().propose(None, context_of(target, state), None)
        return _finish(target, state, drafter, verify, laws, proposal, drafted=False)

    # 1. Draft. A row uses no more drafts than it has room for; of a tree, what is kept is cut later.
    passes = () if state.adapt is None else passes_of(drafter)
    context = dataclasses.replace(context_of(target, state), width=width, price_bg=_price(state, drafter, passes))
    proposal, draft = drafter.propose(state.draft, context, laws.draw(verify.shares_noise))
    width = context.drafts(drafter.num_draft)
    _check_proposal(proposal, width, state, target, drafter)
    proposal = proposal.first(width)
    if proposal.parents_bg is None:
        length_b = jnp.clip(proposal.length_b, 0, jnp.maximum(context.room_b, 0))
    else:
        length_b = jnp.where(context.room_b > 0, jnp.maximum(proposal.length_b, 0), 0)
    proposal = dataclasses.replace(proposal, length_b=length_b)
    state = dataclasses.replace(state, draft=draft)

    def wide(state: State) -> State:
        return _finish(target, state, drafter, verify, laws, proposal, drafted=True)

    def narrowest(state: State) -> State:
        # The target's pass has room for the longest proposal. One loop for each pass, of one turn or none, since
        # lax.switch would copy all caches in all of its branches.
        cost_bw = state.request.cost_bw
        assert cost_bw is not None
        number = jnp.sum(jnp.max(length_b) > jnp.asarray(passes[:-1], jnp.int32), dtype=jnp.int32)
        # Where a plain round costs infinitely much, the cost of one pass is measured, and all rounds have that pass.
        cost_p = cost_bw[0, -len(passes) :]
        number = jnp.where(jnp.isinf(cost_bw[0, 0]), jnp.argmin(cost_p), number)
        for each, room in enumerate(passes):
            fits = proposal.first(room) if room else _without_drafts(proposal)
            share = share_of(cost_p, each) if getattr(drafter, "cuts", False) else float(room > 0)
            finish = functools.partial(_finish, target, drafter=drafter, verify=verify, laws=laws, drafted=True)
            finish = functools.partial(finish, proposal=fits, wide=share)
            turns = (number == each).astype(jnp.int32)
            state = lax.fori_loop(jnp.int32(0), turns, lambda _, state, finish=finish: finish(state), state)
        return state

    if not passes:
        return wide(state)
    # A GPU's host would wait for each of the loops, and a pass over few tokens costs there what one over one does.
    return by_platform(state, cuda=wide, rocm=wide, default=narrowest)


def _price(state: State, drafter: Drafter, passes: tuple[int, ...]) -> Array | None:
    """Returns ``Context.price_bg`` for a drafter that cuts. On a GPU no draft has a price, as the pass stays wide."""
    if not (passes and getattr(drafter, "cuts", False)):
        return None
    adapt, cost_bw = state.adapt, state.request.cost_bw
    assert adapt is not None and cost_bw is not None
    price_bg = adapt.price(cost_bw, passes, ~state.done_b, _room(state))
    return by_platform(price_bg, cuda=jnp.zeros_like, rocm=jnp.zeros_like, default=lambda x: x)


def _finish(
    target: LanguageModel,
    state: State,
    drafter: Drafter,
    verify: VerifyRule,
    laws: "_Laws",
    proposal: Proposal,
    drafted: bool,
    wide: float | Array = 1.0,
) -> State:
    """Returns the state after the target's pass over a proposal, and all that follows from it.

    ``wide`` is as for ``Adapt.after_drafts``.
    """
    # 2. One target pass over [last token, drafts]. Rows that are done rest.
    request, running_b, room_b = state.request, ~state.done_b, _room(state)
    start_b = state.length_b - 1
    last_b1 = jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1)
    count_b = jnp.where(state.done_b, 0, proposal.length_b + 1)
    feed = Feed(jnp.concatenate([last_b1, proposal.tokens_bg], axis=1), start_b, count_b, _parents(proposal))
    cache = state.cache if proposal.cache is None else proposal.cache
    output = target.read(feed, cache, drafter.capture)
    _check("the target's logits_btv", output.logits_btv, (*feed.tokens_bt.shape, target.vocab_size))

    # 3. Verify. From here on the path of a tree that was kept is a chain, and nothing later knows of the tree.
    # Penalties at a place count the drafts that it follows, and its own.
    before_btg = None if feed.parents_bt is None else ancestors(feed.parents_bt)[:, :, 1:]
    target_btv = laws.distributions(output.logits_btv, proposal.tokens_bg, before_btg=before_btg)
    verdict = verify(dataclasses.replace(proposal, cache=None), target_btv, laws.draws)
    drafts_bg, path, depth_b = proposal.tokens_bg, None, None
    if feed.parents_bt is not None:
        path, depth_b = KeptPath.of(verdict, longest_path(drafter), running_b), deepest(feed)
        output, target_btv = path.gather(target, output, feed), path.along(target_btv)
        feed = path.feed(feed)
        drafts_bg = feed.tokens_bt[:, 1:]

    # 4. Cut what is emitted at the first stop token.
    emitted_bt = _emitted(drafts_bg, verdict.num_accepted_b, verdict.next_b)
    most_b = verdict.num_accepted_b + 1 if path is None else path.emits(verdict, room_b)
    count_b, stopped_b = _cut(emitted_bt, most_b, request.stop_tokens_bk)
    count_b = jnp.where(state.done_b, 0, count_b)

    # 5. Write. The last token that is emitted is fed by the next round, so as many places are kept as were emitted.
    length_b = state.length_b + count_b
    logprobs, adapt = state.logprobs, state.adapt
    if logprobs is not None:
        logprobs = _log(logprobs, state.length_b, emitted_bt, count_b, output.logits_btv, target_btv)
    if adapt is not None and request.cost_bw is not None:
        if drafted:
            drafted_b, path_b = proposal.length_b, jnp.clip(room_b, 0, longest_path(drafter))
            if getattr(drafter, "cuts", False):
                drafted_b = path_b
            elif depth_b is not None:
                drafted_b = jnp.where(depth_b > 0, path_b, 0)
            adapt = adapt.after_drafts(request.cost_bw, running_b, room_b, drafted_b, verdict, wide)
        else:
            adapt = adapt.after_plain(request.cost_bw, running_b, output.features)
    state = dataclasses.replace(
        state,
        tokens_bs=append(state.tokens_bs, state.length_b, emitted_bt, count_b),
        length_b=length_b,
        done_b=state.done_b | stopped_b | (length_b >= request.limit_b),
        cache=target.keep(output.cache, feed, count_b),
        stats=_tally(state.stats, running_b, proposal.length_b, depth_b, verdict.num_accepted_b, count_b),
        logprobs=logprobs,
        adapt=adapt,
    )

    # 6. Tell the drafter.
    if not drafted:
        return state
    event = Event(feed, output.features, count_b, drafted=True)
    return dataclasses.replace(state, draft=drafter.observe(state.draft, context_of(target, state), event))


def observe_plain(target: LanguageModel, state: State, drafter: Drafter, due: Array | bool = True) -> State:
    """Returns the state after the drafter has observed, if ``due``, what plain rounds emitted, as if it were prompt."""
    assert state.adapt is not None
    blocks = (jnp.max(state.adapt.unobserved_b) + (UNOBSERVED - 1)) // UNOBSERVED

    def block(_: Array, state: State) -> State:
        adapt = state.adapt
        assert adapt is not None
        start_b = state.length_b - 1 - adapt.unobserved_b
        count_b = jnp.minimum(adapt.unobserved_b, UNOBSERVED)
        feed = Feed(text_at(state.tokens_bs, start_b, UNOBSERVED), start_b, count_b)
        draft = drafter.observe(state.draft, context_of(target, state), Event(feed, adapt.features, count_b))
        return dataclasses.replace(state, draft=draft, adapt=adapt.observed(count_b))

    return lax.fori_loop(jnp.int32(0), jnp.where(due, blocks, 0), block, state)


@struct.dataclass
class _Laws:
    """How this round's tokens are drawn.

    Attributes:
      sampling: per-row parameters.
      counts: of the tokens before the round, or None without penalties.
      draws: the random choices.
    """

    sampling: Sampling
    counts: Counts | None
    draws: RoundDraws

    @classmethod
    def of(cls, target: LanguageModel, state: State) -> "_Laws":
        sampling, counts = state.request.sampling, None
        if sampling.penalized:
            prompt_length_b = state.request.prompt_length_b
            counts = sampling_lib.count_tokens(state.tokens_bs, prompt_length_b, state.length_b, target.vocab_size)
        sampled = jnp.any(jnp.asarray(sampling.temperature) > 0)
        return cls(sampling, counts, RoundDraws(state.keys_b, state.length_b, sampled))

    def distributions(
        self, logits_btv: Array, drafts_bg: Array, first: int | Array = 0, before_btg: Array | None = None
    ) -> Array:
        """Returns the distributions that are sampled, as ``sampling.warp`` does, of penalised logits."""
        return sampling_lib.warp(self._penalized(logits_btv, drafts_bg, first, before_btg), self.sampling)

    def _penalized(
        self, logits_btv: Array, drafts_bg: Array, first: int | Array = 0, before_btg: Array | None = None
    ) -> Array:
        logits_btv = logits_btv.astype(jnp.float32)
        return sampling_lib.penalize(logits_btv, self.sampling, self.counts, drafts_bg, first, before_btg)

    def draw(self, shares_noise: bool) -> Draw:
        """Returns ``draw`` for drafters (``types.Draw``)."""

        def draw(
            logits_bv: Array,
            drafts_bg: Array,
            index: int | Array,
            before_bg: Array | None = None,
            siblings: int | None = None,
        ) -> tuple[Array, Array]:
            before_btg = None if before_bg is None else before_bg[:, None]
            logits_btv = self._penalized(logits_bv[:, None], drafts_bg, index, before_btg)
            probs_bv = sampling_lib.warp(logits_btv, self.sampling)[:, 0]
            distinct = None if siblings is None else (siblings, logits_btv[:, 0])
            if shares_noise:
                depth = jnp.asarray(index, jnp.int32) if before_bg is None else before_bg.sum(-1, dtype=jnp.int32)
                return self.draws.emit(probs_bv, depth, distinct), probs_bv
            return self.draws.draft(probs_bv, index, distinct), probs_bv

        return draw


def context_of(target: LanguageModel, state: State) -> Context:
    """Returns what a drafter is told of a state."""
    return Context(target, state.cache, state.tokens_bs, state.length_b, _room(state))


def _without_drafts(proposal: Proposal) -> Proposal:
    """Returns a chain of no drafts."""
    return dataclasses.replace(proposal.first(0), parents_bg=None)


def _parents(proposal: Proposal) -> Array | None:
    """Returns the parents of the feed's places, int32 ``[b, g + 1]``, or None for a chain."""
    return (
        None if proposal.parents_bg is None else jnp.pad(proposal.parents_bg + 1, ((0, 0), (1, 0)), constant_values=-1)
    )


def _check_proposal(proposal: Proposal, width: int, state: State, target: LanguageModel, drafter: Drafter) -> None:
    rows, g = state.length_b.shape[0], drafter.num_draft
    if proposal.tokens_bg.shape[-1] == width:  # other drafters propose all that they have, whatever the width
        g = width
    _check("the drafter's tokens_bg", proposal.tokens_bg, (rows, g), jnp.int32)
    _check("the drafter's length_b", proposal.length_b, (rows,), jnp.int32)
    if proposal.probs_bgv is not None:
        _check("the drafter's probs_bgv", proposal.probs_bgv, (rows, g, target.vocab_size), jnp.float32)
    depth = depth_of(drafter)
    if (proposal.parents_bg is None) != (depth is None):
        given = "no parents_bg" if proposal.parents_bg is None else "parents_bg"
        raise ValueError(
            f"the drafter's tree_depth is {depth} and its proposal has {given}; a drafter of trees has a depth, "
            "and all its proposals have parents"
        )
    if proposal.parents_bg is not None:
        _check("the drafter's parents_bg", proposal.parents_bg, (rows, g), jnp.int32)


def _check(name: str, array: Array, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raises ValueError unless an array that a model or drafter returned is what its contract says."""
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        wanted = str(shape) if dtype is None else f"{shape} and {jnp.dtype(dtype)}"
        raise ValueError(f"{name} is {array.shape} and {array.dtype}; specjax.types asks for {wanted}")


def _emitted(drafts_bg: Array, accepted_b: Array, next_b: Array) -> Array:
    """Returns ``[b, g+1]``: the accepted drafts, and the next token in every place after them."""
    place_t = jnp.arange(drafts_bg.shape[1] + 1, dtype=jnp.int32)[None]
    drafts_bt = jnp.pad(drafts_bg, ((0, 0), (0, 1)))
    return jnp.where(place_t < accepted_b[:, None], drafts_bt, next_b[:, None])


def _cut(emitted_bt: Array, count_b: Array, stop_tokens_bk: Array) -> tuple[Array, Array]:
    """Returns how many of ``count_b`` tokens to emit, up to and with the first stop token, and whether there is one."""
    place_t = jnp.arange(emitted_bt.shape[1], dtype=jnp.int32)[None]
    stops_bt = (emitted_bt[..., None] == stop_tokens_bk[:, None]).any(-1) & (place_t < count_b[:, None])
    stopped_b = stops_bt.any(-1)
    return jnp.where(stopped_b, jnp.argmax(stops_bt, axis=-1).astype(jnp.int32) + 1, count_b), stopped_b


def _log(
    logs: Logprobs, length_b: Array, emitted_bt: Array, count_b: Array, logits_btv: Array, target_btv: Array
) -> Logprobs:
    """Writes the log-probabilities of the tokens that are emitted, each from its own place of the target's pass.

    Place j of the pass gave the law of emitted token j, whether that is an accepted draft or the token after them.
    """
    own_btv = jax.nn.log_softmax(logits_btv.astype(jnp.float32), axis=-1)

    def of_emitted(values_btv: Array) -> Array:
        return jnp.take_along_axis(values_btv, emitted_bt[..., None], axis=-1)[..., 0]

    logs = dataclasses.replace(
        logs,
        own_bs=append(logs.own_bs, length_b, of_emitted(own_btv), count_b),
        warped_bs=append(logs.warped_bs, length_b, jnp.log(of_emitted(target_btv)), count_b),
    )
    if logs.top_bsn is None or logs.top_tokens_bsn is None:
        return logs
    top_btn, token_btn = lax.top_k(own_btv, logs.top_bsn.shape[-1])
    return dataclasses.replace(
        logs,
        top_tokens_bsn=append(logs.top_tokens_bsn, length_b, token_btn, count_b),
        top_bsn=append(logs.top_bsn, length_b, top_btn, count_b),
    )


def _tally(
    stats: Stats, running_b: Array, drafted_b: Array, depth_b: Array | None, accepted_b: Array, emitted_b: Array
) -> Stats:
    """Returns the counts after a round; ``depth_b`` is the depth of a tree, or None after a chain."""
    running_b = running_b.astype(jnp.int32)
    drafted_b, accepted_b = drafted_b * running_b, accepted_b * running_b
    depth_b = drafted_b if depth_b is None else depth_b * running_b
    place_g = jnp.arange(stats.drafted_at.shape[1], dtype=jnp.int32)[None]

    def reached(count_b: Array) -> Array:
        return (place_g < count_b[:, None]).astype(jnp.int32)

    return Stats(
        rounds=stats.rounds + running_b,
        drafted=stats.drafted + drafted_b,
        accepted=stats.accepted + accepted_b,
        emitted=stats.emitted + emitted_b,
        drafted_at=stats.drafted_at + reached(depth_b),
        accepted_at=stats.accepted_at + reached(accepted_b),
    )
