"""Compiles a tiny model for a TPU, whole and with its structure broken in one way at a time; run by test_aot.py.

Prints one JSON object: by mutation, the report of the program.
"""

import contextlib
import dataclasses
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import cache, sampling
from specjax.aot.programs import Setting
from specjax.aot.report import Limits, compile_program, report
from specjax.aot.topology import choose, prepare
from specjax.engine import programs
from specjax.engine import round as round_lib
from specjax.transformer.config import DecoderConfig

# The vocabulary is larger than what a promise lets a program sort.
TINY = DecoderConfig(2048, 256, 512, 1, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
MUTANTS = {}

most_likely, one_round, rounds = sampling.most_likely, round_lib.one_round, programs.run_rounds


def mutant(module, name):
    """Registers a function that stands in for ``module.name``; its own name is the mutation's."""

    def register(function):
        MUTANTS[function.__name__] = lambda: mock.patch.object(module, name, function)
        return function

    return register


@mutant(cache, "row_by_row")
def writes_by_vmap(stored, new, start_b, **_):
    write = jax.vmap(lambda old, block, at: lax.dynamic_update_slice(old, block, (0, at, 0)))
    return tuple(write(old, block, start_b) for old, block in zip(stored, new, strict=True))


@mutant(cache, "row_by_row")
def writes_by_select(stored, new, start_b, **_):
    place_bs = jnp.arange(stored[0].shape[2], dtype=jnp.int32)[None] - start_b[:, None]
    inside_bs = (place_bs >= 0) & (place_bs < new[0].shape[2])
    source_bs = jnp.clip(place_bs, 0, new[0].shape[2] - 1)

    def write(old_bksh, new_bkth):
        new_bksh = jnp.take_along_axis(new_bkth, source_bs[:, None, :, None], axis=2)
        return jnp.where(inside_bs[:, None, :, None], new_bksh, old_bksh)

    return tuple(map(write, stored, new))


@mutant(round_lib, "one_round")
def reverses_the_cache(target, state, drafter, verify, width):
    state = one_round(target, state, drafter, verify, width)
    return dataclasses.replace(state, cache=jax.tree.map(lambda x: jnp.flip(x, 2), state.cache))


@mutant(programs, "run_rounds")
def carries_one_array_for_two(target, state, drafter, limit, verify, blocks):
    def joined(state):
        pairs = tuple((jnp.concatenate(layer, axis=3),) for layer in state.cache.layers)
        return dataclasses.replace(state, cache=cache.KVCache(pairs))

    def parted(state):
        pairs = tuple(tuple(jnp.split(layer[0], 2, axis=3)) for layer in state.cache.layers)
        return dataclasses.replace(state, cache=cache.KVCache(pairs))

    def round_on_joined(target, state, drafter, verify, width):
        return joined(one_round(target, parted(state), drafter, verify, width))

    with mock.patch.object(round_lib, "one_round", round_on_joined):
        return parted(rounds(target, joined(state), drafter, limit, verify, blocks))


@mutant(programs, "run_rounds")
def loops_twice(target, state, drafter, limit, verify, blocks):
    half = rounds(target, state, drafter, jnp.int32(7), verify, False)
    return rounds(target, half, drafter, limit, verify, blocks)


@mutant(sampling, "most_likely")
def sorts(scores_xv):
    return jnp.argsort(scores_xv, axis=-1)[..., -1].astype(jnp.int32)


@mutant(sampling, "most_likely")
def computes_in_float64(scores_xv):
    with jax.enable_x64(True):
        return most_likely(lax.convert_element_type(scores_xv, np.float64)).astype(np.int32)


@mutant(sampling, "most_likely")
def asks_the_host(scores_xv):
    jax.debug.callback(lambda _: None, scores_xv[..., 0])
    return most_likely(scores_xv)


@mutant(sampling, "most_likely")
def loops_for_long(scores_xv):
    scaled = lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x * jnp.float32(0.5), scores_xv)
    return most_likely(scaled)


def rolls_the_vocabulary(scores_xv):
    return most_likely(jnp.roll(scores_xv, 1, axis=-1))


def run(setting):
    return report(setting, compile_program(setting), Limits())


def main(names):
    topology = choose("v5e:2x2")
    prepare(topology)
    setting = Setting(TINY, topology, drafter="ngram", rows=2, slots=1024, num_draft=2)
    several = dataclasses.replace(setting, tensor=4)
    made = {}
    for name in names or ["none", *MUTANTS, "none on four", "rolls_the_vocabulary"]:
        changed = contextlib.nullcontext if name.startswith("none") else MUTANTS.get(name)
        if name == "rolls_the_vocabulary":
            changed = lambda: mock.patch.object(sampling, "most_likely", rolls_the_vocabulary)
        jax.clear_caches()
        with changed():
            try:
                made[name] = run(several if name in ("none on four", "rolls_the_vocabulary") else setting)
            except Exception as error:  # the test shows it
                made[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(name, made[name].get("compile_seconds"), file=sys.stderr, flush=True)
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1:])
