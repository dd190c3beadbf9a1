"""The least time of a pass on a mesh: bytes read, operations computed, bytes sent.

A pass takes the longer of reading and computing (Williams et al. 2009). The collectives are added, since each waits
for the layer before it. All figures are per device, in bytes and seconds. ``docs/scaling.md`` gives the formulas and
lists the parts that they leave out.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.planning.hardware import Hardware
from specjax.transformer import DecoderConfig, LayerConfig
from specjax.transformer.config import DeltaConfig
from specjax.transformer.decoder import abstract_params

# int4: half a byte, and a float32 scale for each 128 (``specjax.quantized``).
BYTES = {"float32": 4, "bfloat16": 2, "float8": 1, "int8": 1, "int4": 0.5 + 4 / 128}
# All-reduces that a split vocabulary costs, as docs/distributed.md counts them in the loop. Filters search two
# thresholds, top-k's and top-p's, in 10 steps each on an accelerator, and sum what each keeps.
WARP = {"greedy": 2, "temperature": 2, "filters": 2 + 2 + 2 * 10}
DRAW = 2


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices by axis.

    Rows are split over ``data``; attention heads, MLPs and vocabulary over ``tensor``; experts over ``expert``.
    """

    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.expert


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder, and the dtypes of its weights and its cache, which are keys of ``BYTES``."""

    config: DecoderConfig
    weights: str = "bfloat16"
    cache: str = "bfloat16"


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Raises ValueError if the mesh does not divide the model. It need not divide the key/value heads."""
    # Key/value heads are missing here: if tensor does not divide them, each device holds all of them.
    experts = config.experts
    widths = {"num_attention_heads": config.num_attention_heads, "vocab_size": config.vocab_size}
    if config.per_layer:
        widths["per_layer's vocab_size"] = config.per_layer.vocab_size
    for layer in config.each_layer:
        if not layer.experts or (experts and experts.beside):
            widths["intermediate_size"] = math.gcd(widths.get("intermediate_size", 0), config.mlp_width_of(layer))
    if experts:
        widths |= {
            "an expert's width": experts.intermediate_size,
            "the shared experts' width": experts.shared_size,
        }
    if config.recurrence:
        keys, _, sharing, _ = config.recurrence.state_shape
        delta = isinstance(config.recurrence, DeltaConfig)
        widths["the recurrence's heads"] = keys if delta else keys * sharing
    for name, width in widths.items():
        if width % mesh.tensor:
            raise ValueError(f"tensor={mesh.tensor} does not divide {name} {width}; choose a divisor")
    if mesh.expert > 1 and experts is None:
        raise ValueError(f"expert={mesh.expert}, but the model has no experts; leave the axis out")
    if experts and experts.num_experts % mesh.expert:
        raise ValueError(f"expert={mesh.expert} does not divide the {experts.num_experts} experts; choose a divisor")


class Weights(NamedTuple):
    """One device's part of a model's parameters.

    Attributes:
      looked_up: bytes of tables from which a pass reads one row per token.
      dense: bytes that every pass reads whole.
      experts: bytes of experts, from which a pass reads the experts that were chosen.
      products: multiplications per token with these parameters.
    """

    looked_up: float
    dense: float
    experts: float
    products: float

    @property
    def held(self) -> float:
        """Bytes of all parameters on the device."""
        return self.looked_up + self.dense + self.experts


# Names of the matrices that are split over tensor: by attention heads, by MLP width or vocabulary.
_HEADS = {"q_proj", "q_b_proj", "o_proj", "k_up", "v_up"}
_WIDTHS = {"gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
_RECURRENCE = {"v_proj", "gate_proj", "step_proj", "rate_proj", "o_proj", "v_conv"}


@functools.cache
def weights(model: Model, mesh: Mesh = Mesh()) -> Weights:
    """Counts one device's part of the parameters that ``abstract_params`` declares."""
    config = model.config
    recurrence = _RECURRENCE | ({"q_proj", "k_proj"} if _splits_keys(config, mesh) else set())
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, jnp.dtype("bfloat16")))
    looked_up, dense, stacks, products = 0.0, 0.0, 0.0, 0.0
    for path, leaf in leaves:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        split = _HEADS | _WIDTHS
        if names[0] == "layers" and _splits_kv(config, config.each_layer[int(names[1])], mesh):
            split = split | {"k_proj", "v_proj"}
        split = recurrence if "recurrence" in names else split
        # Vectors, such as biases and norms, are small: they count as whole.
        size = leaf.size / (mesh.tensor if leaf.ndim > 1 and not split.isdisjoint(names) else 1)
        # A few parameters stay float32. Tables of embeddings are int8 where kernels are int4.
        stored = "int8" if model.weights == "int4" and "embed_tokens" in names else model.weights
        width = 4 if leaf.dtype == jnp.float32 else BYTES[stored]
        if "experts" in names and config.experts:
            stacks += size / mesh.expert * width
            products += size / mesh.expert * config.experts.per_token / config.experts.num_experts
        elif (
            names[0] == "embed_positions"
            or names[:2] == ["per_layer", "embed_tokens"]
            or (names[0] == "embed_tokens" and not config.tie_word_embeddings)
        ):
            looked_up += size * width
        else:
            # Tied embeddings are among these: the output head reads all of them.
            dense += size * width
            products += size
    return Weights(looked_up, dense, stacks, products)


