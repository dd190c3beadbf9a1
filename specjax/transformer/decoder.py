"""A decoder, as a flax module and as the pure functions that the engine calls."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import KVCache, allocate, gather_slots
from specjax.transformer.attend import attention_form
from specjax.transformer.attention import Attention, LatentAttention
from specjax.transformer.config import EXTERNAL, DecoderConfig, DeltaConfig, LayerConfig
from specjax.transformer.delta import GatedDelta
from specjax.transformer.functional import Functional
from specjax.transformer.layers import (
    MLP,
    Embedding,
    Linear,
    Norm,
    make_norm,
    rotary_tables,
    scaled,
    softcap,
)
from specjax.transformer.mamba import Mamba
from specjax.transformer.moe import MoE, MoEBeside
from specjax.transformer.per_layer import PerLayerBlock, PerLayerEmbedding
from specjax.transformer.recurrent import RecurrentPass, empty_state
from specjax.types import CommitCache, EarlyExit, Feed, Forward, GatherCache, InitCache, LanguageModel, Output

LayerStored = Any
"""A layer's part of the cache: ``Stored``, or a ``RecurrentState`` and after a pass a ``RecurrentPass``; or None."""


class DecoderLayer(nnx.Module):
    """Attention, or a recurrence, and MLP, each added to the residual stream, with norms before or after them."""

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs, inputs: int | None = None
    ):
        """``inputs`` is the width of the states that ``Attention`` reads; None: the width of the model."""
        before, after = config.norm_places != "after", config.norm_places != "before"

        def norm(wanted: bool) -> Norm | None:
            return make_norm(config, config.hidden_size, dtype) if wanted else None

        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.input_layernorm = norm(before)
        attention = functools.partial(Attention, inputs=inputs) if config.latent is None else LatentAttention
        recurrence = GatedDelta if isinstance(config.recurrence, DeltaConfig) else Mamba
        self.self_attn: Any = None if layer.recurrent else attention(config, layer, dtype, rngs)
        self.recurrence: Any = recurrence(config, dtype, rngs) if layer.recurrent else None
        self.attention_post_norm = norm(after)
        self.post_attention_layernorm = norm(before and not config.parallel)
        beside = layer.experts and config.experts is not None and config.experts.beside
        mixed = layer.experts and not beside
        self.mlp = MoE(config, dtype, rngs) if mixed else MLP(config, config.mlp_width_of(layer), dtype, rngs)
        self.moe = MoEBeside(config, dtype, rngs) if beside else None
        self.mlp_post_norm = norm(after)
        self.per_layer = PerLayerBlock(config, config.per_layer, dtype, rngs) if config.per_layer else None
        self.scale = nnx.Param(jnp.ones((1,), dtype)) if config.layer_scale else None

    def __call__(
        self,
        x_btd: Array,
        feed: Feed,
        tables: tuple[Array, Array] | None,
        stored: LayerStored,
        own_btp: Array | None = None,
    ) -> tuple[Array, LayerStored]:
        """Returns the residual stream ``[b, t, d]`` after the layer, and the layer's part of the cache.

        Args:
          x_btd: the residual stream.
          feed: the places.
          tables: what ``rotary_tables`` returns for the layer's rope.
          stored: the layer's part of the cache, or that of the layer whose keys and values it shares. None: the layer
            attends within the feed.
          own_btp: the tokens' embeddings for this layer, if the decoder has such.
        """
        return _run_layer(*nnx.split(self), attention_form(), x_btd, feed, tables, stored, own_btp)

    def inline(
        self,
        x_btd: Array,
        feed: Feed,
        tables: tuple[Array, Array] | None,
        stored: LayerStored,
        own_btp: Array | None = None,
    ) -> tuple[Array, LayerStored]:
        """Does what a call does, in the caller's own trace."""
        normed_btd = _normed(self.input_layernorm, x_btd)
        if self.self_attn is not None:
            y_btd, stored = self.self_attn(normed_btd, feed, tables, stored)
        else:
            y_btd, stored = self.recurrence(normed_btd, feed, stored)
        return self.add(x_btd, normed_btd, y_btd, own_btp), stored

    def add(self, x_btd: Array, normed_btd: Array, y_btd: Array, own_btp: Array | None = None) -> Array:
        """Adds attention's output to the residual stream, and then the MLP's.

        Args:
          x_btd: the residual stream.
          normed_btd: what attention has read.
          y_btd: attention's output.
          own_btp: as for a call.
        """
        x_btd = x_btd + scaled(_normed(self.attention_post_norm, y_btd), self.residual_scale)
        normed_btd = normed_btd if self.parallel else _normed(self.post_attention_layernorm, x_btd)
        y_btd = self.mlp(normed_btd)
        y_btd = y_btd if self.moe is None else self.moe.add(x_btd, y_btd)
        x_btd = x_btd + scaled(_normed(self.mlp_post_norm, y_btd), self.residual_scale)
        if self.per_layer is not None:
            assert own_btp is not None
            x_btd = self.per_layer(x_btd, own_btp)
        return x_btd if self.scale is None else x_btd * jnp.broadcast_to(self.scale[...], x_btd.shape)


