"""DFlash, DFlash2 and DSpark heads in their published layouts: z-lab, DeepSpec, SpecForge and speculators.

Published configs number the target's states in two conventions. Layers are counted from 0.

- ``target_layer_ids`` (z-lab, DeepSpec, SpecForge): number j is the *output* of layer j, the hidden-state index j + 1.
  DeepSpec's -1 is the embedding output, index 0.
- ``aux_hidden_state_layer_ids`` (speculators): number j is the *input* of layer j, the hidden-state index j.

Example: [1, 9, 17] and [2, 10, 18] are the same states. ``specjax.hf.draft_head`` says how tensors are called.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checks import check_integer
from specjax.hf.draft_head import SPECULATORS_KEYS, head_layers, head_sources, vocabulary_tensors
from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.safetensors import Tensor, TensorSpec
from specjax.hf.weights import tensors_of
from specjax.transformer.config import DecoderConfig

SPECULATORS = ("dflash", "dflash2", "dspark")
"""``speculators_model_type`` of the draft heads that are read."""

# Model classes of the other layouts, and what they are.
_ARCHITECTURES = {
    "DFlashDraftModel": "dflash",
    "DFlash2DraftModel": "dflash2",
    "DSparkDraftModel": "dspark",
    "Qwen3DSparkModel": "dspark",
}
_IDS, _OURS = "target_layer_ids", "aux_hidden_state_layer_ids"
# Keys that these layouts have in ``dflash_config`` or at the top level.
_OPTIONS = ("block_size", "mask_token_id", _IDS, "projector_type", "causal", "attention_modes")
_DSPARK = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_TRAINING = ("num_anchors", "confidence_head_alpha", "use_aux_hidden_state", "auto_map")
_OWN = ("num_target_layers", "draft_vocab_size", "is_causal")  # at the top level alone
# Options that are not computed, and the values that change nothing.
_NEUTRAL = {
    "input_embedding_scale": (1.0, 1),
    "output_multiplier": (1.0, 1),
    "final_logit_softcapping": (None, 0, 0.0),
    "attention_mode": ("gqa", "mha"),
}


def is_block(raw: Mapping[str, Any]) -> bool:
    """Returns whether a ``config.json`` is that of a DFlash or DSpark head."""
    names = raw.get("architectures")
    named = isinstance(names, list) and bool(names) and isinstance(names[0], str) and names[0] in _ARCHITECTURES
    return raw.get("speculators_model_type") in SPECULATORS or named or "dflash_config" in raw


def block_fields(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Returns the arguments of ``specjax.drafters.dflash.DFlashHead`` for a config of any layout.

    Args:
      raw: the content of ``config.json``.
      num_layers: the number of the target's layers.

    Raises:
      ValueError: the config is not of a known draft head, a key is missing or out of range, is unknown and might change
        the draft head, or has two different values.
    """
    fields = _of_speculators(raw, num_layers) if "speculators_model_type" in raw else _of_others(raw, num_layers)
    if fields["draft_vocab_size"] is None:
        fields["draft_vocab_size"] = fields["decoder"].vocab_size
    return fields