def num_params(config: DecoderConfig) -> int:
    """Returns the number of the model's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, jnp.dtype("bfloat16"))))


def _splits_kv(config: DecoderConfig, layer: LayerConfig, mesh: Mesh) -> bool:
    """Returns whether keys and values are split. Latents, and heads that do not divide, are copied to each device."""
    return config.latent is None and config.kv_heads_of(layer) % mesh.tensor == 0


def _splits_keys(config: DecoderConfig, mesh: Mesh) -> bool:
    """Returns whether the keys of a recurrence are split. Those that do not divide are copied to each device."""
    return config.recurrence is not None and config.recurrence.state_shape[0] % mesh.tensor == 0


def cache_bytes(model: Model, rows: float, slots: int, mesh: Mesh = Mesh()) -> float:
    """Returns the bytes on one device of a cache of ``rows`` rows: ``slots`` tokens in each, and states."""
    return rows * (slots * token_bytes(model, mesh) + state_bytes(model, mesh))


def state_bytes(model: Model, mesh: Mesh = Mesh()) -> float:
    """Returns the bytes of a row's states in all recurrent layers, on one device. States are float32.

    The last inputs of the convolutions are left out: they are less than a hundredth of it.
    """
    config = model.config
    entries = math.prod(config.recurrence.state_shape) if config.recurrence else 0
    return 4 * entries / mesh.tensor * sum(layer.recurrent for layer in config.each_layer)


def token_bytes(model: Model, mesh: Mesh = Mesh()) -> float:
    """Returns the bytes per token of the caches of all layers on one device."""
    return sum(
        _layer_bytes(model, layer, mesh)
        for layer in model.config.each_layer
        if not layer.recurrent and layer.shares is None
    )


def _layer_bytes(model: Model, layer: LayerConfig, mesh: Mesh) -> float:
    """Returns the bytes per token that a layer reads of a cache on one device: keys and values, or the latent."""
    config = model.config
    if config.latent:
        entries = config.latent.key_value_rank + config.latent.rotary_width
    else:
        parts = mesh.tensor if _splits_kv(config, layer, mesh) else 1
        entries = 2 * config.kv_heads_of(layer) * config.head_width_of(layer) // parts
    return entries * BYTES[model.cache]


def touched_experts(num_experts: int, per_token: int, tokens: float) -> float:
    """Returns how many experts the tokens are expected to visit, if each token chooses evenly and independently."""
    return num_experts * (1 - (1 - per_token / num_experts) ** tokens)


class Messages(NamedTuple):
    """All-reduces of one kind in a pass.

    Attributes:
      number: how many, one after the other.
      devices: over how many devices.
      size: bytes of what is summed.
    """

    number: int
    devices: int
    size: float


@dataclasses.dataclass(frozen=True)
class Pass:
    """One device's work in a pass.

    Attributes:
      read: bytes read from memory.
      flops: operations; a multiplication and its addition are two.
      messages: collectives.
    """

    read: float
    flops: float
    messages: tuple[Messages, ...] = ()

    @property
    def collectives(self) -> int:
        """Number of all-reduces."""
        return sum(message.number for message in self.messages)

    @property
    def sent(self) -> float:
        """Bytes that each device sends.

        An all-reduce over n devices scatters sums and gathers them. Each half sends (n - 1) / n of its size. Example,
        n = 4, 8 MB: 12 MB.
        """
        return sum(2 * (m.devices - 1) / m.devices * m.size * m.number for m in self.messages)


def forward(
    model: Model, mesh: Mesh, rows: float, tokens: int, context: int, chosen: tuple[Messages, ...] = ()
) -> Pass:
    """Counts a pass.

    Args:
      model: the model.
      mesh: its mesh.
      rows: rows of one device.
      tokens: tokens of each row in this pass.
      context: tokens of each row before this pass.
      chosen: collectives of choosing tokens from the pass's logits, from ``choosing``.
    """
    # Weights are read once for all rows. Experts are read only if a token of some row chose them.
    config, held = model.config, weights(model, mesh)
    fed = rows * tokens
    read = held.dense
    if config.experts:
        experts = config.experts
        read += held.experts * touched_experts(experts.num_experts, experts.per_token, fed) / experts.num_experts
    flops = 2 * held.products * fed
    # Attention reads each row's cache, and multiplies queries with keys and scores with values. With latents, the
    # projections are absorbed: scores are as wide as a cache entry, values as wide as the latent.
    heads, latent = config.num_attention_heads / mesh.tensor, config.latent
    for layer in config.each_layer:
        if layer.recurrent:
            continue
        entries = 2 * latent.key_value_rank + latent.rotary_width if latent else 2 * config.head_width_of(layer)
        # A chunk starts at a multiple of its size. Example: with chunks of 8, position 21 sees positions 16 to 21.
        start = context // layer.chunk * layer.chunk if layer.chunk else 0
        seen = min(context - start + tokens, layer.window or math.inf)
        read += rows * seen * _layer_bytes(model, layer, mesh)
        flops += 2 * fed * heads * entries * seen
    # States are read by the pass and, when it is known which places stay, once more. Each token multiplies each entry
    # with its query, its key and what it writes.
    states = state_bytes(model, mesh)
    read += rows * 2 * states
    flops += 2 * fed * 3 * states / 4
    return Pass(read, flops, _messages(model, mesh, fed) + chosen)


def _messages(model: Model, mesh: Mesh, fed: float) -> tuple[Messages, ...]:
    """Returns the all-reduces of hidden states of ``fed`` tokens."""
    config = model.config
    size = fed * config.hidden_size * max(2, BYTES[model.weights])  # activations of 8-bit weights are bfloat16
    mixed = sum(layer.experts for layer in config.each_layer)
    shared = mixed if config.experts and config.experts.shared_size else 0
    # Over tensor: the embedding, the output of each attention, and each MLP that is dense or shared.
    beside = mixed if config.experts and config.experts.beside else 0
    over_tensor = 1 + config.num_hidden_layers + (config.num_hidden_layers - mixed) + shared + beside
    # Joint norms sum the squares of all heads' queries, and those of all keys.
    joint = 2 * config.num_hidden_layers if config.query_key_norm == "joint" else 0
    # The table of embeddings for each layer is split like that of the embedding, and wider.
    sizes = config.per_layer
    wide = size / config.hidden_size * config.num_hidden_layers * sizes.width if sizes else 0
    messages = (
        Messages(over_tensor, mesh.tensor, size),
        Messages(int(sizes is not None), mesh.tensor, wide),
        Messages(joint, mesh.tensor, 4 * fed),
        Messages(mixed, mesh.tensor * mesh.expert, size),
    )
    return tuple(message for message in messages if message.devices > 1 and message.number)


def choosing(mesh: Mesh, rows: float, positions: int, sampling: str, verify: int = 0) -> tuple[Messages, ...]:
    """Returns the all-reduces that warp the logits of a pass, verify drafts, and draw one token.

    Args:
      mesh: the target's mesh, also for a draft's pass: the draft's logits are split like the target's, since
        verification compares the two.
      rows: rows of one device.
      positions: positions of each row: g + 1 in the target's pass, 1 in a draft's.
      sampling: a key of ``WARP``.
      verify: number of all-reduces of verification.
    """
    if mesh.tensor == 1:
        return ()
    warped = Messages(WARP[sampling] + verify, mesh.tensor, 4 * rows * positions)
    return warped, Messages(DRAW, mesh.tensor, 4 * rows)


class Seconds(NamedTuple):
    """The time of a pass, and its parts, in seconds."""

    memory: float
    arithmetic: float
    collectives: float
    total: float


def seconds(work: Pass, hardware: Hardware, dtype: str) -> Seconds:
    """Returns the least time of a pass whose weights have the given dtype."""
    memory = work.read / hardware.bandwidth
    arithmetic = work.flops / hardware.flops.get(dtype, hardware.flops["bfloat16"])
    collectives = sum(m.number * all_reduce_seconds(hardware, m.devices, m.size) for m in work.messages)
    on_device = max(memory, arithmetic) if hardware.overlaps else memory + arithmetic
    return Seconds(memory, arithmetic, collectives, on_device + collectives)


def all_reduce_seconds(hardware: Hardware, devices: int, size: float) -> float:
    """Returns the time of one all-reduce of ``size`` bytes.

    A ring over n devices sends 2 (n - 1) / n of the bytes from each. In a torus, n devices are assumed to form a block
    without wraparound links. The block has as many axes as n has factors of two, at most all of the torus, and one
    link on each axis. A sum hops the length of each axis and back. Example, n = 16 in a torus of 2 axes: a block of
    4 x 4, 2 links, 2 * 2 * (4 - 1) = 12 hops.

    Raises:
      ValueError: the devices have no links, or no figures describe the links between their islands.
    """
    if devices == 1:
        return 0.0
    if not hardware.link:
        raise ValueError(f"a mesh of {devices} devices needs the bandwidth between them; give link=BYTES_PER_SECOND")
    link, latency, hops = hardware.link, hardware.latency, 1.0
    if hardware.torus:
        axes = max(1, min(hardware.torus, int(math.log2(devices))))
        link, hops = link * axes, 2 * axes * (devices ** (1 / axes) - 1)
    if devices > hardware.island:
        if hardware.beyond is None:
            raise ValueError(
                f"a collective over {devices} devices leaves the {hardware.island} that are joined, and what lies "
                "beyond is not modelled: use smaller tensor and expert axes, and data for the rest"
            )
        link, latency = hardware.beyond
    return 2 * (devices - 1) / devices * size / link + latency * hops