def _normed(norm: Norm | None, x: Array) -> Array:
    """Returns normed states, or the states themselves where a layer has no norm."""
    return x if norm is None else norm(x)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _run_layer(graph: Any, state: Any, form: str, *args: Any) -> tuple[Array, LayerStored]:
    """Runs a layer. It is jitted, so that layers that differ in their arrays alone share one trace."""
    del form  # only a part of the key under which jit keeps the trace
    return nnx.merge(graph, state).inline(*args)


RunLayer = Callable[..., tuple[Array, LayerStored]]
"""The type of ``DecoderLayer.__call__``."""


def run_layers(
    layers: Iterable[RunLayer],
    config: DecoderConfig,
    x_btd: Array,
    cache: KVCache | None,
    feed: Feed,
    own_btlp: Array | None = None,
) -> tuple[list[Array], KVCache]:
    """Runs layers over the places of a feed.

    Args:
      layers: all layers of the config, or the first few. The cache of layers that are left out stays as it is.
      config: describes the layers.
      x_btd: the residual stream before the first layer.
      cache: of all layers; None: each layer attends within the feed.
      feed: the places.
      own_btlp: the tokens' embeddings for each layer, if the decoder has such.

    Returns:
      The residual stream before the layers and after each of them, and the cache.
    """
    # Cosines and sines are computed once for each kind of rope, not once for each layer.
    position_bt = feed.position_bt
    ropes = dict.fromkeys(layer.rope for layer in config.each_layer)
    tables = {rope: rotary_tables(position_bt, rope) for rope in ropes}
    states, kept = [x_btd], []
    for i, layer in enumerate(layers):
        shares, own = config.each_layer[i].shares, () if own_btlp is None else (own_btlp[:, :, i],)
        stored = None if cache is None else cache.layers[i]
        if stored is None and config.each_layer[i].recurrent:
            stored = empty_state(config, x_btd.shape[0], x_btd.dtype)
        if shares == EXTERNAL:
            raise ValueError(f"layer {i} shares keys and values of another model, and must be run by the caller")
        stored = stored if shares is None else kept[shares]
        x_btd, stored = layer(x_btd, feed, tables[config.each_layer[i].rope], stored, *own)
        states.append(x_btd)
        kept.append(stored)
    untouched = () if cache is None else cache.layers[len(kept) :]
    return states, KVCache((*kept, *untouched))


class Decoder(nnx.Module):
    """The model. Layers are unrolled, because a scan would copy each layer's weights and cache out of a stack."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        layers: tuple[LayerConfig, ...] | None = None,
    ):
        """``layers`` are the layers to make; None: all layers of the config."""
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, rngs)
        if config.learned_positions:
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size, dtype, rngs, None)
        sizes = config.per_layer
        self.per_layer = None if sizes is None else PerLayerEmbedding(config, sizes, dtype, rngs)
        layers = config.each_layer if layers is None else layers
        self.layers = nnx.List([DecoderLayer(config, layer, dtype, rngs) for layer in layers])
        self.norm = make_norm(config, config.hidden_size, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, config.head_bias, dtype, rngs, ("embed", "vocab")
            )

    def __call__(
        self,
        feed: Feed,
        cache: KVCache | None,
        capture: tuple[int, ...] = (),
        depth: int | None = None,
    ) -> tuple[Array, tuple[Array, ...], KVCache]:
        """Runs one pass, as ``LanguageModel.forward`` says.

        Args:
          feed: the places.
          cache: of all layers. None: each layer attends within the feed.
          capture: hidden-state indices: 0 the embedding output, i the output of layer i, -1 the state after the final
            norm.
          depth: runs the first ``depth`` layers only; None for all.

        Returns:
          Float32 logits ``[b, t, v]``, one ``[b, t, d]`` state per captured index, and the cache.
        """
        config = self.config
        x_btd = self.embed(feed.tokens_bt)
        if config.learned_positions:
            last = config.max_position_embeddings - 1  # places that are not real may lie past the table
            x_btd = x_btd + self.embed_positions(jnp.minimum(feed.position_bt, last))
        own_btlp = None if self.per_layer is None else self.per_layer(feed.tokens_bt, x_btd)
        states, cache = run_layers(self.layers[:depth], config, x_btd, cache, feed, own_btlp)
        states.append(self.norm(states[-1]))  # index -1
        return self.unembed(states[-1]), tuple(states[i] for i in capture), cache

    def embed(self, tokens_bt: Array) -> Array:
        """Returns the tokens' embeddings ``[b, t, d]``, times the family's ``embedding_scale``."""
        x_btd = self.embed_tokens(tokens_bt)
        scale = self.config.embedding_scale
        return x_btd if scale == 1 else x_btd * jnp.asarray(scale, x_btd.dtype)

    def unembed(self, normed_btd: Array) -> Array:
        """Returns float32 logits ``[b, t, v]`` of states after the final norm."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return softcap(scaled(head.logits(normed_btd), self.config.logit_scale), self.config.logit_softcap)


