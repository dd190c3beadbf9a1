"""Multi-token prediction (DeepSeek-AI 2024, DeepSeek-V3, section 2.2): heads that look further ahead.

Module k (from 1) at slot i takes the state of module k - 1 at slot i, the target's for k = 1, and the embedding of
token i + k, and predicts token i + k + 1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from specjax.cache import KVCache, Stored
from specjax.checks import check_integer
from specjax.drafters.chain import Chain, place
from specjax.drafters.fields import check_unset
from specjax.rows import text_at
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.decoder import DecoderLayer, empty_cache
from specjax.transformer.functional import Functional
from specjax.transformer.layers import Embedding, Linear, make_norm, rotary_tables, scaled, softcap
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """What fixes the shapes and the computation of the modules.

    Attributes:
      decoder: the modules' decoder layers, one entry in ``decoder.layers`` for each module. Norms, vocabulary and width
        are those of all parts of a module. ``max_position_embeddings`` and ``tie_word_embeddings`` are ignored. So is
        ``embedding_scale`` where the target embeds, and ``logit_scale``, ``logit_softcap`` and ``head_bias`` where the
        target unembeds.
      hidden_first: the projection takes the state before the embedding (MiMo), not after it.
      zero_first: the embedding at slot 0 is zero, as vLLM has it.
      normed_states: a module's states, which the next draft reads, are those after the module's last norm. False: those
        before it. The logits always come from normed states.
      own_embedding: modules have their own embeddings, not the target's.
      own_head: modules have their own output heads, not the target's.

    Raises:
      ValueError: the decoder has LayerNorms, learned positions, embeddings for each layer, a bias on the modules' own
        output heads, or layers that are recurrent or share keys and values.
    """

    decoder: DecoderConfig
    hidden_first: bool = False
    zero_first: bool = False
    normed_states: bool = True
    own_embedding: bool = False
    own_head: bool = False

    def __post_init__(self):
        bias = ("head_bias",) if self.own_head else ()
        check_unset("MTP modules", self.decoder, "learned_positions", "per_layer", *bias)
        if self.decoder.norm.startswith("layer") or any(
            layer.recurrent or layer.shares is not None for layer in self.decoder.each_layer
        ):
            raise ValueError(
                "MTP modules have RMS norms, and attention with keys and values of their own; the decoder config is of "
                "another kind"
            )

    @property
    def num_modules(self) -> int:
        return self.decoder.num_hidden_layers


class MTPModule(nnx.Module):
    """Joins states with embeddings of later tokens, for one decoder layer and a norm of its own after it.

    ``h' = norm(layer(eh_proj([enorm(embedding) ; hnorm(h)])))`` (DeepSeek-V3, section 2.2).
    """

    def __init__(self, config: MTPConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        decoder = config.decoder
        width, vocab = decoder.hidden_size, decoder.vocab_size
        self.config, self.rope = config, layer.rope
        self.embed_tokens = Embedding(vocab, width, dtype, rngs) if config.own_embedding else None
        self.enorm = make_norm(decoder, width, dtype)
        self.hnorm = make_norm(decoder, width, dtype)
        self.eh_proj = Linear(2 * width, width, False, dtype, rngs, (None, "embed"))
        self.layer = DecoderLayer(decoder, layer, dtype, rngs)
        self.norm = make_norm(decoder, width, dtype)
        self.lm_head = Linear(width, vocab, False, dtype, rngs, ("embed", "vocab")) if config.own_head else None

    def __call__(
        self, target: LanguageModel, feed: Feed, states_btd: Array, stored: Stored | None
    ) -> tuple[Array, Stored]:
        """Runs one pass over t slots of each row.

        Args:
          target: embeds tokens, where the module does not.
          feed: for each slot the token whose embedding is joined: for module k at slot i, token i + k.
          states_btd: the states of the module before, or the target's; any floating dtype.
          stored: what the layer keeps, into which the feed's places are written; None lets the block stand alone, as
            in training.

        Returns:
          ``[b, t, d]`` states in the dtype of ``states_btd``, and what the layer keeps with these slots.

        Raises:
          ValueError: neither the module nor the target embeds tokens.
        """
        dtype = self.eh_proj.kernel[...].dtype
        position_bt = feed.position_bt
        embedded_btd = self._embed(target, feed.tokens_bt).astype(dtype)
        if self.config.zero_first:
            embedded_btd = jnp.where(position_bt[:, :, None] == 0, 0, embedded_btd)
        pair = self.enorm(embedded_btd), self.hnorm(states_btd.astype(dtype))
        x_btd = self.eh_proj(jnp.concatenate(pair[::-1] if self.config.hidden_first else pair, axis=-1))
        x_btd, kept = self.layer(x_btd, feed, rotary_tables(position_bt, self.rope), stored)
        x_btd = self.norm(x_btd) if self.config.normed_states else x_btd
        return x_btd.astype(states_btd.dtype), kept

    def _embed(self, target: LanguageModel, tokens_bt: Array) -> Array:
        if self.embed_tokens is None:
            target.require("embed")
            assert target.embed is not None
            return target.embed(target.params, tokens_bt)
        x_btd = self.embed_tokens(tokens_bt)
        return x_btd * jnp.asarray(self.config.decoder.embedding_scale, x_btd.dtype)

    def logits(self, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits of states ``[b, d]`` that the module returned; raises ValueError as a call does."""
        if not self.config.normed_states:
            states_bd = self.norm(states_bd)
        if self.lm_head is None:
            target.require("unembed")
            assert target.unembed is not None
            return target.unembed(target.params, states_bd[:, None])[:, 0]
        states_bd = states_bd.astype(self.lm_head.kernel[...].dtype)
        decoder = self.config.decoder
        return softcap(scaled(self.lm_head.logits(states_bd), decoder.logit_scale), decoder.logit_softcap)


