"""Parts of the benchmarks: medians of calls in turn, compiled loops of passes and rounds, excerpts of text."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import specjax
from specjax import training
from specjax.commands import hosts, stdlib

LOOP = 20  # rounds or passes inside one timed call, so that dispatch from the host does not count


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to decode one row greedily, of specjax or of another library.

    Attributes:
      library: its name.
      decoding: the name of the way.
      kind: "plain", "draft model" or "prompt lookup". A peer's way is compared with specjax's of the same kind.
        Specjax's further ways have "".
      decode: takes a prompt, int32 ``[t]``, and returns the new tokens, integers ``[n]``.
    """

    library: str
    decoding: str
    kind: str
    decode: Callable[[np.ndarray], Any]


def medians(calls: dict[str, Callable[[], Any]], repeats: int, inputs: Any = None) -> dict[str, float]:
    """Returns the median seconds of each call. The calls take turns, so a change of the machine's load meets all.

    Args:
      calls: the functions to time, by name.
      repeats: number of timings of each.
      inputs: by name, a pytree for each call, whose buffers the call may donate; None: the calls take no argument.
        The pytree is copied before each run, and the copy is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(repeats + 1):
        for name, call in calls.items():
            consumed = () if inputs is None else (jax.block_until_ready(jax.tree.map(jnp.copy, inputs[name])),)
            begin = time.perf_counter()
            jax.block_until_ready(call(*consumed))
            if run:  # the first compiles
                times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in times.items()}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of JAX's events meanwhile that belong to tracing, lowering and compiling."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@functools.partial(jax.jit, static_argnames=("width", "rollback"), donate_argnames="cache")
def target_passes(
    target: specjax.LanguageModel, start_b: Array, cache: Any, *, width: int, rollback: bool = True
) -> Any:
    """Runs ``LOOP`` target passes of ``width`` tokens from ``start_b`` on, each fed the argmax of the one before.

    All passes write the same slots, as attention caches allow. Recurrent layers go on from the state of the pass before
    (``commit``); without ``rollback``, each pass has the state that came in.
    """
    # The chain of inputs keeps XLA from dropping passes.

    def one(_, carry):
        tokens_bt, cache = carry
        feed = specjax.Feed(tokens_bt, start_b, jnp.full_like(start_b, width))
        output = target.forward(target.params, feed, cache)
        after = target.keep(output.cache, feed, feed.count_b) if rollback else _with_states(output.cache, cache)
        return jnp.argmax(output.logits_btv, -1).astype(jnp.int32), after

    tokens_bt = jnp.ones((start_b.shape[0], width), jnp.int32)
    return lax.fori_loop(0, LOOP, one, (tokens_bt, cache))


def is_recurrent(before: Any, after: Any) -> bool:
    """Returns whether a layer's part of the cache is another kind of tree after a pass, until ``commit``."""
    return jax.tree.structure(before) != jax.tree.structure(after)


def _with_states(after: Any, before: Any) -> Any:
    """Returns a decoder's cache after a pass, with the recurrent layers' states of before."""
    pairs = zip(before.layers, after.layers, strict=True)
    return after.replace(layers=tuple(old if is_recurrent(old, new) else new for old, new in pairs))


def simple_draw(state: specjax.State) -> Callable[..., tuple[Array, Array]]:
    """Returns the cheapest ``draw``: greedy, or at temperature 1 if a row of the state has a temperature."""
    # The drafter's own cost is measured, so filters, penalties and keys per row are left out.

    def draw(logits_bv, drafts_bg, index, before_bg=None, siblings=None):
        del before_bg
        key = jax.random.fold_in(jax.random.key(0), drafts_bg.sum() + index)

        if siblings is not None:
            noise_bv = jax.random.gumbel(key, logits_bv.shape)
            return lax.top_k(logits_bv + noise_bv, siblings)[1].astype(jnp.int32), jax.nn.softmax(logits_bv, -1)

        def sample():
            token_b = jax.random.categorical(key, logits_bv, axis=-1).astype(jnp.int32)
            return token_b, jax.nn.softmax(logits_bv, -1)

        def greedy():
            token_b = jnp.argmax(logits_bv, -1).astype(jnp.int32)
            return token_b, jax.nn.one_hot(token_b, logits_bv.shape[-1])

        return lax.cond(jnp.any(jnp.asarray(state.request.sampling.temperature) > 0), sample, greedy)

    return draw


@functools.partial(jax.jit, donate_argnames="state", static_argnames="with_target")
def parts(target: specjax.LanguageModel, drafter: Any, state: specjax.State, *, with_target: bool) -> Any:
    """Runs ``LOOP`` proposals, with or without a target pass over each: rounds that verify and write nothing."""
    draw = simple_draw(state)

    def one(_, carry):
        tokens_bs, draft, cache = carry
        room_b = state.request.limit_b - state.length_b - 1
        context = specjax.Context(target, cache, tokens_bs, state.length_b, room_b)
        proposal, draft = drafter.propose(draft, context, draw)
        cache = cache if proposal.cache is None else proposal.cache
        next_b = proposal.tokens_bg[:, -1]
        if with_target:
            fed_bt = jnp.concatenate([tokens_bs[:, :1], proposal.tokens_bg], axis=1)
            feed = specjax.Feed(fed_bt, state.length_b - 1, proposal.length_b + 1)
            output = target.forward(target.params, feed, cache)
            next_b = jnp.argmax(output.logits_btv[:, -1], -1).astype(jnp.int32)
            cache = target.keep(output.cache, feed, feed.count_b)
        return tokens_bs.at[:, 0].set(next_b), draft, cache  # the next pass depends on this one, so XLA drops none

    return lax.fori_loop(0, LOOP, one, (state.tokens_bs, state.draft, state.cache))


@functools.partial(jax.jit, donate_argnames="state")
def rounds(target: specjax.LanguageModel, drafter: Any, state: specjax.State) -> specjax.State:
    """Runs ``LOOP`` rounds."""
    return lax.fori_loop(0, LOOP, lambda _, state: specjax.step(target, state, drafter=drafter), state)


def ready(args: argparse.Namespace, drafter: Any, temperature: float, prompt: np.ndarray, slots: int) -> specjax.State:
    """Returns the state of prompts ``[rows, t]``, which can run for as long as the slots or the model allow."""
    # Some slots are left for the drafts of the last round.
    past = 16 if drafter is None else max(16, drafter.num_draft + 1)
    room = min(args.model.max_positions or slots, slots - past) - prompt.shape[1]
    sampling = specjax.Sampling(temperature=temperature)
    options = {"sampling": sampling, "max_new_tokens": room, "slots": slots, "fixed": True}
    return specjax.prefill(args.model, prompt, drafter=drafter, **options)


@functools.cache
def held_out_tokens(tokenizer_folder: Path) -> np.ndarray:
    """Returns the tokens of the standard-library modules that are held out from training."""
    tokenizer = specjax.open(tokenizer_folder).need_tokenizer()
    texts = [text for name, text in stdlib.modules().items() if stdlib.is_held_out(name)]
    return training.encode_texts(tokenizer, texts)


def held_out_excerpts(tokenizer_folder: Path, length: int, count: int) -> np.ndarray:
    """Returns ``count`` windows of ``length`` tokens from held-out modules."""
    excerpts = training.Windows(held_out_tokens(tokenizer_folder), length, count, seed=0).batch(0)
    hosts.check_same({"the digest of the excerpts": hashlib.sha256(excerpts.tobytes()).hexdigest()[:8]})
    return excerpts