_DECODER = Functional(Decoder)


def init_params(config: DecoderConfig, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns freshly drawn parameters of ``dtype`` as a nested dict of arrays; ``key`` is consumed."""
    return _DECODER.init(config, key, dtype)


@functools.cache
def abstract_params(config: DecoderConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns the parameters' shapes and dtypes without computing them."""
    # One layer of each kind is traced, since flax is slow over a hundred layers.
    kinds = tuple(dict.fromkeys(config.each_layer))
    tree = jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.split(Decoder(config, dtype, nnx.Rngs(params=jax.random.key(0)), kinds))[1])
    )
    layers = {i: tree["layers"][kinds.index(layer)] for i, layer in enumerate(config.each_layer)}
    return tree | {"layers": layers}


def dtype_of(params: Any) -> jnp.dtype:
    """Returns the dtype that a decoder with these parameters computes in."""
    return params["embed_tokens"]["weight"].dtype


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache.

    A layer has keys and values ``[b, k, s, h]``, or latents ``[b, 1, s, r + rotary]``, or a ``RecurrentState``. A layer
    that shares another layer's keys and values has no arrays.
    """

    def layer_cache(layer: LayerConfig) -> Any:
        if layer.recurrent:
            return empty_state(config, rows, dtype)
        if config.latent is not None:
            return allocate(rows, slots, 1, (config.latent.key_value_rank + config.latent.rotary_width,), dtype)
        widths = 2 * (config.head_width_of(layer),) if layer.shares is None else ()
        return allocate(rows, slots, config.kv_heads_of(layer), widths, dtype)

    return KVCache(tuple(map(layer_cache, config.each_layer)))


def bind(config: DecoderConfig, params: Any) -> Decoder:
    """Returns the module over ``params``, for calls inside a traced function."""
    return _DECODER.bind(config, params, dtype_of(params))


class _Functions(NamedTuple):
    forward: Forward
    init_cache: InitCache
    embed: Callable[[Any, Array], Array]
    unembed: Callable[[Any, Array], Array]
    early_exit: EarlyExit | None
    axes: Callable[[], Any]
    commit: CommitCache | None
    gather: GatherCache | None


@functools.cache
def _functions(config: DecoderConfig, dtype: jnp.dtype) -> _Functions:
    # Cached, so that two models of one architecture have the same static functions and share compilations.
    def forward(params, feed, cache, capture=()):
        return Output(*bind(config, params)(feed, cache, capture))

    def init_cache(rows, slots):
        return empty_cache(config, rows, slots, dtype)

    def embed(params, tokens_bt):
        return bind(config, params).embed(tokens_bt)

    def unembed(params, normed_btd):
        return bind(config, params).unembed(normed_btd)

    def early_exit(params, feed, cache, depth):
        return Output(*bind(config, params)(feed, cache, depth=depth))

    def axes():
        return _DECODER.axes(config, dtype)

    def commit(cache, feed, kept_b):
        del feed
        layers = (stored.keep(kept_b) if isinstance(stored, RecurrentPass) else stored for stored in cache.layers)
        return KVCache(tuple(layers))

    def gather(cache, feed, path_bt):
        return KVCache(
            tuple(gather_slots(stored, feed.start_b, path_bt, feed.tokens_bt.shape[1]) for stored in cache.layers)
        )

    if not any(layer.recurrent for layer in config.each_layer):
        return _Functions(forward, init_cache, embed, unembed, early_exit, axes, None, gather)
    # A state cannot take tokens back that another pass fed, so no layers are run ahead of the others. It has no entries
    # of places that a path could choose from either.
    return _Functions(forward, init_cache, embed, unembed, None, axes, commit, None)


def decoder_model(config: DecoderConfig, params: Any) -> LanguageModel:
    """Returns the decoder as a ``LanguageModel``. It computes in the dtype of ``params``, made by ``init_params``."""
    return LanguageModel(
        params=params,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        num_layers=config.num_hidden_layers,
        windows=tuple(layer.reach for layer in config.each_layer),
        **_functions(config, dtype_of(params))._asdict(),
    )
