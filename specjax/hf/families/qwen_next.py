"""Qwen3-Next and Qwen 3.5: gated DeltaNet in most layers, attention with output gates in the others."""

from typing import Any

from specjax.hf.families.qwen import QWEN3, QWEN3_MOE, SHARED_EXPERT, take_sparse_layers
from specjax.hf.families.shared import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    Family,
    layers_of,
    recurrence_rows,
    take_activation,
    take_num_experts,
    take_sizes,
    with_experts,
    with_recurrence,
)
from specjax.hf.keys import Keys
from specjax.hf.names import BY_KEY_HEAD, CONVOLUTION, LINEAR, SAME, Table
from specjax.hf.rope import take_rope, without_axes
from specjax.transformer.config import MAX_HEAD, DecoderConfig, DeltaConfig, ExpertsConfig

_DELTA: Table = {
    **recurrence_rows(
        "linear_attn",
        CONVOLUTION,
        q_conv__taps="conv1d.weight",
        k_conv__taps="conv1d.weight",
        v_conv__taps="conv1d.weight",
    ),
    **recurrence_rows("linear_attn", SAME, decay_log="A_log", step_bias="dt_bias", norm__weight="norm.weight"),
    **recurrence_rows("linear_attn", LINEAR, o_proj__kernel="out_proj.weight"),
}
QWEN3_NEXT: Table = {
    **QWEN3_MOE,
    **SHARED_EXPERT,
    **_DELTA,
    **recurrence_rows(
        "linear_attn",
        BY_KEY_HEAD,
        q_proj__kernel="in_proj_qkvz.weight",
        k_proj__kernel="in_proj_qkvz.weight",
        v_proj__kernel="in_proj_qkvz.weight",
        gate_proj__kernel="in_proj_qkvz.weight",
        rate_proj__kernel="in_proj_ba.weight",
        step_proj__kernel="in_proj_ba.weight",
    ),
}
_SPLIT: Table = recurrence_rows(
    "linear_attn",
    LINEAR,
    q_proj__kernel="in_proj_qkv.weight",
    k_proj__kernel="in_proj_qkv.weight",
    v_proj__kernel="in_proj_qkv.weight",
    gate_proj__kernel="in_proj_z.weight",
    rate_proj__kernel="in_proj_b.weight",
    step_proj__kernel="in_proj_a.weight",
)
QWEN3_5: Table = {**QWEN3, **_DELTA, **_SPLIT}
QWEN3_5_MOE: Table = {**QWEN3_MOE, **SHARED_EXPERT, **_DELTA, **_SPLIT}


def _hybrid(keys: Keys, sizes: dict[str, Any], sparse: list[bool], **features: Any) -> DecoderConfig:
    """Reads what these families share; ``sparse`` says which layers have experts."""
    # 1. Attention, which rotates a quarter of each head unless the config says otherwise.
    count = sizes["num_hidden_layers"]
    head_dim = keys.integer("head_dim", 256, most=MAX_HEAD)
    bias = keys.flag("attention_bias", False)
    ropes = take_rope(keys, partial=True)
    ropes[""] = {"partial_rotary_factor": 0.25} | without_axes(ropes[""])
    layers = sizes | with_experts(layers_of(sizes, head_dim, ropes, [FULL_ATTENTION] * count, None), sparse)
    # 2. Which layers are recurrent, as a list or as a pattern: with 4, every fourth layer has attention.
    interval, kinds = keys.integer("full_attention_interval", 4), keys.take("layer_types", None)
    if kinds is None:
        kinds = [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(count)]
    return DecoderConfig(
        **layers | {"layers": with_recurrence(layers["layers"], kinds)},
        head_dim=head_dim,
        norm="rms_one_plus",
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        output_gate=True,
        query_key_norm="heads",
        recurrence=DeltaConfig(
            key_heads=keys.integer("linear_num_key_heads", 16),
            heads=keys.integer("linear_num_value_heads", 32),
            key_width=keys.integer("linear_key_head_dim", 128, most=MAX_HEAD),
            value_width=keys.integer("linear_value_head_dim", 128, most=MAX_HEAD),
            taps=keys.integer("linear_conv_kernel_dim", 4, most=MAX_HEAD),
        ),
        **features,
    )


def _qwen3_next(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=2)
    sparse = take_sparse_layers(keys, sizes)
    experts = _take_experts(keys, 512, 10, keys.flag("norm_topk_prob", True))
    return _hybrid(keys, sizes, sparse, experts=experts)


def _qwen3_5(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=4)
    return _hybrid(keys, sizes, [False] * sizes["num_hidden_layers"])


def _qwen3_5_moe(keys: Keys) -> DecoderConfig:
    experts = _take_experts(keys, 256, 8, True)
    # No layer has an MLP of its own, so the configs do not say how wide it is.
    sizes = take_sizes(
        keys, max_position_embeddings=32768, num_key_value_heads=2, intermediate_size=experts.intermediate_size
    )
    return _hybrid(keys, sizes, [True] * sizes["num_hidden_layers"], experts=experts)


def _take_experts(keys: Keys, num_experts: int, per_token: int, renormalize: bool) -> ExpertsConfig:
    """Takes the keys of experts; the shared one's share is gated. ``num_experts`` and ``per_token`` are defaults."""
    return ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", num_experts),
        per_token=keys.integer("num_experts_per_tok", per_token),
        intermediate_size=keys.integer("moe_intermediate_size", 512),
        renormalize=renormalize,
        shared_size=keys.integer("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


FAMILIES = {
    "qwen3_next": Family(_qwen3_next, "Qwen3NextForCausalLM", QWEN3_NEXT),
    "qwen3_5_text": Family(_qwen3_5, "Qwen3_5ForCausalLM", QWEN3_5),
    "qwen3_5_moe_text": Family(_qwen3_5_moe, "Qwen3_5MoeForCausalLM", QWEN3_5_MOE),
}
