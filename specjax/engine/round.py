"""One round, and the reading of a prompt: what the target is fed, and what of it becomes true."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax import sampling as sampling_lib
from specjax.engine.request import CHUNK, Request
from specjax.engine.state import Logprobs, State
from specjax.sampling import RoundDraws
from specjax.types import Cache, Context, Drafter, Draw, Event, Feed, LanguageModel, Proposal, Stats, VerifyRule


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


def start(
    target: LanguageModel,
    prompt_bs: Array,
    request: Request,
    drafter: Drafter | None,
    *,
    chunk: int,
    logprobs: bool,
    top_logprobs: int,
) -> State:
    """Returns the state before the first round."""
    drafter = NoDrafter() if drafter is None else drafter
    rows, slots = prompt_bs.shape
    length_b = request.prompt_length_b
    tokens_bs = jnp.where(jnp.arange(slots, dtype=jnp.int32)[None] < length_b[:, None], prompt_bs, 0)
    zero_b = jnp.zeros((rows,), jnp.int32)
    zero_bg = jnp.zeros((rows, drafter.num_draft), jnp.int32)
    state = State(
        tokens_bs=tokens_bs,
        length_b=length_b,
        done_b=length_b >= request.limit_b,
        cache=target.init_cache(rows, slots),
        draft=drafter.init(target, rows, slots),
        stats=Stats(zero_b, zero_b, zero_b, zero_b, zero_bg, zero_bg),
        request=request,
        keys_b=sampling_lib.row_keys(request.sampling),
        logprobs=Logprobs.empty(rows, slots, top_logprobs) if logprobs else None,
        num_draft=drafter.num_draft,
    )
    return _read(target, state, drafter, zero_b, chunk, one_pass=chunk < CHUNK)


def extend(
    target: LanguageModel,
    state: State,
    new_bt: Array,
    count_b: Array,
    new_limit_b: Array,
    drafter: Drafter | None,
    chunk: int,
) -> State:
    """Returns the state with the first ``count_b`` of the new tokens after each row's end, read as a prompt."""
    drafter = NoDrafter() if drafter is None else drafter
    old_b, extended_b = state.length_b, count_b > 0
    length_b = old_b + count_b
    request = dataclasses.replace(
        state.request,
        prompt_length_b=jnp.where(extended_b, length_b, state.request.prompt_length_b),
        limit_b=jnp.where(extended_b, length_b + new_limit_b, state.request.limit_b),
    )
    state = dataclasses.replace(
        state,
        tokens_bs=_append(state.tokens_bs, old_b, new_bt, count_b),
        length_b=length_b,
        done_b=state.done_b & ~extended_b,
        request=request,
    )
    # A row that is not extended has all but its last token in the cache, and nothing to read.
    one_pass = new_bt.shape[1] <= chunk < CHUNK
    return _read(target, state, drafter, old_b - 1, chunk, one_pass)


