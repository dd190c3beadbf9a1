"""Rows of different lengths in one array, right-padded: read and written at each row's own place."""

import jax.numpy as jnp
from jax import Array


def text_at(tokens_bs: Array, start_b: Array, width: int) -> Array:
    """Returns ``width`` tokens of each row from ``start_b`` on; outside of the slots, the nearest slot's token."""
    at_bt = start_b[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.take_along_axis(tokens_bs, jnp.clip(at_bt, 0, tokens_bs.shape[1] - 1), axis=1)


def append(array_bs: Array, length_b: Array, new_bt: Array, count_b: Array) -> Array:
    """Writes ``count_b`` entries past each row's end; all other slots keep what they hold.

    Entries may have further dimensions: ``array_bs`` is ``[b, s, ..]`` and ``new_bt`` ``[b, t, ..]``.
    """
    place_bs = jnp.arange(array_bs.shape[1], dtype=jnp.int32)[None] - length_b[:, None]
    source_bs = jnp.clip(place_bs, 0, new_bt.shape[1] - 1)
    written_bs = (place_bs >= 0) & (place_bs < count_b[:, None])
    shape = (*place_bs.shape, *(1 for _ in array_bs.shape[2:]))
    new_bs = jnp.take_along_axis(new_bt, source_bs.reshape(shape), axis=1)
    return jnp.where(written_bs.reshape(shape), new_bs, array_bs)
