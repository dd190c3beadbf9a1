"""Llama, and families that differ from it in few keys: Mistral, Ministral, SmolLM3."""

import dataclasses
from typing import Any

from specjax.hf.families.shared import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Family,
    head_width,
    layers_of,
    same_kind,
    take_activation,
    take_sizes,
    uniform_layers,
    without_positions,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, LAYER_NORMS, MLP, Table
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig

_LONGEST = "max_position_embeddings"
LLAMA: Table = {**ENDS, **LAYER_NORMS, **ATTENTION, **MLP}


def _llama(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys)
    head_dim = head_width(keys, sizes)
    keys.only("sliding_window", None)
    keys.only("use_sliding_window", False)
    keys.only("rope_interleaved", False)  # SmolLM
    return _biased(keys, uniform_layers(keys, sizes, head_dim))


def _biased(keys: Keys, described: dict[str, Any], **features: Any) -> DecoderConfig:
    """Takes the keys of activation and biases; ``described`` are the other arguments of a Llama."""
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **described,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        **features,
    )


def _mistral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    head_dim = head_width(keys, sizes)
    window = keys.integer("sliding_window", 4096, optional=True)
    return DecoderConfig(
        **uniform_layers(keys, sizes, head_dim, window), activation=take_activation(keys, "hidden_act", "silu")
    )


def _ministral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    head_dim = head_width(keys, sizes)
    kinds = keys.take("layer_types", None)
    kinds = [SLIDING_ATTENTION] * sizes["num_hidden_layers"] if kinds is None else kinds
    window = keys.integer("sliding_window", 4096, optional=True)
    return DecoderConfig(
        **sizes | layers_of(sizes, head_dim, take_rope(keys), kinds, window),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
    )


def _ministral3(keys: Keys) -> DecoderConfig:
    # The rotary object also says how queries grow with the position. Its longest text says nothing more.
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=262_144, rms_norm_eps=1e-5)
    head_dim = keys.integer("head_dim", 128, most=MAX_HEAD)
    window = keys.integer("sliding_window", None, optional=True)
    ropes, kinds = take_rope(keys, 1e6), same_kind(keys, sizes, window)
    own = Keys(ropes[""], "rope_parameters")
    growth = float(own.number("llama_4_scaling_beta")), own.integer("original_max_position_embeddings"), 0
    rope = {key: value for key, value in ropes[""].items() if key not in ("llama_4_scaling_beta", _LONGEST)}
    described = sizes | layers_of(sizes, head_dim, {"": rope}, kinds, window)
    described["layers"] = tuple(dataclasses.replace(layer, growth=growth) for layer in described["layers"])
    return DecoderConfig(**described, head_dim=head_dim, activation=take_activation(keys, "hidden_act", "silu"))


def _smollm3(keys: Keys) -> DecoderConfig:
    # 1. Layers without positions: listed as 0, or every ``interval``-th.
    sizes = take_sizes(keys, num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True)
    head_dim, count = head_width(keys, sizes), sizes["num_hidden_layers"]
    interval = keys.integer("no_rope_layer_interval", 4)
    rotated = keys.take("no_rope_layers", None)
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotated, list) or len(rotated) < count or any(flag not in (0, 1) for flag in rotated):
        raise ValueError(
            f"no_rope_layers is {rotated!r}; it must say of each of the {count} layers whether it has positions, 1 or 0"
        )
    bare = [not flag for flag in rotated[:count]]
    # 2. Those layers have the windows, if windows are switched on and the config does not say which layers have them.
    window = keys.integer("sliding_window", None, optional=True)
    window = window if keys.flag("use_sliding_window", False) else None
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = [SLIDING_ATTENTION if plain and window is not None else FULL_ATTENTION for plain in bare]
    layers = layers_of(sizes, head_dim, take_rope(keys, 2e6), kinds, window)
    return _biased(keys, {**sizes, "head_dim": head_dim, **without_positions(layers, bare)})


FAMILIES = {
    "llama": Family(_llama, "LlamaForCausalLM", LLAMA),
    "ministral3": Family(_ministral3, "Ministral3ForCausalLM", LLAMA),
    "ministral": Family(_ministral, "MinistralForCausalLM", LLAMA),
    "mistral": Family(_mistral, "MistralForCausalLM", LLAMA),
    "smollm3": Family(_smollm3, "SmolLM3ForCausalLM", LLAMA, code="SmolLM3"),
}
