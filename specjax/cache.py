"""A key/value cache of fixed shape, written from a different slot in each row."""

from typing import Protocol

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

LayerCache = tuple[Array, ...]
"""One layer's arrays ``[b, k, s, h]``: keys and values, or latents."""


class AttendingCache(Protocol):
    """A layer's part of another kind of cache. It stores keys and values, and attends to them, in its own way."""

    def attend(
        self,
        query_bnth: Array,
        new: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        value_width: int | None = None,
    ) -> tuple[Array, "AttendingCache"]:
        """Returns the output and the cache with ``new``; see ``specjax.transformer.attention.store_and_attend``."""
        ...


Stored = LayerCache | AttendingCache

MOST_UNROLLED_ROWS = 16
"""Up to so many rows the updates of a cache are unrolled, which is fastest. More rows are written in a loop, so that
programs and compile times do not grow with the rows."""


@struct.dataclass
class KVCache:
    """The cache of all layers; slot equals position.

    Each layer has its own arrays, not a slice of one stacked array, so that reads and writes need no slicing.

    Attributes:
      layers: for each layer, arrays ``[b, k, s, h]``.
    """

    layers: tuple[Stored, ...]


def allocate(layers: int, rows: int, slots: int, kv_heads: int, widths: tuple[int, ...], dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache: per layer, one array ``[rows, kv_heads, slots, h]`` for each h in ``widths``."""

    def layer() -> LayerCache:
        return tuple(jnp.zeros((rows, kv_heads, slots, width), dtype) for width in widths)

    return KVCache(tuple(layer() for _ in range(layers)))


def update(stored: LayerCache | None, new: LayerCache, start_b: Array) -> LayerCache:
    """Returns the layer's arrays with ``new`` written from slot ``start_b[i]`` of row i on; ``new`` if it has none.

    The caller guarantees ``start_b + t <= s``. Otherwise ``dynamic_update_slice`` silently shifts the write onto good
    slots: with s = 10 and t = 4 a write from slot 8 lands on slots 6 to 9.

    Args:
      stored: arrays ``[b, k, s, h]``, or None.
      new: for each of them t entries per row, ``[b, k, t, h]``.
      start_b: int32.
    """
    if stored is None:
        return new
    new = tuple(block.astype(old.dtype) for old, block in zip(stored, new, strict=True))
    # On a GPU each update is a kernel, and a scatter is one kernel for all rows. On a TPU a scatter would copy and pad
    # the cache, and on a CPU it is a slow loop.
    return lax.platform_dependent(stored, new, start_b, cuda=scattered, rocm=scattered, default=row_by_row)


def scattered(stored: LayerCache, new: LayerCache, start_b: Array) -> LayerCache:
    """Writes all rows by one scatter per array. Arguments and result are those of ``update``, as of ``row_by_row``."""
    rows, _, width, _ = new[0].shape
    row_b1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    slot_bt = start_b[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    # The two indexed axes are apart, so the indexed array is [b, t, k, h].
    return tuple(
        old.at[row_b1, :, slot_bt].set(block.swapaxes(1, 2), mode="promise_in_bounds", unique_indices=True)
        for old, block in zip(stored, new, strict=True)
    )


def row_by_row(stored: LayerCache, new: LayerCache, start_b: Array) -> LayerCache:
    """Writes one row after another; XLA does each update in place."""
    zero = jnp.zeros((), start_b.dtype)

    def write(row: int | Array, stored: LayerCache) -> LayerCache:
        start = lax.dynamic_index_in_dim(start_b, row, keepdims=False)
        index = (jnp.asarray(row, start_b.dtype), zero, start, zero)
        blocks = (lax.dynamic_slice_in_dim(block, row, 1) for block in new)
        return tuple(lax.dynamic_update_slice(old, block, index) for old, block in zip(stored, blocks, strict=True))

    rows = start_b.shape[0]
    if rows > MOST_UNROLLED_ROWS:
        return lax.fori_loop(0, rows, write, stored)
    for row in range(rows):
        stored = write(row, stored)
    return stored
