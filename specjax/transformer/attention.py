"""Attention over a cache. The cost follows the tokens in use, not the slots that are allocated."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.cache import LayerCache, Stored, update
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.layers import Linear, RMSNorm, declare, make_norm, normal, rotate, softcap
from specjax.types import Feed

SMALLEST_WINDOW = 256
LATENT_EPS = 1e-6  # of the norms of latents; the config's `norm_eps` holds for all other norms


def attend(
    query_bnth: Array,
    keys_bksh: Array,
    values_bksh: Array | None,
    feed: Feed,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    value_width: int | None = None,
) -> Array:
    """Attends from each query to the slots up to its position.

    The n / k query heads that share a key head are folded into the query axis. So each key and value is read once, and
    there is one matrix product per row and key head.

    Args:
      query_bnth: floats, queries.
      keys_bksh: floats, keys.
      values_bksh: floats, values. None: the values are the first ``value_width`` entries of the keys.
      feed: the places of the queries. Outputs of places that are not real mean nothing, but are finite.
      scale: multiplies the products of queries and keys.
      window: how many slots a query sees, its own included; None for all. Example: with a window of 3 the query at
        slot 10 sees slots 8, 9 and 10.
      cap: soft cap of the scaled products, or None.
      value_width: see ``values_bksh``.

    Returns:
      ``[b, n, t, values' h]``. The result equals attention over all s slots. It is computed over the smallest of
      ``attention_windows`` that holds every real place, so the cost follows the longest row that does not rest.
    """
    b, n, t, h = query_bnth.shape
    k, slots = keys_bksh.shape[1:3]
    query = query_bnth.reshape(b, k, n // k * t, h) * jnp.asarray(scale, query_bnth.dtype)
    # Latents hold keys and values in one array, which is passed to the branches once.
    stored = (keys_bksh,) if values_bksh is None else (keys_bksh, values_bksh)
    # A place that is not real sees slot 0. Without any slot its softmax would be NaN, and the next layer would write
    # NaN into the cache.
    position_bt = jnp.where(feed.real_bt, feed.position_bt, 0)

    def over(used: int, query: Array, stored: tuple[Array, ...], position_bt: Array) -> Array:
        keys, values = stored[0][:, :, :used], stored[-1][:, :, :used, :value_width]
        scores = jnp.einsum("bkqh,bksh->bkqs", query, keys, preferred_element_type=jnp.float32)
        scores = softcap(scores, cap)
        slot_11s = jnp.arange(used, dtype=position_bt.dtype)[None, None]
        seen_bts = slot_11s <= position_bt[:, :, None]
        if window is not None:
            seen_bts &= slot_11s > position_bt[:, :, None] - window
        scores = scores.reshape(b, n, t, used)
        scores = jnp.where(seen_bts[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("bkqs,bksh->bkqh", weights.reshape(b, k, n // k * t, used), values)

    # One branch for each window, chosen on the device: the length of the text is not known when this compiles.
    windows = attention_windows(slots)
    needed = jnp.max(position_bt) + 1
    index = jnp.sum(needed > jnp.asarray(windows[:-1], needed.dtype))
    branches = [functools.partial(over, used) for used in windows]
    out = lax.switch(index, branches, query, stored, position_bt)
    return out.reshape(b, n, t, out.shape[-1])


def store_and_attend(
    query_bnth: Array, new: LayerCache, feed: Feed, stored: Stored | None, **options: Any
) -> tuple[Array, Stored]:
    """Stores a layer's new keys and values, and attends to all that are stored.

    Args:
      query_bnth: floats, queries.
      new: keys and values ``[b, k, t, h]`` of the feed's places, or keys alone that hold the values.
      feed: the places.
      stored: the layer's part of the cache. None: the places attend to each other.
      **options: keyword arguments of ``attend``.

    Returns:
      ``[b, n, t, values' h]``, and the layer's part of the cache with ``new``.
    """
    if stored is not None and not isinstance(stored, tuple):
        return stored.attend(query_bnth, new, **options)
    stored = update(stored, new, feed.start_b)
    keys, values = stored if len(stored) == 2 else (stored[0], None)
    return attend(query_bnth, keys, values, feed, **options), stored


def attention_windows(slots: int) -> tuple[int, ...]:
    """Returns the windows that are compiled: doubling from 256, the last one ``slots``.

    Examples: 1000 slots have 256, 512 and 1000; 100 slots have 50 and 100. A short cache has two windows as well,
    because XLA may copy a cache that a product reads outside of a branch of ``lax.switch``.
    """
    windows = []
    window = min(SMALLEST_WINDOW, max(slots // 2, 1))
    while window < slots:
        windows.append(window)
        window *= 2
    return (*windows, slots)


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245).

    ``inputs`` is the width of the states that come in. None: the width of the model.
    """

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs, inputs: int | None = None
    ):
        width, bias = config.hidden_size, config.attention_bias
        inputs = width if inputs is None else inputs
        self.n, self.k, self.h = config.num_attention_heads, config.kv_heads, config.head_width
        self.scale = config.attention_scale or 1 / math.sqrt(self.h)
        self.layer, self.cap, self.gated = layer, config.attention_softcap, config.output_gate
        heads, kv_heads = ("heads", self.n), ("kv_heads", self.k)
        # With an output gate, each head's part of the query projection holds the query and then the gate.
        query_width = 2 * self.h if self.gated else self.h
        self.q_proj = Linear(inputs, self.n * query_width, bias, dtype, rngs, ("embed", heads))
        self.k_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads))
        self.v_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads))
        self.o_proj = Linear(self.n * self.h, width, config.output_bias, dtype, rngs, (heads, "embed"))
        self.q_norm = make_norm(config, self.h, dtype) if config.query_key_norm else None
        self.k_norm = make_norm(config, self.h, dtype) if config.query_key_norm else None

    def __call__(
        self, x_btd: Array, feed: Feed, tables: tuple[Array, Array] | None, stored: Stored | None
    ) -> tuple[Array, Stored]:
        """Returns the output ``[b, t, d]`` and this layer's keys and values.

        Without ``stored`` the block attends to itself.
        """
        b, t, _ = x_btd.shape

        def heads(x: Array, count: int, norm: Any = None) -> Array:
            x = x.reshape(b, t, count, self.h)
            return (x if norm is None else norm(x)).transpose(0, 2, 1, 3)

        # Norms come before the rotation, since the families' query-key norms are trained that way.
        interleaved = self.layer.rope is not None and self.layer.rope.interleaved
        query, gate = self.q_proj(x_btd), None
        if self.gated:
            query, gate = jnp.split(query.reshape(b, t, self.n, 2 * self.h), 2, axis=-1)
        query = rotate(heads(query, self.n, self.q_norm), tables, interleaved)
        keys = rotate(heads(self.k_proj(x_btd), self.k, self.k_norm), tables, interleaved)
        new = keys, heads(self.v_proj(x_btd), self.k)
        options = {"scale": self.scale, "window": self.layer.window, "cap": self.cap}
        out, stored = store_and_attend(query, new, feed, stored, **options)
        out = out.transpose(0, 2, 1, 3)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(b, t, self.n * self.h)), stored


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

    The cache holds one latent and one rotary key per token, ``[b, 1, s, r + rotary]``. Keys and values are never
    made. Their projections from the latent are absorbed into the query and the output (section 2.1.2). So n query heads
    attend to one key head.
    """

    def __init__(self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        latent = config.latent
        assert latent is not None
        width, self.n, self.latent, self.layer = config.hidden_size, config.num_attention_heads, latent, layer
        head, heads = latent.plain_width + latent.rotary_width, ("heads", self.n)
        self.scale = config.attention_scale or 1 / math.sqrt(head)
        rank = latent.query_rank
        if rank is None:
            self.q_proj = Linear(width, self.n * head, False, dtype, rngs, ("embed", heads))
        else:
            self.q_a_proj = Linear(width, rank, config.attention_bias, dtype, rngs, ("embed", None))
            self.q_a_layernorm = RMSNorm(rank, LATENT_EPS, dtype)
            self.q_b_proj = Linear(rank, self.n * head, False, dtype, rngs, (None, heads))
        r = latent.key_value_rank
        self.kv_a_proj = Linear(width, r + latent.rotary_width, config.attention_bias, dtype, rngs, ("embed", None))
        self.kv_a_layernorm = RMSNorm(r, LATENT_EPS, dtype)
        self.k_up = declare(normal(rngs, (self.n, latent.plain_width, r), dtype), "heads", None, None)
        self.v_up = declare(normal(rngs, (self.n, latent.value_width, r), dtype), "heads", None, None)
        self.o_proj = Linear(self.n * latent.value_width, width, config.output_bias, dtype, rngs, (heads, "embed"))

    def __call__(
        self, x_btd: Array, feed: Feed, tables: tuple[Array, Array] | None, stored: Stored | None
    ) -> tuple[Array, Stored]:
        """Returns the output ``[b, t, d]`` and this layer's latents.

        Without ``stored`` the block attends to itself.
        """
        b, t, _ = x_btd.shape
        latent, r = self.latent, self.latent.key_value_rank
        interleaved = self.layer.rope is not None and self.layer.rope.interleaved
        query = (
            self.q_proj(x_btd) if latent.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_btd)))
        )
        # The key projection moves to the queries: n heads of r + rotary entries, as wide as one token of the cache.
        query = query.reshape(b, t, self.n, latent.plain_width + latent.rotary_width).transpose(0, 2, 1, 3)
        plain, rotary = query[..., : latent.plain_width], query[..., latent.plain_width :]
        absorbed = jnp.einsum("bnth,nhr->bntr", plain, self.k_up[...])
        query = jnp.concatenate([absorbed, rotate(rotary, tables, interleaved)], axis=-1)
        # One latent and one rotary key per token, for all heads. Only the latent is normed, only the key is rotated.
        compressed = self.kv_a_proj(x_btd)[:, None]
        shared = rotate(compressed[..., r:], tables, interleaved)
        keys = jnp.concatenate([self.kv_a_layernorm(compressed[..., :r]), shared], axis=-1)
        options = {"scale": self.scale, "window": self.layer.window, "value_width": r}
        out, stored = store_and_attend(query, (keys,), feed, stored, **options)
        # The value projection comes after the sum over slots: once per query, not once per slot.
        out = jnp.einsum("bntr,nhr->btnh", out, self.v_up[...])
        return self.o_proj(out.reshape(b, t, self.n * latent.value_width)), stored
