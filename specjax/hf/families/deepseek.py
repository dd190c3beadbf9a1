"""DeepSeek-V2 and -V3, and Kimi-K2, which has the architecture of DeepSeek-V3."""

from typing import Any

from specjax.hf.families.shared import (
    Family,
    layers_of,
    same_kind,
    take_activation,
    take_grouped_experts,
    take_num_experts,
    take_sizes,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import (
    ENDS,
    HEADS,
    LAYER_NORMS,
    MLP,
    SAME,
    Table,
    expert_rows,
    layer_path,
    layer_tensor,
    linear,
    linears,
)
from specjax.hf.rope import attention_scale, take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig, LatentConfig

DEEPSEEK_V3: Table = {
    **ENDS,
    **LAYER_NORMS,
    **linears("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.o_proj"),
    **linear(layer_path("self_attn.kv_a_proj"), layer_tensor("self_attn.kv_a_proj_with_mqa")),
    layer_path("self_attn.q_a_layernorm.weight"): (layer_tensor("self_attn.q_a_layernorm.weight"), SAME),
    layer_path("self_attn.kv_a_layernorm.weight"): (layer_tensor("self_attn.kv_a_layernorm.weight"), SAME),
    layer_path("self_attn.k_up"): (layer_tensor("self_attn.kv_b_proj.weight"), HEADS),
    layer_path("self_attn.v_up"): (layer_tensor("self_attn.kv_b_proj.weight"), HEADS),
    **MLP,
    **expert_rows("mlp", "gate_proj", "up_proj", "down_proj"),
    layer_path("mlp.gate.e_score_correction_bias"): (layer_tensor("mlp.gate.e_score_correction_bias"), SAME),
    **linears("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
}


def _deepseek_v3(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=4096, num_key_value_heads=128)
    experts = take_grouped_experts(
        keys, n_routed_experts=256, moe_intermediate_size=2048, routed_scaling_factor=2.5, n_group=8, topk_group=4
    )
    dense = keys.integer("first_k_dense_replace", 3, least=0)
    return _latent_decoder(keys, sizes, experts, dense, keys.flag("rope_interleave", True, optional=True))


def _deepseek_v2(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys)
    keys.only("mlp_bias", False, None)
    dense = keys.integer("first_k_dense_replace", 0, least=0)
    return _latent_decoder(keys, sizes, _softmax_experts(keys), dense, True)


def _softmax_experts(keys: Keys) -> ExpertsConfig:
    """Takes the experts of DeepSeek-V2 (section 2.1.3)."""
    # 1. Which experts may be chosen: all, or those in the groups that have the best experts.
    keys.only("scoring_func", "softmax", None)
    keys.only("norm_topk_prob", False, None)
    method = keys.take("topk_method", "greedy")
    groups, best = (keys.integer(key, None, optional=True) for key in ("n_group", "topk_group"))
    if method == "greedy":
        groups = best = 1
    elif method != "group_limited_greedy":
        raise ValueError(f"topk_method is {method!r}; supported: 'greedy', 'group_limited_greedy'")
    elif groups is None or best is None:
        raise ValueError(f"topk_method is {method!r}, but n_group is {groups} and topk_group {best}; give both")
    # 2. Sizes.
    size = keys.integer("moe_intermediate_size", 1407)
    number = take_num_experts(keys, "n_routed_experts", 64)
    keys.only("num_experts", number)
    return ExpertsConfig(
        num_experts=number,
        per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=size,
        renormalize=False,
        scale=keys.number("routed_scaling_factor", 1.0),
        groups=groups,
        best_groups=best,
        group_best=1,
        shared_size=size * keys.integer("n_shared_experts", 2, least=0),
    )


def _latent_decoder(
    keys: Keys, sizes: dict[str, Any], experts: ExpertsConfig, dense: int, interleaved: bool
) -> DecoderConfig:
    """Reads what DeepSeek-V2 and -V3 share. ``dense``: the first so many layers have no experts."""
    # 1. Keys that must agree with others, or that only the authors' code reads.
    keys.only("moe_layer_freq", 1, None)
    if sizes["num_key_value_heads"] not in (None, sizes["num_attention_heads"]):
        raise ValueError(
            f"num_key_value_heads is {sizes['num_key_value_heads']}, but num_attention_heads "
            f"{sizes['num_attention_heads']}; with latent attention they are equal"
        )
    keys.ignore("head_dim", "qk_head_dim")  # follow from the other widths
    # 2. Latent attention (DeepSeek-V2, section 2.1).
    latent = LatentConfig(
        query_rank=keys.integer("q_lora_rank", 1536, optional=True),
        key_value_rank=keys.integer("kv_lora_rank", 512),
        plain_width=keys.integer("qk_nope_head_dim", 128, most=MAX_HEAD // 2),
        rotary_width=keys.integer("qk_rope_head_dim", 64, most=MAX_HEAD // 2),
        value_width=keys.integer("v_head_dim", 128),
    )
    # 3. Only a part of each head has a position, so ``head_dim`` is not the width that rotates.
    bias = keys.flag("attention_bias", False)
    ropes = take_rope(keys)
    head = latent.plain_width + latent.rotary_width
    kinds = same_kind(keys, sizes, None)
    layers = layers_of(sizes, latent.rotary_width, ropes, kinds, None, interleaved=interleaved)
    sparse = [i >= dense for i in range(sizes["num_hidden_layers"])]
    return DecoderConfig(
        **sizes | with_experts(layers, sparse),
        head_dim=head,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        attention_scale=head**-0.5 * attention_scale(ropes[""]),
        latent=latent,
        experts=experts,
    )


FAMILIES = {
    "deepseek_v2": Family(_deepseek_v2, "DeepseekV2ForCausalLM", DEEPSEEK_V3, code="DeepseekV2"),
    "deepseek_v3": Family(_deepseek_v3, "DeepseekV3ForCausalLM", DEEPSEEK_V3, code="DeepseekV3"),
}
