"""Cohere's Command models."""

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
    without_positions,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, MLP, QUERY_KEY_NORMS, Table, norms
from specjax.hf.rope import take_rope
from specjax.transformer.config import DecoderConfig

COHERE: Table = {**ENDS, **norms(input_layernorm="input_layernorm"), **ATTENTION, **QUERY_KEY_NORMS, **MLP}
_DEFAULTS = {"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}


def _cohere_like(keys: Keys, described: dict[str, Any], normed: bool = False) -> DecoderConfig:
    """Reads the keys that all Command models share; ``described`` are sizes and layers, ``normed`` is Command R+'s."""
    # Only the authors' own code has models of the other kinds.
    keys.only("use_parallel_block", True)
    keys.only("use_gated_activation", True)
    keys.only("rotary_pct", 1.0, 1)
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **described,
        norm="layer_unbiased",
        parallel=True,
        query_key_norm="each_head" if normed else None,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        logit_scale=float(keys.number("logit_scale", 0.0625)),
    )


def _cohere(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, "layer_norm_eps", **_DEFAULTS)
    head_dim, kinds = head_width(keys, sizes), same_kind(keys, sizes, None)
    layers = layers_of(sizes, head_dim, take_rope(keys, 500_000.0), kinds, None, interleaved=True)
    normed = keys.flag("use_qk_norm", False, optional=True)
    return _cohere_like(keys, {**sizes, "head_dim": head_dim, **layers}, normed)


def _cohere2(keys: Keys) -> DecoderConfig:
    # 1. transformers computes the width of a head, whatever the config says, and has no norms of heads.
    keys.only("use_qk_norm", False, None)
    sizes = take_sizes(keys, "layer_norm_eps", **_DEFAULTS)
    keys.only("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    head_dim = head_width(keys, sizes)
    # 2. Types of layers, as a list or as a pattern: with 4, every fourth layer has full attention and no positions.
    kinds, pattern = keys.take("layer_types", None), keys.integer("sliding_window_pattern", 4)
    keys.ignore("_sliding_window_pattern")  # transformers made layer_types of it
    if kinds is None:
        kinds = [SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    window = keys.integer("sliding_window", 4096, optional=True)
    layers = layers_of(sizes, head_dim, take_rope(keys), kinds, window, interleaved=True)
    layers = without_positions(layers, [kind == FULL_ATTENTION for kind in kinds])
    return _cohere_like(keys, {**sizes, "head_dim": head_dim, **layers})


FAMILIES = {
    "cohere": Family(_cohere, "CohereForCausalLM", COHERE),
    "cohere2": Family(_cohere2, "Cohere2ForCausalLM", COHERE),
}
