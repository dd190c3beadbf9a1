"""Measures a round's recurrences and their rollback: states that are rebuilt, against a state kept for each place.

Run ``python tests/rollback_cost.py``. The sizes are those of gated DeltaNet in Qwen3-Next, without projections.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from specjax.transformer.recurrent import Places, RecurrentPass, recur

K, R, E, H = 16, 2, 128, 128  # key heads, value heads for each, widths of keys and values
LAYERS, RUNS = 12, 21


def rebuilt(states, places, kept_b):
    """As the decoder does: writes of each place are kept, and the states are computed of those that stay."""
    outs, after = [], []
    for state in states:
        out, writes = recur(state, places)
        done = RecurrentPass(state, places.keys_bkte, writes, places.decay_bktr, ())
        outs.append(out)
        after.append(done.keep(kept_b).state_bkerh)
    return outs, after


def stored(states, places, kept_b):
    """Token by token, with the state after each place; then one of these is picked."""

    def step(state, place):
        query, key, value, decay, rate = place
        state = state * jnp.exp(decay)[:, :, None, :, None]
        write = rate[..., None] * (value - jnp.einsum("bke,bkerh->bkrh", key, state))
        state = state + key[..., None, None] * write[:, :, None]
        return state, (jnp.einsum("bke,bkerh->bkrh", query, state), state)

    outs, after = [], []
    for state in states:
        _, (out, every) = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), places))
        every = jnp.concatenate([state[None], every])
        outs.append(jnp.moveaxis(out, 0, 2))
        after.append(every[kept_b, jnp.arange(len(kept_b))])
    return outs, after


def main():
    print("| rows | places | ms, rebuilt | ms, a state per place | ratio | kB kept, rebuilt | kB, a state per place |")
    print("|---|---|---|---|---|---|---|")
    for rows, width in ((1, 1), (1, 5), (1, 9), (4, 5)):
        keys = jax.random.split(jax.random.key(0), 6)
        unit = jax.random.normal(keys[0], (2, rows, K, width, E))
        query, key = unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)
        places = Places(
            query,
            key,
            jax.random.normal(keys[1], (rows, K, width, R, H)),
            -jax.random.uniform(keys[2], (rows, K, width, R)),
            jax.random.uniform(keys[3], (rows, K, width, R)),
        )
        states = tuple(jax.random.normal(k, (rows, K, E, R, H)) for k in jax.random.split(keys[4], LAYERS))
        kept_b = jnp.full((rows,), (width + 1) // 2, jnp.int32)
        ways = {way: jax.jit(way) for way in (rebuilt, stored)}
        found = {way: jax.block_until_ready(ways[way](states, places, kept_b)) for way in ways}
        for ours, theirs in zip(*map(jax.tree.leaves, found.values()), strict=True):
            assert jnp.allclose(ours, theirs, atol=1e-4), jnp.abs(ours - theirs).max()
        times = {way: [] for way in ways}
        for _ in range(RUNS):
            for way, run in ways.items():
                start = time.perf_counter()
                jax.block_until_ready(run(states, places, kept_b))
                times[way].append(1e3 * (time.perf_counter() - start) / LAYERS)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        ms = [statistics.median(one) for one in times.values()]
        place = 4 * (K * E + K * R * H + K * R) * width * rows / 1e3
        every = 4 * K * R * E * H * (width + 1) * rows / 1e3
        print(f"| {rows} | {width} | {ms[0]:.2f} | {ms[1]:.2f} | {ratio:.2f} | {place:.0f} | {every:.0f} |", flush=True)


if __name__ == "__main__":
    main()
