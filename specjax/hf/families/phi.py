"""Phi-3."""

from specjax.hf.families.shared import Family, head_width, layers_of, same_kind, take_activation, take_sizes
from specjax.hf.keys import Keys
from specjax.hf.names import ENDS, LAYER_NORMS, Table, layer_path, layer_tensor, linear, linears
from specjax.hf.rope import take_rope
from specjax.transformer.config import DecoderConfig

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


FAMILIES = {
    "phi3": Family(_phi3, "Phi3ForCausalLM", PHI3, code="Phi3"),
}
