"""The program of ``generate`` for a target without parameters, on devices that need not exist."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax.aot.rounds import Caches
from specjax.aot.topology import Topology, devices
from specjax.drafters.eagle import EagleHead
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.model import ModelDrafter
from specjax.drafters.ngram import NGramDrafter
from specjax.drafters.with_tree import with_tree
from specjax.engine.loop import lower
from specjax.planning import Mesh as PlannedMesh
from specjax.planning import Model, cache_bytes, check_mesh, forward, token_bytes, weights
from specjax.quantized import Kind, quantize
from specjax.sampling import Sampling
from specjax.sharding import RULES, make_mesh, shardings
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params, decoder_model
from specjax.types import Drafter, LanguageModel
from specjax.verify import default_rule

SMALL = DecoderConfig(4096, 512, 1024, 2, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
"""A model that compiles in seconds."""

SAMPLING = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(),
    "filters": Sampling(top_k=50, top_p=0.9),
}
DRAFTERS = ("none", "ngram", "model", "eagle")
DTYPE = jnp.dtype("bfloat16")
PROMPT = 128  # the width of prompts
NEW = 256  # tokens that a row may emit
DRAFT_LAYERS, DRAFT_WIDTH, DRAFT_HEAD = 4, 512, 64  # of the draft model
DRAFT_VOCABULARY = 32000  # of the EAGLE head, as of published EAGLE-3 heads

_XLA_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "s8", "int4": "s4", "int32": "s32"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to compile.

    Attributes:
      target: the target model.
      topology: the devices.
      drafter: one of ``DRAFTERS``.
      sampling: a key of ``SAMPLING``: what all rows ask for.
      rows: rows of the batch.
      slots: tokens that each row has room for.
      used: tokens of each row in the round that is looked at.
      num_draft: drafts of a round; of a tree, the most on one path.
      tensor: devices that the target is split over.
      quantize: how the target's weights are stored: a kind of ``specjax.quantize``; None: bfloat16.
      tree: drafts of a tree, which replaces the chain: the one that ``load_drafter(.., tree=)`` makes; None: a chain.

    Raises:
      ValueError: a number is out of its range, a name is unknown, or the devices do not divide the target.
    """

    target: DecoderConfig
    topology: Topology
    drafter: str = "ngram"
    sampling: str = "greedy"
    rows: int = 1
    slots: int = 2048
    used: int = 512
    num_draft: int = 4
    tensor: int = 1
    quantize: Kind | None = None
    tree: int | None = None

    def __post_init__(self):
        for name, choices in (("drafter", DRAFTERS), ("sampling", tuple(SAMPLING))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} is {getattr(self, name)!r}; choose from {', '.join(choices)}")
        if self.tree is not None and self.drafter == "none":
            raise ValueError(f"--tree is {self.tree} and there is no drafter; give another --drafter for a tree")
        most = max(self.num_draft, self.tree or 0)
        limits = {
            "rows": (1, 2**20),
            "num_draft": (1, 64),
            "slots": (PROMPT + NEW + most + 1, min(self.target.max_position_embeddings + most + 1, 2**30)),
            "used": (most + 2, self.slots - most - 1),
        }
        limits |= {} if self.tree is None else {"tree": (1, 256)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is {getattr(self, name)}; give {low} to {high} for this model and the rest"
                )
        check_mesh(self.target, PlannedMesh(tensor=self.tensor))

    @property
    def drafts(self) -> int:
        """Drafts of a round; 0 without a drafter."""
        return 0 if self.drafter == "none" else self.tree or self.num_draft

    @property
    def passes(self) -> int:
        """Passes of a draft model or an EAGLE head in a round: one for each draft of the longest path."""
        return min(self.num_draft, self.tree or self.num_draft)

    @property
    def mesh(self) -> PlannedMesh:
        return PlannedMesh(tensor=self.tensor)

    @property
    def planned(self) -> Model:
        """The target as ``specjax.planning`` counts it."""
        return Model(self.target, weights="float8" if self.quantize == "fp8" else self.quantize or "bfloat16")

    @property
    def known(self) -> dict[str, Any]:
        """The values of the program's arguments by JAX's names for them, where all rows have the same."""
        sampling = SAMPLING[self.sampling]
        fields = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
        known = {f"request.sampling.{name}": value for name, value in fields.items() if value is not None}
        del known["request.sampling.seed"]
        return known | {"request.prompt_length_b": self.used, "request.limit_b": self.used + NEW}


def with_layers(config: DecoderConfig, count: int) -> DecoderConfig:
    """Returns the config cut to its first ``count`` layers.

    Raises:
      ValueError: the config does not have so many layers.
    """
    if not 1 <= count <= config.num_hidden_layers:
        raise ValueError(f"--layers is {count}; give 1 to {config.num_hidden_layers}, the layers of the target")
    return dataclasses.replace(config, num_hidden_layers=count, layers=config.each_layer[:count])


