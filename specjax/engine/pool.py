"""The loop of rollouts: prompts are read once into a pool, and rows that are done go on with the next completion."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax import sampling as sampling_lib
from specjax.engine import prompt
from specjax.engine.adapt import Adapt
from specjax.engine.kept import Kept
from specjax.engine.programs import rounds_while
from specjax.engine.request import Request
from specjax.engine.round import NoDrafter
from specjax.engine.state import Logprobs, State
from specjax.engine.tree import longest_path
from specjax.sharding import ROWS, WHOLE, by_rows
from specjax.types import Cache, Drafter, Generation, LanguageModel, Stats, VerifyRule


@struct.dataclass
class _Work:
    """What the loop carries. Array names end in n where the first axis is completions.

    Attributes:
      state: of the rows.
      index_b: int32, the completion that each row runs; the number of completions where a row has none.
      next: int32 scalar, the first completion that no row has begun.
      rounds: int32 scalar, rounds so far.
      ended: what rows that are done leave, with one row for each completion.
    """

    state: State
    index_b: Array
    next: Array
    rounds: Array
    ended: "_Ended"


@struct.dataclass
class _Ended:
    """What is kept of a row: the tokens ``[n, s]``, the length ``[n]``, counts and log-probabilities."""

    tokens_ns: Array
    length_n: Array
    stats: Stats
    logprobs: Logprobs | None

    @classmethod
    def of(cls, state: State) -> "_Ended":
        return cls(state.tokens_bs, state.length_b, state.stats, state.logprobs)


@Kept
@functools.partial(
    jax.jit, static_argnames=("classes", "verify", "chunk", "logprobs", "samples", "rows", "prompt_slots")
)
def rollout_program(target, prompt_ps, request_n, drafter, count, *, classes, **static):
    """Prompts and completions as one program. ``samples`` completions of a prompt follow each other.

    Args:
      target, drafter: as for ``specjax.rollout``.
      prompt_ps: int32 ``[p, s]``, the prompts.
      request_n: what is asked for of each completion.
      count: int32 scalar, how many completions to run, the first ones; of each part of a mesh.
      classes: ``classes_key``.
      static: ``verify``; ``chunk`` and ``logprobs`` as of ``prompt.start``; ``samples``; ``rows``, how many run at
        once, of each part of a mesh; ``prompt_slots``, enough for all prompts.

    Returns:
      The completions, and the number of rounds in each row of the batch, int32 ``[rows]``.
    """
    del classes  # only a part of the key under which jit keeps the program
    run = functools.partial(_run, **static)
    return by_rows(run, (WHOLE, ROWS, ROWS, WHOLE, WHOLE), ROWS)(target, prompt_ps, request_n, drafter, count)


def _run(
    target: LanguageModel,
    prompt_ps: Array,
    request_n: Request,
    drafter: Drafter | None,
    count: Array,
    *,
    verify: VerifyRule,
    chunk: int,
    logprobs: bool,
    samples: int,
    rows: int,
    prompt_slots: int,
) -> tuple[Generation, Array]:
    # 1. Each prompt is read once. A pool of the slots that prompts need takes less memory than one of whole rows.
    slots = prompt_ps.shape[1]
    kept = pool_slots(target, drafter, prompt_slots, slots)
    request_p = jax.tree.map(lambda x: x[::samples], request_n)
    pool = prompt.start(
        target, prompt_ps[:, :kept], request_p, drafter, chunk=chunk, logprobs=False, top_logprobs=0
    )  # fmt: skip
    load = functools.partial(
        _load,
        pool=(pool.cache, pool.draft),
        empty=_empty_caches(target, drafter, 1, slots),
        prompt_ps=prompt_ps,
        request_n=request_n,
        keys_n=sampling_lib.row_keys(request_n.sampling),
        count=count,
        samples=samples,
    )

    # 2. At first every row is done with nothing. Its completion's number is the row's own, so what it leaves is
    # overwritten later.
    total = request_n.limit_b.shape[0]
    state = _idle(target, drafter, request_n, rows, slots, logprobs, pool.adapt)
    ended = jax.tree.map(lambda x: jnp.zeros((total, *x.shape[1:]), x.dtype), _Ended.of(state))
    zero = jnp.int32(0)
    work = load(_Work(state, jnp.arange(rows, dtype=jnp.int32), zero, zero, ended))

    # 3. Rounds run until a row is done, if it can go on with another completion; else until all rows are done. A row
    # whose limit is traced and 0 is done as it begins.
    def unfinished(work: _Work) -> Array:
        return jnp.any(work.index_b < total)

    def body(work: _Work) -> _Work:
        most_done = jnp.where(work.next < count, 1, rows)

        def holds(_: Array, state: State) -> Array:
            return jnp.sum(state.done_b, dtype=jnp.int32) < most_done

        ran, state = rounds_while(holds, target, work.state, drafter, verify, True)
        return load(dataclasses.replace(work, state=state, rounds=work.rounds + ran))

    work = lax.while_loop(unfinished, body, work)
    ended, logs = work.ended, work.ended.logprobs
    generation = Generation(
        tokens=ended.tokens_ns,
        lengths=ended.length_n,
        prompt_lengths=request_n.prompt_length_b,
        stats=ended.stats,
        logprobs=None if logs is None else logs.own_bs,
        warped_logprobs=None if logs is None else logs.warped_bs,
    )
    return generation, jnp.full((rows,), work.rounds, jnp.int32)


def _empty_caches(target: LanguageModel, drafter: Drafter | None, rows: int, slots: int) -> tuple[Cache, Any]:
    drafter = NoDrafter() if drafter is None else drafter
    return target.init_cache(rows, slots), drafter.init(target, rows, slots)


def pool_slots(target: LanguageModel, drafter: Drafter | None, few: int, slots: int) -> int:
    """Returns ``few`` if a row of so many slots is the first part of a row of ``slots``; else ``slots``.

    It is where each array has one axis of slots, or none. A ring of fewer slots than the text is another case.
    """

    def shapes(count: int) -> list[Any]:
        return jax.tree.leaves(jax.eval_shape(lambda: _empty_caches(target, drafter, 1, count)))

    for short, long in zip(shapes(few), shapes(slots), strict=True):
        more = [b - a for a, b in zip(short.shape, long.shape, strict=True) if a != b]
        if more not in ([], [slots - few]):
            return slots
    return few


def _idle(
    target: LanguageModel,
    drafter: Drafter | None,
    request_n: Request,
    rows: int,
    slots: int,
    logprobs: bool,
    adapt_p: Adapt | None,
) -> State:
    """Returns rows that are all done, with the request of the first completions."""
    zero_b = jnp.zeros((rows,), jnp.int32)
    longest = 0 if drafter is None else longest_path(drafter)
    cache, draft = _empty_caches(target, drafter, rows, slots)
    request_b = jax.tree.map(lambda x: x[:rows], request_n)

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x[:1], (rows, *x.shape[1:]))

    return State(
        tokens_bs=jnp.zeros((rows, slots), jnp.int32),
        length_b=zero_b + 1,
        done_b=jnp.ones((rows,), bool),
        cache=cache,
        draft=draft,
        stats=_no_stats(rows, longest),
        request=request_b,
        keys_b=sampling_lib.row_keys(request_b.sampling),
        logprobs=Logprobs.empty(rows, slots, 0) if logprobs else None,
        adapt=jax.tree.map(spread, adapt_p),  # before the first round all rows know the same
        num_draft=0 if drafter is None else drafter.num_draft,
    )


def _no_stats(rows: int, longest: int) -> Stats:
    zero_b, zero_bg = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, longest), jnp.int32)
    return Stats(zero_b, zero_b, zero_b, zero_b, zero_bg, zero_bg)


def _load(
    work: _Work,
    *,
    pool: tuple[Cache, Any],
    empty: tuple[Cache, Any],
    prompt_ps: Array,
    request_n: Request,
    keys_n: Array,
    count: Array,
    samples: int,
) -> _Work:
    """Returns the work after rows that are done left what they have, and took the next completions.

    Args:
      work: after rounds.
      pool: the target's cache and the drafter's state after each prompt.
      empty: one row of both without text, with all slots.
      prompt_ps, request_n, count, samples: as for ``rollout_program``.
      keys_n: the completions' keys.
    """
    state, total = work.state, request_n.limit_b.shape[0]

    # 1. What is done goes to the completion's place, in one scatter: rows that still run have a place past the end.
    due_b = state.done_b & (work.index_b < total)
    place_b = jnp.where(due_b, work.index_b, total)
    ended = jax.tree.map(lambda all_n, new: all_n.at[place_b].set(new, mode="drop"), work.ended, _Ended.of(state))

    # 2. The next completions, in the order of the rows.
    next_b = work.next + jnp.cumsum(due_b, dtype=jnp.int32) - 1
    loads_b = due_b & (next_b < count)
    index_b = jnp.where(loads_b, next_b, jnp.where(due_b, total, work.index_b))
    run_b = jnp.minimum(index_b, total - 1)
    from_b = run_b // samples

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(loads_b.reshape(-1, *(1 for _ in old.shape[1:])), new, old)

    request_b = jax.tree.map(lambda x: x[run_b], request_n)
    length_b = chosen(request_b.prompt_length_b, state.length_b)
    inside_bs = jnp.arange(prompt_ps.shape[1], dtype=jnp.int32)[None] < length_b[:, None]

    # 3. Caches are large, so only the rows that are replaced are copied.
    def copy(i: Array, caches: tuple[Cache, Any]) -> tuple[Cache, Any]:
        row = order_b[i]

        def put(all_rows: Array, prompts: Array, blank: Array) -> Array:
            begun = lax.dynamic_slice_in_dim(prompts, from_b[row], 1, 0)
            new = lax.dynamic_update_slice(blank, begun, (0,) * blank.ndim)
            return lax.dynamic_update_slice_in_dim(all_rows, new, row, 0)

        return jax.tree.map(put, caches, pool, empty)

    order_b = jnp.argsort(~loads_b, stable=True)
    copies = jnp.sum(loads_b, dtype=jnp.int32)
    cache, draft = lax.fori_loop(jnp.int32(0), copies, copy, (state.cache, state.draft))
    state = dataclasses.replace(
        state,
        tokens_bs=chosen(jnp.where(inside_bs, prompt_ps[from_b], 0), state.tokens_bs),
        length_b=length_b,
        done_b=jnp.where(loads_b, length_b >= request_b.limit_b, state.done_b),
        cache=cache,
        draft=draft,
        stats=jax.tree.map(lambda x: chosen(jnp.zeros_like(x), x), state.stats),
        request=request_b,
        keys_b=keys_n[run_b],
        logprobs=jax.tree.map(lambda x: chosen(jnp.zeros_like(x), x), state.logprobs),
        adapt=None if state.adapt is None else state.adapt.forgotten(loads_b),
    )
    return _Work(state, index_b, work.next + jnp.sum(due_b, dtype=jnp.int32), work.rounds, ended)