def _read(target: LanguageModel, state: State, drafter: Drafter, start_b: Array, chunk: int, one_pass: bool) -> State:
    """Feeds each row's tokens from ``start_b`` on, all but the last, which the next round feeds.

    Tokens that fit into a chunk of less than ``CHUNK`` are one pass. More are read in a loop of such passes, so that
    memory does not grow with the prompt beyond the cache. The first pass of a row is the one that is not full: no later
    pass then writes past the row's end.
    """
    missing_b = state.length_b - 1 - start_b

    def read(first_b: Array, count_b: Array, cache: Cache, draft: Any) -> tuple[Cache, Any]:
        at_bt = first_b[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
        at_bt = jnp.minimum(at_bt, state.tokens_bs.shape[1] - 1)
        feed = Feed(jnp.take_along_axis(state.tokens_bs, at_bt, axis=1), first_b, count_b)
        output = target.forward(target.params, feed, cache, drafter.capture)
        cache = target.keep(output.cache, feed, count_b)
        context = Context(target, cache, state.tokens_bs, state.length_b, _room(state))
        return cache, drafter.observe(draft, context, Event(feed, output.features, count_b))

    if one_pass:
        cache, draft = read(start_b, missing_b, state.cache, state.draft)
        return dataclasses.replace(state, cache=cache, draft=draft)
    chunks = (jnp.max(missing_b) + (chunk - 1)) // chunk

    def body(i: Array, carry: tuple[Cache, Any]) -> tuple[Cache, Any]:
        read_b = missing_b - (chunks - i) * chunk  # before this chunk; a shorter row rests while this is negative
        first_b, end_b = jnp.maximum(read_b, 0), jnp.maximum(read_b + chunk, 0)
        return read(start_b + first_b, end_b - first_b, *carry)

    cache, draft = lax.fori_loop(jnp.int32(0), chunks, body, (state.cache, state.draft))
    return dataclasses.replace(state, cache=cache, draft=draft)


def _room(state: State) -> Array:
    """Returns how many drafts each row can use, -1 for a row that is done.

    A row that may emit r more tokens can use at most r - 1 drafts, since every round also emits one token of the
    target's. Clipping here makes rows stop exactly at their limit.
    """
    return jnp.where(state.done_b, -1, state.request.limit_b - state.length_b - 1)


def one_round(target: LanguageModel, state: State, drafter: Drafter | None, verify: VerifyRule) -> State:
    """Returns the state after one round."""
    drafter = NoDrafter() if drafter is None else drafter
    if drafter.num_draft != state.num_draft:
        raise ValueError(
            f"the drafter proposes {drafter.num_draft} tokens and the state was made for {state.num_draft}: give "
            "prefill and step the same drafter"
        )
    request, sampling = state.request, state.request.sampling
    draws = RoundDraws(state.keys_b, state.length_b, jnp.any(jnp.asarray(sampling.temperature) > 0))
    counts = None
    if sampling.penalized:
        counts = sampling_lib.count_tokens(state.tokens_bs, request.prompt_length_b, state.length_b, target.vocab_size)

    def distributions(logits_btv: Array, drafts_bg: Array, first: int | Array = 0) -> Array:
        logits_btv = logits_btv.astype(jnp.float32)
        return sampling_lib.warp(sampling_lib.penalize(logits_btv, sampling, counts, drafts_bg, first), sampling)

    # 1. Draft. A row uses no more drafts than it has room for.
    room_b = _room(state)
    context = Context(target, state.cache, state.tokens_bs, state.length_b, room_b)
    proposal, draft = drafter.propose(state.draft, context, _make_draw(distributions, draws, verify.shares_noise))
    _check_proposal(proposal, state, target)
    proposal = dataclasses.replace(proposal, length_b=jnp.clip(proposal.length_b, 0, jnp.maximum(room_b, 0)))

    # 2. One target pass over [last token, drafts]. Rows that are done rest.
    start_b = state.length_b - 1
    last_b1 = jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1)
    count_b = jnp.where(state.done_b, 0, proposal.length_b + 1)
    feed = Feed(jnp.concatenate([last_b1, proposal.tokens_bg], axis=1), start_b, count_b)
    cache = state.cache if proposal.cache is None else proposal.cache
    output = target.forward(target.params, feed, cache, drafter.capture)
    _check("the target's logits_btv", output.logits_btv, (*feed.tokens_bt.shape, target.vocab_size))

    # 3. Verify, and cut what is emitted at the first stop token.
    target_btv = distributions(output.logits_btv, proposal.tokens_bg)
    verdict = verify(dataclasses.replace(proposal, cache=None), target_btv, draws)
    emitted_bt = _emitted(proposal.tokens_bg, verdict.num_accepted_b, verdict.next_b)
    count_b, stopped_b = _cut(emitted_bt, verdict.num_accepted_b + 1, request.stop_tokens_bk)
    count_b = jnp.where(state.done_b, 0, count_b)

    # 4. Write. The last token that is emitted is fed by the next round, so as many places are kept as were emitted.
    length_b = state.length_b + count_b
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = _log(logprobs, state.length_b, emitted_bt, count_b, output.logits_btv, target_btv)
    state = dataclasses.replace(
        state,
        tokens_bs=_append(state.tokens_bs, state.length_b, emitted_bt, count_b),
        length_b=length_b,
        done_b=state.done_b | stopped_b | (length_b >= request.limit_b),
        cache=target.keep(output.cache, feed, count_b),
        stats=_tally(state.stats, ~state.done_b, proposal.length_b, verdict.num_accepted_b, count_b),
        logprobs=logprobs,
    )

    # 5. Tell the drafter.
    context = Context(target, state.cache, state.tokens_bs, state.length_b, _room(state))
    event = Event(feed, output.features, count_b, drafted=True)
    return dataclasses.replace(state, draft=drafter.observe(draft, context, event))


