"""The least time that a pass takes on a mesh: what must be read, computed and sent.

Each pass over t tokens takes the longer of reading its bytes and doing its arithmetic (Williams et al. 2009), and its
collectives on top, since each waits for the layer before it. All figures are of one device, in bytes and seconds.
``docs/scaling.md`` gives the formulas and what they leave out.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.planning.hardware import Hardware
from specjax.transformer import DecoderConfig
from specjax.transformer.decoder import abstract_params

BYTES = {"float32": 4, "bfloat16": 2, "float8": 1, "int8": 1}
# All-reduces of a number per token that a split vocabulary costs, as docs/distributed.md counts them in the loop.
WARP = {"greedy": 2, "temperature": 5, "filters": 5 + 3 + 2 * 30}
DRAW = 2


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices by axis: rows are split over ``data``, heads, MLPs and vocabulary over ``tensor``, experts over
    ``expert``."""

    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.expert


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder and the dtypes, keys of ``BYTES``, of its weights and its cache."""

    config: DecoderConfig
    weights: str = "bfloat16"
    cache: str = "bfloat16"


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Raises ValueError if the mesh does not divide the model; heads of keys and values need not be divided."""
    experts = config.experts
    widths = {"num_attention_heads": config.num_attention_heads, "vocab_size": config.vocab_size}
    if not all(layer.experts for layer in config.each_layer):
        widths["intermediate_size"] = config.intermediate_size
    if experts:
        widths |= {
            "an expert's width": experts.intermediate_size,
            "the shared experts' width": experts.shared_size,
        }
    for name, width in widths.items():
        if width % mesh.tensor:
            raise ValueError(f"tensor={mesh.tensor} does not divide {name} {width}; choose a divisor")
    if mesh.expert > 1 and experts is None:
        raise ValueError(f"expert={mesh.expert}, but the model has no experts; leave the axis out")
    if experts and experts.num_experts % mesh.expert:
        raise ValueError(f"expert={mesh.expert} does not divide the {experts.num_experts} experts; choose a divisor")


class Weights(NamedTuple):
    """What one device holds of a model's parameters: bytes, and multiplications that each token makes with them.

    Attributes:
      looked_up: tables of which a pass reads a row per token.
      dense: what every pass reads whole.
      experts: its experts, of which a pass reads those that were chosen.
      products: multiplications per token.
    """

    looked_up: float
    dense: float
    experts: float
    products: float

    @property
    def held(self) -> float:
        return self.looked_up + self.dense + self.experts


_HEADS = {"q_proj", "q_b_proj", "o_proj", "k_up", "v_up"}
_WIDTHS = {"gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


@functools.cache
def weights(model: Model, mesh: Mesh = Mesh()) -> Weights:
    """Counts the parameters that one device holds, as ``abstract_params`` declares them."""
    config = model.config
    split = _HEADS | _WIDTHS | ({"k_proj", "v_proj"} if _splits_kv(config, mesh) else set())
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, jnp.dtype("bfloat16")))
    looked_up, dense, stacks, products = 0.0, 0.0, 0.0, 0.0
    for path, leaf in leaves:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        size = leaf.size / (mesh.tensor if leaf.ndim > 1 and not split.isdisjoint(names) else 1)
        width = 4 if leaf.dtype == jnp.float32 else BYTES[model.weights]  # a few parameters stay float32
        if "experts" in names and config.experts:
            stacks += size / mesh.expert * width
            products += size / mesh.expert * config.experts.per_token / config.experts.num_experts
        elif names[0] == "embed_positions" or (names[0] == "embed_tokens" and not config.tie_word_embeddings):
            looked_up += size * width
        else:
            dense += size * width
            products += size
    return Weights(looked_up, dense, stacks, products)


