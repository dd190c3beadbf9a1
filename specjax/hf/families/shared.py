"""What the readers of the families share: the description of a family, and takers of keys that many families have.

A reader takes every key that it understands. Defaults are the defaults of transformers' config classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from specjax.hf.keys import Keys
from specjax.hf.names import Layout, Table, layer_path, layer_tensor
from specjax.hf.rope import read_rope, take_rope
from specjax.transformer.config import (
    MAX_HEAD,
    MAX_LAYERS,
    Activation,
    DecoderConfig,
    ExpertsConfig,
    LayerConfig,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A ``model_type`` of ``config.json``.

    Attributes:
      read: takes the keys of a config, and returns what its decoder computes. It raises ValueError if a key is missing
        or has a value that the decoder does not compute.
      architecture: the class of transformers that computes the model.
      names: which tensor makes which parameter.
      code: start of the names of the classes that published folders bring as code and that transformers contains, too;
        None: no folder's code is accepted.
      effective: keys that change logits in this family, although they are in ``NO_EFFECT``.
      modules: parts of tensor names as the modules of transformers 5 are called, with the parts of published names that
        they stand for. Folders have such names that were saved with ``save_original_format=False``.
    """

    read: Callable[[Keys], DecoderConfig]
    architecture: str
    names: Table
    code: str | None = None
    effective: frozenset[str] = frozenset()
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A ``model_type`` that transformers does not have, and that computes what another one computes.

    Attributes:
      family: the other ``model_type``.
      architecture: the class that computes the model.
      code: as for ``Family.code``; the folder brings these classes.
      implied: keys that the other family does not have, with the values that it computes.
    """

    family: str
    architecture: str
    code: str
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
FULL_ATTENTION, SLIDING_ATTENTION, LINEAR_ATTENTION = "full_attention", "sliding_attention", "linear_attention"


def take_sizes(keys: Keys, norm_eps: str = "rms_norm_eps", /, **defaults: Any) -> dict[str, Any]:
    """Takes the keys that nearly all families share, as arguments of DecoderConfig.

    Args:
      keys: the keys of a ``config.json``.
      norm_eps: the family's own name of this key.
      **defaults: the family's own defaults. A key without a default must be there.
    """
    defaults = {"max_position_embeddings": 2048, "num_key_value_heads": None, norm_eps: 1e-6, **defaults}

    def default(key: str) -> tuple[Any, ...]:
        return (defaults[key],) if key in defaults else ()

    sizes = {key: keys.integer(key, *default(key)) for key in _SIZES}
    tied = defaults.get("tie_word_embeddings", False)
    return sizes | {
        "num_hidden_layers": keys.integer("num_hidden_layers", *default("num_hidden_layers"), most=MAX_LAYERS),
        "num_key_value_heads": keys.integer("num_key_value_heads", *default("num_key_value_heads"), optional=True),
        "norm_eps": keys.number(norm_eps, *default(norm_eps)),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
    }


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")


def take_activation(keys: Keys, key: str, default: str) -> Activation:
    """Takes the name of an activation; raises ValueError if it is unknown."""
    name = keys.take(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_width(keys: Keys, sizes: dict[str, Any]) -> int:
    """Takes the width of an attention head, by default ``hidden_size / num_attention_heads``."""
    head_dim = keys.integer("head_dim", None, most=MAX_HEAD, optional=True)
    if head_dim is not None:
        return head_dim
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads or width // heads > MAX_HEAD:
        raise ValueError(
            f"hidden_size {width} and num_attention_heads {heads} give no head_dim of at most {MAX_HEAD}; give head_dim"
        )
    return width // heads


def layers_of(
    sizes: dict[str, Any],
    head_dim: int | Mapping[str, int],
    ropes: dict[str, dict[str, Any]],
    kinds: Any,
    window: int | None,
    **options: Any,
) -> dict[str, Any]:
    """Returns the layers, and the longest text that all of them serve, as arguments of DecoderConfig.

    Args:
      sizes: what ``take_sizes`` returned.
      head_dim: entries of an attention head that may be rotated; for each type in ``ropes``, if types differ.
      ropes: what ``take_rope`` returned.
      kinds: the type of each layer, as in ``layer_types``.
      window: tokens that a layer of sliding attention sees.
      **options: further arguments of ``read_rope``.

    Raises:
      ValueError: the types are not one known type for each layer, or a type lacks its window or rotary positions.
    """
    # 1. Frequencies are computed once for each type, not for each layer.
    if not isinstance(kinds, list) or len(kinds) != sizes["num_hidden_layers"]:
        raise ValueError(f"layer_types is {kinds!r}; it must name each of the {sizes['num_hidden_layers']} layers")
    longest = sizes["max_position_embeddings"]
    widths = dict.fromkeys(ropes, head_dim) if isinstance(head_dim, int) else head_dim
    read = {kind: read_rope(ropes[kind], widths[kind], longest, **options) for kind in ropes}
    # 2. Each layer gets what its type says. Without types of their own, rotary positions are under "".
    layers = []
    for kind in kinds:
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise ValueError(f"layer_types has {kind!r}; supported: {FULL_ATTENTION!r}, {SLIDING_ATTENTION!r}")
        if kind == SLIDING_ATTENTION and window is None:
            raise ValueError(f"layer_types has {kind!r}, but sliding_window is null or switched off; give one")
        key = kind if kind in read else ""
        if key not in read:
            raise ValueError(f"rope_parameters lacks {kind!r}, which layer_types names")
        layers.append(LayerConfig(rope=read[key][0], window=window if kind == SLIDING_ATTENTION else None))
    return {"layers": tuple(layers), "max_position_embeddings": min(longest for _, longest in read.values())}


def same_kind(keys: Keys, sizes: dict[str, Any], window: int | None) -> list[str]:
    """Returns the type of each layer if all have the same type; takes a ``layer_types`` that agrees."""
    kinds = [FULL_ATTENTION if window is None else SLIDING_ATTENTION] * sizes["num_hidden_layers"]
    keys.only("layer_types", kinds, None)
    return kinds


def uniform_layers(
    keys: Keys, sizes: dict[str, Any], head_dim: int, window: int | None = None, theta: float = 10000.0
) -> dict[str, Any]:
    """Takes the keys of layers that are all of one type, as arguments of DecoderConfig."""
    kinds = same_kind(keys, sizes, window)
    return sizes | {"head_dim": head_dim} | layers_of(sizes, head_dim, take_rope(keys, theta), kinds, window)


def partly_rotary_layers(
    keys: Keys, sizes: dict[str, Any], head_dim: int, part: float, **options: Any
) -> dict[str, Any]:
    """Takes the keys of layers of full attention that rotate a part of each head, as arguments of DecoderConfig.

    ``part`` is the family's own share of a head, ``options`` are further arguments of ``read_rope``.
    """
    ropes = take_rope(keys, partial=True)
    ropes[""].setdefault("partial_rotary_factor", part)
    kinds = same_kind(keys, sizes, None)
    return sizes | {"head_dim": head_dim} | layers_of(sizes, head_dim, ropes, kinds, None, **options)


def without_positions(described: dict[str, Any], bare: list[bool]) -> dict[str, Any]:
    """Returns the result of ``layers_of`` without rotary positions in the layers for which ``bare`` is true."""
    pairs = zip(described["layers"], bare, strict=True)
    layers = tuple(dataclasses.replace(layer, rope=None) if plain else layer for layer, plain in pairs)
    return described | {"layers": layers}


def take_num_experts(keys: Keys, key: str, default: int) -> int:
    """Takes the number of experts under the family's own name, or under ``num_local_experts`` of transformers 5."""
    number = keys.integer(key, None, optional=True)
    other = keys.integer("num_local_experts", None, optional=True)
    if None not in (number, other) and number != other:
        raise ValueError(f"{key} is {number}, but num_local_experts {other}; give one of them")
    return number or other or default


