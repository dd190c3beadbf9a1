"""Grouped-query attention over a cache whose allocated length is not what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.cache import write
from specjax.transformer.config import DecoderConfig
from specjax.transformer.layers import Linear, rotate

SMALLEST_WINDOW = 256


def attend(query_bnth: Array, keys_bksh: Array, values_bksh: Array, position_bt: Array) -> Array:
    """Attends from each query to the slots up to its position.

    The n / k query heads that share a key head are folded into the query axis, so that each key and value is read
    once and the product is one matrix product per row and key head.

    Returns:
      ``[b, n, t, h]``. Equal to attention over all s slots; computed over the smallest window of slots that holds
      every position, so the cost follows the longest row in use.
    """
    b, n, t, h = query_bnth.shape
    k, slots = keys_bksh.shape[1:3]
    query = query_bnth.reshape(b, k, n // k * t, h) * jnp.asarray(1 / math.sqrt(h), query_bnth.dtype)

    def over(window: int, query: Array, keys_bksh: Array, values_bksh: Array, position_bt: Array) -> Array:
        keys, values = keys_bksh[:, :, :window], values_bksh[:, :, :window]
        scores = jnp.einsum("bkqh,bksh->bkqs", query, keys, preferred_element_type=jnp.float32)
        seen_bts = jnp.arange(window, dtype=position_bt.dtype)[None, None] <= position_bt[:, :, None]
        scores = scores.reshape(b, n, t, window)
        scores = jnp.where(seen_bts[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("bkqs,bksh->bkqh", weights.reshape(b, k, n // k * t, window), values)

    windows = attention_windows(slots)
    needed = jnp.max(position_bt) + 1
    index = jnp.sum(needed > jnp.asarray(windows[:-1], needed.dtype))
    branches = [functools.partial(over, window) for window in windows]
    out = lax.switch(index, branches, query, keys_bksh, values_bksh, position_bt)
    return out.reshape(b, n, t, h)


def attention_windows(slots: int) -> tuple[int, ...]:
    """Returns the compiled windows: doubling from 256, the last one ``slots``.

    A short cache has two as well: a product that reads the cache directly, not from a branch of ``lax.switch``, can
    make XLA copy it.
    """
    windows = []
    window = min(SMALLEST_WINDOW, max(slots // 2, 1))
    while window < slots:
        windows.append(window)
        window *= 2
    return (*windows, slots)


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.attention_bias
        self.n, self.k, self.h = config.num_attention_heads, config.kv_heads, config.head_width
        self.q_proj = Linear(width, self.n * self.h, bias, dtype, rngs)
        self.k_proj = Linear(width, self.k * self.h, bias, dtype, rngs)
        self.v_proj = Linear(width, self.k * self.h, bias, dtype, rngs)
        self.o_proj = Linear(self.n * self.h, width, bias, dtype, rngs)

    def __call__(
        self,
        x_btd: Array,
        position_bt: Array,
        tables: tuple[Array, Array],
        stored: tuple[Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Returns the output and this layer's keys and values; without ``stored`` the block attends to itself."""
        b, t, _ = x_btd.shape

        def heads(x: Array, count: int) -> Array:
            return x.reshape(b, t, count, self.h).transpose(0, 2, 1, 3)

        query = rotate(heads(self.q_proj(x_btd), self.n), tables)
        keys = rotate(heads(self.k_proj(x_btd), self.k), tables)
        values = heads(self.v_proj(x_btd), self.k)
        if stored is not None:
            start_b = position_bt[:, 0]
            keys, values = write(stored[0], keys, start_b), write(stored[1], values, start_b)
        out = attend(query, keys, values, position_bt)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(b, t, self.n * self.h)), (keys, values)
