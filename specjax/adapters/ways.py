"""How rows at different places go through a model whose cache has one write index."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax import cache as kv
from specjax.adapters.called import Caller
from specjax.adapters.layout import Leaf
from specjax.types import Feed

Passed = tuple[Array, tuple[Array, ...], dict[int, Array]]
"""Logits ``[b, t, v]``, the cache as specjax keeps it, and hidden states ``[b, t, d]`` by index."""

SCRATCH = 16
"""Scratch slots of each row. A wider pass, such as one over a prompt, adds slots for its own time."""


def mapped(call: Caller, params: Any, feed: Feed, kept: tuple[Array, ...]) -> Passed:
    """Maps the model over rows: each is a batch of one, with a write index of its own."""

    if feed.tokens_bt.shape[0] == 1:  # a mapped write is a scatter, for which XLA copies the cache on a CPU
        return indexed(call, params, feed, kept)

    def row(tokens_t: Array, position_t: Array, start: Array, kept: tuple[Array, ...]) -> Passed:
        single = jax.tree.map(lambda x: x[None], (tokens_t, position_t, start, kept))
        return jax.tree.map(lambda x: x[0], indexed_at(call, params, *single))

    return jax.vmap(row)(feed.tokens_bt, feed.position_bt, feed.start_b, kept)


def indexed(call: Caller, params: Any, feed: Feed, kept: tuple[Array, ...]) -> Passed:
    """Calls a model whose cache has a write index for each row."""
    return indexed_at(call, params, feed.tokens_bt, feed.position_bt, feed.start_b, kept)


def indexed_at(
    call: Caller, params: Any, tokens_bt: Array, position_bt: Array, start_b: Array, kept: tuple[Array, ...]
) -> Passed:
    """Calls the model with slot equal to position."""
    slot_11s = jnp.arange(_slots(call, kept), dtype=jnp.int32)[None, None]
    return call(params, tokens_bt, position_bt, slot_11s <= position_bt[:, :, None], kept, start_b)


def scratch(call: Caller, params: Any, feed: Feed, kept: tuple[Array, ...]) -> Passed:
    """Lets all rows write at the same scratch slots, past every row, and moves what was written to each row's place.

    Example: a cache has 128 slots and 16 scratch slots, and rows of 10 and 20 tokens are fed 4 places. The model writes
    at slots 128 to 131 of both rows. Then the slots move to 10 to 13 and to 20 to 23.
    """
    width, leaves = feed.tokens_bt.shape[1], call.layout.kept_leaves
    at, more = _slots(call, kept) - SCRATCH, max(width - SCRATCH, 0)
    wide = tuple(_padded(x, leaf.slots_kept, more) for leaf, x in zip(leaves, kept, strict=True))
    # A place sees its row's slots before the pass, and the scratch slots up to its own.
    slot_11s = jnp.arange(at + SCRATCH + more, dtype=jnp.int32)[None, None]
    place_1t1 = jnp.arange(width, dtype=jnp.int32)[None, :, None]
    seen_bts = (slot_11s < feed.start_b[:, None, None]) | ((slot_11s >= at) & (slot_11s <= at + place_1t1))
    index_b = jnp.full_like(feed.start_b, at)
    logits_btv, written, states = call(params, feed.tokens_bt, feed.position_bt, seen_bts, wide, index_b)
    move = functools.partial(_moved, at=at, feed=feed)
    return logits_btv, tuple(map(move, leaves, kept, written)), states


def _slots(call: Caller, kept: tuple[Array, ...]) -> int:
    return kept[0].shape[call.layout.kept_leaves[0].slots_kept]


def _padded(array: Array, axis: int, more: int) -> Array:
    if not more:
        return array
    return jnp.pad(array, [(0, more if each == axis else 0) for each in range(array.ndim)])


def _moved(leaf: Leaf, array: Array, written: Array, at: int, feed: Feed) -> Array:
    """Returns the array with what was written at scratch slots written at each row's place."""
    axis = leaf.slots_kept
    new = lax.slice_in_dim(written, at, at + feed.tokens_bt.shape[1], axis=axis)
    (moved,) = kv.update((_flat(array, axis),), (_flat(new, axis),), feed.start_b)
    return moved.reshape(array.shape)


def _flat(array: Array, axis: int) -> Array:
    """Returns the array as ``[b, k, s, h]``."""
    shape = array.shape
    before, after = 1, 1
    for size in shape[1:axis]:
        before *= size
    for size in shape[axis + 1 :]:
        after *= size
    return array.reshape(shape[0], before, shape[axis], after)
