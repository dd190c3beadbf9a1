"""Embeddings of each token for each layer (Gemma 3n, Gemma 4): a second table, from which each layer gets an entry.

p is the width of one token's embedding for one layer.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.transformer.config import Activation, DecoderConfig, PerLayerConfig
from specjax.transformer.layers import ACTIVATIONS, Embedding, Linear, make_norm


class PerLayerEmbedding(nnx.Module):
    """Makes the embeddings of all layers from the tokens, and from the tokens' embeddings for the first layer."""

    def __init__(self, config: DecoderConfig, sizes: PerLayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.width, packed = sizes.width, config.num_hidden_layers * sizes.width
        self.embed_tokens = Embedding(sizes.vocab_size, packed, dtype, rngs)
        self.projection = Linear(config.hidden_size, packed, False, dtype, rngs, ("embed", None))
        self.norm = make_norm(config, sizes.width, dtype)

    def __call__(self, tokens_bt: Array, embedded_btd: Array) -> Array:
        """Returns ``[b, t, layers, p]``.

        Args:
          tokens_bt: the tokens.
          embedded_btd: their embeddings as the first layer gets them.
        """
        shape = (*tokens_bt.shape, -1, self.width)
        dtype = embedded_btd.dtype
        token = self.embed_tokens(tokens_bt) * jnp.asarray(math.sqrt(self.width), dtype)
        context = self.projection(embedded_btd) * jnp.asarray(1 / math.sqrt(embedded_btd.shape[-1]), dtype)
        # Each summand has a mean square near 1, and so has the result.
        return (self.norm(context.reshape(shape)) + token.reshape(shape)) * jnp.asarray(math.sqrt(0.5), dtype)


class PerLayerBlock(nnx.Module):
    """Adds a layer's own embedding to the residual stream, gated by the stream."""

    def __init__(self, config: DecoderConfig, sizes: PerLayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.activation: Activation = config.activation
        self.input_gate = Linear(config.hidden_size, sizes.width, False, dtype, rngs, ("embed", None))
        self.projection = Linear(sizes.width, config.hidden_size, False, dtype, rngs, (None, "embed"))
        self.norm = make_norm(config, config.hidden_size, dtype)

    def __call__(self, x_btd: Array, own_btp: Array) -> Array:
        """Returns the residual stream ``[b, t, d]``; ``own_btp`` are the tokens' embeddings for this layer."""
        gated_btp = ACTIVATIONS[self.activation](self.input_gate(x_btd)) * own_btp
        return x_btd + self.norm(self.projection(gated_btp))
