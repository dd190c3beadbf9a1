"""Attention over a cache whose allocated length is not what it costs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.cache import ChainCache, Stored, update
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.layers import Linear, RMSNorm, declare, make_norm, normal, rotate, softcap
from specjax.types import Feed

SMALLEST_WINDOW = 256
LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


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
    the product is one matrix product per row and key head.

    Args:
      query_bnth: queries.
      keys_bksh: keys.
      values_bksh: values; None means the first ``value_width`` entries of the keys.
      feed: the places of the queries. What is returned for places that are not real means nothing, but is finite.
      scale: multiplies the products.
      window: how many slots a query sees, its own included; None for all.
      cap: soft cap of the scaled products, or None.
      value_width: see ``values_bksh``.

    Returns:
      ``[b, n, t, values' h]``. Equal to attention over all s slots, but computed over the smallest window of slots
      that holds every real place. So the cost follows the longest row that does not rest.
    """
    b, n, t, h = query_bnth.shape
    k, slots = keys_bksh.shape[1:3]
    query = query_bnth.reshape(b, k, n // k * t, h) * jnp.asarray(scale, query_bnth.dtype)
    stored = (keys_bksh,) if values_bksh is None else (keys_bksh, values_bksh)
    # A place that is not real sees slot 0: with none at all its softmax would be NaN, and the cache would keep that.
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

    windows = attention_windows(slots)
    needed = jnp.max(position_bt) + 1
    index = jnp.sum(needed > jnp.asarray(windows[:-1], needed.dtype))
    branches = [functools.partial(over, used) for used in windows]
    out = lax.switch(index, branches, query, stored, position_bt)
    return out.reshape(b, n, t, out.shape[-1])


def attend_along_chains(
    query_bnth: Array,
    cache: ChainCache,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    value_width: int | None = None,
) -> Array:
    """Attends from the last step of the chains that started at each slot (EAGLE-3's training-time test).

    The query at slot i is step j of the chain that started at slot i - j: it sees the true slots up to i - j, and of
    each later step of its chain the one slot that is its own. Slots below j start no chain; what is returned for them
    means nothing.

    Args:
      query_bnth: queries of the last step, one for each slot.
      cache: of all steps, the last one included.
      scale: as for ``attend``, and so the rest; a step without values has them in its keys.

    Returns:
      ``[b, n, t, values' h]``.
    """
    b, n, t, h = query_bnth.shape
    (true_keys, true_values), *chain = ((step[0], step[-1][..., :value_width]) for step in cache.steps)
    k, j = true_keys.shape[1], len(chain)
    query = query_bnth.reshape(b, k, n // k, t, h) * jnp.asarray(scale, query_bnth.dtype)
    slot_t = jnp.arange(t, dtype=jnp.int32)
    seen_ts = slot_t[None, :] <= slot_t[:, None] - j
    if window is not None:
        seen_ts &= slot_t[None, :] > slot_t[:, None] - window
    scores = softcap(jnp.einsum("bkqth,bksh->bkqts", query, true_keys, preferred_element_type=jnp.float32), cap)
    scores = [jnp.where(seen_ts[None, None, None], scores, -jnp.inf)]
    own = [(_shifted(keys, j - m), _shifted(values, j - m)) for m, (keys, values) in enumerate(chain, 1)]
    for keys, _ in own:
        score = jnp.einsum("bkqth,bkth->bkqt", query, keys, preferred_element_type=jnp.float32)
        scores.append(softcap(score, cap)[..., None])
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(true_values.dtype)
    out = jnp.einsum("bkqts,bksh->bkqth", weights[..., :t], true_values)
    for m, (_, values) in enumerate(own):
        out = out + weights[..., t + m, None] * values[:, :, None]
    return out.reshape(b, n, t, out.shape[-1])


def _shifted(x_bkth: Array, slots: int) -> Array:
    """Returns the entries of earlier slots, ``slots`` before each; zeros where there is none."""
    return jnp.pad(x_bkth, ((0, 0), (0, 0), (slots, 0), (0, 0)))[:, :, : x_bkth.shape[2]]


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
    """Grouped-query self-attention (Ainslie et al. 2023) of states that are ``inputs`` wide; None: as the model."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs, inputs: int | None = None
    ):
        width, bias = config.hidden_size, config.attention_bias
        inputs = width if inputs is None else inputs
        self.n, self.k, self.h = config.num_attention_heads, config.kv_heads, config.head_width
        self.scale = config.attention_scale or 1 / math.sqrt(self.h)
        self.layer, self.cap, self.gated = layer, config.attention_softcap, config.output_gate
        heads, kv_heads = ("heads", self.n), ("kv_heads", self.k)
        self.q_proj = Linear(inputs, self.n * self.h * (2 if self.gated else 1), bias, dtype, rngs, ("embed", heads))
        self.k_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads))
        self.v_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads))
        self.o_proj = Linear(self.n * self.h, width, config.output_bias, dtype, rngs, (heads, "embed"))
        self.q_norm = make_norm(config, self.h, dtype) if config.query_key_norm else None
        self.k_norm = make_norm(config, self.h, dtype) if config.query_key_norm else None

    def __call__(
        self, x_btd: Array, feed: Feed, tables: tuple[Array, Array] | None, stored: Stored | None
    ) -> tuple[Array, Stored]:
        """Returns the output and this layer's keys and values; without ``stored`` the block attends to itself."""
        b, t, _ = x_btd.shape

        def heads(x: Array, count: int, norm: Any = None) -> Array:
            x = x.reshape(b, t, count, self.h)
            return (x if norm is None else norm(x)).transpose(0, 2, 1, 3)

        interleaved = self.layer.rope is not None and self.layer.rope.interleaved
        query, gate = self.q_proj(x_btd), None
        if self.gated:
            query, gate = jnp.split(query.reshape(b, t, self.n, 2 * self.h), 2, axis=-1)
        query = rotate(heads(query, self.n, self.q_norm), tables, interleaved)
        keys = rotate(heads(self.k_proj(x_btd), self.k, self.k_norm), tables, interleaved)
        values, options = heads(self.v_proj(x_btd), self.k), {"scale": self.scale, "window": self.layer.window}
        if isinstance(stored, ChainCache):
            stored = ChainCache((*stored.steps, (keys, values)))
            out = attend_along_chains(query, stored, cap=self.cap, **options)
        else:
            keys, values = stored = update(stored, (keys, values), feed.start_b)
            out = attend(query, keys, values, feed, cap=self.cap, **options)
        out = out.transpose(0, 2, 1, 3)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(b, t, self.n * self.h)), stored


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

    The cache holds one latent and one rotary key per token, ``[b, 1, s, r + rotary]``. Keys and values are never
    made: their projections from the latent are absorbed into the query and the output (section 2.1.2), which makes
    attention that of n query heads on one key head.
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
        """Returns the output and this layer's latents; without ``stored`` the block attends to itself."""
        b, t, _ = x_btd.shape
        latent, r = self.latent, self.latent.key_value_rank
        interleaved = self.layer.rope is not None and self.layer.rope.interleaved
        query = (
            self.q_proj(x_btd) if latent.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_btd)))
        )
        query = query.reshape(b, t, self.n, latent.plain_width + latent.rotary_width).transpose(0, 2, 1, 3)
        plain, rotary = query[..., : latent.plain_width], query[..., latent.plain_width :]
        absorbed = jnp.einsum("bnth,nhr->bntr", plain, self.k_up[...])
        query = jnp.concatenate([absorbed, rotate(rotary, tables, interleaved)], axis=-1)
        compressed = self.kv_a_proj(x_btd)[:, None]
        shared = rotate(compressed[..., r:], tables, interleaved)
        keys = jnp.concatenate([self.kv_a_layernorm(compressed[..., :r]), shared], axis=-1)
        options = {"scale": self.scale, "window": self.layer.window, "value_width": r}
        if isinstance(stored, ChainCache):
            stored = ChainCache((*stored.steps, (keys,)))
            out = attend_along_chains(query, stored, **options)
        else:
            stored = update(stored, (keys,), feed.start_b)
            out = attend(query, stored[0], None, feed, **options)
        out = jnp.einsum("bntr,nhr->btnh", out, self.v_up[...])
        return self.o_proj(out.reshape(b, t, self.n * latent.value_width)), stored
