"""Runs that measure the costs of rounds, of the very programs that are asked for, so nothing else compiles."""

import dataclasses
import time
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from specjax.engine.adapt import drafts_of, kept_by, places_past
from specjax.engine.costs import key_of, measured
from specjax.engine.pool import rollout_program
from specjax.engine.programs import generate_program, rounds_program
from specjax.engine.request import Request
from specjax.engine.state import State
from specjax.sharding import gathered, open_parts
from specjax.types import VerifyRule

_MEASURED_PROMPT = 256
"""The most tokens of a prompt that ``generate`` reads when it measures the costs of rounds."""


def with_costs(request: Request, cost_w: np.ndarray) -> Request:
    """Returns the request with these costs for all rows."""
    assert request.cost_bw is not None
    return dataclasses.replace(request, cost_bw=_filled(request.cost_bw, cost_w))


def _filled(array: Array, values: Any) -> Array:
    """Returns the values in the array's shape and at its place: ``jit`` compiles a program for each kind of place."""
    filled = np.broadcast_to(np.asarray(values, array.dtype), array.shape)
    return jax.device_put(filled, array.sharding if array.committed else None)


def _program(classes: int, verify: VerifyRule, rows: int, *models: Any) -> Hashable:
    """Returns what differs where the costs of rounds do, in this process."""
    leaves, structure = jax.tree.flatten(models)
    mesh = jax.sharding.get_abstract_mesh()
    return classes, verify, rows, structure, mesh, tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)


def costs_of_generate(target, prompt_bs, request, drafter, static) -> np.ndarray:
    """Returns the costs of rounds, measured by runs of the very program that is asked for, so nothing else compiles."""

    def rounds(prompt_bs: Array, asked: Request) -> Array:
        return generate_program(target, prompt_bs, asked, drafter, **static).stats.rounds

    return _costs_of_prompts(target, prompt_bs, request, drafter, static, prompt_bs.shape[0], rounds)


def costs_of_rollout(target, prompt_ps, request_n, drafter, static) -> np.ndarray:
    """Returns the costs of rounds, measured by the program that is asked for with one completion for each row."""
    count = jnp.int32(static["rows"])

    def rounds(prompt_ps: Array, asked: Request) -> Array:
        return rollout_program(target, prompt_ps, asked, drafter, count, **static)[1]

    rows = static["rows"] * open_parts("data")
    return _costs_of_prompts(target, prompt_ps, request_n, drafter, static, rows, rounds)


def _costs_of_prompts(target, prompt_bs, request, drafter, static, rows, rounds) -> np.ndarray:
    """Returns the costs of rounds of ``rows`` rows, where ``rounds(prompts, request)`` runs a program of prompts."""
    slots, drafts = prompt_bs.shape[1], drafts_of(drafter)
    # Of a long prompt a part is enough: the program reads as many chunks as there are.
    length_b = np.minimum(gathered(request.prompt_length_b), _MEASURED_PROMPT)
    same_bs = _filled(prompt_bs, 1)  # n-grams find a copy in each round

    def run(cost_w: np.ndarray, new: int) -> tuple[float, int]:
        asked = dataclasses.replace(
            with_costs(request, cost_w),
            prompt_length_b=_filled(request.prompt_length_b, length_b),
            limit_b=_filled(request.limit_b, length_b + new),
            stop_tokens_bk=_filled(request.stop_tokens_bk, -1),
        )
        start = time.perf_counter()
        ran = gathered(rounds(same_bs, asked))
        return time.perf_counter() - start, int(ran.max())

    room = slots - int(length_b.max()) - places_past(drafter.num_draft, True) - 1
    trees = target, drafter, request.prompt_length_b[:rows]  # times hardly depend on the slots
    program = _program(static["classes"], static["verify"], rows, target, drafter)
    return measured(program, lambda: key_of(drafts, *trees), drafts, kept_by(drafter), lambda: room, run)


def costs_of_run(target, state, drafter, limit, options) -> np.ndarray:
    """Returns the costs of rounds, measured by the program that is asked for, on a copy of the state."""
    drafts = drafts_of(drafter)

    def find_room() -> int:
        slots, longest = state.tokens_bs.shape[1], int(gathered(state.length_b).max())
        return slots - longest - places_past(drafter.num_draft, True) - 1

    def run(cost_w: np.ndarray, new: int) -> tuple[float, int]:
        copy = _restarted(state)
        assert copy.adapt is not None
        request = dataclasses.replace(
            with_costs(copy.request, cost_w),
            limit_b=_filled(copy.request.limit_b, gathered(state.length_b) + new),
            stop_tokens_bk=_filled(copy.request.stop_tokens_bk, -1),
        )
        width_b = _filled(copy.adapt.width_b, min(int(np.argmin(cost_w)), len(copy.adapt.widths) - 1))
        adapt = dataclasses.replace(copy.adapt, width_b=width_b, rest_b=_filled(copy.adapt.rest_b, 0))
        copy = dataclasses.replace(copy, request=request, adapt=adapt)
        before = gathered(jax.block_until_ready(copy).stats.rounds)
        start = time.perf_counter()
        no_limit = None if limit is None else jnp.int32(2**30)
        after = gathered(rounds_program(target, copy, drafter, no_limit, **options).stats.rounds)
        return time.perf_counter() - start, int((after - before).max())

    trees = target, drafter, state.length_b
    program = _program(options["classes"], options["verify"], state.length_b.shape[0], target, drafter)
    return measured(program, lambda: key_of(drafts, *trees), drafts, kept_by(drafter), find_room, run)


@jax.jit
def _restarted(state: State) -> State:
    """Returns a copy of the state in which all rows run, with tokens that are all alike: n-grams find a copy."""
    # Computed from the state's own arrays. Others could be placed otherwise, and ``run`` would compile once more.
    copy = jax.tree.map(jnp.copy, state)
    return dataclasses.replace(copy, tokens_bs=0 * state.tokens_bs + 1, done_b=state.done_b & False)
