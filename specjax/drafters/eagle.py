"""EAGLE draft heads: one decoder layer or a few, which draft from the target's hidden states."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import KVCache, Stored
from specjax.checks import check_integer
from specjax.drafters.draft_ids import by_targets_ids, tokens_of_draft
from specjax.drafters.fields import check_unset
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.decoder import DecoderLayer, empty_cache, run_layers
from specjax.transformer.functional import Functional
from specjax.transformer.layers import Embedding, Linear, make_norm
from specjax.types import Feed, LanguageModel


@dataclasses.dataclass(frozen=True)
class EagleHead:
    """The description of an EAGLE draft head; a ``Head`` of ``specjax.drafters.feature``.

    EAGLE-1 (Li et al. 2024, arXiv 2401.15077, section 4.1) predicts the target's last state from
    ``fc([embedding ; state])``. The target's output head then gives the logits. EAGLE-2 has the same draft head.
    EAGLE-3 (Li et al. 2025, arXiv 2503.01840, section 3.1) fuses several states of the target into one by ``fc``. From
    the second draft on it reads its own states. Most have their own output heads, often over a part of the vocabulary.

    Attributes:
      decoder: describes the layers. Its ``vocab_size`` is the target's. Its ``max_position_embeddings`` and
        ``tie_word_embeddings`` are ignored. So is ``embedding_scale`` where the target embeds, and ``logit_scale``,
        ``logit_softcap`` and ``head_bias`` where the target unembeds.
      capture: hidden-state indices of the target: 0 the embedding output, i the output of layer i. EAGLE-1: ``(-1,)``,
        the state after the final norm.
      version: 1 or 3.
      target_hidden_size: width of the target's states, None for ``decoder.hidden_size``.
      draft_vocab_size: u, how many of the target's tokens can be drafted; None for all. EAGLE-1: None.
      own_embedding: whether the draft head has its own embedding; otherwise the target embeds.
      own_head: whether the draft head has its own output head; otherwise the target unembeds. None: as most heads of
        the version, EAGLE-3 has one and EAGLE-1 has not. EAGLE-1 cannot have one.
      fc_bias: whether ``fc`` has a bias; EAGLE-1 only.
      norm_before_residual: whether the first layer's residual is the normed state; EAGLE-3 only, like the fields below.
      norm_before_fc: whether the target's states are normed together before ``fc``.
      fc_norm: whether the target's states are normed one by one before ``fc``. Not together with ``norm_before_fc``.
      norm_output: whether the next draft reads the normed states of the draft before it (EAGLE-3.1).
      norm_logits: whether the logits come from normed states. SpecForge could train heads without this norm.
      window_stays: whether the windows of the layers stay along a chain, where the first draft's windows are, as in
        training. Otherwise they slide. Both versions.

    Raises:
      ValueError: a size is out of range, ``version`` is neither 1 nor 3, fields contradict each other or the version,
        or ``decoder`` has fields that the draft head does not compute. The message names the fields.
    """

    decoder: DecoderConfig
    capture: tuple[int, ...]
    version: Literal[1, 3] = 3
    target_hidden_size: int | None = None
    draft_vocab_size: int | None = None
    own_embedding: bool = False
    own_head: bool | None = None
    fc_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_logits: bool = True
    window_stays: bool = False

    def __post_init__(self):
        if self.target_hidden_size is None:
            object.__setattr__(self, "target_hidden_size", self.decoder.hidden_size)
        if self.own_head is None:
            object.__setattr__(self, "own_head", self.version == 3)
        check_integer("target_hidden_size", self.target_hidden_size, 1)
        if self.draft_vocab_size is not None:
            check_integer("draft_vocab_size", self.draft_vocab_size, 1, self.vocab_size)
        if self.version not in (1, 3):
            raise ValueError(f"version is {self.version!r}; give 1 (also for EAGLE-2) or 3")
        # Each version has fields that the other lacks. A field that is silently ignored would draft badly.
        features = [name for name in _OF_EAGLE_3 if getattr(self, name)]
        features += ["own_head"] * bool(self.own_head) + ["norm_logits=False"] * (not self.norm_logits)
        if self.version == 1 and (features or self.draft_vocab_size or self.capture != (-1,)):
            raise ValueError(
                f"an EAGLE-1 head has capture {self.capture}, draft_vocab_size {self.draft_vocab_size} and {features}; "
                "it has none of these, and reads the state after the final norm, (-1,)"
            )
        if self.version == 3 and self.fc_bias:
            raise ValueError("fc_bias is true; the fc of an EAGLE-3 head has no bias")
        if self.version == 3 and (not self.capture or min(self.capture) < 0 or len(set(self.capture)) < self.states):
            raise ValueError(
                f"the hidden-state indices are {self.capture}; give different ones, 0 for the embedding output and i "
                "for the output of layer i"
            )
        if self.norm_output and not self.norm_logits:
            raise ValueError("norm_output is true and norm_logits false; a normed state gives normed logits")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm are both true; the states are normed together or one by one")
        # Only `fc` of EAGLE-3 changes the width, and the target's embedding and output head do not go through it.
        width, other = self.decoder.hidden_size, self.target_hidden_size
        if width != other and (self.version == 1 or not self.own_embedding or not self.own_head):
            raise ValueError(
                f"the draft head is {width} wide and the target's states {other}: only an EAGLE-3 head with an "
                "embedding and an output head of its own can differ from the target in width"
            )
        self._check_decoder()

    def _check_decoder(self) -> None:
        """Raises ValueError if the decoder has fields that the draft head would ignore."""
        ignored = ["learned_positions", "per_layer", "recurrence"]
        ignored += ["embedding_scale"] * self.own_embedding
        ignored += ["logit_scale", "logit_softcap", "head_bias"] * bool(self.own_head)
        # The first layer of EAGLE-3 reads two normed states, and its MLP reads what its attention has changed.
        ignored += ["latent", "parallel"] * (self.version == 3)
        check_unset(f"an EAGLE-{self.version} head", self.decoder, *ignored)
        if self.version == 3 and self.decoder.norm_places == "after":
            raise ValueError("norm_places is 'after'; an EAGLE-3 head norms what its attention reads, so give another")

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def states(self) -> int:
        """How many of the target's hidden states are fused."""
        return len(self.capture)

    def describe(self) -> str:
        """Returns one line for people: the size, the target's states that are read, and the draft vocabulary."""
        layers, width = self.decoder.num_hidden_layers, self.decoder.hidden_size
        size = f"EAGLE-{self.version} head, {layers} layer{'s' if layers > 1 else ''} of width {width}"
        if self.version == 1:
            return f"{size}: reads the target's state after the final norm"
        states = ", ".join(map(str, self.capture))
        return (
            f"{size}: reads the target's hidden states {states} (0 the embedding output, i the output of layer i), "
            f"drafts {self.draft_vocab_size or self.vocab_size} of {self.vocab_size} tokens"
        )

    def init_params(self, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns freshly drawn parameters as a nested dict of arrays; ``key`` is consumed.

        With a reduced draft vocabulary, ``draft_of_v`` int32 ``[v]`` holds the draft's id of each target token, and -1
        for tokens that are never drafted. Here the draft vocabulary is the target's first ``draft_vocab_size`` tokens.
        """
        return _EAGLE.init(self, key, dtype)

    def abstract_params(self, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns the parameters' shapes and dtypes without computing them."""
        return _EAGLE.abstract(self, dtype)

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params``, with a tuple of ``Axis`` in place of each array."""
        return _EAGLE.axes(self, _dtype_of(params))

    def check_fit(self, target: LanguageModel, width: int) -> None:
        """Checks that the draft head can read the target.

        Args:
          target: the target.
          width: width of the target's hidden states.

        Raises:
          ValueError: the draft head reads states of another width; or the target lacks the ``embed`` or ``unembed``
            that the draft head uses.
        """
        if self.target_hidden_size != width:
            raise ValueError(
                f"the draft head reads states {self.target_hidden_size} wide and the target's are {width}; {_CURE}"
            )
        if not self.own_head:  # `logits` needs both: it unembeds states in the dtype of the target's embeddings
            target.require("embed", "unembed")
        elif not self.own_embedding:
            target.require("embed")

    def at_draft(self, index: int | Array) -> "EagleHead":
        """Returns the draft head that draft ``index`` of a chain is computed with.

        With ``window_stays``, windows start where those of draft 0 do. Example, a window of 8 and draft 0 from slot 20:
        drafts 0 and 2 see slots 13 and later, so the window of draft 2, from slot 22, is 10.

        Raises:
          ValueError: windows stay, and the chain is a loop on the device (``FeatureDrafter.unrolled``).
        """
        layers = self.decoder.each_layer
        if not self.window_stays or all(layer.window is None for layer in layers):
            return self
        if not isinstance(index, int):
            raise ValueError("window_stays is true and the chain is a loop on the device; give unrolled=True")
        widened = [dataclasses.replace(layer, window=layer.window and layer.window + index) for layer in layers]
        return dataclasses.replace(self, decoder=dataclasses.replace(self.decoder, layers=tuple(widened)))

    def init_cache(self, params: Any, rows: int, slots: int) -> KVCache:
        """Returns an empty cache of the draft head's layers."""
        return empty_cache(self.decoder, rows, slots, _dtype_of(params))

    def fuse(self, params: Any, features: tuple[Array, ...]) -> Array:
        """Returns states ``[b, t, d]``, made from one ``[b, t, target's d]`` for each index of ``capture``."""
        return self._bind(params).fuse([x.astype(_dtype_of(params)) for x in features])

    def run(
        self, params: Any, target: LanguageModel, feed: Feed, states_btd: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        """Runs one pass; see ``specjax.drafters.feature.Head.run``."""
        module = self._bind(params)
        if self.own_embedding:
            embedded_btd = module.embed_tokens(feed.tokens_bt)
        else:
            assert target.embed is not None
            embedded_btd = target.embed(target.params, feed.tokens_bt)
        return module(embedded_btd.astype(states_btd.dtype), states_btd, cache, feed)

    def logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns float32 logits ``[b, v]`` of states ``[b, d]``. Tokens that are never drafted have -inf."""
        logits, draft_of_v = self._output(params, target, states_bd), self.draft_of_v(params)
        if draft_of_v is None:
            return logits
        if self.own_head:
            return by_targets_ids(logits, draft_of_v)
        return jnp.where((draft_of_v >= 0)[None], logits, -jnp.inf)

    def draft_logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns float32 logits ``[b, u]`` of states ``[b, d]``, those of the draft vocabulary's tokens."""
        logits, draft_of_v = self._output(params, target, states_bd), self.draft_of_v(params)
        if draft_of_v is None or self.own_head:
            return logits
        assert self.draft_vocab_size is not None
        return logits[:, tokens_of_draft(draft_of_v, self.draft_vocab_size)]

    def _output(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns the logits of the output head: of the draft vocabulary if it is the draft head's own, else of all."""

        def unembed(x_bd: Array) -> Array:
            assert target.unembed is not None
            x_bd = x_bd.astype(target.embedding_spec.dtype)
            return target.unembed(target.params, x_bd[:, None])[:, 0].astype(jnp.float32)

        return self._bind(params).logits(states_bd, unembed)

    def draft_of_v(self, params: Any) -> Array | None:
        """Returns int32 ``[v]``, the draft's id of each of the target's tokens, or -1; None if all are drafted."""
        return None if self.draft_vocab_size is None else params["draft_of_v"]

    def _bind(self, params: Any) -> "_Eagle1 | _Eagle3":
        return _EAGLE.bind(self, params, _dtype_of(params))


_CURE = "give the draft head's own target, or a draft head made for this one"
_OF_EAGLE_3 = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def check_fit(head: EagleHead, target: LanguageModel) -> None:
    """Raises ValueError unless the draft head fits the target's width, vocabulary and number of layers."""
    target.require("embed", "unembed", "num_layers")
    assert target.num_layers is not None
    head.check_fit(target, target.embedding_spec.shape[-1])
    if head.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft head is for {head.vocab_size} tokens and the target has {target.vocab_size}; {_CURE}"
        )
    if max(head.capture) > target.num_layers:
        raise ValueError(
            f"the draft head reads the target's hidden states {head.capture} and the target has {target.num_layers} "
            f"layers; {_CURE}"
        )


class _BareLayer(DecoderLayer):
    """EAGLE-1's first layer. There is no norm before its attention."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype, rngs)
        self.input_layernorm = None


class _FusingLayer(DecoderLayer):
    """EAGLE-3's first layer. Its attention reads embedding and state side by side, 2 d wide."""

    def __init__(self, head: EagleHead, dtype: jnp.dtype, rngs: nnx.Rngs):
        config, width = head.decoder, head.decoder.hidden_size
        super().__init__(config, config.each_layer[0], dtype, rngs, inputs=2 * width)
        self.norm_before_residual = head.norm_before_residual
        self.hidden_norm = make_norm(config, width, dtype)

    def join(
        self,
        embedded_btd: Array,
        x_btd: Array,
        feed: Feed,
        tables: tuple[Array, Array] | None,
        stored: Stored | None,
    ) -> tuple[Array, Stored]:
        """Does what a layer's call does, with the embedding beside the state."""
        assert self.input_layernorm is not None
        normed_btd = self.hidden_norm(x_btd)
        both = jnp.concatenate([self.input_layernorm(embedded_btd), normed_btd], axis=-1)
        y_btd, kept = self.self_attn(both, feed, tables, stored)
        return self.add(normed_btd if self.norm_before_residual else x_btd, normed_btd, y_btd), kept


class _Eagle1(nnx.Module):
    def __init__(self, head: EagleHead, dtype: jnp.dtype, rngs: nnx.Rngs):
        config, width = head.decoder, head.decoder.hidden_size
        self.head = head
        if head.own_embedding:
            self.embed_tokens = Embedding(head.vocab_size, width, dtype, rngs)
        self.fc = Linear(2 * width, width, head.fc_bias, dtype, rngs, (None, "embed"))
        first, *others = config.each_layer
        layers = [DecoderLayer(config, layer, dtype, rngs) for layer in others]
        self.layers = nnx.List([_BareLayer(config, first, dtype, rngs), *layers])

    def fuse(self, features: Sequence[Array]) -> Array:
        return features[0]

    def __call__(self, embedded_btd: Array, x_btd: Array, cache: KVCache, feed: Feed) -> tuple[Array, KVCache]:
        x_btd = self.fc(jnp.concatenate([embedded_btd, x_btd], axis=-1))
        states, cache = run_layers(self.layers, self.head.decoder, x_btd, cache, feed)
        return states[-1], cache

    def logits(self, x_bd: Array, unembed: Callable[[Array], Array]) -> Array:
        return unembed(x_bd)


class _Eagle3(nnx.Module):
    def __init__(self, head: EagleHead, dtype: jnp.dtype, rngs: nnx.Rngs):
        config, width, target_width = head.decoder, head.decoder.hidden_size, head.target_hidden_size
        assert target_width is not None
        self.head = head
        if head.own_embedding:
            self.embed_tokens = Embedding(head.vocab_size, width, dtype, rngs)
        self.input_norm = make_norm(config, head.states * target_width, dtype) if head.norm_before_fc else None
        norms = [make_norm(config, target_width, dtype) for _ in head.capture]
        self.fc_norm = nnx.List(norms) if head.fc_norm else None
        self.fc = Linear(head.states * target_width, width, False, dtype, rngs, (None, "embed"))
        layers = [DecoderLayer(config, layer, dtype, rngs) for layer in config.each_layer[1:]]
        self.layers = nnx.List([_FusingLayer(head, dtype, rngs), *layers])
        self.norm = make_norm(config, width, dtype)
        # With a reduced draft vocabulary, logits are looked up by the target's ids. With logits split over devices, the
        # look-up would move more than the split saves.
        axes, size = ("embed", "vocab" if head.draft_vocab_size is None else None), head.draft_vocab_size
        self.lm_head = Linear(width, size or head.vocab_size, False, dtype, rngs, axes) if head.own_head else None
        if head.draft_vocab_size is not None:
            token_v = jnp.arange(head.vocab_size, dtype=jnp.int32)
            self.draft_of_v = nnx.Param(jnp.where(token_v < head.draft_vocab_size, token_v, -1))

    def fuse(self, features: Sequence[Array]) -> Array:
        if self.fc_norm is not None:
            features = [norm(x) for norm, x in zip(self.fc_norm, features, strict=True)]
        fused = jnp.concatenate(features, axis=-1)
        return self.fc(fused if self.input_norm is None else self.input_norm(fused))

    def __call__(self, embedded_btd: Array, x_btd: Array, cache: KVCache, feed: Feed) -> tuple[Array, KVCache]:
        # Only the first layer reads the embedding.
        first, *others = self.layers
        assert isinstance(first, _FusingLayer)
        layers = [functools.partial(first.join, embedded_btd), *others]
        states, cache = run_layers(layers, self.head.decoder, x_btd, cache, feed)
        return (self.norm(states[-1]) if self.head.norm_output else states[-1]), cache

    def logits(self, x_bd: Array, unembed: Callable[[Array], Array]) -> Array:
        if self.head.norm_logits and not self.head.norm_output:
            x_bd = self.norm(x_bd)
        return unembed(x_bd) if self.lm_head is None else self.lm_head.logits(x_bd)


def _module(head: EagleHead, dtype: jnp.dtype, rngs: nnx.Rngs) -> _Eagle1 | _Eagle3:
    return (_Eagle1 if head.version == 1 else _Eagle3)(head, dtype, rngs)


_EAGLE = Functional(_module)


def _dtype_of(params: Any) -> jnp.dtype:
    return params["fc"]["kernel"].dtype
