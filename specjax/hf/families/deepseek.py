"""DeepSeek-V3."""

from specjax.hf.families.shared import (
    Family,
    layers_of,
    same_kind,
    take_activation,
    take_grouped_experts,
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
from specjax.transformer.config import MAX_HEAD, DecoderConfig, LatentConfig

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
    # 1. Keys that must agree with others, or that only the authors' code reads.
    sizes = take_sizes(keys, max_position_embeddings=4096, num_key_value_heads=128)
    keys.only("moe_layer_freq", 1, None)
    if sizes["num_key_value_heads"] not in (None, sizes["num_attention_heads"]):
        raise ValueError(
            f"num_key_value_heads is {sizes['num_key_value_heads']}, but num_attention_heads "
            f"{sizes['num_attention_heads']}; with latent attention they are equal"
        )
    keys.ignore("head_dim", "qk_head_dim")  # follow from the other widths
    # 2. Latent attention (DeepSeek-V2, section 2.1) and experts.
    latent = LatentConfig(
        query_rank=keys.integer("q_lora_rank", 1536, optional=True),
        key_value_rank=keys.integer("kv_lora_rank", 512),
        plain_width=keys.integer("qk_nope_head_dim", 128, most=MAX_HEAD // 2),
        rotary_width=keys.integer("qk_rope_head_dim", 64, most=MAX_HEAD // 2),
        value_width=keys.integer("v_head_dim", 128),
    )
    dense = keys.integer("first_k_dense_replace", 3, least=0)
    experts = take_grouped_experts(
        keys, n_routed_experts=256, moe_intermediate_size=2048, routed_scaling_factor=2.5, n_group=8, topk_group=4
    )
    # 3. Only a part of each head has a position, so ``head_dim`` is not the width that rotates.
    bias = keys.flag("attention_bias", False)
    ropes = take_rope(keys)
    interleaved = keys.flag("rope_interleave", True, optional=True)
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
    "deepseek_v3": Family(_deepseek_v3, "DeepseekV3ForCausalLM", DEEPSEEK_V3, code="DeepseekV3"),
}
