"""The description of a decoder: everything that fixes its shapes and its computation, for all families."""

import dataclasses
from typing import Literal, get_args

from specjax.checks import check_integer, check_positive

Norm = Literal["rms", "rms_one_plus", "layer", "layer_unbiased"]
NormPlaces = Literal["before", "after", "around"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

MAX_SIZE = 2**31 - 1  # tokens and positions are int32
MAX_LAYERS = 1000  # layers are unrolled
MAX_HEAD = 2**16
EXTERNAL = -1


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), after the scaling of the family.

    Attributes:
      frequencies: radians per position of each rotated pair. Entries of an attention head past the pairs stay as they
        are: with 3 frequencies, entries 0 .. 5 are rotated.
      scale: multiplies cosines and sines (YaRN's attention factor; Peng et al. 2023, section 3.4).
      interleaved: pair j of r pairs holds entries 2j and 2j + 1. False: it holds entries j and j + r.
      dynamic: (base, factor, original length) of dynamic NTK scaling. A position past the original length is rotated
        with the frequencies of a text that ends at this position. None: frequencies do not depend on the position.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    dynamic: tuple[float, float, int] | None = None


def plain_rope(width: int, theta: float = 10000.0) -> Rope:
    """Returns the unscaled rotary positions of ``width`` entries with base ``theta``."""
    return Rope(tuple(theta ** (-j / width) for j in range(0, width, 2)))


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The settings that may differ from layer to layer.

    Attributes:
      rope: rotary positions, or None for a layer without positions.
      window: tokens that a query sees, itself included (sliding-window attention), or None for all.
      chunk: c; positions are cut into chunks of c, and a query sees positions of its own chunk only. Example: with a
        chunk of 8, the query at position 10 sees positions 8, 9 and 10. None: there are no chunks.
      growth: (w, m, o), or (w, m) for o = 1; the query at position p is multiplied by
        ``1 + w log(1 + floor((p + o) / m))`` (Nakanishi 2025, arXiv 2501.19399, in steps of m tokens). None: queries
        are not.
      unit_heads: whether each head's query and key are divided by the root of their mean square, after the rotation.
      experts: whether the layer has the mixture ``DecoderConfig.experts``.
      recurrent: whether ``DecoderConfig.recurrence`` takes the place of attention.
      head_dim: h of this layer; None means the decoder's.
      kv_heads: k of this layer; None means the decoder's.
      intermediate_size: f of this layer; None means the decoder's.
      keys_as_values: values come from the output of the key projection, so there is no value projection (Gemma 4).
      shares: an earlier layer, to whose keys and values this layer attends (Brandon et al. 2024, arXiv 2405.12981).
        Then this layer has no keys and values of its own, and no cache. ``EXTERNAL``: a layer of another model, whose
        part of the cache the caller gives (an assistant).
    """

    rope: Rope | None
    window: int | None = None
    chunk: int | None = None
    growth: tuple[float, int] | tuple[float, int, int] | None = None
    unit_heads: bool = False
    experts: bool = False
    recurrent: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None
    keys_as_values: bool = False
    shares: int | None = None

    @property
    def reach(self) -> int | None:
        """The most tokens that a query sees, or None if there is no limit."""
        limits = [limit for limit in (self.window, self.chunk) if limit is not None]
        return min(limits, default=None)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1); the cache holds latents.

    Attributes:
      query_rank: width of the queries' latent, or None for queries straight from the hidden state.
      key_value_rank: r, width of the latent from which keys and values are projected.
      plain_width: entries of a query or key without rotary positions, per attention head.
      rotary_width: entries of a query or key with rotary positions. All attention heads share the key's.
      value_width: entries of a value, per attention head.
    """

    query_rank: int | None
    key_value_rank: int
    plain_width: int
    rotary_width: int
    value_width: int


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """A recurrence by the gated delta rule (Yang et al. 2025, arXiv 2412.06464).

    Attributes:
      key_heads: k, heads of queries and keys.
      heads: heads of values, each with a state; a multiple of ``key_heads``.
      key_width: e, entries of a query or key.
      value_width: h, entries of a value.
      taps: tokens that the convolution of queries, keys and values sees.
    """

    key_heads: int
    heads: int
    key_width: int
    value_width: int
    taps: int = 4

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """k, e, r and h of a row's state: key heads, width of a key, value heads that share a key, width of a value."""
        return self.key_heads, self.key_width, self.heads // self.key_heads, self.value_width


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """A recurrence by Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    Attributes:
      heads: heads of values, each with a state; a multiple of ``groups``.
      head_width: h, entries of a value.
      groups: k, how many queries and keys there are. The heads of a group share them.
      state_width: e, entries of a query or key.
      taps: tokens that the convolution of queries, keys and values sees.
      conv_bias: biases on the convolution.
      proj_bias: biases on the projections.
    """

    heads: int
    head_width: int
    groups: int
    state_width: int
    taps: int = 4
    conv_bias: bool = True
    proj_bias: bool = False

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """k, e, r and h of a row's state, as in ``DeltaConfig``."""
        return self.groups, self.state_width, self.heads // self.groups, self.head_width


RecurrenceConfig = DeltaConfig | MambaConfig


@dataclasses.dataclass(frozen=True)
class PerLayerConfig:
    """Embeddings of each token for each layer, which the layer adds to the residual stream (Gemma 3n, Gemma 4).

    Attributes:
      vocab_size: tokens of the table, at least the decoder's.
      width: p, entries of the embedding of one token for one layer.
    """

    vocab_size: int
    width: int


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538).

    Attributes:
      num_experts: e, experts of a layer.
      per_token: c, experts that each token goes to.
      intermediate_size: width of one expert.
      score: how router logits become scores: "softmax", "sigmoid", or "sparsemixer" (Liu et al. 2024, 2409.12136).
        Sparsemixer chooses one expert after the other. An expert's weight is its softmax over those experts that were
        not chosen before it and have nearly its logit: ``(best - logit) / max(|logit|, best)`` is at most ``nearness``.
      renormalize: whether the chosen experts' scores are divided by their sum.
      scale: multiplies the chosen experts' weights.
      groups: experts are chosen within the best groups only (DeepSeek-V3, section 2.1.2); 1 for no groups.
      best_groups: how many groups the experts are chosen from.
      group_best: a group is as good as the sum of the scores of so many of its best experts.
      router_bias: whether a bias per expert is added to the router logits, for the choice and for the weights.
      corrected: whether a bias per expert is added to the scores. It decides the choice, not the weights.
      shared_size: width of the shared MLP that every token goes through as well; 0 for none.
      shared_gate: whether the sigmoid of one more projection of the token scales the shared MLP's output (Qwen3-Next).
      bias: whether the experts' three projections have biases.
      clamp: (a, m); with g = min(gate, m) and u = clip(up, -m, m), an expert computes ``down(g sigmoid(a g) (u + 1))``.
        None: it computes ``down(act(gate) up)``.
      weighs_inputs: whether the weights multiply what goes into the experts, not what comes out.
      beside: whether the mixture stands beside the layer's MLP, with norms of its own, and the outputs of the two are
        added (Gemma 4). False: it takes the MLP's place.
      normed_router: whether the router norms its input and multiplies each entry by a parameter (Gemma 4).
      expert_scale: whether a parameter multiplies the weight of each expert (Gemma 4).
      nearness: see "sparsemixer"; None with other scores.
    """

    num_experts: int
    per_token: int
    intermediate_size: int
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    best_groups: int = 1
    group_best: int = 2
    router_bias: bool = False
    corrected: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    bias: bool = False
    clamp: tuple[float, float] | None = None
    weighs_inputs: bool = False
    beside: bool = False
    normed_router: bool = False
    expert_scale: bool = False
    nearness: float | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder: one description for all families, read from a ``config.json`` by ``specjax.hf``.

    Hashable, so that it can be a static argument of ``jit``.

    Attributes:
      vocab_size: v.
      hidden_size: d, the model width.
      intermediate_size: f, the MLP width.
      num_hidden_layers: decoder layers.
      num_attention_heads: n, query heads.
      num_key_value_heads: k, key and value heads; divides n. None means n.
      head_dim: h. None means ``hidden_size // num_attention_heads``.
      max_position_embeddings: longest sequence.
      layers: one entry per layer. None means full attention with plain rotary positions.
      learned_positions: a table of ``max_position_embeddings`` vectors is added to the embeddings.
      norm: "rms"; "rms_one_plus", which multiplies by 1 + weight; "layer", LayerNorm with biases; or "layer_unbiased",
        LayerNorm without.
      norm_eps: added to the variance or mean square.
      norm_places: where a layer has norms: "before" attention and MLP, "after" them (OLMo team 2024, OLMo 2, section
        3.2), or "around", which is both.
      parallel: attention and MLP read the same state (Wang and Komatsuzaki 2021, GPT-J). A norm before them is one for
        both. False: the MLP reads what attention has changed.
      residual_scale: multiplies the outputs of attention and MLP before they are added to the residual stream.
      query_key_norm: norms over the query and the key of each attention head.
      joint_query_key_norm: these norms are over the entries of all attention heads together.
      value_norm: root-mean-square norms without weights over the value of each attention head (Gemma 4).
      activation: of the MLP; "gelu_tanh" is the tanh approximation.
      gated_mlp: ``down(act(gate(x)) * up(x))``; otherwise ``down(act(up(x)))``.
      attention_bias: biases on the query, key and value projections (on latents: on those from the hidden state).
      output_bias: bias on the attention's output projection.
      attention_sinks: each query head has a learned logit, which takes part in the softmax over the slots and has no
        value (Xiao et al. 2024, arXiv 2309.17453). Not with latent attention.
      output_gate: the output of the attention heads is multiplied by the sigmoid of one more projection (Qwen3-Next).
        This projection is the second half of each head's part of the query projection. Not with latent attention.
      mlp_bias: biases on the MLP's projections.
      tie_word_embeddings: the output head is the embedding.
      head_bias: bias on the output head.
      embedding_scale: multiplies the embeddings, rounded to their dtype.
      attention_scale: multiplies query-key products; None means ``head_dim ** -0.5``, or for latent attention
        ``(plain_width + rotary_width) ** -0.5``.
      attention_softcap: c in ``c * tanh(scores / c)`` (Gemma 2), or None.
      logit_scale: multiplies the logits, before the soft cap.
      logit_softcap: the same as ``attention_softcap``, for the logits.
      latent: multi-head latent attention in place of grouped-query attention.
      experts: the mixture of the layers that have one.
      recurrence: what takes the place of attention in the layers that are recurrent.
      per_layer: embeddings for each layer, or None.
      layer_scale: each layer ends with a product of the residual stream and one number (Gemma 4).

    Raises:
      ValueError: a number is out of range, a name is unknown, or sizes contradict each other. The message names them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    layers: tuple[LayerConfig, ...] | None = None
    learned_positions: bool = False
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    norm_places: NormPlaces = "before"
    parallel: bool = False
    residual_scale: float = 1.0
    query_key_norm: bool = False
    joint_query_key_norm: bool = False
    value_norm: bool = False
    activation: Activation = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    output_gate: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    recurrence: RecurrenceConfig | None = None
    per_layer: PerLayerConfig | None = None
    layer_scale: bool = False

    def __post_init__(self):
        # Defaults that follow from other fields come first, so that the checks see the values in use.
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            for name in ("hidden_size", "num_attention_heads"):
                check_integer(name, getattr(self, name), 1, MAX_SIZE)
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        # Each field by itself. Later checks divide by these numbers.
        for name, most in _MOST.items():
            check_integer(name, getattr(self, name), 1, most)
        for name in ("norm_eps", "embedding_scale", "residual_scale", "logit_scale"):
            check_positive(name, getattr(self, name))
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            check_positive(name, getattr(self, name), optional=True)
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} must be true or false, got {getattr(self, field.name)!r}")
        for name, kind in (("norm", Norm), ("norm_places", NormPlaces), ("activation", Activation)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {choices}")
        # Fields that must agree with each other.
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.kv_heads}"
            )
        if self.latent and self.attention_sinks:
            raise ValueError("attention_sinks is true beside latent attention, which has none; give one of them")
        if self.head_bias and self.tie_word_embeddings:
            raise ValueError("head_bias is true, but tie_word_embeddings makes the embedding the output head; untie it")
        if self.joint_query_key_norm and not self.query_key_norm:
            raise ValueError("joint_query_key_norm is true, but query_key_norm false; set both")
        if self.latent and self.output_gate:
            raise ValueError("output_gate is true beside latent attention, which has no gate; give one of them")
        if self.layers is None:
            if self.head_width % 2:
                raise ValueError(f"head_dim {self.head_width} is odd; rotary positions need an even one")
            layer = LayerConfig(rope=plain_rope(self.head_width))
            object.__setattr__(self, "layers", (layer,) * self.num_hidden_layers)
        self._check_layers()

    def _check_layers(self) -> None:
        if len(self.each_layer) != self.num_hidden_layers:
            raise ValueError(
                f"layers has {len(self.each_layer)} entries for num_hidden_layers {self.num_hidden_layers}"
            )
        for i, layer in enumerate(self.each_layer):
            # Latent attention rotates a part of each query only.
            rotary = self.latent.rotary_width if self.latent else self.head_width_of(layer)
            self._check_heads(i, layer)
            if layer.window is not None:
                check_integer("sliding window", layer.window, 1, MAX_SIZE)
            if layer.chunk is not None:
                check_integer("attention chunk", layer.chunk, 1, MAX_SIZE)
            if layer.growth is not None:
                check_positive("growth of queries", layer.growth[0])
                check_integer("growth of queries, tokens of a step", layer.growth[1], 1, MAX_SIZE)
                for first in layer.growth[2:]:
                    check_integer("growth of queries, first position", first, 0, MAX_SIZE)
            if layer.experts and self.experts is None:
                raise ValueError("a layer is a mixture of experts, but experts is None; describe them")
            if layer.recurrent and self.recurrence is None:
                raise ValueError("a layer is recurrent, but recurrence is None; describe it")
            if layer.rope and 2 * len(layer.rope.frequencies) > rotary:
                pairs = len(layer.rope.frequencies)
                raise ValueError(f"rotary positions turn {pairs} pairs of entries, but a head has {rotary} entries")
        if self.per_layer:
            check_integer("per_layer's vocab_size", self.per_layer.vocab_size, self.vocab_size, MAX_SIZE)
            check_integer("per_layer's width", self.per_layer.width, 1, MAX_SIZE // self.num_hidden_layers)
        # The router takes the best groups and then experts within them: both choices must be possible.
        if self.experts:
            experts = self.experts
            for name in ("num_experts", "per_token", "intermediate_size", "groups", "best_groups", "group_best"):
                check_integer(f"experts' {name}", getattr(experts, name), 1, MAX_SIZE)
            check_positive("experts' scale", experts.scale)
            for value in experts.clamp or ():
                check_positive("experts' clamp", value)
            check_positive("experts' nearness", experts.nearness, optional=experts.score != "sparsemixer")
            if experts.score == "sparsemixer" and (experts.renormalize or experts.corrected or experts.groups > 1):
                raise ValueError(
                    "the experts' score is 'sparsemixer', which has its own choice and weights; renormalize and "
                    "corrected must be false, and groups 1"
                )
            if experts.num_experts % experts.groups or experts.best_groups > experts.groups:
                raise ValueError(
                    f"{experts.num_experts} experts in {experts.groups} groups (n_group), {experts.best_groups} of "
                    "them chosen (topk_group): the groups must be of one size, and no more chosen than there are"
                )
            choosable = experts.num_experts // experts.groups * experts.best_groups
            if experts.per_token > choosable:
                raise ValueError(
                    f"{experts.per_token} experts per token (num_experts_per_tok), but only {choosable} to choose from"
                )

        if self.recurrence:
            for field in dataclasses.fields(self.recurrence):
                if field.type is int:
                    check_integer(f"the recurrence's {field.name}", getattr(self.recurrence, field.name), 1, MAX_SIZE)
            keys, _, _, _ = self.recurrence.state_shape
            if self.recurrence.heads % keys:
                raise ValueError(
                    f"the recurrence has {self.recurrence.heads} value heads for {keys} keys; give a multiple of {keys}"
                )

    def _check_heads(self, number: int, layer: LayerConfig) -> None:
        """Checks the sizes of a layer, and that it shares the keys and values of an earlier layer with the same."""
        check_integer(f"layer {number}'s head_dim", self.head_width_of(layer), 1, MAX_HEAD)
        check_integer(f"layer {number}'s key/value heads", self.kv_heads_of(layer), 1, MAX_SIZE)
        check_integer(f"layer {number}'s intermediate_size", self.mlp_width_of(layer), 1, MAX_SIZE)
        if self.num_attention_heads % self.kv_heads_of(layer):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of the {self.kv_heads_of(layer)} "
                f"key/value heads of layer {number}"
            )
        own = layer.head_dim, layer.kv_heads, layer.keys_as_values or None, layer.shares
        if (self.latent or layer.recurrent) and own != (None,) * 4:
            raise ValueError(f"layer {number} has keys and values of its own kind, but not plain attention; drop them")
        if layer.shares in (None, EXTERNAL):
            return
        check_integer(f"layer {number}'s shares", layer.shares, 0, number - 1)
        source = self.each_layer[layer.shares]
        sizes = [(self.head_width_of(at), self.kv_heads_of(at)) for at in (source, layer)]
        if source.shares is not None or source.recurrent or sizes[0] != sizes[1]:
            raise ValueError(
                f"layer {number} shares the keys and values of layer {layer.shares}, which must have its own, of "
                f"{sizes[1][1]} heads of {sizes[1][0]} entries"
            )

    def head_width_of(self, layer: LayerConfig) -> int:
        """Returns h of a layer."""
        return self.head_width if layer.head_dim is None else layer.head_dim

    def kv_heads_of(self, layer: LayerConfig) -> int:
        """Returns k of a layer."""
        return self.kv_heads if layer.kv_heads is None else layer.kv_heads

    def mlp_width_of(self, layer: LayerConfig) -> int:
        """Returns f of a layer."""
        return self.intermediate_size if layer.intermediate_size is None else layer.intermediate_size

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def each_layer(self) -> tuple[LayerConfig, ...]:
        assert self.layers is not None
        return self.layers


_MOST = {
    "vocab_size": MAX_SIZE,
    "hidden_size": MAX_SIZE,
    "intermediate_size": MAX_SIZE,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_SIZE,
    "num_key_value_heads": MAX_SIZE,
    "head_dim": MAX_HEAD,
    "max_position_embeddings": MAX_SIZE,
}
