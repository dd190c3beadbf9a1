"""Benchmarks of ``bench`` of passes and rounds: ``width``, ``round`` and ``slots``."""

import argparse
import functools
from typing import Any

import jax.numpy as jnp

from specjax.commands import measure, models
from specjax.commands.console import print_table


def bench_width(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times target passes by width, at 300 tokens of context."""
    start_b = jnp.asarray([300], jnp.int32)
    cache = args.model.init_cache(1, 512)
    widths = range(1, 10)
    calls = {str(t): functools.partial(measure.target_passes, args.model, start_b, width=t) for t in widths}
    seconds = measure.medians(calls, args.repeats, dict.fromkeys(calls, cache))
    return print_table(
        "Target pass by width",
        [
            {"tokens": t, "ms": seconds[str(t)] / measure.LOOP * 1e3, "ratio": seconds[str(t)] / seconds["1"]}
            for t in widths
        ],
    )


def bench_round(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a round against its parts."""
    rows, prompt = [], models.prompts(args, 200, 1)
    for g, drafter in args.drafts.items():
        for temperature in args.temperature:
            state = measure.ready(args, drafter, temperature, prompt, 512)
            calls = {
                "round": functools.partial(measure.rounds, args.model, drafter),
                "drafter": functools.partial(measure.parts, args.model, drafter, with_target=False),
                "target": functools.partial(measure.target_passes, args.model, state.length_b - 1, width=g + 1),
                "in turn": functools.partial(measure.parts, args.model, drafter, with_target=True),
            }
            inputs = dict.fromkeys(calls, state) | {"target": state.cache}
            milliseconds = {k: v / measure.LOOP * 1e3 for k, v in measure.medians(calls, args.repeats, inputs).items()}
            rows.append(
                {"num_draft": g, "temperature": temperature}
                | {f"{name} ms": value for name, value in milliseconds.items()}
                | {
                    "round / (drafter + target)": milliseconds["round"]
                    / (milliseconds["drafter"] + milliseconds["target"]),
                    "round / in turn": milliseconds["round"] / milliseconds["in turn"],
                }
            )
    return print_table("A round against its parts", rows)


def bench_slots(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a step by slots allocated, with 300 tokens in use."""
    rows, prompt = [], models.prompts(args, 300, 1)
    for name, drafter in {"plain": None, **{f"g = {g}": d for g, d in args.drafts.items()}}.items():
        states = {str(slots): measure.ready(args, drafter, 0.0, prompt, slots) for slots in (512, 4096)}
        seconds = measure.medians(
            dict.fromkeys(states, functools.partial(measure.rounds, args.model, drafter)), args.repeats, states
        )
        rows.append(
            {"drafter": name}
            | {f"{slots} slots, ms": value / measure.LOOP * 1e3 for slots, value in seconds.items()}
            | {"ratio": seconds["4096"] / seconds["512"]}
        )
    return print_table("300 slots in use, by slots allocated", rows)
