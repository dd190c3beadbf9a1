"""GLM: dense GLM-4, and GLM-4.5, 4.6 and 4.7 with experts."""

from typing import Any

from specjax.hf.families.deepseek import DEEPSEEK_V3
from specjax.hf.families.phi import PHI3
from specjax.hf.families.qwen import QWEN3_MOE
from specjax.hf.families.shared import (
    Family,
    partly_rotary_layers,
    take_activation,
    take_grouped_experts,
    take_sizes,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, Table, norms
from specjax.transformer.config import MAX_HEAD, DecoderConfig

GLM4_MOE: Table = {
    **QWEN3_MOE,
    **{row: DEEPSEEK_V3[row] for row in DEEPSEEK_V3 if "shared_experts" in row or "e_score_correction_bias" in row},
}

# The dense models fuse gate and up projections, as Phi-3 does.
GLM: Table = {**PHI3, **ATTENTION}
GLM4: Table = {
    **GLM,
    **norms(attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
}


def _glm(keys: Keys, **features: Any) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=131072, num_key_value_heads=2, rms_norm_eps=1.5625e-7)
    head_dim = keys.integer("head_dim", 128, most=MAX_HEAD)
    return DecoderConfig(
        **partly_rotary_layers(keys, sizes, head_dim, 0.5, interleaved=True),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=keys.flag("attention_bias", True),
        **features,
    )


def _glm4(keys: Keys) -> DecoderConfig:
    return _glm(keys, norm_places="around")


def _glm4_moe(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5)
    head_dim = keys.integer("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"], most=MAX_HEAD)
    dense = keys.integer("first_k_dense_replace", 1, least=0)
    experts = take_grouped_experts(
        keys, n_routed_experts=128, moe_intermediate_size=1408, routed_scaling_factor=1.0, n_group=1, topk_group=1
    )
    layers = partly_rotary_layers(keys, sizes, head_dim, 0.5)
    return DecoderConfig(
        **with_experts(layers, [i >= dense for i in range(sizes["num_hidden_layers"])]),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=keys.flag("attention_bias", False),
        query_key_norm="heads" if keys.flag("use_qk_norm", False) else None,
        experts=experts,
    )


FAMILIES = {
    "glm": Family(_glm, "GlmForCausalLM", GLM),
    "glm4": Family(_glm4, "Glm4ForCausalLM", GLM4),
    "glm4_moe": Family(_glm4_moe, "Glm4MoeForCausalLM", GLM4_MOE),
}