def _check_proposal(proposal: Proposal, state: State, target: LanguageModel) -> None:
    rows, g = state.stats.drafted_at.shape
    _check("the drafter's tokens_bg", proposal.tokens_bg, (rows, g), jnp.int32)
    _check("the drafter's length_b", proposal.length_b, (rows,), jnp.int32)
    if proposal.probs_bgv is not None:
        _check("the drafter's probs_bgv", proposal.probs_bgv, (rows, g, target.vocab_size), jnp.float32)


def _check(name: str, array: Array, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raises ValueError unless an array that a model or drafter returned is what its contract says."""
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        wanted = str(shape) if dtype is None else f"{shape} and {jnp.dtype(dtype)}"
        raise ValueError(f"{name} is {array.shape} and {array.dtype}; specjax.types asks for {wanted}")


def _make_draw(distributions: Callable[..., Array], draws: RoundDraws, shares_noise: bool) -> Draw:
    def draw(logits_bv: Array, drafts_bg: Array, index: int | Array) -> tuple[Array, Array]:
        probs_bv = distributions(logits_bv[:, None], drafts_bg, index)[:, 0]
        if shares_noise:
            return draws.emit(probs_bv, jnp.asarray(index, jnp.int32)), probs_bv
        return draws.draft(probs_bv, index), probs_bv

    return draw


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


def _append(array_bs: Array, length_b: Array, new_bt: Array, count_b: Array) -> Array:
    """Writes ``count_b`` entries past each row's end; all other slots keep what they hold.

    Entries may have further dimensions: ``array_bs`` is ``[b, s, ..]`` and ``new_bt`` ``[b, t, ..]``.
    """
    place_bs = jnp.arange(array_bs.shape[1], dtype=jnp.int32)[None] - length_b[:, None]
    source_bs = jnp.clip(place_bs, 0, new_bt.shape[1] - 1)
    written_bs = (place_bs >= 0) & (place_bs < count_b[:, None])
    shape = (*place_bs.shape, *(1 for _ in array_bs.shape[2:]))
    new_bs = jnp.take_along_axis(new_bt, source_bs.reshape(shape), axis=1)
    return jnp.where(written_bs.reshape(shape), new_bs, array_bs)


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
        own_bs=_append(logs.own_bs, length_b, of_emitted(own_btv), count_b),
        warped_bs=_append(logs.warped_bs, length_b, jnp.log(of_emitted(target_btv)), count_b),
    )
    if logs.top_bsn is None or logs.top_tokens_bsn is None:
        return logs
    top_btn, token_btn = lax.top_k(own_btv, logs.top_bsn.shape[-1])
    return dataclasses.replace(
        logs,
        top_tokens_bsn=_append(logs.top_tokens_bsn, length_b, token_btn, count_b),
        top_bsn=_append(logs.top_bsn, length_b, top_btn, count_b),
    )


def _tally(stats: Stats, running_b: Array, drafted_b: Array, accepted_b: Array, emitted_b: Array) -> Stats:
    running_b = running_b.astype(jnp.int32)
    drafted_b, accepted_b = drafted_b * running_b, accepted_b * running_b
    place_g = jnp.arange(stats.drafted_at.shape[1], dtype=jnp.int32)[None]

    def reached(count_b: Array) -> Array:
        return (place_g < count_b[:, None]).astype(jnp.int32)

    return Stats(
        rounds=stats.rounds + running_b,
        drafted=stats.drafted + drafted_b,
        accepted=stats.accepted + accepted_b,
        emitted=stats.emitted + emitted_b,
        drafted_at=stats.drafted_at + reached(drafted_b),
        accepted_at=stats.accepted_at + reached(accepted_b),
    )