def _of_speculators(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    # 1. The layers. Whatever their config's model_type, speculators makes Qwen3's.
    keys = Keys(raw, "config.json")
    kind = keys.take("speculators_model_type")
    if kind not in SPECULATORS:
        raise ValueError(
            f"speculators_model_type is {kind!r}, no block draft head; supported: {', '.join(SPECULATORS)}"
        )
    keys.ignore(*SPECULATORS_KEYS)
    decoder, unknown = head_layers(keys.take("transformer_layer_config"))
    decoder = _as_qwen3(decoder)
    width = keys.integer("target_hidden_size", None, optional=True)
    if width not in (None, decoder.hidden_size):
        raise ValueError(f"target_hidden_size is {width}; speculators computes {decoder.hidden_size}, the head's own")
    # 2. The block.
    ids = keys.take(_OURS, None)
    two_way = keys.flag("sliding_window_non_causal", kind == "dflash2")
    fields = {
        "decoder": decoder,
        "capture": _indices(_OURS, [2, num_layers // 2, num_layers - 3] if ids is None else ids, 0),
        "block_size": keys.integer("block_size"),
        "mask_token": keys.integer("mask_token_id", least=0),
        "from_anchor": keys.flag("sample_from_anchor", kind == "dspark"),
        "causal": tuple(layer.window is not None and not two_way for layer in decoder.each_layer),
        "draft_vocab_size": keys.integer("draft_vocab_size"),
    }
    # 3. DSpark's heads.
    if kind == "dspark":
        fields |= _dspark({key: keys.take(key) for key in _DSPARK if key in keys}, 256, True)
    if kind == "dflash2":
        fields |= _dflash2({key: keys.take(key) for key in _DFLASH2 if key in keys})
    warn_unknown("config.json", (*keys.switched_off(), *unknown))
    return fields


def _of_others(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Reads configs that have the draft head's keys among those of a Qwen3 layer, or in ``dflash_config``."""
    # 1. The keys of the block, those of the target and the layers.
    options, layer, unknown = _split(raw)
    kind = _kind(layer.pop("architectures", None), options.take("projector_type", None))
    own = Keys({key: layer.pop(key) for key in _OWN if key in layer}, "config.json")
    targets, drafted = own.integer("num_target_layers", None, optional=True), own.take("draft_vocab_size", None)
    if targets not in (None, num_layers):
        raise ValueError(f"num_target_layers is {targets} and the target has {num_layers} layers; give its own target")
    decoder, others = head_layers(layer)
    decoder = _as_qwen3(decoder)
    # 2. A causal draft head says so in one of two places; otherwise layers with windows are causal.
    causal = own.flag("is_causal", False) if own.peek("is_causal") is not None else None
    causal = options.flag("causal", False) if causal is None and "causal" in options else causal
    # 3. The block.
    ids = options.take(_IDS, None)
    ids = _indices(_IDS, _spread(decoder, num_layers) if ids is None else ids, -1)
    fields = {
        "decoder": decoder,
        "capture": tuple(index + 1 for index in ids),
        "block_size": options.integer("block_size", 16),
        "mask_token": options.integer("mask_token_id", least=0),
        "from_anchor": kind == "dspark",
        "causal": tuple(causal if causal is not None else x.window is not None for x in decoder.each_layer),
        "draft_vocab_size": drafted,
    }
    if kind == "dspark":
        fields |= _dspark({key: options.take(key) for key in _DSPARK if key in options}, 0, False)
    if kind == "dflash2":
        fields |= _dflash2({key: options.take(key) for key in _DFLASH2 if key in options})
    warn_unknown("config.json", (*options.switched_off(), *unknown, *others))
    return fields


def _split(raw: Mapping[str, Any]) -> tuple[Keys, dict[str, Any], tuple[str, ...]]:
    """Returns the options of a block, which both places may have; the other keys; and the names of unknown options."""
    layer, inner = dict(raw), raw.get("dflash_config") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"dflash_config is {inner!r}; it must be an object")
    layer.pop("dflash_config", None)
    found: dict[str, Any] = {}
    for key in (*_OPTIONS, *_DSPARK, *_DFLASH2, *_NEUTRAL):
        values = [place[key] for place in (inner, layer) if place.get(key) is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f"{key} is {values[1]!r}, but {values[0]!r} in dflash_config; give one of them")
        found |= {key: values[0]} if values else {}
        layer.pop(key, None)
    options = Keys(found, "dflash_config")
    for key, values in _NEUTRAL.items():
        options.only(key, *values)
    modes = options.take("attention_modes", None)
    if modes is not None and (not isinstance(modes, list) or not set(map(str, modes)) <= {"gqa", "mha"}):
        raise ValueError(f"attention_modes is {modes!r}; a block draft head computes only 'gqa' and 'mha'")
    others = {key: inner[key] for key in inner if key not in (*_OPTIONS, *_DSPARK, *_DFLASH2, *_NEUTRAL, *_TRAINING)}
    unknown = Keys(others, "dflash_config").switched_off()
    return options, {key: layer[key] for key in layer if key not in _TRAINING}, unknown


def _kind(architectures: Any, projector: Any) -> str:
    """Returns "dflash", "dflash2" or "dspark"."""
    names = [architectures] if isinstance(architectures, str) else architectures
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(f"architectures is {architectures!r}, no block draft head; supported: {list(_ARCHITECTURES)}")
    if projector not in (None, "dflash", "dspark"):
        raise ValueError(f"projector_type is {projector!r}; supported: 'dflash' and 'dspark'")
    return projector or _ARCHITECTURES[name]


def _as_qwen3(decoder: DecoderConfig) -> DecoderConfig:
    """Returns layers with Qwen3's norms of queries and keys, which all these draft heads have."""
    return dataclasses.replace(decoder, query_key_norm="heads", output_bias=decoder.attention_bias)


def _spread(decoder: DecoderConfig, num_layers: int) -> list[int]:
    """Returns z-lab's default for ``target_layer_ids``: outputs from layer 1 to the fourth from the end, evenly."""
    count = decoder.num_hidden_layers
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


def _indices(name: str, value: Any, least: int) -> tuple[int, ...]:
    """Returns a list of layers' numbers; raises ValueError if ``value`` is none."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; it must be a list of layers' numbers")
    for index in value:
        check_integer(name, index, least)
    return tuple(value)


def _dspark(found: Mapping[str, Any], rank: int, trusts: bool) -> dict[str, Any]:
    """Returns the fields of the Markov head and the confidence head; ``rank`` and ``trusts`` are their defaults."""
    keys = Keys(found, "config.json")
    rank, kind = keys.integer("markov_rank", rank, least=0), keys.take("markov_head_type", "vanilla")
    confidence = keys.flag("enable_confidence_head", trusts, optional=True)
    with_markov = keys.flag("confidence_head_with_markov", rank > 0, optional=True)
    fields: dict[str, Any] = {"confidence": confidence, "confidence_with_markov": confidence and with_markov}
    return fields | ({"markov": kind, "markov_rank": rank} if rank else {})


def _dflash2(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the convolutions and the selector."""
    keys = Keys(found, "config.json")
    return {
        "conv_taps": keys.integer("conv_kernel_size", 2),
        "conv_group": keys.integer("conv_group_size", 16),
        "selector_rank": keys.integer("selector_rank", 256),
        "selector_top_k": keys.integer("selector_top_k", 16),
    }


def block_tensors(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a folder's tensors by the names of the parameters; raises ValueError if two would have one name."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        known = name.removeprefix("model.")
        known = known.removesuffix(".weight") if known.endswith("_codebook.weight") else known
        if known in tensors:
            raise ValueError(f"tensors {tensors[known].name!r} and {name!r} are both {known!r}; remove one of them")
        tensors[known] = tensor
    return tensors


def tensors_of_block(params: Any) -> list[TensorSpec]:
    """Returns the tensors of a draft head's parameters. Each array is made when it is written."""
    specs = tensors_of(head_sources(params), params)
    return specs + (vocabulary_tensors(np.asarray(params["draft_of_v"])) if "draft_of_v" in params else [])
