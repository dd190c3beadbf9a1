"""Phi-3 and Phi-3.5-MoE."""

from specjax.checks import check_positive
from specjax.hf.families.shared import (
    Family,
    head_width,
    layers_of,
    same_kind,
    take_activation,
    take_num_experts,
    take_sizes,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import (
    ATTENTION,
    ENDS,
    LAYER_NORMS,
    SAME,
    Table,
    expert_rows,
    layer_path,
    layer_tensor,
    linear,
    linears,
)
from specjax.hf.rope import take_rope
from specjax.transformer.config import DecoderConfig, ExpertsConfig

PHI3: Table = {
    **ENDS,
    **LAYER_NORMS,
    **linear(layer_path("self_attn.q_proj"), layer_tensor("self_attn.qkv_proj")),
    **linear(layer_path("self_attn.k_proj"), layer_tensor("self_attn.qkv_proj")),
    **linear(layer_path("self_attn.v_proj"), layer_tensor("self_attn.qkv_proj")),
    **linears("self_attn.o_proj", "mlp.down_proj"),
    **linear(layer_path("mlp.gate_proj"), layer_tensor("mlp.gate_up_proj")),
    **linear(layer_path("mlp.up_proj"), layer_tensor("mlp.gate_up_proj")),
}


PHIMOE: Table = {
    **ENDS,
    "norm.bias": ("model.norm.bias", SAME),
    "lm_head.bias": ("lm_head.bias", SAME),
    **{
        layer_path(f"{norm}.{part}"): (layer_tensor(f"{norm}.{part}"), SAME)
        for norm in ("input_layernorm", "post_attention_layernorm")
        for part in ("weight", "bias")
    },
    **ATTENTION,
    **expert_rows("block_sparse_moe", "w1", "w3", "w2"),
}


def _phi3(keys: Keys) -> DecoderConfig:
    # 1. Keys that only the authors' own code reads. The decoder computes one value of each.
    sizes = take_sizes(keys, max_position_embeddings=4096, rms_norm_eps=1e-5)
    head_dim = head_width(keys, sizes)
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.only(bias, False)
    keys.only("full_attn_mod", 1, None)
    keys.only("interpolate_factor", 1, None)
    # 2. Rotary positions. The original length lies next to them in the config, not among them.
    original = keys.integer("original_max_position_embeddings", 4096)
    window = keys.integer("sliding_window", None, optional=True)
    ropes = take_rope(keys, partial=True)
    kind = next((ropes[""][key] for key in ("rope_type", "type") if ropes[""].get(key) is not None), "default")
    inner = ropes[""].get("original_max_position_embeddings", original)
    if inner != original:
        raise ValueError(f"original_max_position_embeddings is {original}, but {inner!r} in the rope; give one of them")
    if kind in ("su", "yarn", "longrope"):  # early Phi-3 folders have other names for LongRoPE
        ropes[""] |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is not one of Phi-3's; supported: 'default', 'longrope'")
    kinds = same_kind(keys, sizes, window)
    return DecoderConfig(
        **sizes | layers_of(sizes, head_dim, ropes, kinds, window),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
    )


def _phimoe(keys: Keys) -> DecoderConfig:
    # 1. Attention. With LongRoPE, one key sets the scale of rotated entries in texts up to the original length.
    sizes = take_sizes(keys, max_position_embeddings=4096 * 32, num_key_value_heads=8, rms_norm_eps=1e-5)
    head_dim = head_width(keys, sizes)
    window = keys.integer("sliding_window", None, optional=True)
    original = keys.integer("original_max_position_embeddings", None, optional=True)  # transformers reads the rope's
    ropes = take_rope(keys, 1e6)
    rope = ropes[""]
    kind = next((rope[key] for key in ("rope_type", "type") if rope.get(key) is not None), "default")
    if kind not in ("default", "longrope", "su"):
        raise ValueError(f"rope_type {kind!r} is not one of Phi-3.5-MoE's; supported: 'default', 'longrope'")
    if kind != "default":
        if original not in (None, rope.setdefault("original_max_position_embeddings", original)):
            raise ValueError(
                f"original_max_position_embeddings is {original}, but {rope['original_max_position_embeddings']!r} in "
                "the rope; give one of them"
            )
        scales = {key: rope.pop(key, None) for key in ("short_mscale", "long_mscale")}
        for key, scale in scales.items():
            check_positive(key, scale)
        rope["attention_factor"] = scales["short_mscale"]
    kinds = same_kind(keys, sizes, window)
    # 2. Experts.
    keys.only("num_experts_per_tok", 2)  # transformers chooses two, whatever the config says
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 16),
        per_token=2,
        intermediate_size=sizes["intermediate_size"],
        score="sparsemixer",
        nearness=2 * keys.number("router_jitter_noise", 0.01),
        renormalize=False,
    )
    bias = keys.flag("attention_bias", False)
    layers = sizes | {"head_dim": head_dim} | layers_of(sizes, head_dim, ropes, kinds, window)
    return DecoderConfig(
        **with_experts(layers, [True] * sizes["num_hidden_layers"]),
        norm="layer",
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        head_bias=keys.flag("lm_head_bias", False),
        experts=experts,
    )


FAMILIES = {
    "phi3": Family(_phi3, "Phi3ForCausalLM", PHI3, code="Phi3"),
    "phimoe": Family(
        _phimoe,
        "PhimoeForCausalLM",
        PHIMOE,
        "PhiMoE",
        frozenset({"router_jitter_noise"}),
        {".mlp.router.": ".block_sparse_moe.gate.", ".mlp.": ".block_sparse_moe."},
    ),
}
