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
    """Returns the layer's arrays with ``new`` ``[b, k, t, h]`` written from ``start_b`` on; ``new`` if it has none."""
    if stored is None:
        return new
    return tuple(write(old, block, start_b) for old, block in zip(stored, new, strict=True))


def write(cache_bksh: Array, new_bkth: Array, start_b: Array) -> Array:
    """Returns the cache with t slots of row i written from slot ``start_b[i]`` on.

    The caller guarantees ``start_b + t <= s``. Otherwise ``dynamic_update_slice`` silently shifts the write onto good
    slots: with s = 10 and t = 4 a write from slot 8 lands on slots 6 to 9.
    """
    new_bkth = new_bkth.astype(cache_bksh.dtype)
    zero = jnp.zeros((), start_b.dtype)
    # One update per row: XLA does each in place, while a vmapped update becomes a scatter with a loop of its own.
    for row in range(cache_bksh.shape[0]):
        index = (jnp.full((), row, start_b.dtype), zero, start_b[row], zero)
        cache_bksh = lax.dynamic_update_slice(cache_bksh, new_bkth[row : row + 1], index)
    return cache_bksh
