"""Mixtral."""

from specjax.hf.families.shared import (
    Family,
    head_width,
    take_activation,
    take_num_experts,
    take_sizes,
    uniform_layers,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, LAYER_NORMS, Table, expert_rows
from specjax.transformer.config import DecoderConfig, ExpertsConfig

MIXTRAL: Table = {**ENDS, **LAYER_NORMS, **ATTENTION, **expert_rows("block_sparse_moe", "w1", "w3", "w2")}


def _mixtral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32, rms_norm_eps=1e-5)
    head_dim = head_width(keys, sizes)
    layers = uniform_layers(keys, sizes, head_dim, keys.integer("sliding_window", None, optional=True), theta=1e6)
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 8),
        per_token=keys.integer("num_experts_per_tok", 2),
        intermediate_size=sizes["intermediate_size"],
    )
    return DecoderConfig(
        **with_experts(layers, [True] * sizes["num_hidden_layers"]),
        activation=take_activation(keys, "hidden_act", "silu"),
        experts=experts,
    )


FAMILIES = {
    "mixtral": Family(_mixtral, "MixtralForCausalLM", MIXTRAL, modules={".mlp.": ".block_sparse_moe."}),
}
