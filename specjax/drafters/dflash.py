"""DFlash, DFlash2 and DSpark: draft heads whose block attends to the target's states, and to itself both ways."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import KVCache, update
from specjax.checks import check_integer
from specjax.drafters.block import Block
from specjax.drafters.dflash_layers import DFlashLayers
from specjax.drafters.draft_ids import by_targets_ids
from specjax.drafters.fields import check_unset
from specjax.drafters.markov import KINDS, Kind
from specjax.rows import text_at
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.decoder import empty_cache
from specjax.transformer.functional import Functional
from specjax.types import Context, Event, LanguageModel


@dataclasses.dataclass(frozen=True)
class DFlashHead:
    """The description of a DFlash or DSpark draft head; a ``Head`` of ``specjax.drafters.block``.

    DFlash (Chen et al. 2026, arXiv 2602.06036): ``c = norm(fc([states]))`` fuses states of the target at each position.
    Each layer keeps keys and values of all c, which get no norm of the layer's. A block is the row's last token, the
    anchor, and masks after it. Its queries see all c, and all places of the block: there is no order among drafts.
    DSpark (DeepSeek-AI 2026, arXiv 2607.05147) adds a Markov head, which corrects a draft's logits by the token before
    it, and a confidence head, which estimates whether a draft will be accepted. DFlash2 (z-lab) adds convolutions
    around attention and MLP, over the places of a block, and a selector, which chooses each draft among the likeliest
    tokens by the token before it.

    Example, a row of n = 10 tokens and a block of 4: the target's states, and so c, are known at positions 0 to 8. The
    block has positions 9 to 12. Position 9 holds token 9, the others the mask. DFlash: positions 10 to 12 predict
    tokens 10 to 12, so there are 3 drafts. With ``from_anchor``: positions 9 to 12 predict tokens 10 to 13.

    Attributes:
      decoder: describes the layers. Its ``vocab_size`` is the target's. Its ``max_position_embeddings`` and
        ``tie_word_embeddings`` are ignored. So is ``embedding_scale`` where the target embeds, and ``logit_scale``,
        ``logit_softcap`` and ``head_bias`` where the target unembeds.
      capture: hidden-state indices of the target, ascending: 0 the embedding output, i the output of layer i.
      block_size: places of a block, the anchor's included.
      mask_token: the token whose embedding the places after the anchor hold.
      from_anchor: each place predicts the token after its own, the anchor's place included (DSpark). Otherwise each
        place predicts its own token, and the anchor's place predicts nothing (DFlash).
      causal: for each layer, whether a place sees only places of the block up to its own. None: no layer is causal.
      target_hidden_size: width of the target's states, None for ``decoder.hidden_size``.
      draft_vocab_size: u, how many of the target's tokens can be drafted; None for all.
      own_embedding: whether the draft head has its own embedding; otherwise the target embeds.
      own_head: whether the draft head has its own output head; otherwise the target unembeds.
      window_stays: windows of w positions start w before the anchor for the whole block, and the block is seen whole,
        as speculators trains. Otherwise a place sees what is less than w positions away, as engines compute.
      markov: the Markov head. "vanilla": logits plus ``W2 W1[token before]``; "gated": W1's row times a gate of it and
        the state; "rnn": a recurrent state over the block. None: there is none.
      markov_rank: r, the width of W1's rows.
      confidence: whether there is a confidence head.
      confidence_with_markov: whether the confidence head reads W1's row of the token before, beside the state.
      conv_taps: places that the convolutions see, their own included; 0: there are none.
      conv_group: entries of a state that share what the convolutions make of the state; divides the width.
      selector_rank: r of the selector's tables; None: there is no selector. Not with a Markov head.
      selector_top_k: how many of the likeliest tokens the selector chooses among.

    Raises:
      ValueError: a size is out of range, fields contradict each other, or ``decoder`` has fields that the draft head
        does not compute. The message names the fields.
    """

    decoder: DecoderConfig
    capture: tuple[int, ...]
    block_size: int
    mask_token: int
    from_anchor: bool = False
    causal: tuple[bool, ...] | None = None
    target_hidden_size: int | None = None
    draft_vocab_size: int | None = None
    own_embedding: bool = False
    own_head: bool = False
    window_stays: bool = False
    markov: Kind | None = None
    markov_rank: int = 256
    confidence: bool = False
    confidence_with_markov: bool = False
    conv_taps: int = 0
    conv_group: int = 16
    selector_rank: int | None = None
    selector_top_k: int = 16

    def __post_init__(self):
        # 1. Defaults and sizes.
        layers = self.decoder.num_hidden_layers
        if self.target_hidden_size is None:
            object.__setattr__(self, "target_hidden_size", self.decoder.hidden_size)
        if self.causal is None:
            object.__setattr__(self, "causal", (False,) * layers)
        check_integer("target_hidden_size", self.target_hidden_size, 1)
        check_integer("block_size", self.block_size, 1 if self.from_anchor else 2, 2**16)
        check_integer("mask_token_id", self.mask_token, 0, self.vocab_size - 1)
        check_integer("markov_rank", self.markov_rank, 1)
        check_integer("conv_kernel_size", self.conv_taps, 0, self.block_size)
        if self.conv_taps:
            check_integer("conv_group_size", self.conv_group, 1)
            if self.decoder.hidden_size % self.conv_group:
                raise ValueError(
                    f"conv_group_size {self.conv_group} does not divide the width {self.decoder.hidden_size}; give a "
                    "number that does"
                )
        if self.selector_rank is not None:
            check_integer("selector_rank", self.selector_rank, 1)
            check_integer("selector_top_k", self.selector_top_k, 1, self.vocab_size)
        if self.draft_vocab_size is not None:
            check_integer("draft_vocab_size", self.draft_vocab_size, 1, self.vocab_size)
        assert self.causal is not None
        if len(self.causal) != layers:
            raise ValueError(f"causal has {len(self.causal)} entries for {layers} layers; give one for each")
        # 2. What excludes each other.
        ordered = all(one < other for one, other in zip(self.capture, self.capture[1:], strict=False))
        if not self.capture or self.capture[0] < 0 or not ordered:
            raise ValueError(
                f"the hidden-state indices are {self.capture}; give ascending ones, 0 for the embedding output and i "
                "for the output of layer i"
            )
        if self.markov not in (None, *KINDS):
            raise ValueError(f"the Markov head is {self.markov!r}; supported: {', '.join(KINDS)}")
        if self.confidence_with_markov and not (self.confidence and self.markov):
            raise ValueError("confidence_with_markov is true; it needs a confidence head and a Markov head")
        if self.selector_rank is not None and (self.markov or self.draft_vocab_size is not None):
            raise ValueError("a draft head with a selector has no Markov head and drafts the whole vocabulary")
        if self.draft_vocab_size is not None and not self.own_head:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size} and there is no output head for these tokens; give the "
                "draft head its own output head"
            )
        width, other = self.decoder.hidden_size, self.target_hidden_size
        if width != other and not (self.own_embedding and self.own_head):
            raise ValueError(
                f"the draft head is {width} wide and the target's states {other}: only a draft head with an embedding "
                "and an output head of its own can differ from the target in width"
            )
        # 3. What the layers do not compute.
        ignored = ["learned_positions", "per_layer", "recurrence", "latent", "experts", "parallel", "value_norm"]
        ignored += ["attention_sinks", "attention_softcap", "output_gate", "norm_places"]
        ignored += ["residual_scale", "layer_scale"]
        ignored += ["embedding_scale"] * self.own_embedding
        ignored += ["logit_scale", "logit_softcap", "head_bias"] * self.own_head
        check_unset("a block draft head", self.decoder, *ignored)
        if self.decoder.query_key_norm not in (None, "heads"):
            raise ValueError(
                f"query_key_norm is {self.decoder.query_key_norm!r}; a block draft head has 'heads' or none"
            )
        for i, layer in enumerate(self.decoder.each_layer):
            if layer != LayerConfig(layer.rope, layer.window):
                raise ValueError(f"layer {i} is {layer}; a layer of a block draft head has a rope and a window alone")

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def most_drafts(self) -> int:
        """The places that predict."""
        return self.block_size if self.from_anchor else self.block_size - 1

    @property
    def marginal(self) -> bool:
        """Whether no draft's logits depend on the draft before it."""
        return self.selector_rank is None and self.markov is None

    @property
    def name(self) -> str:
        """ "DFlash2" with convolutions or a selector, "DSpark" with a Markov or confidence head, else "DFlash"."""
        if self.conv_taps or self.selector_rank is not None:
            return "DFlash2"
        return "DSpark" if self.markov or self.confidence else "DFlash"

    def places(self, count: int) -> int:
        """Returns how many places a pass for ``count`` drafts has.

        Where a place sees later ones, all places count, as in training: fewer would change what the first predict.
        """
        assert self.causal is not None
        return count + (not self.from_anchor) if all(self.causal) else self.block_size

    def describe(self) -> str:
        """Returns one line for people: the size, the block, and the target's states that are read."""
        layers, width = self.decoder.num_hidden_layers, self.decoder.hidden_size
        parts = [f"{self.markov} Markov head of rank {self.markov_rank}"] if self.markov else []
        parts += ["confidence head"] if self.confidence else []
        parts += [f"selector of rank {self.selector_rank}"] if self.selector_rank else []
        states = ", ".join(map(str, self.capture))
        return (
            f"{self.name} head, {layers} layer{'s' if layers > 1 else ''} of width {width}"
            + "".join(f", {part}" for part in parts)
            + f": {self.most_drafts} drafts in a block of {self.block_size}, reads the target's hidden states {states} "
            f"(0 the embedding output, i the output of layer i), drafts {self.draft_vocab_size or self.vocab_size} of "
            f"{self.vocab_size} tokens"
        )

    def init_params(self, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns freshly drawn parameters as a nested dict of arrays; ``key`` is consumed.

        ``draft_of_v`` is as for ``EagleHead.init_params``.
        """
        return _DFLASH.init(self, key, dtype)

    def abstract_params(self, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns the parameters' shapes and dtypes without computing them."""
        return _DFLASH.abstract(self, dtype)

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params``, with a tuple of ``Axis`` in place of each array."""
        return _DFLASH.axes(self, _dtype_of(params))

    def check_fit(self, target: LanguageModel) -> None:
        """Raises ValueError unless the draft head fits the target's number of layers, width and vocabulary."""
        if not (self.own_embedding and self.own_head):
            target.require("embed", "unembed")
        # Engines disagree on the last layer's output: before the final norm, or after it.
        if target.num_layers is not None and self.capture[-1] >= target.num_layers:
            raise ValueError(
                f"the draft head reads the target's hidden states {self.capture} and the target has "
                f"{target.num_layers} layers, of which it may read all but the last; {_CURE}"
            )
        width = target.state_specs(self.capture)[0].shape[-1]
        if self.target_hidden_size != width:
            raise ValueError(
                f"the draft head reads states {self.target_hidden_size} wide and the target's are {width}; {_CURE}"
            )
        if self.vocab_size != target.vocab_size:
            raise ValueError(
                f"the draft head is for {self.vocab_size} tokens and the target has {target.vocab_size}; {_CURE}"
            )

    def init(self, params: Any, target: LanguageModel, rows: int, slots: int) -> KVCache:
        """Returns an empty cache of the layers: keys and values of c."""
        self.check_fit(target)
        return empty_cache(self.decoder, rows, slots, _dtype_of(params))

    def observe(self, params: Any, state: KVCache, context: Context, event: Event) -> KVCache:
        """Writes keys and values of the target's true states. No place of a block is ever written."""
        del context
        features = [x.astype(_dtype_of(params)) for x in event.features]
        # What is written past the kept places is never seen: a later event writes there before a block sees it.
        new = self._bind(params).contexts(jnp.concatenate(features, axis=-1), event.feed.position_bt)
        start_b = event.feed.start_b
        return KVCache(tuple(update(old, own, start_b) for old, own in zip(state.layers, new, strict=True)))

    def block(self, params: Any, state: KVCache, context: Context, count: int) -> tuple[Block, KVCache]:
        """Runs the anchor and the masks after it. A row of one token drafts from its anchor alone."""
        module, target = self._bind(params), context.target
        anchor_b1, end_b1 = text_at(context.tokens_bs, context.length_b - 1, 1), context.length_b[:, None] - 1
        used_b = jnp.where(context.running_b, context.length_b - 1, 0)
        states_btd = self._run(module, target, state, anchor_b1, end_b1, self.places(count), used_b)
        first = 0 if self.from_anchor else 1
        states_bgd = states_btd[:, first : first + count]
        return Block(states_bgd, self._logits(module, target, states_bgd), jnp.ones_like(context.running_b)), state

    def blocks(
        self,
        params: Any,
        target: LanguageModel,
        tokens_bt: Array,
        features: tuple[Array, ...],
        anchor_bm: Array,
        first_bm: Array,
    ) -> tuple[Array, Array]:
        """Runs m blocks of each text at once, for training.

        Each block is the one that ``block`` runs on the text up to its anchor. It sees nothing of the other blocks.

        Args:
          params: the draft head's parameters.
          target: the target.
          tokens_bt: int32, text.
          features: the target's captured states ``[b, t, d]`` over the text.
          anchor_bm: int32, the positions of the anchors, 0 to t - 1.
          first_bm: int32, the first position of the text that each block sees, at most its anchor's.

        Returns:
          The states ``[b, m, g, d]`` and float32 logits ``[b, m, g, u]`` of all drafts of a block, before ``step``.
        """
        module, g = self._bind(params), self.most_drafts
        b, m = anchor_bm.shape
        states_btd = jnp.concatenate([x.astype(_dtype_of(params)) for x in features], axis=-1)
        cache = KVCache(tuple(module.contexts(states_btd, jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)[None])))
        tokens_bm = jnp.take_along_axis(tokens_bt, anchor_bm, axis=1)
        states_btd = self._run(module, target, cache, tokens_bm, anchor_bm, self.places(g), None, first_bm)
        states_bmgd = states_btd.reshape(b, m, -1, states_btd.shape[-1])[:, :, -g:]
        logits = self._logits(module, target, states_bmgd.reshape(b, m * g, -1))
        return states_bmgd, logits.reshape(b, m, g, -1)

    def _run(
        self,
        module: "DFlashLayers",
        target: LanguageModel,
        cache: KVCache,
        anchor_bm: Array,
        end_bm: Array,
        places: int,
        used_b: Array | None,
        first_bm: Array | None = None,
    ) -> Array:
        """Returns the states ``[b, m places, d]`` of blocks of an anchor and masks. ``DFlashLayers`` says the rest."""
        tokens_bmp = jnp.full((*anchor_bm.shape, places), self.mask_token, jnp.int32).at[..., 0].set(anchor_bm)
        tokens_bt = tokens_bmp.reshape(anchor_bm.shape[0], -1)
        if self.own_embedding:
            x_btd = module.embed_tokens(tokens_bt)
        else:
            assert target.embed is not None
            x_btd = target.embed(target.params, tokens_bt).astype(module.fc.kernel[...].dtype)
        return module(x_btd, cache, end_bm, used_b, first_bm)

    def _logits(self, module: "DFlashLayers", target: LanguageModel, states_btd: Array) -> Array:
        """Returns float32 logits ``[b, t, u]``."""
        if self.own_head:
            return module.lm_head.logits(states_btd)
        assert target.unembed is not None
        given_btd = states_btd.astype(target.embedding_spec.dtype)
        return target.unembed(target.params, given_btd).astype(jnp.float32)

    def start(self, params: Any, rows: int) -> Array | None:
        """Returns the recurrent state ``[b, r]`` of an "rnn" Markov head before a block."""
        return jnp.zeros((rows, self.markov_rank), _dtype_of(params)) if self.markov == "rnn" else None

    def step(
        self, params: Any, carry: Array | None, logits_bu: Array, state_bd: Array, token_b: Array
    ) -> tuple[Array, Array | None]:
        """Corrects a draft's logits by the token before it; see ``specjax.drafters.block.Head.step``."""
        module = self._bind(params)
        if self.selector_rank is not None:
            return module.candidate_selector(logits_bu, state_bd, token_b), carry
        if self.markov is not None:
            bias_bu, carry = module.markov_head(state_bd, token_b, carry)
            logits_bu = logits_bu + bias_bu
        if self.draft_vocab_size is None:
            return logits_bu, carry
        return by_targets_ids(logits_bu, module.draft_of_v[...]), carry

    def confidence_of(self, params: Any, state_bd: Array, token_b: Array) -> Array:
        """Returns float32 ``[b]``: the estimated probability that a draft is accepted, given that all before it are.

        The estimate reads the state at the draft's place and the token before the draft, never the draft itself.

        Raises:
          ValueError: there is no confidence head.
        """
        return nnx.sigmoid(self.confidence_logit(params, state_bd, token_b))

    def confidence_logit(self, params: Any, state_bd: Array, token_b: Array) -> Array:
        """Returns the float32 logit ``[b]`` of what ``confidence_of`` returns."""
        if not self.confidence:
            raise ValueError("the draft head has no confidence head; give one that has")
        module, read = self._bind(params), [state_bd]
        if self.confidence_with_markov:
            read.append(module.markov_head.markov_w1(token_b).astype(state_bd.dtype))
        return module.confidence_head(jnp.concatenate(read, axis=-1))

    def _bind(self, params: Any) -> "DFlashLayers":
        return _DFLASH.bind(self, params, _dtype_of(params))


_CURE = "give the draft head's own target, or a draft head made for this one"


_DFLASH = Functional(DFlashLayers)


def _dtype_of(params: Any) -> jnp.dtype:
    return params["fc"]["kernel"].dtype
