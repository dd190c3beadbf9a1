"""Llama, and families that differ from it in few keys."""

from specjax.hf.families.shared import Family, head_width, take_activation, take_sizes, uniform_layers
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, LAYER_NORMS, MLP, Table
from specjax.transformer.config import DecoderConfig

LLAMA: Table = {**ENDS, **LAYER_NORMS, **ATTENTION, **MLP}


def _llama(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys)
    head_dim = head_width(keys, sizes)
    keys.only("sliding_window", None)
    keys.only("use_sliding_window", False)
    keys.only("rope_interleaved", False)  # SmolLM
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **uniform_layers(keys, sizes, head_dim),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _mistral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    head_dim = head_width(keys, sizes)
    window = keys.integer("sliding_window", 4096, optional=True)
    return DecoderConfig(
        **uniform_layers(keys, sizes, head_dim, window), activation=take_activation(keys, "hidden_act", "silu")
    )


FAMILIES = {
    "llama": Family(_llama, "LlamaForCausalLM", LLAMA),
    "mistral": Family(_mistral, "MistralForCausalLM", LLAMA),
}
