"""Speculative decoding in one compiled loop: propose, one target pass, verify, write, repeat.

Rows advance by their own counts and never look at each other: what a row emits depends on its prompt, its sampling
parameters and its seed alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike

from specjax import sampling as sampling_lib
from specjax import verify as rules
from specjax.engine.request import Request, check_key, check_rule, lay_out
from specjax.sampling import RoundDraws, Sampling
from specjax.sharding import ROWS, WHOLE, by_rows, gathered
from specjax.types import Cache, Context, Drafter, Draw, Generation, LanguageModel, Output, Proposal, Stats, VerifyRule


@struct.dataclass
class State:
    """Everything the loop carries. Rows are independent slots.

    Attributes:
      tokens_bs: int32, prompt and emitted tokens, zeros past a row's length.
      length_b: int32, tokens of each row.
      done_b: bool; such a row emits nothing, and what its passes write lies past its length.
      cache: the target's, holding the first ``length_b - 1`` tokens of each row.
      draft: the drafter's own state.
      stats: counts so far.
      request: what was asked for; constant.
      keys_b: one key per row; constant.
    """

    tokens_bs: Array
    length_b: Array
    done_b: Array
    cache: Cache
    draft: Any
    stats: Stats
    request: Request
    keys_b: Array


_REQUEST = Request(prompt_length_b=ROWS, limit_b=ROWS, stop_tokens_k=WHOLE, sampling=ROWS)  # type: ignore
_STATE = State(ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, _REQUEST, ROWS)  # type: ignore  (specs in place of arrays)


@struct.dataclass
class _NoDrafter:
    """Proposes nothing, which makes a round a step of plain decoding."""

    num_draft = 0
    capture = ()
    vocab_size = None
    max_positions = None

    def start(self, context, features, slots):
        del context, features, slots

    def propose(self, state, context, draw):
        del draw
        rows = context.length_b.shape[0]
        return Proposal(jnp.zeros((rows, 0), jnp.int32), None, jnp.zeros((rows,), jnp.int32)), state

    def commit(self, state, context, verdict, features):
        del context, verdict, features
        return state


def _prefill(
    target: LanguageModel, prompt_bt: Array, request: Request, key: Array | None, drafter: Drafter | None, slots: int
) -> State:
    """Returns the state before the first round."""
    drafter = _NoDrafter() if drafter is None else drafter
    rows, width = prompt_bt.shape
    length_b = request.prompt_length_b
    inside_bt = jnp.arange(width, dtype=jnp.int32)[None] < length_b[:, None]
    tokens_bs = jnp.pad(jnp.where(inside_bt, prompt_bt, 0), ((0, 0), (0, slots - width)))
    zero_b = jnp.zeros((rows,), jnp.int32)
    zero_bg = jnp.zeros((rows, drafter.num_draft), jnp.int32)
    # The first round feeds the last prompt token again, which makes all rounds alike.
    prompt_bt = tokens_bs[:, :width]
    output = target.forward(target.params, prompt_bt, target.init_cache(rows, slots), zero_b, drafter.capture)
    return State(
        tokens_bs=tokens_bs,
        length_b=length_b,
        done_b=length_b >= request.limit_b,
        cache=output.cache,
        draft=drafter.start(Context(target, output.cache, prompt_bt, length_b), output.features, slots),
        stats=Stats(zero_b, zero_b, zero_b, zero_b, zero_bg, zero_bg),
        request=request,
        keys_b=sampling_lib.row_keys(request.sampling, key),
    )


def step(
    target: LanguageModel, state: State, *, drafter: Drafter | None = None, verify: VerifyRule = rules.block
) -> State:
    """Runs one round and returns the next state. Pure; jit it with ``state`` donated.

    Args:
      target: the model that ``state`` was made with.
      state: from ``prefill`` or an earlier round.
      drafter: the drafter that ``state`` was made with.
      verify: a rule of ``specjax.verify``.

    Raises:
      ValueError, TypeError: the drafter is not the state's, or a model, drafter or rule breaks its contract.
    """
    check_rule(verify)
    run = functools.partial(_step, verify=verify)
    return by_rows(run, (WHOLE, _STATE, WHOLE), _STATE)(target, state, drafter)


def _step(target: LanguageModel, state: State, drafter: Drafter | None, verify: VerifyRule) -> State:
    drafter = _NoDrafter() if drafter is None else drafter
    rows, g = state.stats.drafted_at_bg.shape
    if drafter.num_draft != g:
        raise ValueError(
            f"the drafter proposes {drafter.num_draft} tokens and the state was made for {g}: give prefill and step "
            "the same drafter"
        )
    request, sampling = state.request, state.request.sampling
    context = Context(target, state.cache, state.tokens_bs, state.length_b)
    draws = RoundDraws(state.keys_b, state.length_b, jnp.any(jnp.asarray(sampling.temperature) > 0))
    counts = sampling_lib.count(state.tokens_bs, request.prompt_length_b, state.length_b, target.vocab_size, sampling)

    def distributions(logits_btv: Array, drafts_bi: Array) -> Array:
        logits_btv = logits_btv.astype(jnp.float32)
        return sampling_lib.warp(sampling_lib.penalize(logits_btv, sampling, counts, drafts_bi), sampling)

    proposal, draft = drafter.propose(state.draft, context, _make_draw(distributions, draws, verify.shares_noise))
    _check("the drafter's tokens_bg", proposal.tokens_bg, (rows, g), jnp.int32)
    _check("the drafter's length_b", proposal.length_b, (rows,), jnp.int32)
    if proposal.probs_bgv is not None:
        _check("the drafter's probs_bgv", proposal.probs_bgv, (rows, g, target.vocab_size), jnp.float32)
    if proposal.states_btd is not None:
        _check("the drafter's states_btd", proposal.states_btd, (rows, g + 1, *proposal.states_btd.shape[2:]))
        most = target.num_layers or proposal.depth
        if proposal.cache is None or not 1 <= proposal.depth <= most:
            given = "no cache" if proposal.cache is None else "a cache"
            raise ValueError(
                f"the drafter gives states_btd behind {proposal.depth} layers of {most} and {given}; give states "
                "behind 1 layer or more, and the cache that these layers wrote"
            )
    # A row with room for r more tokens can use r - 1 drafts; given no more, it ends at its limit exactly.
    room_b = jnp.where(state.done_b, 0, request.limit_b - state.length_b - 1)
    proposal = dataclasses.replace(proposal, length_b=jnp.minimum(proposal.length_b, room_b))

    start_b = state.length_b - 1
    fed_bt = jnp.concatenate(
        [jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1), proposal.tokens_bg], axis=1
    )
    output = _target_pass(target, proposal, fed_bt, state.cache, start_b, drafter.capture)
    proposal = dataclasses.replace(proposal, cache=None, states_btd=None)
    _check("the target's logits_btv", output.logits_btv, (rows, g + 1, target.vocab_size))
    verdict = verify(proposal, distributions(output.logits_btv, proposal.tokens_bg), draws)

    emitted_bt = _emitted(proposal.tokens_bg, verdict.num_accepted_b, verdict.next_b)
    count_b, stopped_b = _cut(emitted_bt, verdict.num_accepted_b + 1, request.stop_tokens_k)
    count_b = jnp.where(state.done_b, 0, count_b)
    length_b = state.length_b + count_b
    return dataclasses.replace(
        state,
        tokens_bs=_append(state.tokens_bs, state.length_b, emitted_bt, count_b),
        length_b=length_b,
        done_b=state.done_b | stopped_b | (length_b >= request.limit_b),
        cache=target.commit(output.cache, start_b, verdict.num_accepted_b + 1),
        draft=drafter.commit(draft, context, verdict, output.features),
        stats=_tally(state.stats, ~state.done_b, proposal.length_b, verdict.num_accepted_b, count_b),
    )


def _target_pass(
    target: LanguageModel, proposal: Proposal, fed_bt: Array, cache: Cache, start_b: Array, capture: tuple[int, ...]
) -> Output:
    """Feeds [last token, g drafts] to the target, or to those of its layers that the drafter has not run over them."""
    cache = cache if proposal.cache is None else proposal.cache
    hidden = any(0 <= index < proposal.depth for index in capture)  # states that only those layers give
    if proposal.states_btd is None or target.resume is None or hidden:
        return target.forward(target.params, fed_bt, cache, start_b, capture)
    return target.resume(target.params, proposal.states_btd, cache, start_b, proposal.depth, capture)


def _check(name: str, array: Array, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raises ValueError unless an array that a model or drafter returned is what its contract says."""
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        wanted = str(shape) if dtype is None else f"{shape} and {jnp.dtype(dtype)}"
        raise ValueError(f"{name} is {array.shape} and {array.dtype}; specjax.types asks for {wanted}")


