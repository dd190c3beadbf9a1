"""A Llama-family decoder, as a flax module and as the pure functions that the engine takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import KVCache, allocate
from specjax.transformer.attention import Attention
from specjax.transformer.config import DecoderConfig
from specjax.transformer.layers import Embedding, GatedMLP, Linear, RMSNorm, rotary_tables
from specjax.types import Forward, InitCache, LanguageModel, Output


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(width, eps, dtype)
        self.mlp = GatedMLP(width, config.intermediate_size, config.mlp_bias, dtype, rngs)

    def __call__(self, x_btd, position_bt, tables, stored):
        attended, stored = self.self_attn(self.input_layernorm(x_btd), position_bt, tables, stored)
        x_btd = x_btd + attended
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), stored


class Decoder(nnx.Module):
    """The model. Layers are unrolled: a scan would copy each layer's weights and cache out of a stack."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype, rngs)

    def __call__(
        self, tokens_bt: Array, start_b: Array, cache: KVCache | None, capture: tuple[int, ...] = ()
    ) -> tuple[Array, tuple[Array, ...], KVCache]:
        """Returns float32 logits, the captured states and the cache; without a cache the block stands alone."""
        config = self.config
        position_bt = start_b[:, None] + jnp.arange(tokens_bt.shape[1], dtype=start_b.dtype)[None]
        tables = rotary_tables(position_bt, config.head_width, config.rope_theta)
        x_btd = self.embed_tokens(tokens_bt)
        states, keys, values = [x_btd], [], []
        for i, layer in enumerate(self.layers):
            stored = None if cache is None else (cache.keys[i], cache.values[i])
            x_btd, (layer_keys, layer_values) = layer(x_btd, position_bt, tables, stored)
            states.append(x_btd)
            keys.append(layer_keys)
            values.append(layer_values)
        normed_btd = self.norm(x_btd)
        states.append(normed_btd)  # index -1
        head = self.embed_tokens.logits if config.tie_word_embeddings else self.lm_head
        logits_btv = head(normed_btd).astype(jnp.float32)
        return logits_btv, tuple(states[i] for i in capture), KVCache(tuple(keys), tuple(values))


def init_params(config: DecoderConfig, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns freshly drawn parameters as a nested dict of arrays; ``key`` is consumed."""
    _, state = nnx.split(Decoder(config, dtype, nnx.Rngs(params=key)))
    return nnx.to_pure_dict(state)


def abstract_params(config: DecoderConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns the parameters' shapes and dtypes without computing them."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


@functools.cache
def _graph(config: DecoderConfig, dtype: jnp.dtype):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0))))


def bind(config: DecoderConfig, params: Any) -> Decoder:
    """Returns the module over ``params``, for calls inside a traced function."""
    dtype = jax.tree.leaves(params)[0].dtype
    graph, state = _graph(config, dtype)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@functools.cache
def _functions(config: DecoderConfig, dtype: jnp.dtype) -> tuple[Forward, InitCache]:
    # Cached, so that two models of one architecture share their static functions and hence their compilations.
    def forward(params, tokens_bt, cache, start_b, capture=()):
        return Output(*bind(config, params)(tokens_bt, start_b, cache, capture))

    def init_cache(rows, slots):
        return allocate(config.num_hidden_layers, rows, slots, config.kv_heads, config.head_width, dtype)

    return forward, init_cache


def decoder_model(config: DecoderConfig, params: Any) -> LanguageModel:
    """Returns the decoder as a ``LanguageModel``; it computes in the dtype of ``params``."""
    forward, init_cache = _functions(config, jax.tree.leaves(params)[0].dtype)
    return LanguageModel(
        params=params,
        forward=forward,
        init_cache=init_cache,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )
