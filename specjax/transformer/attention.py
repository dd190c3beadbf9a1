"""The attention of a layer: over keys and values of groups of heads, or over latents."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import Stored
from specjax.transformer.attend import attend_to_shared, store_and_attend
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.layers import Linear, RMSNorm, declare, make_norm, normal, rms, rotate
from specjax.types import Feed

LATENT_EPS = 1e-6  # of the norms of latents; the config's `norm_eps` holds for all other norms


def grown(query_bnth: Array, position_bt: Array, weight: float, step: int, first: int = 1) -> Array:
    """Returns queries times ``1 + weight log(1 + floor((p + first) / step))`` at position p: ``LayerConfig.growth``."""
    steps_bt = ((position_bt + first) // step).astype(jnp.float32)
    factor_b1t1 = (1 + weight * jnp.log1p(steps_bt))[:, None, :, None]
    return (query_bnth.astype(jnp.float32) * factor_b1t1).astype(query_bnth.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245).

    A layer that shares another layer's keys and values has queries only.

    ``inputs`` is the width of the states that come in. None: the width of the model.
    """

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs, inputs: int | None = None
    ):
        width, bias = config.hidden_size, config.attention_bias
        inputs = width if inputs is None else inputs
        self.n, self.k, self.h = config.num_attention_heads, config.kv_heads_of(layer), config.head_width_of(layer)
        self.scale = config.attention_scale or 1 / math.sqrt(self.h)
        # Without the number of the layer that is shared, layers that differ in it alone have one trace.
        self.layer = dataclasses.replace(layer, shares=None)
        self.cap, self.gated = config.attention_softcap, config.output_gate
        heads, kv_heads = ("heads", self.n), ("kv_heads", self.k)
        # With an output gate, each head's part of the query projection holds the query and then the gate.
        query_width = 2 * self.h if self.gated else self.h
        self.q_proj = Linear(inputs, self.n * query_width, bias, dtype, rngs, ("embed", heads))
        own, values = layer.shares is None, layer.shares is None and not layer.keys_as_values
        self.k_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads)) if own else None
        self.v_proj = Linear(inputs, self.k * self.h, bias, dtype, rngs, ("embed", kv_heads)) if values else None
        self.o_proj = Linear(self.n * self.h, width, config.output_bias, dtype, rngs, (heads, "embed"))

        def norm(count: int) -> Any:
            """Returns the norm of so many heads; a joint norm sees the entries of all heads at once."""
            widths = {"heads": self.h, "each_head": (count, self.h), "joint": count * self.h}
            return make_norm(config, widths[config.query_key_norm], dtype) if config.query_key_norm else None

        self.joint = config.query_key_norm == "joint"
        self.q_norm, self.k_norm = norm(self.n), norm(self.k) if own else None
        self.sinks = declare(jnp.zeros((self.n,), dtype), heads) if config.attention_sinks else None
        self.eps, self.normed_values = config.norm_eps, config.value_norm

    def __call__(
        self, x_btd: Array, feed: Feed, tables: tuple[Array, Array] | None, stored: Stored | None
    ) -> tuple[Array, Stored]:
        """Returns the output ``[b, t, d]`` and this layer's keys and values; () if it shares another layer's.

        Without ``stored`` the block attends to itself. A layer that shares gets the other layer's part of the cache.
        """
        b, t, _ = x_btd.shape

        def heads(x: Array, count: int, norm: Any = None) -> Array:
            if norm is not None:
                x = norm(x.reshape(b, t, -1, count * self.h if self.joint else self.h))
            return x.reshape(b, t, count, self.h).transpose(0, 2, 1, 3)

        # Norms come before the rotation, since the families' query-key norms are trained that way.
        interleaved = self.layer.rope is not None and self.layer.rope.interleaved
        query, gate = self.q_proj(x_btd), None
        if self.gated:
            query, gate = jnp.split(query.reshape(b, t, self.n, 2 * self.h), 2, axis=-1)
        query = rotate(heads(query, self.n, self.q_norm), tables, interleaved)
        if self.layer.unit_heads:
            query = self._unit(query)
        if self.layer.growth is not None:
            weight, step, *first = self.layer.growth
            query = grown(query, feed.position_bt, weight, step, *first)
        options = {"scale": self.scale, "window": self.layer.window, "chunk": self.layer.chunk, "cap": self.cap}
        options["sinks_n"] = None if self.sinks is None else self.sinks[...]
        if self.k_proj is None:
            out, stored = attend_to_shared(query, feed, stored, **options), ()
        else:
            keys = self.k_proj(x_btd)
            values = heads(keys if self.v_proj is None else self.v_proj(x_btd), self.k)
            keys = rotate(heads(keys, self.k, self.k_norm), tables, interleaved)
            new = (
                self._unit(keys) if self.layer.unit_heads else keys,
                self._unit(values) if self.normed_values else values,
            )
            out, stored = store_and_attend(query, new, feed, stored, **options)
        out = out.transpose(0, 2, 1, 3)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(b, t, self.n * self.h)), stored

    def _unit(self, x: Array) -> Array:
        """Returns each head's queries, keys or values over the root of their mean square."""
        return rms(x, self.eps).astype(x.dtype)


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
        options = {"scale": self.scale, "window": self.layer.window, "chunk": self.layer.chunk, "value_width": r}
        out, stored = store_and_attend(query, (keys,), feed, stored, **options)
        # The value projection comes after the sum over slots: once per query, not once per slot.
        out = jnp.einsum("bntr,nhr->btnh", out, self.v_up[...])
        return self.o_proj(out.reshape(b, t, self.n * latent.value_width)), stored