def _make_draw(distributions: Callable[[Array, Array], Array], draws: RoundDraws, shares_noise: bool) -> Draw:
    def draw(logits_bv: Array, prefix_bi: Array) -> tuple[Array, Array]:
        probs_bv = distributions(logits_bv[:, None], prefix_bi)[:, 0]
        index = prefix_bi.shape[1]
        token_b = draws.emit(probs_bv, jnp.int32(index)) if shares_noise else draws.draft(probs_bv, index)
        return token_b, probs_bv

    return draw


def _emitted(drafts_bg: Array, accepted_b: Array, next_b: Array) -> Array:
    """Returns ``[b, g+1]``: the accepted drafts, and the next token in every place behind them."""
    place_t = jnp.arange(drafts_bg.shape[1] + 1, dtype=jnp.int32)[None]
    drafts_bt = jnp.pad(drafts_bg, ((0, 0), (0, 1)))
    return jnp.where(place_t < accepted_b[:, None], drafts_bt, next_b[:, None])


def _cut(emitted_bt: Array, count_b: Array, stop_tokens_k: Array) -> tuple[Array, Array]:
    """Returns how many of ``count_b`` tokens to emit, up to and with the first stop token, and whether there is one."""
    place_t = jnp.arange(emitted_bt.shape[1], dtype=jnp.int32)[None]
    stops_bt = (emitted_bt[..., None] == stop_tokens_k[None, None]).any(-1) & (place_t < count_b[:, None])
    stopped_b = stops_bt.any(-1)
    return jnp.where(stopped_b, jnp.argmax(stops_bt, axis=-1).astype(jnp.int32) + 1, count_b), stopped_b


