"""Gemma 4."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from specjax.checks import check_integer
from specjax.hf.families.gemma import GEMMA
from specjax.hf.families.shared import FULL_ATTENTION, SLIDING_ATTENTION, Family, layers_of, take_activation, take_sizes
from specjax.hf.keys import Keys
from specjax.hf.names import LINEAR, SAME, Layout, Table, layer_path, layer_tensor, linear, norms
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig, PerLayerConfig

_GATE_AND_UP = Layout(axis=1, transpose=True)  # [experts, gate and up, in] -> [experts, in, out]

GEMMA4: Table = {
    **GEMMA,
    layer_path("scale"): (layer_tensor("layer_scalar"), SAME),
    # Embeddings for each layer.
    "per_layer.embed_tokens.weight": ("model.embed_tokens_per_layer.weight", SAME),
    **linear("per_layer.projection", "model.per_layer_model_projection"),
    "per_layer.norm.weight": ("model.per_layer_projection_norm.weight", SAME),
    **linear(layer_path("per_layer.input_gate"), layer_tensor("per_layer_input_gate")),
    **linear(layer_path("per_layer.projection"), layer_tensor("per_layer_projection")),
    layer_path("per_layer.norm.weight"): (layer_tensor("post_per_layer_input_norm.weight"), SAME),
    # Experts beside the MLP.
    layer_path("moe.gate.kernel"): (layer_tensor("router.proj.weight"), LINEAR),
    layer_path("moe.gate.input_scale"): (layer_tensor("router.scale"), SAME),
    layer_path("moe.gate.expert_scale"): (layer_tensor("router.per_expert_scale"), SAME),
    layer_path("moe.experts.gate_proj"): (layer_tensor("experts.gate_up_proj"), _GATE_AND_UP),
    layer_path("moe.experts.up_proj"): (layer_tensor("experts.gate_up_proj"), _GATE_AND_UP),
    layer_path("moe.experts.down_proj"): (layer_tensor("experts.down_proj"), LINEAR),
    **norms(
        **{
            "moe.mlp_norm": "post_feedforward_layernorm_1",
            "moe.input_norm": "pre_feedforward_layernorm_2",
            "moe.output_norm": "post_feedforward_layernorm_2",
        }
    ),
}

_ROPES = {
    FULL_ATTENTION: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": 1e4},
}
_SIZES = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def _gemma4_text(keys: Keys) -> DecoderConfig:
    experts = _experts(keys)
    width = keys.integer("hidden_size_per_layer_input", 256, least=0)
    table = keys.integer("vocab_size_per_layer_input", 262_144, least=0)
    per_layer = PerLayerConfig(table, width) if width else None
    return _gemma4(keys, take_sizes(keys, **_SIZES), 512, experts=experts, per_layer=per_layer)


def _gemma4_unified_text(keys: Keys) -> DecoderConfig:
    return _gemma4(keys, take_sizes(keys, **_SIZES | {"max_position_embeddings": 262_144}), 1024)


def _gemma4(keys: Keys, sizes: dict[str, Any], window: int, **features: Any) -> DecoderConfig:
    """Reads the keys that both share; ``window`` is the default."""
    keys.only("use_bidirectional_attention", None, "vision")  # images may see what follows them, text never does
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **sizes | _layers(keys, sizes, keys.integer("sliding_window", window), features.get("experts") is not None),
        norm_places="around",
        query_key_norm="heads",
        value_norm=True,
        activation=take_activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=math.sqrt(sizes["hidden_size"]),
        attention_scale=1.0,
        logit_softcap=keys.number("final_logit_softcapping", None, optional=True),
        layer_scale=True,
        **features,
    )


def _experts(keys: Keys) -> ExpertsConfig | None:
    """Takes the experts that stand beside each layer's MLP."""
    if not keys.flag("enable_moe_block", False):
        keys.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return None
    return ExpertsConfig(
        num_experts=keys.integer("num_experts"),
        per_token=keys.integer("top_k_experts"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        beside=True,
        normed_router=True,
        expert_scale=True,
    )


def _layers(keys: Keys, sizes: dict[str, Any], window: int, mixed: bool) -> dict[str, Any]:
    """Takes the keys that say how layers differ, as arguments of DecoderConfig.

    ``mixed``: whether each layer has experts.
    """
    # 1. Types: by default every sixth layer sees all tokens. The last layer always does, whatever the config says.
    count, kinds = sizes["num_hidden_layers"], keys.take("layer_types", None)
    if kinds is None:
        kinds = [SLIDING_ATTENTION if (i + 1) % 6 else FULL_ATTENTION for i in range(count)]
    if isinstance(kinds, list) and kinds[-1:] == [SLIDING_ATTENTION]:
        kinds = [*kinds[:-1], FULL_ATTENTION]
    # 2. Each type has its own attention heads and frequencies.
    head_dim, same = keys.integer("head_dim", 256, most=MAX_HEAD), keys.flag("attention_k_eq_v", False)
    heads = _heads(keys, kinds, same)
    widths = {kind: heads.get(kind, {}).get("head_dim", head_dim) for kind in _ROPES}
    described = layers_of(sizes, widths, _ropes(keys), kinds, window)
    # 3. The last layers attend to the keys and values of the last layer of their type before them.
    first = count - keys.integer("num_kv_shared_layers", 0, least=0, most=count)
    double = keys.flag("use_double_wide_mlp", False)
    layers = []
    for i, (kind, layer) in enumerate(zip(kinds, described["layers"], strict=True)):
        own = heads.get(kind, {})
        features = {"head_dim": own.get("head_dim"), "kv_heads": own.get("num_key_value_heads"), "experts": mixed}
        if i >= first:
            features["shares"] = _source(kinds[:first], kind, i)
            features["intermediate_size"] = 2 * sizes["intermediate_size"] if double else None
        else:
            features["keys_as_values"] = same and kind == FULL_ATTENTION
        layers.append(dataclasses.replace(layer, **features))
    return described | {"layers": tuple(layers), "head_dim": head_dim}


def _source(kinds: list[str], kind: str, number: int) -> int:
    """Returns the last layer of a type; ``kinds`` are the types of the layers that layer ``number`` may share."""
    if kind not in kinds:
        raise ValueError(
            f"num_kv_shared_layers leaves {len(kinds)} layers with keys and values, none of them of the type {kind!r} "
            f"of layer {number}; it must leave one of each type"
        )
    return len(kinds) - 1 - kinds[::-1].index(kind)


def _heads(keys: Keys, kinds: Any, same: bool) -> dict[str, dict[str, Any]]:
    """Takes the width of heads and the number of key/value heads of the types of layers that have their own.

    Published configs have keys for full attention. transformers 5 writes an object for each layer.
    """
    wide = keys.integer("global_head_dim", 512, most=MAX_HEAD)
    few = keys.integer("num_global_key_value_heads", None, optional=True)
    given = keys.take("per_layer_config", None)
    if given is None:
        return {FULL_ATTENTION: {"head_dim": wide} | ({"num_key_value_heads": few} if same and few else {})}
    if not isinstance(given, Mapping) or not isinstance(kinds, list):
        raise ValueError(f"per_layer_config is {given!r}; it must be an object with a key for each layer that differs")
    # Every layer of a type must say the same: rotary positions depend on the type.
    found: dict[str, dict[str, Any]] = {}
    for i, kind in enumerate(map(str, kinds)):
        own = given.get(str(i), given.get(kind, {}))
        if not isinstance(own, Mapping) or own.keys() - {"head_dim", "num_key_value_heads"}:
            raise ValueError(
                f"per_layer_config has {own!r} for layer {i}; supported: an object with 'head_dim' and "
                "'num_key_value_heads'"
            )
        for key, value in own.items():
            check_integer(f"{key} of layer {i} in per_layer_config", value, 1, MAX_HEAD)
        if found.setdefault(kind, dict(own)) != own:
            raise ValueError(f"per_layer_config has {found[kind]} and {own!r} for two layers of type {kind!r}")
    if unknown := sorted(given.keys() - found.keys() - set(map(str, range(len(kinds))))):
        raise ValueError(f"per_layer_config has {unknown}; it may have numbers and types of layers")
    return found


def _ropes(keys: Keys) -> dict[str, dict[str, Any]]:
    """Takes the rotary positions of each type of layers."""
    given = keys.peek("rope_parameters")
    ropes = take_rope(keys, kinds=dict.fromkeys(_ROPES))
    if "" not in ropes:
        return ropes
    if given is not None:
        raise ValueError(f"rope_parameters is {given!r}; it must name layer types: {', '.join(map(repr, _ROPES))}")
    return _ROPES


FAMILIES = {
    "gemma4_text": Family(_gemma4_text, "Gemma4ForCausalLM", GEMMA4),
    "gemma4_unified_text": Family(_gemma4_unified_text, "Gemma4UnifiedForCausalLM", GEMMA4),
}
