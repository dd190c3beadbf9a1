"""Qwen 2 and 3."""

from typing import Any

from specjax.checks import check_integer
from specjax.hf.families.llama import LLAMA
from specjax.hf.families.shared import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Family,
    head_width,
    layers_of,
    take_activation,
    take_num_experts,
    take_sizes,
    uniform_layers,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import QUERY_KEY_NORMS, Table, expert_rows
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig

QWEN3: Table = {**LLAMA, **QUERY_KEY_NORMS}
QWEN3_MOE: Table = {**QWEN3, **expert_rows("mlp", "gate_proj", "up_proj", "down_proj")}


def _qwen_window(keys: Keys) -> int | None:
    """Takes the window of sliding attention, or None if it is switched off."""
    window = keys.integer("sliding_window", 4096, optional=True)
    return window if keys.flag("use_sliding_window", False) else None


def _qwen(keys: Keys, sizes: dict[str, Any], head_dim: int, bias: bool, **features: Any) -> DecoderConfig:
    """Reads Qwen2 and Qwen3: sliding attention from layer ``max_window_layers`` on, if it is switched on."""
    window, windows_from = _qwen_window(keys), keys.integer("max_window_layers", 28, least=0)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        first = sizes["num_hidden_layers"] if window is None else windows_from
        kinds = [SLIDING_ATTENTION if i >= first else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    return DecoderConfig(
        **sizes | layers_of(sizes, head_dim, take_rope(keys), kinds, window),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        **features,
    )


def _qwen2(keys: Keys) -> DecoderConfig:
    keys.only("use_mrope", False)
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=32)
    return _qwen(keys, sizes, head_width(keys, sizes), True)


def _qwen3(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=32)
    bias = keys.flag("attention_bias", False)
    head_dim = keys.integer("head_dim", 128, most=MAX_HEAD)
    return _qwen(keys, sizes, head_dim, bias, output_bias=bias, query_key_norm=True)


def _qwen3_moe(keys: Keys) -> DecoderConfig:
    # 1. Attention: as in Qwen3, but a window is for all layers or for none.
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=4)
    head_dim = head_width(keys, sizes)
    window = _qwen_window(keys)
    keys.ignore("max_window_layers")  # transformers gives all layers a window, or none
    bias = keys.flag("attention_bias", False)
    # 2. Which layers have experts: every ``step``-th, but for those that are listed as dense.
    step, dense = keys.integer("decoder_sparse_step", 1), keys.take("mlp_only_layers", None)
    dense = [] if dense is None else dense
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {dense!r}; it must be a list of layers' numbers")
    for layer in dense:
        check_integer("mlp_only_layers", layer, 0, sizes["num_hidden_layers"] - 1)
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 128),
        per_token=keys.integer("num_experts_per_tok", 8),
        intermediate_size=keys.integer("moe_intermediate_size", 768),
        renormalize=keys.flag("norm_topk_prob", False),
    )
    layers = uniform_layers(keys, sizes, head_dim, window)
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(sizes["num_hidden_layers"])]
    return DecoderConfig(
        **with_experts(layers, sparse),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        experts=experts,
    )


FAMILIES = {
    "qwen2": Family(_qwen2, "Qwen2ForCausalLM", LLAMA),
    "qwen3": Family(_qwen3, "Qwen3ForCausalLM", QWEN3),
    "qwen3_moe": Family(_qwen3_moe, "Qwen3MoeForCausalLM", QWEN3_MOE),
}
