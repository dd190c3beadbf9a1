"""The description of a decoder: everything that fixes its shapes and its computation, for all families."""

import dataclasses
from typing import Literal, get_args

from specjax.checks import check_integer, check_positive
from specjax.transformer.parts import EXTERNAL as EXTERNAL
from specjax.transformer.parts import MAX_HEAD as MAX_HEAD
from specjax.transformer.parts import MAX_LAYERS as MAX_LAYERS
from specjax.transformer.parts import MAX_SIZE as MAX_SIZE
from specjax.transformer.parts import DeltaConfig as DeltaConfig
from specjax.transformer.parts import ExpertsConfig as ExpertsConfig
from specjax.transformer.parts import LatentConfig as LatentConfig
from specjax.transformer.parts import LayerConfig as LayerConfig
from specjax.transformer.parts import MambaConfig as MambaConfig
from specjax.transformer.parts import PerLayerConfig as PerLayerConfig
from specjax.transformer.parts import RecurrenceConfig as RecurrenceConfig
from specjax.transformer.parts import Rope as Rope
from specjax.transformer.parts import plain_rope as plain_rope

Norm = Literal["rms", "rms_one_plus", "layer", "layer_unbiased"]
NormPlaces = Literal["before", "after", "around"]
QueryKeyNorm = Literal["heads", "each_head", "joint"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


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
      query_key_norm: norms over queries and keys: "heads", over each attention head, all with the same weights;
        "each_head", over each attention head with weights of its own (Command R+); "joint", over the entries of all
        attention heads together (OLMo 2); or None. Not with latent attention.
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
    query_key_norm: QueryKeyNorm | None = None
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
        kinds = {"norm": Norm, "norm_places": NormPlaces, "activation": Activation, "query_key_norm": QueryKeyNorm}
        for name, kind in kinds.items():
            choices = (*get_args(kind), None) if name == "query_key_norm" else get_args(kind)
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {choices}")
        # Fields that must agree with each other.
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.kv_heads}"
            )
        if self.head_bias and self.tie_word_embeddings:
            raise ValueError("head_bias is true, but tie_word_embeddings makes the embedding the output head; untie it")
        for name in ("attention_sinks", "output_gate", "query_key_norm", "value_norm", "attention_softcap"):
            if self.latent and getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but latent attention has none; give one of them")
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
            if layer.experts and self.experts is None:
                raise ValueError("a layer is a mixture of experts, but experts is None; describe them")
            if layer.recurrent and self.recurrence is None:
                raise ValueError("a layer is recurrent, but recurrence is None; describe it")
            if layer.rope and 2 * len(layer.rope.frequencies) > rotary:
                pairs = len(layer.rope.frequencies)
                raise ValueError(
                    f"rotary positions turn {pairs} pairs of entries, but an attention head has {rotary} entries"
                )
        if self.per_layer:
            check_integer("per_layer's vocab_size", self.per_layer.vocab_size, self.vocab_size, MAX_SIZE)
            check_integer("per_layer's width", self.per_layer.width, 1, MAX_SIZE // self.num_hidden_layers)

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
        own = ("head_dim", "kv_heads", "keys_as_values", "shares", "growth", "unit_heads")
        given = {name: value for name in own if (value := getattr(layer, name)) not in (None, False)}
        if layer.recurrent:
            seen = ("rope", "window", "chunk")
            given |= {name: value for name in seen if (value := getattr(layer, name)) is not None}
        if (self.latent or layer.recurrent) and given:
            raise ValueError(f"layer {number} has {given}, but not plain attention; leave out {', '.join(given)}")
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
