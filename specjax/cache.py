"""A key/value cache of fixed shape, written at an offset of its own in each row."""

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

LayerCache = tuple[Array, ...]
"""What one layer keeps of each token, in arrays ``[b, k, s, h]``: its keys and values, or its latents."""


@struct.dataclass
class ChainCache:
    """What one layer of a draft head keeps of chains that start at every slot at once, for training it as it drafts.

    The chain that starts at slot s has one entry of each step behind it: that of step j at slot s + j.

    Attributes:
      steps: per step, arrays ``[b, k, t, h]``.
    """

    steps: tuple[LayerCache, ...] = ()


Stored = LayerCache | ChainCache


@struct.dataclass
class KVCache:
    """What all layers keep; slot equals position.

    Arrays of their own for each layer, not one stacked array: a layer reads and writes its own without slicing the
    others.

    Attributes:
      layers: per layer, arrays ``[b, k, s, h]``.
    """

    layers: tuple[Stored, ...]


def allocate(layers: int, rows: int, slots: int, kv_heads: int, widths: tuple[int, ...], dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache; each layer has one array for each of the ``widths`` h."""

    def layer() -> LayerCache:
        return tuple(jnp.zeros((rows, kv_heads, slots, width), dtype) for width in widths)

    return KVCache(tuple(layer() for _ in range(layers)))


def update(stored: LayerCache | None, new: LayerCache, start_b: Array) -> LayerCache:
    """Returns the layer's arrays with ``new`` ``[b, k, t, h]`` written from ``start_b`` on; ``new`` if it has none."""
    if stored is None:
        return new
    return tuple(write(old, block, start_b) for old, block in zip(stored, new, strict=True))


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
