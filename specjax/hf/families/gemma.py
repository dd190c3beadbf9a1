"""Gemma 1, 2 and 3."""

import math
from collections.abc import Mapping
from typing import Any

from specjax.hf.families.llama import LLAMA
from specjax.hf.families.shared import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Family,
    layers_of,
    take_activation,
    take_sizes,
    uniform_layers,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, MLP, QUERY_KEY_NORMS, Table, norms
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig

# Gemma 2 and 3 have four norms in a layer. Their post_attention_layernorm is applied to attention's output. In other
# families the norm of this name is applied to the MLP's input, as their pre_feedforward_layernorm is.
GEMMA: Table = {
    **ENDS,
    **norms(
        input_layernorm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        post_attention_layernorm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    **ATTENTION,
    **QUERY_KEY_NORMS,
    **MLP,
}


def _gemma1(keys: Keys) -> DecoderConfig:
    # The first folders name the exact gelu, but their models were trained with the approximation.
    sizes = take_sizes(keys, num_key_value_heads=16, max_position_embeddings=8192, tie_word_embeddings=True)
    if keys.peek("hidden_act") == "gelu":
        keys.ignore("hidden_act")
    keys.only("hidden_activation", None, "gelu_pytorch_tanh")
    keys.only("use_bidirectional_attention", False, None)
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **uniform_layers(keys, sizes, keys.integer("head_dim", 256, most=MAX_HEAD)),
        norm="rms_one_plus",
        activation=take_activation(keys, "hidden_act", "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=math.sqrt(sizes["hidden_size"]),
    )


def _gemma(keys: Keys, sizes: dict[str, Any], layers: dict[str, Any], head_dim: int, **features: Any) -> DecoderConfig:
    """Reads the keys that Gemma 2 and 3 share."""
    keys.ignore("hidden_act")  # transformers reads hidden_activation
    keys.only("use_bidirectional_attention", False, None)
    scalar = keys.number("query_pre_attn_scalar", 256)
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **sizes | layers,
        head_dim=head_dim,
        norm="rms_one_plus",
        norm_places="around",
        activation=take_activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=math.sqrt(sizes["hidden_size"]),
        attention_scale=float(scalar) ** -0.5,
        **features,
    )


def _gemma2(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=True)
    head_dim = keys.integer("head_dim", 256, most=MAX_HEAD)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = [FULL_ATTENTION if i % 2 else SLIDING_ATTENTION for i in range(sizes["num_hidden_layers"])]
    window = keys.integer("sliding_window", 4096, optional=True)
    if window is not None:
        keys.only("sliding_window_size", window)  # a second name in the 9B and 27B models
    layers = layers_of(sizes, head_dim, take_rope(keys), kinds, window)
    return _gemma(
        keys,
        sizes,
        layers,
        head_dim,
        attention_softcap=keys.number("attn_logit_softcapping", 50.0, optional=True),
        logit_softcap=keys.number("final_logit_softcapping", 30.0, optional=True),
    )


def _gemma3_text(keys: Keys) -> DecoderConfig:
    # 1. Types of layers, as a list or as a pattern: with 6, every sixth layer has full attention.
    sizes = take_sizes(keys, **_GEMMA3_SIZES, tie_word_embeddings=True)
    head_dim = keys.integer("head_dim", 256, most=MAX_HEAD)
    kinds, pattern = keys.take("layer_types", None), keys.integer("sliding_window_pattern", 6)
    keys.ignore("_sliding_window_pattern")  # transformers made layer_types of it
    if kinds is None:
        kinds = [SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    keys.only("attn_logit_softcapping", None)  # transformers reads it and does not apply it
    # 2. Both types of layers have their own rotary positions. A flat object would leave open which type it is for.
    local_theta = keys.number("rope_local_base_freq", 10000.0)
    flat = keys.peek("rope_parameters")
    if isinstance(flat, Mapping) and flat.keys().isdisjoint((FULL_ATTENTION, SLIDING_ATTENTION)) and flat:
        raise ValueError(
            f"rope_parameters is {flat!r}; for Gemma 3 it must name layer types: {FULL_ATTENTION!r}, "
            f"{SLIDING_ATTENTION!r}"
        )
    ropes = take_rope(keys, 1e6, {FULL_ATTENTION: None, SLIDING_ATTENTION: local_theta})
    if "" in ropes:  # the spelling of transformers 4: only full attention is scaled
        ropes = {FULL_ATTENTION: ropes[""], SLIDING_ATTENTION: {"rope_theta": local_theta}}
    layers = layers_of(sizes, head_dim, ropes, kinds, keys.integer("sliding_window", 4096, optional=True))
    return _gemma(
        keys,
        sizes,
        layers,
        head_dim,
        query_key_norm="heads",
        logit_softcap=keys.number("final_logit_softcapping", None, optional=True),
    )


# Published configs of the multimodal models leave out sizes that equal these.
_GEMMA3_SIZES: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


FAMILIES = {
    "gemma": Family(_gemma1, "GemmaForCausalLM", LLAMA),
    "gemma2": Family(_gemma2, "Gemma2ForCausalLM", GEMMA),
    "gemma3_text": Family(_gemma3_text, "Gemma3ForCausalLM", GEMMA),
}