def _check_fit(config: MTPConfig, target: LanguageModel, width: int) -> None:
    if config.decoder.hidden_size != width:
        raise ValueError(
            f"the MTP modules are {config.decoder.hidden_size} wide and the target's states {width}; give their own "
            "target, or modules made for this one"
        )
    if not config.own_embedding:
        target.require("embed")
    if not config.own_head:
        target.require("unembed")


class _MTP(nnx.Module):
    def __init__(self, config: MTPConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.modules_ = nnx.List([MTPModule(config, layer, dtype, rngs) for layer in config.decoder.each_layer])


_MODULES = Functional(_MTP)


def init_mtp_params(config: MTPConfig, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns freshly drawn parameters of that dtype: nested dicts of arrays, with the modules under their numbers from
    0; consumes ``key``."""
    return _MODULES.init(config, key, dtype)["modules_"]


def abstract_mtp_params(config: MTPConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns the parameters' shapes and dtypes without computing them."""
    return _MODULES.abstract(config, dtype)["modules_"]


def _axes(config: MTPConfig, params: Any) -> Any:
    """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
    return _MODULES.axes(config, _dtype_of(params))["modules_"]


def _dtype_of(params: Any) -> jnp.dtype:
    return params[0]["eh_proj"]["kernel"].dtype


def _bind(config: MTPConfig, params: Any) -> list[MTPModule]:
    return list(_MODULES.bind(config, {"modules_": params}, _dtype_of(params)).modules_)


@dataclasses.dataclass(frozen=True)
class MTPHead:
    """One module as the head of a ``FeatureDrafter``, which feeds it its own states again for more than one draft.

    Attributes:
      config: of a single module.

    Raises:
      ValueError: the config has several.
    """

    config: MTPConfig

    capture = (-1,)

    def __post_init__(self):
        if self.config.num_modules != 1:
            raise ValueError(f"the config has {self.config.num_modules} modules; a draft head that is chained has one")

    @property
    def vocab_size(self) -> int:
        return self.config.decoder.vocab_size

    def check_fit(self, target: LanguageModel, width: int) -> None:
        """Raises ValueError unless ``width`` is the module's, and the target has what is shared."""
        _check_fit(self.config, target, width)

    def init_cache(self, params: Any, rows: int, slots: int) -> KVCache:
        """Makes an empty cache."""
        return empty_cache(self.config.decoder, rows, slots, _dtype_of(params))

    def at_draft(self, index: int | Array) -> "MTPHead":
        """Returns the head itself, for all drafts."""
        del index
        return self

    def axes(self, params: Any) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return _axes(self.config, params)

    def fuse(self, params: Any, features: tuple[Array, ...]) -> Array:
        """Returns the target's states after its final norm."""
        del params
        return features[0]

    def run(
        self, params: Any, target: LanguageModel, feed: Feed, states_btd: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache]:
        """As ``specjax.drafters.feature.Head.run``; without a cache the block stands alone, as in training."""
        stored = None if cache is None else cache.layers[0]
        states_btd, stored = _bind(self.config, params)[0](target, feed, states_btd, stored)
        return states_btd, KVCache((stored,))

    def logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits of states ``[b, d]`` that ``run`` returned."""
        return _bind(self.config, params)[0].logits(target, states_bd)

    draft_logits = logits

    def draft_of_v(self, params: Any) -> None:
        """Returns None: all tokens are drafted."""
        del params


@struct.dataclass
class MTPState:
    """What the modules remember between rounds.

    Attributes:
      cache: one layer for each module in use.
      states_btd: ``[b, 2g, d]`` in the target's dtype, its states after the final norm at slots ``start_b`` and later.
        Of a row of n tokens they are known up to slot n - 2; the others hold anything.
      start_b: int32 ``[b]``. The slots before it are final in the cache; those from it on have to be written again.
    """

    cache: Cache
    states_btd: Array
    start_b: Array


@struct.dataclass
class MTPDrafter:
    """Drafts token k of a round with module k, all of them at the slot of the last state that the target gave
    (DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Module k needs token i + k at slot i, which may be a draft of this round. Example, n = 10 tokens, g = 3: module 2
    has true tokens in its slots 0 to 7. Slot 8 embeds a draft of this round, which may be rejected. So the next round
    starts g slots before n and writes those slots again.

    Modules past the first ``num_draft`` are not used. A row of one token drafts nothing: no state of the target is
    known yet.

    Attributes:
      params: the modules' parameters, by their numbers from 0.
      config: of the modules.
      num_draft: g, tokens proposed per round, at most one for each module.

    Raises:
      ValueError: ``num_draft`` is below 1, or there are fewer modules.
    """

    params: Any
    config: MTPConfig = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False)

    capture = (-1,)
    max_positions = None

    def __post_init__(self):
        check_integer("num_draft", self.num_draft, 1)
        if self.num_draft > self.config.num_modules:
            raise ValueError(
                f"num_draft is {self.num_draft}, but there are {self.config.num_modules} MTP modules of one draft "
                "each; give at most so many, or chain the first module (a FeatureDrafter of an MTPHead)"
            )

    @property
    def vocab_size(self) -> int:
        return self.config.decoder.vocab_size

    def axes(self) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return _axes(self.config, self.params)

    def init(self, target: LanguageModel, rows: int, slots: int) -> MTPState:
        """Returns an empty cache.

        Raises:
          ValueError: the modules were made for a target of another width, or need more of the target.
        """
        (spec,) = target.state_specs(self.capture)
        _check_fit(self.config, target, spec.shape[-1])
        g = self.num_draft
        # A pass over a prompt's chunk also covers up to 2g slots that are written again.
        cache = empty_cache(self.config.decoder, rows, slots + 2 * g, _dtype_of(self.params))
        states_btd = jnp.zeros((rows, 2 * g, spec.shape[-1]), spec.dtype)
        return MTPState(KVCache(cache.layers[:g]), states_btd, jnp.zeros((rows,), jnp.int32))

    def observe(self, state: MTPState, context: Context, event: Event) -> MTPState:
        """Feeds a prompt. Of a round, the states are only kept: ``propose`` feeds them."""
        g, kept_b1 = self.num_draft, event.kept_b[:, None] > 0
        first_b1 = event.feed.start_b[:, None]

        def known(start_b: Array, width: int) -> Array:
            """Returns the states of ``width`` slots, from those remembered or from the event."""
            slot_bt = start_b[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
            at_bt = jnp.where(slot_bt < first_b1, slot_bt - state.start_b[:, None], slot_bt - first_b1 + 2 * g)
            both_btd = jnp.concatenate([state.states_btd, event.features[0]], axis=1)
            return jnp.take_along_axis(both_btd, jnp.clip(at_bt, 0, both_btd.shape[1] - 1)[:, :, None], axis=1)

        cache, final_b = state.cache, event.feed.start_b + 1  # propose had true tokens up to the row's end
        if not event.drafted:
            width = event.feed.tokens_bt.shape[1] + 2 * g
            count_b = jnp.where(kept_b1[:, 0], event.end_b - state.start_b, 0)
            states_btd, kept = known(state.start_b, width), []
            for k, module in enumerate(self._modules, start=1):
                tokens_bt = text_at(context.tokens_bs, state.start_b + k, width)
                feed = Feed(tokens_bt, state.start_b, count_b)
                states_btd, stored = module(context.target, feed, states_btd, cache.layers[k - 1])
                kept.append(stored)
            cache, final_b = KVCache(tuple(kept)), event.end_b + 1
        # The slot of the last known state is written again, too: propose draws from it, also with one module.
        start_b = jnp.maximum(jnp.minimum(final_b - g, event.end_b - 1), 0)
        states_btd = jnp.where(kept_b1[:, :, None], known(start_b, 2 * g), state.states_btd)
        return MTPState(cache, states_btd, jnp.where(kept_b1[:, 0], start_b, state.start_b))

    def propose(self, state: MTPState, context: Context, draw: Draw) -> tuple[Proposal, MTPState]:
        """Draws one token from each module, the next of which sees it."""
        g, length_b, target = self.num_draft, context.length_b, context.target
        slot_bt = state.start_b[:, None] + jnp.arange(3 * g, dtype=jnp.int32)[None]
        tokens_bt = text_at(context.tokens_bs, state.start_b, 3 * g)
        count_b = jnp.where(context.running_b, jnp.maximum(length_b - 1 - state.start_b, 0), 0)
        last_b = jnp.maximum(count_b - 1, 0)  # the slot of the last state that the target gave
        width = context.drafts(g)
        chain = Chain.empty(length_b.shape[0], width, target.vocab_size)
        states_btd, kept = state.states_btd, []
        for k, module in enumerate(self._modules, start=1):
            feed = Feed(tokens_bt[:, k : k + 2 * g], state.start_b, count_b)
            states_btd, stored = module(target, feed, states_btd, state.cache.layers[k - 1])
            kept.append(stored)
            if k > width:  # its cache is kept up to date all the same
                continue
            chain, token_b = chain.add(draw, module.logits(target, place(states_btd, last_b)), k - 1)
            tokens_bt = jnp.where(slot_bt == (length_b + (k - 1))[:, None], token_b[:, None], tokens_bt)
        drafted_b = jnp.where(length_b >= 2, width, 0).astype(jnp.int32)
        return chain.propose(drafted_b), dataclasses.replace(state, cache=KVCache(tuple(kept)))

    @property
    def _modules(self) -> list[MTPModule]:
        return _bind(self.config, self.params)[: self.num_draft]