def _append(tokens_bs: Array, length_b: Array, emitted_bt: Array, count_b: Array) -> Array:
    """Writes ``count_b`` tokens behind each row's end; all other slots keep what they hold."""
    place_bs = jnp.arange(tokens_bs.shape[1], dtype=jnp.int32)[None] - length_b[:, None]
    source_bs = jnp.clip(place_bs, 0, emitted_bt.shape[1] - 1)
    written_bs = (place_bs >= 0) & (place_bs < count_b[:, None])
    return jnp.where(written_bs, jnp.take_along_axis(emitted_bt, source_bs, axis=1), tokens_bs)


def _tally(stats: Stats, running_b: Array, drafted_b: Array, accepted_b: Array, emitted_b: Array) -> Stats:
    running_b = running_b.astype(jnp.int32)
    drafted_b, accepted_b = drafted_b * running_b, accepted_b * running_b
    place_g = jnp.arange(stats.drafted_at_bg.shape[1], dtype=jnp.int32)[None]

    def reached(count_b: Array) -> Array:
        return (place_g < count_b[:, None]).astype(jnp.int32)

    return Stats(
        rounds_b=stats.rounds_b + running_b,
        drafted_b=stats.drafted_b + drafted_b,
        accepted_b=stats.accepted_b + accepted_b,
        emitted_b=stats.emitted_b + emitted_b,
        drafted_at_bg=stats.drafted_at_bg + reached(drafted_b),
        accepted_at_bg=stats.accepted_at_bg + reached(accepted_b),
    )


def _rounds(
    target: LanguageModel, state: State, drafter: Drafter | None, limit: Array | None, verify: VerifyRule
) -> State:
    """Runs rounds until every row is done, or ``limit`` of them."""

    def unfinished(carry: tuple[Array, State]) -> Array:
        count, state = carry
        running = ~jnp.all(state.done_b)
        return running if limit is None else running & (count < limit)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        count, state = carry
        return count + 1, _step(target, state, drafter, verify)

    return lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def _generation(state: State) -> Generation:
    return Generation(state.tokens_bs, state.length_b, state.request.prompt_length_b, state.stats)


def classes_key(target: LanguageModel, drafter: Drafter | None) -> int:
    """Returns a number that differs where classes do, which keeps programs apart that ``jit`` alone confuses.

    jaxlib compares two trees of dataclasses by their fields, whatever their classes: now and then, where hashes share a
    bucket, ``jit`` hands a drafter the program of another class with equal fields, say of its parent. Hashes do heed
    classes.
    """
    return hash(jax.tree.structure((target, drafter)))


@functools.partial(jax.jit, static_argnames=("classes", "verify", "slots"))
def _generate_jit(target, prompt_bt, request, key, drafter, *, classes, verify, slots):
    del classes

    def run(target, prompt_bt, request, key, drafter):
        state = _prefill(target, prompt_bt, request, key, drafter, slots)
        return _generation(_rounds(target, state, drafter, None, verify))

    return by_rows(run, (WHOLE, ROWS, _REQUEST, WHOLE, WHOLE), ROWS)(target, prompt_bt, request, key, drafter)


@functools.partial(jax.jit, static_argnames=("classes", "slots"))
def _prefill_jit(target, prompt_bt, request, key, drafter, *, classes, slots):
    del classes
    run = functools.partial(_prefill, slots=slots)
    return by_rows(run, (WHOLE, ROWS, _REQUEST, WHOLE, WHOLE), _STATE)(target, prompt_bt, request, key, drafter)