def num_params(config: DecoderConfig) -> int:
    """Returns the model's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, jnp.dtype("bfloat16"))))


def _splits_kv(config: DecoderConfig, mesh: Mesh) -> bool:
    """Whether keys and values are split: fewer heads than devices are copied to each, and so is the one latent."""
    return config.latent is None and config.kv_heads % mesh.tensor == 0


def token_bytes(model: Model, mesh: Mesh = Mesh()) -> float:
    """Returns the cache's bytes per token and layer on one device: keys and values, or the latent."""
    config = model.config
    if config.latent:
        entries = config.latent.key_value_rank + config.latent.rotary_width
    else:
        entries = 2 * config.kv_heads * config.head_width // (mesh.tensor if _splits_kv(config, mesh) else 1)
    return entries * BYTES[model.cache]


def touched_experts(num_experts: int, per_token: int, tokens: float) -> float:
    """Returns how many experts the tokens are expected to visit, each choosing evenly and on its own."""
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
    """What one device does in a pass: bytes it reads, operations (a multiplication and its sum are two), messages."""

    read: float
    flops: float
    messages: tuple[Messages, ...] = ()

    @property
    def collectives(self) -> int:
        return sum(message.number for message in self.messages)

    @property
    def sent(self) -> float:
        """Bytes that each device sends: an all-reduce scatters sums and gathers them, (n - 1) / n of its size each."""
        return sum(2 * (m.devices - 1) / m.devices * m.size * m.number for m in self.messages)


def forward(
    model: Model, mesh: Mesh, rows: float, tokens: int, context: int, chosen: tuple[Messages, ...] = ()
) -> Pass:
    """Counts a pass of ``tokens`` tokens in each of ``rows`` rows, the device's own, after ``context`` tokens.

    ``chosen`` is what choosing tokens from its logits sends, as ``choosing`` returns it.
    """
    config, held = model.config, weights(model, mesh)
    fed = rows * tokens
    read = held.dense
    if config.experts:
        experts = config.experts
        read += held.experts * touched_experts(experts.num_experts, experts.per_token, fed) / experts.num_experts
    flops = 2 * held.products * fed
    heads, latent = config.num_attention_heads / mesh.tensor, config.latent
    # Scores and values; absorbed latents are as wide as what is cached of them.
    entries = 2 * latent.key_value_rank + latent.rotary_width if latent else 2 * config.head_width
    seen = sum(min(context + tokens, layer.window or math.inf) for layer in config.each_layer)
    read += rows * seen * token_bytes(model, mesh)
    flops += 2 * fed * heads * entries * seen
    return Pass(read, flops, _messages(model, mesh, fed) + chosen)


def _messages(model: Model, mesh: Mesh, fed: float) -> tuple[Messages, ...]:
    config = model.config
    size = fed * config.hidden_size * max(2, BYTES[model.weights])  # activations stay bfloat16 beside 8-bit weights
    mixed = sum(layer.experts for layer in config.each_layer)
    shared = mixed if config.experts and config.experts.shared_size else 0
    # Over tensor: the embedding, each attention's output, each MLP that is dense or shared.
    over_tensor = 1 + config.num_hidden_layers + (config.num_hidden_layers - mixed) + shared
    messages = (
        Messages(over_tensor, mesh.tensor, size),
        Messages(mixed, mesh.tensor * mesh.expert, size),
    )
    return tuple(message for message in messages if message.devices > 1 and message.number)


def choosing(mesh: Mesh, rows: float, positions: int, sampling: str, verify: int = 0) -> tuple[Messages, ...]:
    """Returns what is sent to warp the logits of so many positions in each row, to verify drafts, and to draw a token.

    Args:
      mesh: of the target, whose logits a draft's are compared with, so that they are split alike.
      rows: the device's own.
      positions: of the target's pass g + 1, of the draft's 1.
      sampling: a key of ``WARP``.
      verify: all-reduces of verification.
    """
    if mesh.tensor == 1:
        return ()
    warped = Messages(WARP[sampling] + verify, mesh.tensor, 4 * rows * positions)
    return warped, Messages(DRAW, mesh.tensor, 4 * rows)


class Seconds(NamedTuple):
    """What a pass takes, and its parts."""

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

    A ring sends 2 (n - 1) / n of them. In a torus, n devices are taken to form a block without wraparound links: as
    many axes as n has factors of two, at most all, each a link; a sum hops the length of each, and back.

    Raises:
      ValueError: the devices have no links, or no figures say how they are joined.
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
