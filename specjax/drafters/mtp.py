"""Multi-token prediction (DeepSeek-AI 2024, DeepSeek-V3, section 2.2): heads that look further ahead.

Module k (from 1) at slot i takes the state of module k - 1 at slot i, the target's for k = 1, and the embedding of
token i + k, and predicts token i + k + 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from specjax.cache import KVCache, Stored
from specjax.checks import check_integer
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.decoder import DecoderLayer, empty_cache
from specjax.transformer.layers import Embedding, Linear, declared_axes, make_norm, positions, rotary_tables, softcap
from specjax.types import Cache, Context, Draw, LanguageModel, Proposal, Verdict


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """What fixes the shapes and the computation of the modules.

    Attributes:
      decoder: the modules' decoder layers, one entry in ``decoder.layers`` for each module. Norms, vocabulary and width
        are those of all parts of a module.
      hidden_first: the projection takes the state before the embedding (MiMo), not behind it.
      zero_first: the embedding at slot 0 is zero, as vLLM has it.
      own_embedding: modules have their own embeddings, not the target's.
      own_head: modules have their own output heads, not the target's.

    Raises:
      ValueError: the decoder has LayerNorms or learned positions.
    """

    decoder: DecoderConfig
    hidden_first: bool = False
    zero_first: bool = False
    own_embedding: bool = False
    own_head: bool = False

    def __post_init__(self):
        if self.decoder.norm == "layer" or self.decoder.learned_positions:
            raise ValueError("MTP modules have RMS norms and rotary positions; the decoder config is of another kind")

    @property
    def num_modules(self) -> int:
        return self.decoder.num_hidden_layers


class MTPModule(nnx.Module):
    """Joins states with embeddings of later tokens, for one decoder layer with a norm of its own behind it.

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
        self, target: LanguageModel, tokens_bt: Array, states_btd: Array, stored: Stored | None, start_b: Array
    ) -> tuple[Array, Stored]:
        """Feeds t slots of each row.

        Args:
          target: lends the embedding, where the module has none.
          tokens_bt: int32, for each slot the token whose embedding is joined: for module k at slot i, token i + k.
          states_btd: the states of the module before, or the target's; any floating dtype.
          stored: what the layer keeps, of which the slots from ``start_b`` on are written; None lets the block stand
            alone, as in training.
          start_b: int32, the first slot of each row.

        Returns:
          ``[b, t, d]`` states in the dtype of ``states_btd``, and what the layer keeps with these slots.

        Raises:
          ValueError: the target does not lend its embedding, and the module has none.
        """
        dtype = self.eh_proj.kernel[...].dtype
        position_bt = positions(start_b, tokens_bt.shape[1])
        embedded_btd = self._embed(target, tokens_bt).astype(dtype)
        if self.config.zero_first:
            embedded_btd = jnp.where(position_bt[:, :, None] == 0, 0, embedded_btd)
        pair = self.enorm(embedded_btd), self.hnorm(states_btd.astype(dtype))
        x_btd = self.eh_proj(jnp.concatenate(pair[::-1] if self.config.hidden_first else pair, axis=-1))
        x_btd, stored = self.layer(x_btd, position_bt, rotary_tables(position_bt, self.rope), stored)
        return self.norm(x_btd).astype(states_btd.dtype), stored

    def _embed(self, target: LanguageModel, tokens_bt: Array) -> Array:
        if self.embed_tokens is None:
            return _shared(target, "embed")(target.params, tokens_bt)
        x_btd = self.embed_tokens(tokens_bt)
        return x_btd * jnp.asarray(self.config.decoder.embedding_scale, x_btd.dtype)

    def logits(self, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits of states ``[b, d]`` that the module returned; raises ValueError as a call does."""
        if self.lm_head is None:
            return _shared(target, "unembed")(target.params, states_bd[:, None])[:, 0]
        logits_bv = self.lm_head(states_bd.astype(self.lm_head.kernel[...].dtype))
        return softcap(logits_bv.astype(jnp.float32), self.config.decoder.logit_softcap)


def _check_fit(config: MTPConfig, target: LanguageModel, width: int) -> None:
    if config.decoder.hidden_size != width:
        raise ValueError(
            f"the MTP modules are {config.decoder.hidden_size} wide and the target's states {width}; give their own "
            "target, or modules made for this one"
        )
    for name, own in (("embed", config.own_embedding), ("unembed", config.own_head)):
        if not own:
            _shared(target, name)


def _shared(target: LanguageModel, name: str) -> Any:
    function = getattr(target, name)
    if function is None:
        raise ValueError(f"the head uses the target's {name}, which it does not have; give LanguageModel({name}=...)")
    return function


class _MTP(nnx.Module):
    def __init__(self, config: MTPConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.modules_ = nnx.List([MTPModule(config, layer, dtype, rngs) for layer in config.decoder.each_layer])


def init_mtp_params(config: MTPConfig, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns freshly drawn parameters of that dtype: nested dicts of arrays, with the modules under their numbers from
    0; consumes ``key``."""
    _, state = nnx.split(_MTP(config, dtype, nnx.Rngs(params=key)))
    return nnx.to_pure_dict(state)["modules_"]


def abstract_mtp_params(config: MTPConfig, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
    """Returns the parameters' shapes and dtypes without computing them."""
    return jax.eval_shape(lambda: init_mtp_params(config, jax.random.key(0), dtype))


@functools.cache
def _graph(config: MTPConfig, dtype: jnp.dtype):
    return nnx.split(nnx.eval_shape(lambda: _MTP(config, dtype, nnx.Rngs(0))))


def _axes(config: MTPConfig, params: Any) -> Any:
    """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
    return declared_axes(_graph(config, _dtype_of(params))[1])["modules_"]


def _dtype_of(params: Any) -> jnp.dtype:
    return params[0]["eh_proj"]["kernel"].dtype


def _bind(config: MTPConfig, params: Any) -> list[MTPModule]:
    graph, state = _graph(config, _dtype_of(params))
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, {"modules_": params})
    return list(nnx.merge(graph, state).modules_)


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
            raise ValueError(f"the config has {self.config.num_modules} modules; a head that is chained has one")

    @property
    def vocab_size(self) -> int:
        return self.config.decoder.vocab_size

    def check_fit(self, target: LanguageModel, width: int) -> None:
        """Raises ValueError unless ``width`` is the module's, and the target lends what is shared."""
        _check_fit(self.config, target, width)

    def init_cache(self, params: Any, rows: int, slots: int) -> KVCache:
        """Makes an empty cache."""
        return empty_cache(self.config.decoder, rows, slots, _dtype_of(params))

    def axes(self, params: Any) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return _axes(self.config, params)

    def fuse(self, params: Any, features: tuple[Array, ...]) -> Array:
        """Returns the target's states behind its final norm."""
        del params
        return features[0]

    def run(
        self,
        params: Any,
        target: LanguageModel,
        tokens_bt: Array,
        states_btd: Array,
        cache: KVCache | None,
        start_b: Array,
    ) -> tuple[Array, KVCache]:
        """As ``specjax.drafters.feature.Head.run``; without a cache the block stands alone, as in training."""
        stored = None if cache is None else cache.layers[0]
        states_btd, stored = _bind(self.config, params)[0](target, tokens_bt, states_btd, stored, start_b)
        return states_btd, KVCache((stored,))

    def logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits of states ``[b, d]`` that ``run`` returned."""
        return _bind(self.config, params)[0].logits(target, states_bd)


@struct.dataclass
class MTPState:
    """What the modules remember between rounds.

    Attributes:
      cache: one layer for each module in use, of the same slots.
      states_btd: ``[b, 2g, d]`` in the target's dtype, its states behind the final norm at the slots from ``start_b``
        on; those past the last known one hold what will be overwritten.
      start_b: int32 ``[b]``, g slots before the row's end, and at least 0.
    """

    cache: Cache
    states_btd: Array
    start_b: Array


@struct.dataclass
class MTPDrafter:
    """Drafts token k of a round with module k, all of them at the slot of the last state that the target gave
    (DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437, section 2.2).

    With n tokens in a row, module k has the true embeddings of its slots up to n - 1 - k; those behind, up to n - 2,
    have embeddings of this round's drafts. The next round begins g slots before n, so that each module writes them
    again. Modules past the first ``num_draft`` are not used. A row of one token drafts nothing: no state of the target
    is known yet.

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

    def start(self, context: Context, features: tuple[Array, ...], slots: int) -> MTPState:
        """Fills each module's cache from the prompt.

        Raises:
          ValueError: the modules were made for a target of another width, or for one that lends more.
        """
        _check_fit(self.config, context.target, features[0].shape[-1])
        rows, width = context.tokens_bs.shape
        g = self.num_draft
        cache = empty_cache(self.config.decoder, rows, max(slots, 2 * g), _dtype_of(self.params))
        states_btd, zero_b, kept = features[0], jnp.zeros((rows,), jnp.int32), []
        padded_bt = jnp.pad(context.tokens_bs, ((0, 0), (0, g)))
        for k, module in enumerate(_bind(self.config, self.params)[:g], start=1):
            fed_bt = padded_bt[:, k : k + width]
            states_btd, stored = module(context.target, fed_bt, states_btd, cache.layers[k - 1], zero_b)
            kept.append(stored)
        start_b = jnp.maximum(context.length_b - 1 - g, 0)
        at_bt = jnp.minimum(start_b[:, None] + jnp.arange(2 * g, dtype=jnp.int32)[None], width - 1)
        return MTPState(KVCache(tuple(kept)), _gather(features[0], at_bt), start_b)

    def propose(self, state: MTPState, context: Context, draw: Draw) -> tuple[Proposal, MTPState]:
        """Draws one token from each module, the next of which sees it."""
        g, length_b, target = self.num_draft, context.length_b, context.target
        at_bt = state.start_b[:, None] + jnp.arange(3 * g, dtype=jnp.int32)[None]
        # What lies past the last slot with a state fills slots that are written before they count.
        tokens_bt = jnp.take_along_axis(context.tokens_bs, jnp.minimum(at_bt, context.tokens_bs.shape[1] - 1), axis=1)
        last_b1 = jnp.maximum(length_b - 2 - state.start_b, 0)[:, None]
        states_btd, kept, tokens, probs = state.states_btd, [], [], []
        for k, module in enumerate(_bind(self.config, self.params)[:g], start=1):
            fed_bt = tokens_bt[:, k : k + 2 * g]
            states_btd, stored = module(target, fed_bt, states_btd, state.cache.layers[k - 1], state.start_b)
            kept.append(stored)
            prefix_bi = jnp.stack(tokens, axis=1) if tokens else jnp.zeros((length_b.shape[0], 0), jnp.int32)
            token_b, probs_bv = draw(module.logits(target, _gather(states_btd, last_b1)[:, 0]), prefix_bi)
            tokens_bt = jnp.where(at_bt == (length_b + (k - 1))[:, None], token_b[:, None], tokens_bt)
            tokens.append(token_b)
            probs.append(probs_bv)
        drafted_b = jnp.where(length_b >= 2, g, 0).astype(jnp.int32)
        proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(probs, axis=1), drafted_b)
        return proposal, dataclasses.replace(state, cache=KVCache(tuple(kept)))

    def commit(self, state: MTPState, context: Context, verdict: Verdict, features: tuple[Array, ...]) -> MTPState:
        """Keeps the target's states for the next round to write; those of rejected drafts will lie past the end."""
        del verdict
        g, first_b1 = self.num_draft, (context.length_b - 1)[:, None]  # the first of ``features`` is at slot n - 1
        start_b = jnp.maximum(context.length_b - g, 0)
        slot_bt = start_b[:, None] + jnp.arange(2 * g, dtype=jnp.int32)[None]
        at_bt = jnp.where(slot_bt < first_b1, slot_bt - state.start_b[:, None], slot_bt - first_b1 + 2 * g)
        known_btd = jnp.concatenate([state.states_btd, features[0]], axis=1)
        return MTPState(state.cache, _gather(known_btd, jnp.minimum(at_bt, 3 * g)), start_b)


def _gather(x_btd: Array, at_bt: Array) -> Array:
    """Returns the states of each row at the given places."""
    return jnp.take_along_axis(x_btd, at_bt[:, :, None], axis=1)