@functools.partial(jax.jit, static_argnames=("classes", "verify"), donate_argnames=("state",))
def _rounds_jit(target, state, drafter, limit, *, classes, verify):
    del classes
    run = functools.partial(_rounds, verify=verify)
    return by_rows(run, (WHOLE, _STATE, WHOLE, WHOLE), _STATE)(target, state, drafter, limit)


def generate(
    target: LanguageModel,
    prompt_bt: ArrayLike,
    prompt_length_b: ArrayLike | None = None,
    *,
    drafter: Drafter | None = None,
    verify: VerifyRule = rules.block,
    sampling: Sampling = Sampling(),
    max_new_tokens: int,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    key: Array | None = None,
) -> Generation:
    """Continues prompts by speculative decoding; the law of the text is the target's, whatever the drafter.

    Pure, and usable inside the caller's own ``jit``, where it transfers nothing. Called outside of one, it moves its
    arguments to the device and compiles itself, with prompt width, slots and the number of stop tokens rounded up, so
    that other prompts, lengths, sampling parameters, seeds and stop tokens in the same buckets compile nothing new.
    Under ``jax.set_mesh`` it runs on the mesh's devices, for models that ``specjax.shard`` has put there.

    Args:
      target: the model whose text is wanted.
      prompt_bt: integers ``[b, t]``, right-padded.
      prompt_length_b: integers ``[b]``, 1 .. t; None means t for all.
      drafter: proposes tokens; None is plain decoding through the same loop.
      verify: a rule of ``specjax.verify``.
      sampling: temperature, top-k and so on, one for all rows or per row.
      max_new_tokens: the most tokens a row emits; under ``jit`` a static integer.
      stop_tokens: ids that end a row; the one that ended it is part of the text.
      slots: tokens to allocate per row; None fits. At least prompt + max_new_tokens + num_draft + 1.
      key: makes the draws another sample for the same seeds; consumed. None is a fixed key.

    Returns:
      Tokens, lengths and statistics of each row.

    Raises:
      ValueError, TypeError: before anything compiles, naming the value, the limit and the cure.
    """
    check_rule(verify)
    check_key(key)
    prompt_bt, request, slots = lay_out(
        target, drafter, prompt_bt, prompt_length_b, sampling, max_new_tokens, stop_tokens, slots
    )
    classes = classes_key(target, drafter)
    return _generate_jit(target, prompt_bt, request, key, drafter, classes=classes, verify=verify, slots=slots)


def prefill(
    target: LanguageModel,
    prompt_bt: ArrayLike,
    prompt_length_b: ArrayLike | None = None,
    *,
    drafter: Drafter | None = None,
    sampling: Sampling = Sampling(),
    max_new_tokens: int,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    key: Array | None = None,
) -> State:
    """Fills the caches from the prompts, for loops of one's own around ``step``.

    The arguments are ``generate``'s, and so is what is raised.
    """
    check_key(key)
    prompt_bt, request, slots = lay_out(
        target, drafter, prompt_bt, prompt_length_b, sampling, max_new_tokens, stop_tokens, slots
    )
    classes = classes_key(target, drafter)
    return _prefill_jit(target, prompt_bt, request, key, drafter, classes=classes, slots=slots)


def stream(
    target: LanguageModel,
    prompt_bt: ArrayLike,
    prompt_length_b: ArrayLike | None = None,
    *,
    rounds: int = 1,
    drafter: Drafter | None = None,
    verify: VerifyRule = rules.block,
    sampling: Sampling = Sampling(),
    max_new_tokens: int,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    key: Array | None = None,
) -> Iterator[Generation]:
    """Like ``generate``, but yields the generation so far, as NumPy arrays, after every few rounds.

    Args:
      rounds: rounds between two yields, at least 1: one return to the host each. The rest is as for ``generate``.

    Yields:
      The generation so far; the last one is what ``generate`` returns.

    Raises:
      ValueError, TypeError: as for ``generate``, when it is called rather than at the first yield.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; give an integer of at least 1")
    check_rule(verify)
    state = prefill(
        target,
        prompt_bt,
        prompt_length_b,
        drafter=drafter,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        slots=slots,
        key=key,
    )
    return _run(target, state, drafter, jnp.int32(rounds), verify)


def _run(
    target: LanguageModel, state: State, drafter: Drafter | None, rounds: Array, verify: VerifyRule
) -> Iterator[Generation]:
    classes = classes_key(target, drafter)
    while not state.done_b.all():
        state = _rounds_jit(target, state, drafter, rounds, classes=classes, verify=verify)
        yield gathered(_generation(state))
