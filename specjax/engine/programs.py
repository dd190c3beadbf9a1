"""The compiled programs of the loop: prompts and rounds as one, or one each where a caller looks in between."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax.engine import prompt
from specjax.engine import round as round_lib
from specjax.engine.adapt import UNOBSERVED, widths_of
from specjax.engine.kept import Kept
from specjax.engine.state import State
from specjax.platforms import by_platform
from specjax.sharding import ROWS, WHOLE, by_rows
from specjax.types import Drafter, LanguageModel, VerifyRule

_Carry = tuple[Array, State]
"""The number of rounds so far, and the state."""


def classes_key(target: LanguageModel, drafter: Drafter | None) -> int:
    """Returns a number that differs where classes do, which keeps programs apart that ``jit`` alone confuses.

    jaxlib compares two trees of dataclasses by their fields, whatever their classes: now and then, where hashes share a
    bucket, ``jit`` hands a drafter the program of another class with equal fields, say of its parent. Hashes do heed
    classes.
    """
    return hash(jax.tree.structure((target, drafter)))


BLOCK = 4
"""Rounds between two looks at whether all rows are done, on a GPU, unless ``run`` is asked for a number in between.

A GPU's host reads the condition of such a loop from the device and waits for it. A loop of known length needs no such
wait. So a GPU runs blocks of rounds, in which rows that are done rest. Up to ``BLOCK - 1`` rounds at the end of all
rows are in vain, which is why a block is short."""


def run_rounds(
    target: LanguageModel, state: State, drafter: Drafter | None, limit: Array | None, verify: VerifyRule, blocks: bool
) -> State:
    """Runs rounds until every row is done, or ``limit`` of them. ``blocks``: the limit is None or has whole blocks."""

    def unfinished(count: Array, state: State) -> Array:
        running = ~jnp.all(state.done_b)
        return running if limit is None else running & (count < limit)

    return rounds_while(unfinished, target, state, drafter, verify, blocks)[1]


def rounds_while(
    holds: Callable[[Array, State], Array],
    target: LanguageModel,
    state: State,
    drafter: Drafter | None,
    verify: VerifyRule,
    blocks: bool,
) -> _Carry:
    """Runs rounds while ``holds(count, state)``, and returns their number and the state.

    Args:
      holds: takes the number of rounds so far and the state, and returns a bool scalar.
      target, state, drafter, verify: as for ``specjax.run``.
      blocks: whether a GPU may run up to ``BLOCK - 1`` rounds after ``holds`` has become false.
    """

    def unfinished(carry: _Carry) -> Array:
        return holds(*carry)

    def rounds(width: int | None) -> Callable[[_Carry], _Carry]:
        # Jitted, so that its two users share one trace. A function of this call alone, so that no other call with equal
        # trees gets it (``classes_key``).
        one_round = jax.jit(lambda state: round_lib.one_round(target, state, drafter, verify, width))

        def one(count: Array, state: State) -> _Carry:
            return count + 1, one_round(state)

        def block(count: Array, state: State) -> _Carry:
            return count + BLOCK, lax.fori_loop(0, BLOCK, lambda _, state: one_round(state), state)

        return lambda carry: by_platform(*carry, cuda=block, rocm=block, default=one) if blocks else one(*carry)

    carry = (jnp.int32(0), state)
    if state.adapt is None or drafter is None:
        return lax.while_loop(unfinished, rounds(None), carry)

    # One loop for each width, which runs while that width is chosen. Loops, since lax.switch would copy all caches in
    # all of its branches.
    def full(state: State) -> Array | bool:
        # Whether the features of further plain rounds would find no place. Tokens alone can wait for the next trial.
        assert state.adapt is not None
        return jnp.max(state.adapt.unobserved_b) > UNOBSERVED - BLOCK if state.adapt.features else False

    def body(carry: _Carry) -> _Carry:
        for number, width in enumerate(widths_of(drafter)):

            def chosen(carry: _Carry, number: int = number) -> Array:
                adapt = carry[1].adapt
                assert adapt is not None
                chosen = unfinished(carry) & (adapt.width == number)
                return chosen if number else chosen & ~jnp.asarray(full(carry[1]))

            carry = lax.while_loop(chosen, rounds(width), carry)
            if number == 0:
                count, state = carry
                assert state.adapt is not None
                due = full(state) | (state.adapt.width > 0)
                carry = count, round_lib.observe_plain(target, state, drafter, due)
        return carry

    return lax.while_loop(unfinished, body, carry)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "verify", "chunk", "logprobs", "top_logprobs"))
def generate_program(target, prompt_bs, request, drafter, *, classes, verify, **static):
    """Prompts and rounds as one program, so nothing returns to the host between them."""
    del classes  # only a part of the key under which jit keeps the program

    def run(target, prompt_bs, request, drafter):
        state = prompt.start(target, prompt_bs, request, drafter, **static)
        return run_rounds(target, state, drafter, None, verify, True).generation

    return by_rows(run, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(target, prompt_bs, request, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "chunk", "logprobs", "top_logprobs", "assumed"))
def prefill_program(target, prompt_bs, request, drafter, *, classes, **static):
    """Prompts alone."""
    del classes
    run = functools.partial(prompt.start, **static)
    return by_rows(run, (WHOLE, ROWS, ROWS, WHOLE), ROWS)(target, prompt_bs, request, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "chunk"), donate_argnames=("state",))
def extend_program(target, state, new_bt, count_b, new_limit_b, drafter, *, classes, chunk):
    """Further tokens of rows, whose state is donated."""
    del classes
    run = functools.partial(prompt.extend, chunk=chunk)
    specs = (WHOLE, ROWS, ROWS, ROWS, ROWS, WHOLE)
    return by_rows(run, specs, ROWS)(target, state, new_bt, count_b, new_limit_b, drafter)


@Kept
@functools.partial(jax.jit, static_argnames=("classes", "verify", "blocks"), donate_argnames=("state",))
def rounds_program(target, state, drafter, limit, *, classes, verify, blocks):
    """Rounds alone, whose state is donated."""
    del classes
    run = functools.partial(run_rounds, verify=verify, blocks=blocks)
    return by_rows(run, (WHOLE, ROWS, WHOLE, WHOLE), ROWS)(target, state, drafter, limit)
