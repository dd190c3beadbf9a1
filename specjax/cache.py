"""A key/value cache of fixed shape, written at an offset of its own in each row."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax


@struct.dataclass
class KVCache:
    """Keys and values of all layers; slot equals position.

    One array per layer, not one stacked array: a layer reads and writes its own without slicing the others.

    Attributes:
      keys: per layer ``[b, k, s, h]``.
      values: per layer ``[b, k, s, h]``.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def allocate(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache."""
    shape = (rows, kv_heads, slots, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
    )


def write(cache_bksh: Array, new_bkth: Array, start_b: Array) -> Array:
    """Writes t slots of each row from ``start_b[i]`` on.

    The caller guarantees ``start_b + t <= s``: ``dynamic_update_slice`` would silently shift a write that does not
    fit onto good slots. One update per row, since XLA keeps each in place, while a vmapped update becomes a scatter
    with a loop of its own.
    """
    new_bkth = new_bkth.astype(cache_bksh.dtype)
    zero = jnp.zeros((), start_b.dtype)
    for row in range(cache_bksh.shape[0]):
        index = (jnp.full((), row, start_b.dtype), zero, start_b[row], zero)
        cache_bksh = lax.dynamic_update_slice(cache_bksh, new_bkth[row : row + 1], index)
    return cache_bksh


def grow(cache: KVCache, slots: int) -> KVCache:
    """Returns the cache with ``slots`` slots, the new ones empty; ``slots`` must not be less than it has."""
    have = cache.keys[0].shape[2]
    if slots < have:
        raise ValueError(f"cannot shrink a cache from {have} to {slots} slots; ask for at least {have}")
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - have), (0, 0))), cache)
