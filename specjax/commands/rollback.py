"""The benchmark ``rollback`` of ``bench``: what it costs a target with recurrent layers to take places back."""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

import specjax
from specjax.commands import measure
from specjax.commands.console import print_table


def check(model: specjax.LanguageModel) -> None:
    """Raises ValueError unless the model takes places back."""
    if model.commit is None:
        raise ValueError(
            "rollback is asked for, but no layer of --target is recurrent: caches of keys and values take nothing "
            "back; give a hybrid model, such as a Qwen3-Next or Granite 4"
        )


def bench_rollback(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the target's pass of a round with and without rollback, at 300 tokens, and counts what the pass keeps."""
    rows = []
    for batch in args.batch or [1]:
        start_b = jnp.full((batch,), 300, jnp.int32)
        cache = args.model.init_cache(batch, 512)
        for width in dict.fromkeys((1, *(g + 1 for g in args.num_draft))):
            passes = functools.partial(measure.target_passes, args.model, start_b, width=width)
            calls = {"with": passes, "without": functools.partial(passes, rollback=False)}
            seconds = measure.medians(calls, args.repeats, dict.fromkeys(calls, cache))
            state, kept = sizes(args.model, batch, width)
            rows.append(
                {
                    "batch": batch,
                    "places": width,
                    "without rollback, ms": seconds["without"] / measure.LOOP * 1e3,
                    "with rollback, ms": seconds["with"] / measure.LOOP * 1e3,
                    "ratio": seconds["with"] / seconds["without"],
                    "state, MB": state / 1e6,
                    "kept in the round, MB": kept / 1e6,
                    "a state per place, MB": width * state / 1e6,
                }
            )
    return print_table("The target's pass with and without rollback", rows)


def sizes(model: specjax.LanguageModel, rows: int, width: int) -> tuple[int, int]:
    """Returns the bytes of the states of all recurrent layers, and of what a pass over ``width`` places adds to them.

    What a pass adds is kept until it is known which places stay.
    """
    before = jax.eval_shape(lambda: model.init_cache(rows, 512))
    start_b = jnp.zeros((rows,), jnp.int32)
    feed = specjax.Feed(jnp.zeros((rows, width), jnp.int32), start_b, start_b + width)
    after = jax.eval_shape(model.forward, model.params, feed, before).cache
    pairs = [pair for pair in zip(before.layers, after.layers, strict=True) if measure.is_recurrent(*pair)]
    state, later = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in zip(*pairs, strict=True))
    return state, later - state
