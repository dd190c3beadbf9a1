"""gpt-oss."""

from specjax.hf.families.shared import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Family,
    layers_of,
    take_num_experts,
    take_sizes,
    with_experts,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, LAYER_NORMS, SAME, Layout, Table, layer_path, layer_tensor, linear
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig

# In the two stacks of gate and up-projection, even entries are the gate's. Published folders hold the stacks' kernels
# as MXFP4, which is read as the plain stack (``specjax.hf.formats``).
_KERNELS, _BIASES = Layout(axis=2, stride=2), Layout(axis=1, stride=2)
GPT_OSS: Table = {
    **ENDS,
    **LAYER_NORMS,
    **ATTENTION,
    layer_path("self_attn.sinks"): (layer_tensor("self_attn.sinks"), SAME),
    **linear(layer_path("mlp.gate"), layer_tensor("mlp.router")),
    layer_path("mlp.experts.gate_proj"): (layer_tensor("mlp.experts.gate_up_proj"), _KERNELS),
    layer_path("mlp.experts.up_proj"): (layer_tensor("mlp.experts.gate_up_proj"), _KERNELS),
    layer_path("mlp.experts.down_proj"): (layer_tensor("mlp.experts.down_proj"), SAME),
    layer_path("mlp.experts.gate_bias"): (layer_tensor("mlp.experts.gate_up_proj_bias"), _BIASES),
    layer_path("mlp.experts.up_bias"): (layer_tensor("mlp.experts.gate_up_proj_bias"), _BIASES),
    layer_path("mlp.experts.down_bias"): (layer_tensor("mlp.experts.down_proj_bias"), SAME),
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(keys: Keys) -> DecoderConfig:
    # 1. Attention: every second layer has a window.
    sizes = take_sizes(keys, max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5)
    head_dim = keys.integer("head_dim", 64, most=MAX_HEAD)
    window = keys.integer("sliding_window", 128, optional=True)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = [FULL_ATTENTION if i % 2 else SLIDING_ATTENTION for i in range(sizes["num_hidden_layers"])]
    scaled = keys.peek("rope_parameters") or keys.peek("rope_scaling")
    ropes = take_rope(keys, 150000.0)
    ropes[""] |= {} if scaled else _ROPE
    keys.ignore("initial_context_length")  # a second name of original_max_position_embeddings
    bias = keys.flag("attention_bias", True)
    # 2. Experts. The class has the name of an activation, and does not read it.
    keys.ignore("hidden_act")
    per_token = keys.integer("num_experts_per_tok", 4)
    keys.only("experts_per_token", per_token)
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 128),
        per_token=per_token,
        intermediate_size=sizes["intermediate_size"],
        router_bias=True,
        bias=True,
        clamp=(float(keys.number("swiglu_alpha", 1.702)), float(keys.number("swiglu_limit", 7.0))),
    )
    layers = sizes | {"head_dim": head_dim} | layers_of(sizes, head_dim, ropes, kinds, window)
    return DecoderConfig(
        **with_experts(layers, [True] * sizes["num_hidden_layers"]),
        attention_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        experts=experts,
    )


FAMILIES = {
    "gpt_oss": Family(_gpt_oss, "GptOssForCausalLM", GPT_OSS),
}
