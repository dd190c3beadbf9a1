"""Descriptions of the parts of a decoder: rotary positions, layers, latents, recurrences, experts."""

import dataclasses
from typing import Literal, get_args

from specjax.checks import check_integer, check_positive

Score = Literal["softmax", "sigmoid", "sparsemixer"]

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

    def __post_init__(self):
        if self.window is not None:
            check_integer("sliding window", self.window, 1, MAX_SIZE)
        if self.chunk is not None:
            check_integer("attention chunk", self.chunk, 1, MAX_SIZE)
        if self.growth is not None:
            check_positive("growth of queries", self.growth[0])
            check_integer("growth of queries, tokens of a step", self.growth[1], 1, MAX_SIZE)
            for first in self.growth[2:]:
                check_integer("growth of queries, first position", first, 0, MAX_SIZE)

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

    def __post_init__(self):
        _check_recurrence(self)

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

    def __post_init__(self):
        _check_recurrence(self)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """k, e, r and h of a row's state, as in ``DeltaConfig``."""
        return self.groups, self.state_width, self.heads // self.groups, self.head_width


RecurrenceConfig = DeltaConfig | MambaConfig


def _check_recurrence(sizes: RecurrenceConfig) -> None:
    for field in dataclasses.fields(sizes):
        if field.type is int:
            check_integer(f"the recurrence's {field.name}", getattr(sizes, field.name), 1, MAX_SIZE)
    keys = sizes.state_shape[0]
    if sizes.heads % keys:
        raise ValueError(f"the recurrence has {sizes.heads} value heads for {keys} keys; give a multiple of {keys}")


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
    score: Score = "softmax"
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

    def __post_init__(self):
        # The router takes the best groups and then experts within them: both choices must be possible.
        for name in ("num_experts", "per_token", "intermediate_size", "groups", "best_groups", "group_best"):
            check_integer(f"experts' {name}", getattr(self, name), 1, MAX_SIZE)
        check_integer("experts' shared_size", self.shared_size, 0, MAX_SIZE)
        check_positive("experts' scale", self.scale)
        for value in self.clamp or ():
            check_positive("experts' clamp", value)
        if self.score not in get_args(Score):
            raise ValueError(f"the experts' score is {self.score!r}; choose from {get_args(Score)}")
        check_positive("experts' nearness", self.nearness, optional=self.score != "sparsemixer")
        plain = not (self.renormalize or self.corrected or self.expert_scale or self.groups > 1)
        if self.score == "sparsemixer" and not plain:
            raise ValueError(
                "the experts' score is 'sparsemixer', which has its own choice and weights; renormalize, corrected and "
                "expert_scale must be false, and groups 1"
            )
        if self.shared_size and self.beside:
            raise ValueError(
                f"shared_size is {self.shared_size}, but beside is true: the MLP is the shared one; give 0"
            )
        if self.shared_gate and not self.shared_size:
            raise ValueError("shared_gate is true, but shared_size 0: there is nothing to scale; give a shared_size")
        if self.num_experts % self.groups or self.best_groups > self.groups:
            raise ValueError(
                f"{self.num_experts} experts in {self.groups} groups (n_group), {self.best_groups} of "
                "them chosen (topk_group): the groups must be of one size, and no more chosen than there are"
            )
        choosable = self.num_experts // self.groups * self.best_groups
        if self.per_token > choosable:
            raise ValueError(
                f"{self.per_token} experts per token (num_experts_per_tok), but only {choosable} to choose from"
            )