def take_grouped_experts(keys: Keys, **defaults: Any) -> ExpertsConfig:
    """Takes the experts of DeepSeek-V3 (section 2.1.2) and of families like it.

    Experts are chosen by corrected sigmoid scores within the best groups. Shared experts see every token. ``defaults``
    holds the family's own defaults.
    """
    # The authors' code has other routers under these two keys; this is the one that transformers has.
    keys.only("scoring_func", "sigmoid", None)
    keys.only("topk_method", "noaux_tc", None)
    size = keys.integer("moe_intermediate_size", defaults["moe_intermediate_size"])
    return ExpertsConfig(
        num_experts=take_num_experts(keys, "n_routed_experts", defaults["n_routed_experts"]),
        per_token=keys.integer("num_experts_per_tok", 8),
        intermediate_size=size,
        score="sigmoid",
        renormalize=keys.flag("norm_topk_prob", True, optional=True),
        scale=keys.number("routed_scaling_factor", defaults["routed_scaling_factor"]),
        groups=keys.integer("n_group", defaults["n_group"]),
        best_groups=keys.integer("topk_group", defaults["topk_group"]),
        corrected=True,
        shared_size=size * keys.integer("n_shared_experts", 1, least=0),
    )


def with_experts(described: dict[str, Any], sparse: list[bool]) -> dict[str, Any]:
    """Returns the result of ``layers_of`` with experts in the layers for which ``sparse`` is true."""
    pairs = zip(described["layers"], sparse, strict=True)
    return described | {"layers": tuple(dataclasses.replace(layer, experts=mixed) for layer, mixed in pairs)}


# Names of types that transformers 5 translates.
_OLD_KINDS = {"mamba": LINEAR_ATTENTION, "attention": FULL_ATTENTION}


def with_recurrence(layers: tuple[Any, ...], kinds: Any) -> tuple[Any, ...]:
    """Returns the layers with a recurrence in place of attention where ``kinds`` says linear attention.

    Raises:
      ValueError: the types are not one known type for each layer.
    """
    if not isinstance(kinds, list) or len(kinds) != len(layers):
        raise ValueError(f"layer_types is {kinds!r}; it must name each of the {len(layers)} layers")
    kinds = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    for kind in kinds:
        if kind not in (FULL_ATTENTION, LINEAR_ATTENTION):
            raise ValueError(f"layer_types has {kind!r}; supported: {FULL_ATTENTION!r}, {LINEAR_ATTENTION!r}")
    return tuple(
        dataclasses.replace(layer, rope=None, recurrent=True) if kind == LINEAR_ATTENTION else layer
        for layer, kind in zip(layers, kinds, strict=True)
    )


def recurrence_rows(block: str, layout: Layout, **names: str) -> Table:
    """Rows of parameters of a recurrence, whose tensors are in ``block``.

    ``names`` are parameter=tensor, with "__" for a dot in the parameter's path.
    """
    return {
        layer_path(f"recurrence.{ours.replace('__', '.')}"): (layer_tensor(f"{block}.{theirs}"), layout)
        for ours, theirs in names.items()
    }
