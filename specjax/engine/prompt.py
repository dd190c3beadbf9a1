"""The reading of prompts: the state before the first round, and rows that go on with further tokens."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from specjax import sampling as sampling_lib
from specjax.engine.adapt import Adapt, kept_by
from specjax.engine.request import CHUNK, Request
from specjax.engine.round import NoDrafter, context_of, observe_plain
from specjax.engine.state import Logprobs, State
from specjax.engine.tree import depth_of, longest_path
from specjax.rows import append, text_at
from specjax.types import Cache, Drafter, Event, Feed, LanguageModel, Stats


def start(
    target: LanguageModel,
    prompt_bs: Array,
    request: Request,
    drafter: Drafter | None,
    *,
    chunk: int,
    logprobs: bool,
    top_logprobs: int,
    assumed: bool = False,
) -> State:
    """Returns the state before the first round."""
    drafter = NoDrafter() if drafter is None else drafter
    rows, slots = prompt_bs.shape
    length_b = request.prompt_length_b
    tokens_bs = jnp.where(jnp.arange(slots, dtype=jnp.int32)[None] < length_b[:, None], prompt_bs, 0)
    zero_b = jnp.zeros((rows,), jnp.int32)
    zero_bg = jnp.zeros((rows, longest_path(drafter)), jnp.int32)
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
        adapt=_adapt(request.cost_bw, target, drafter),
        num_draft=drafter.num_draft,
        assumed=assumed,
    )
    return _read(target, state, drafter, zero_b, chunk, one_pass=chunk < CHUNK)


def _adapt(cost_bw: Array | None, target: LanguageModel, drafter: Drafter) -> Adapt | None:
    if cost_bw is None:
        return None
    specs = target.state_specs(drafter.capture) if drafter.capture else ()
    return Adapt.start(cost_bw, kept_by(drafter), specs, trees=depth_of(drafter) is not None)


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
    if state.adapt is not None:
        state = observe_plain(target, state, drafter)
    old_b, extended_b = state.length_b, count_b > 0
    length_b = old_b + count_b
    request = dataclasses.replace(
        state.request,
        prompt_length_b=jnp.where(extended_b, length_b, state.request.prompt_length_b),
        limit_b=jnp.where(extended_b, length_b + new_limit_b, state.request.limit_b),
    )
    state = dataclasses.replace(
        state,
        tokens_bs=append(state.tokens_bs, old_b, new_bt, count_b),
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
        feed = Feed(text_at(state.tokens_bs, first_b, chunk), first_b, count_b)
        output = target.read(feed, cache, drafter.capture)
        cache = target.keep(output.cache, feed, count_b)
        context = dataclasses.replace(context_of(target, state), cache=cache)
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