def draft_config(target: DecoderConfig) -> DecoderConfig:
    """Returns the draft model: 4 layers, 512 wide or a quarter of the target if that is less, the same vocabulary."""
    heads = max(1, min(DRAFT_WIDTH, target.hidden_size // 4) // DRAFT_HEAD)
    width = heads * DRAFT_HEAD
    sharing = max(1, min(target.num_attention_heads // target.kv_heads, heads))
    return DecoderConfig(
        vocab_size=target.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=DRAFT_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // sharing if heads % sharing == 0 else heads,
        max_position_embeddings=target.max_position_embeddings,
        tie_word_embeddings=True,
    )


def eagle_head(target: DecoderConfig) -> EagleHead:
    """Returns a draft head like the published EAGLE-3 heads, for targets of any family: one layer of Llama's as wide as
    the target, three states, 32000 tokens."""
    decoder = DecoderConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.kv_heads,
        head_dim=target.head_width,
        max_position_embeddings=target.max_position_embeddings,
    )
    layers = target.num_hidden_layers
    states = tuple(sorted({0, layers // 2, layers}))
    reduced = DRAFT_VOCABULARY if target.vocab_size > DRAFT_VOCABULARY else None
    return EagleHead(decoder, states, draft_vocab_size=reduced)


def model(config: DecoderConfig) -> LanguageModel:
    """Returns a model whose parameters are shapes."""
    return decoder_model(config, abstract_params(config, DTYPE))


def make_drafter(setting: Setting) -> Drafter | None:
    """Returns the drafter with abstract parameters.

    Raises:
      ValueError: there is no tree of so many drafts.
    """
    if setting.drafter == "none":
        return None
    return with_tree(_chain(setting), setting.tree)


def _chain(setting: Setting) -> Drafter:
    if setting.drafter == "ngram":
        return NGramDrafter(setting.num_draft)
    if setting.drafter == "model":
        return ModelDrafter(model(draft_config(setting.target)), setting.num_draft)
    head = eagle_head(setting.target)
    return FeatureDrafter(head.abstract_params(DTYPE), head, setting.num_draft)


def lowered(setting: Setting) -> jax.stages.Lowered:
    """Returns the program, lowered for the first devices of the topology."""
    mesh = make_mesh(tensor=setting.tensor, devices=devices(setting.topology))
    target, drafter = model(setting.target), make_drafter(setting)
    if setting.quantize:
        target = quantize(target, setting.quantize)
    return lower(
        _placed(target, mesh, RULES),
        np.ones((setting.rows, PROMPT), np.int32),
        mesh=mesh,
        # A draft is whole on every device, as `load_drafter` puts it.
        drafter=None if drafter is None else _placed(drafter, mesh, {}),
        verify=default_rule(drafter),
        sampling=SAMPLING[setting.sampling],
        max_new_tokens=NEW,
        slots=setting.slots,
    )


def _placed(tree: Any, mesh: Mesh, rules: Any) -> Any:
    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings(tree, mesh, rules))


def caches(setting: Setting) -> tuple[Caches, int]:
    """Returns the caches as one device holds them, and how many arrays they are.

    The target's key and value heads are split if they divide over the devices. XLA may split a draft's, too.
    """
    target, drafter = model(setting.target), make_drafter(setting)
    rows, slots = setting.rows, setting.slots
    found, count = set(), 0
    for init, whole in (
        (lambda: target.init_cache(rows, slots), False),
        (_init_of(drafter, target, rows, slots), True),
    ):
        for leaf in jax.tree.leaves(jax.eval_shape(init)):
            if leaf.ndim < 3 or slots not in leaf.shape:
                continue
            split = leaf.shape[1] % setting.tensor == 0
            parts = (leaf.shape[0], leaf.shape[1] // setting.tensor, *leaf.shape[2:]) if split else leaf.shape
            dtype = _XLA_DTYPES.get(str(leaf.dtype), str(leaf.dtype))
            found |= {(dtype, parts)} | ({(dtype, leaf.shape)} if whole else set())
            count += 1
    return Caches(tuple(sorted(found))), count


def _init_of(drafter: Drafter | None, target: LanguageModel, rows: int, slots: int) -> Callable[[], Any]:
    return lambda: () if drafter is None else drafter.init(target, rows, slots)


def ideal_bytes(setting: Setting) -> float:
    """Returns what a round has to read on one device: weights once a pass, and the keys and values in use."""

    def read(planned: Model, mesh: PlannedMesh, tokens: int) -> float:
        return forward(planned, mesh, setting.rows, tokens, setting.used - tokens).read

    total = read(setting.planned, setting.mesh, setting.drafts + 1)
    if setting.drafter == "model":
        total += setting.passes * read(Model(draft_config(setting.target)), PlannedMesh(), 1)
    if setting.drafter == "eagle":
        # The target's states are fused once; the layer runs once over them and once for each draft of a path but the
        # first.
        head = eagle_head(setting.target)
        sizes = {name: _bytes(part) for name, part in head.abstract_params(DTYPE).items() if name != "embed_tokens"}
        entries = token_bytes(Model(head.decoder)) * setting.rows * setting.used
        total += sizes.pop("fc") + setting.passes * (sum(sizes.values()) + entries)
    return total


def held_bytes(setting: Setting) -> float:
    """Returns the bytes of parameters and caches on one device, without those of intermediate values."""

    def cache(config: DecoderConfig, mesh: PlannedMesh) -> float:
        return cache_bytes(Model(config), setting.rows, setting.slots, mesh)

    total = weights(setting.planned, setting.mesh).held + cache(setting.target, setting.mesh)
    if setting.drafter == "model":
        draft = draft_config(setting.target)
        total += weights(Model(draft)).held + cache(draft, PlannedMesh())
    if setting.drafter == "eagle":
        head = eagle_head(setting.target)
        total += _bytes(head.abstract_params(DTYPE)) + cache(head.decoder, PlannedMesh())
    return total


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
