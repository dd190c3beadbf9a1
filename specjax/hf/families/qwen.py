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
from specjax.hf.names import LINEAR, QUERY_KEY_NORMS, Table, expert_rows, layer_path, layer_tensor
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig

QWEN3: Table = {**LLAMA, **QUERY_KEY_NORMS}
SHARED_EXPERT: Table = {
    **{
        layer_path(f"mlp.shared_experts.{name}_proj.kernel"): (
            layer_tensor(f"mlp.shared_expert.{name}_proj.weight"),
            LINEAR,
        )
        for name in ("gate", "up", "down")
    },
    layer_path("mlp.shared_expert_gate.kernel"): (layer_tensor("mlp.shared_expert_gate.weight"), LINEAR),
}
QWEN2_MOE: Table = {**LLAMA, **expert_rows("mlp", "gate_proj", "up_proj", "down_proj"), **SHARED_EXPERT}
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
    return _qwen(keys, sizes, head_dim, bias, output_bias=bias, query_key_norm="heads")


def take_sparse_layers(keys: Keys, sizes: dict[str, Any]) -> list[bool]:
    """Takes which layers have experts: every ``decoder_sparse_step``-th, but for those that are listed as dense."""
    step, dense = keys.integer("decoder_sparse_step", 1), keys.take("mlp_only_layers", None)
    dense = [] if dense is None else dense
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {dense!r}; it must be a list of layers' numbers")
    for layer in dense:
        check_integer("mlp_only_layers", layer, 0, sizes["num_hidden_layers"] - 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(sizes["num_hidden_layers"])]


def _qwen2_moe(keys: Keys) -> DecoderConfig:
    # 1. Attention: where windows are switched on, every second of the first layers has one.
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=16)
    head_dim = head_width(keys, sizes)
    sliding = keys.flag("use_sliding_window", False)
    window = keys.integer("sliding_window", 4096, least=0, optional=True)  # transformers writes 0 if it is off
    below, kinds = keys.integer("max_window_layers", 28, least=0), keys.take("layer_types", None)
    if kinds is None:
        windows = [sliding and i % 2 == 0 and i < below for i in range(sizes["num_hidden_layers"])]
        kinds = [SLIDING_ATTENTION if has_window else FULL_ATTENTION for has_window in windows]
    # 2. Experts, with a shared one whose share is gated.
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 60),
        per_token=keys.integer("num_experts_per_tok", 4),
        intermediate_size=keys.integer("moe_intermediate_size", 1408),
        renormalize=keys.flag("norm_topk_prob", False),
        shared_size=keys.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    layers = sizes | {"head_dim": head_dim}
    layers |= layers_of(sizes, head_dim, take_rope(keys), kinds, window if sliding and window else None)
    return DecoderConfig(
        **with_experts(layers, take_sparse_layers(keys, sizes)),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=keys.flag("qkv_bias", True),
        experts=experts,
    )


def _qwen3_moe(keys: Keys) -> DecoderConfig:
    # 1. Attention: as in Qwen3, but a window is for all layers or for none.
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=4)
    head_dim = head_width(keys, sizes)
    window = _qwen_window(keys)
    keys.ignore("max_window_layers")  # transformers gives all layers a window, or none
    bias = keys.flag("attention_bias", False)
    # 2. Experts.
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 128),
        per_token=keys.integer("num_experts_per_tok", 8),
        intermediate_size=keys.integer("moe_intermediate_size", 768),
        renormalize=keys.flag("norm_topk_prob", False),
    )
    layers = uniform_layers(keys, sizes, head_dim, window)
    return DecoderConfig(
        **with_experts(layers, take_sparse_layers(keys, sizes)),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm="heads",
        experts=experts,
    )


FAMILIES = {
    "qwen2": Family(_qwen2, "Qwen2ForCausalLM", LLAMA),
    "qwen2_moe": Family(_qwen2_moe, "Qwen2MoeForCausalLM", QWEN2_MOE),
    "qwen3": Family(_qwen3, "Qwen3ForCausalLM", QWEN3),
    "qwen3_moe": Family(_qwen3_moe, "Qwen3MoeForCausalLM", QWEN3_MOE),
}
