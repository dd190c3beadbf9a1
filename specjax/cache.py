"""A key/value cache of fixed shape, written from a different slot in each row."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from specjax.platforms import by_platform

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
        chunk: int | None = None,
        cap: float | None = None,
        value_width: int | None = None,
        sinks_n: Array | None = None,
    ) -> tuple[Array, "AttendingCache"]:
        """Returns the output and the cache with ``new``; see ``specjax.transformer.attend.store_and_attend``."""
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
      layers: for each layer, arrays ``[b, k, s, h]``, or () if it shares those of another layer; for a recurrent layer
        its state, a pytree with rows first.
    """

    layers: tuple[Any, ...]


def allocate(rows: int, slots: int, kv_heads: int, widths: tuple[int, ...], dtype: jnp.dtype) -> LayerCache:
    """Returns a layer's empty cache: one array ``[rows, kv_heads, slots, h]`` for each h in ``widths``."""
    return tuple(jnp.zeros((rows, kv_heads, slots, width), dtype) for width in widths)


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
    on_tpu = functools.partial(row_by_row, constrain=_unpadded)
    on_cpu = as_integers if any(array.dtype == jnp.bfloat16 for array in stored) else row_by_row
    return by_platform(stored, new, start_b, cuda=scattered, rocm=scattered, tpu=on_tpu, cpu=on_cpu, default=row_by_row)


def gather_slots(stored: LayerCache, start_b: Array, path_bt: Array, places: int) -> LayerCache:
    """Returns the layer's arrays with the entries of slots ``start_b[i] + path_bt[i, j]`` moved to ``start_b[i] + j``.

    Args:
      stored: arrays ``[b, k, s, h]``.
      start_b: int32.
      path_bt: int32, 0 to ``places`` - 1.
      places: how many places a pass over the tree has. The caller guarantees that slots for all of them exist.
    """
    # On a TPU a gather from the whole cache would copy and pad the cache.
    ways = {"tpu": functools.partial(_moved, places=places), "default": _taken}
    return by_platform(stored, start_b, path_bt, **ways)


def _taken(stored: LayerCache, start_b: Array, path_bt: Array) -> LayerCache:
    slot_b1t1 = (start_b[:, None] + path_bt)[:, None, :, None]
    return update(stored, tuple(jnp.take_along_axis(array, slot_b1t1, axis=2) for array in stored), start_b)


def _moved(stored: LayerCache, start_b: Array, path_bt: Array, places: int) -> LayerCache:
    # The places of the pass are a slice of each row, from which the path is taken.
    def read(row: int | Array, array: Array) -> Array:
        begin = lax.dynamic_index_in_dim(start_b, row, keepdims=False)
        zero = jnp.zeros((), begin.dtype)
        index = (jnp.asarray(row, begin.dtype), zero, begin, zero)
        return lax.dynamic_slice(array, index, (1, array.shape[1], places, array.shape[3]))[0]

    rows = start_b.shape[0]

    def block(array: Array) -> Array:
        if rows > MOST_UNROLLED_ROWS:
            return lax.map(lambda row: read(row, array), jnp.arange(rows, dtype=jnp.int32))
        return jnp.stack([read(row, array) for row in range(rows)])

    place_b1t1 = path_bt[:, None, :, None]
    stored = tuple(map(_unpadded, stored))
    path = tuple(jnp.take_along_axis(block(array), place_b1t1, axis=2) for array in stored)
    return tuple(map(_unpadded, update(stored, path, start_b)))


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


def as_integers(stored: LayerCache, new: LayerCache, start_b: Array) -> LayerCache:
    """Writes bfloat16 as integers of 16 bits. Arguments and result are those of ``update``.

    XLA:CPU would convert the whole cache to float32 and back for each row. Bits are copied once for all rows.
    """
    stored, new = (tuple(lax.bitcast_convert_type(x, jnp.uint16) for x in arrays) for arrays in (stored, new))
    written = row_by_row(stored, new, start_b, unrolled=1)
    return tuple(lax.bitcast_convert_type(x, jnp.bfloat16) for x in written)


def row_by_row(
    stored: LayerCache,
    new: LayerCache,
    start_b: Array,
    constrain: Callable[[Array], Array] = lambda array: array,
    unrolled: int = MOST_UNROLLED_ROWS,
) -> LayerCache:
    """Writes one row after another; XLA does each update in place.

    ``constrain`` is applied to the arrays that a loop carries. Up to ``unrolled`` rows are written without a loop.
    """
    rows, zero = start_b.shape[0], jnp.zeros((), start_b.dtype)
    # Flat rows have one layout. XLA:TPU (libtpu 0.0.42) fails where a loop copies what it reads into another layout.
    shapes = [(1, *block.shape[1:]) for block in new]
    flat = [block.reshape(rows, -1) for block in new]

    def write(row: int | Array, stored: LayerCache) -> LayerCache:
        index = (jnp.asarray(row, start_b.dtype), zero, lax.dynamic_index_in_dim(start_b, row, keepdims=False), zero)
        blocks = [lax.dynamic_index_in_dim(x, row).reshape(shape) for x, shape in zip(flat, shapes, strict=True)]
        return tuple(lax.dynamic_update_slice(old, block, index) for old, block in zip(stored, blocks, strict=True))

    def write_in_loop(row: Array, stored: LayerCache) -> LayerCache:
        return tuple(map(constrain, write(row, tuple(map(constrain, stored)))))

    if rows > unrolled:
        return lax.fori_loop(0, rows, write_in_loop, stored)
    for row in range(rows):
        stored = write(row, stored)
    return stored


def _unpadded(array_bksh: Array) -> Array:
    """Asks a TPU for the layout that it gives to caches outside of a loop.

    Tiles are 128 wide. With heads of 64 entries in them, half of each would be padding, and the cache would be copied
    into that layout and back in every round. So slots are in the tiles' width unless a head fills it.
    """
    slots_last = (0, 1, 3, 2)
    return with_layout_constraint(array_bksh, Layout((0, 1, 2, 3) if array_bksh.shape[-1] % 128 == 0 else slots_last))
