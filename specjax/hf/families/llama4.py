"""Llama 4."""

from typing import Any

from specjax.checks import check_integer
from specjax.hf.families.shared import FULL_ATTENTION, Family, take_activation, take_num_experts, take_sizes
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, LAYER_NORMS, LINEAR, SAME, Layout, Table, layer_path, layer_tensor
from specjax.hf.rope import read_rope, take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig, LayerConfig

CHUNKED_ATTENTION = "chunked_attention"
_GATES_AND_UPS = Layout(axis=2)  # one stack: the gate's entries, then the up-projection's
LLAMA4: Table = {
    **ENDS,
    **LAYER_NORMS,
    **ATTENTION,
    **{
        layer_path(f"mlp.{ours}{name}.kernel"): (layer_tensor(f"feed_forward.{theirs}{name}.weight"), LINEAR)
        for ours, theirs in (("", ""), ("shared_experts.", "shared_expert."))
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    layer_path("mlp.gate.kernel"): (layer_tensor("feed_forward.router.weight"), LINEAR),
    layer_path("mlp.experts.gate_proj"): (layer_tensor("feed_forward.experts.gate_up_proj"), _GATES_AND_UPS),
    layer_path("mlp.experts.up_proj"): (layer_tensor("feed_forward.experts.gate_up_proj"), _GATES_AND_UPS),
    layer_path("mlp.experts.down_proj"): (layer_tensor("feed_forward.experts.down_proj"), SAME),
}
_SIZES = {
    "vocab_size": 202_048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}


def _llama4_text(keys: Keys) -> DecoderConfig:
    # 1. Published configs of multimodal models leave out sizes that equal the defaults.
    sizes = take_sizes(keys, **_SIZES)
    width = sizes.pop("intermediate_size")  # of an expert, and of the shared one
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 16),
        per_token=keys.integer("num_experts_per_tok", 1),
        intermediate_size=width,
        score="sigmoid",
        renormalize=False,
        shared_size=width,
        weighs_inputs=True,
    )
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **sizes | _layers(keys, sizes, head_dim := keys.integer("head_dim", 128, most=MAX_HEAD)),
        intermediate_size=keys.integer("intermediate_size_mlp", 16384),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        experts=experts,
    )


def _layers(keys: Keys, sizes: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Takes the keys of the layers, as arguments of DecoderConfig.

    Raises:
      ValueError: a list does not fit the number of layers, or a value is of another type or out of range.
    """
    # 1. Which layers have rotary positions (the key says 1 for those that have), and which have experts.
    count = sizes["num_hidden_layers"]
    interval, step = keys.integer("no_rope_layer_interval", 4), keys.integer("interleave_moe_layer_step", 1)
    rotary = keys.take("no_rope_layers", None) or [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotary, list) or len(rotary) != count or any(flag not in (0, 1) for flag in rotary):
        raise ValueError(f"no_rope_layers is {rotary!r}; it must have 0 or 1 for each of the {count} layers")
    sparse = keys.take("moe_layers", None)
    sparse = list(range(step - 1, count, step)) if sparse is None else sparse
    if not isinstance(sparse, list):
        raise ValueError(f"moe_layers is {sparse!r}; it must be a list of layers' numbers")
    for layer in sparse:
        check_integer("moe_layers", layer, 0, count - 1)
    # 2. Which layers attend in chunks.
    chunk, kinds = keys.integer("attention_chunk_size", 8192, optional=True), keys.take("layer_types", None)
    if kinds is None:
        kinds = [CHUNKED_ATTENTION if flag and chunk is not None else FULL_ATTENTION for flag in rotary]
    known = {FULL_ATTENTION: None, CHUNKED_ATTENTION: chunk}
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}; it must have one of {list(known)} for each of the {count} layers")
    if chunk is None and CHUNKED_ATTENTION in kinds:
        raise ValueError(f"layer_types has {CHUNKED_ATTENTION!r}, but attention_chunk_size is null; give one")
    # 3. Queries grow with the position in layers without rotary positions. The others have norms of queries and keys.
    normed, grows = keys.flag("use_qk_norm", True), keys.flag("attn_temperature_tuning", True)
    growth = float(keys.number("attn_scale", 0.1)), keys.integer("floor_scale", 8192)
    rope, longest = read_rope(
        take_rope(keys, 500_000.0)[""], head_dim, sizes["max_position_embeddings"], interleaved=True
    )
    layers = (
        LayerConfig(
            rope=rope if rotates else None,
            chunk=known[kind],
            growth=growth if grows and not rotates else None,
            unit_heads=normed and bool(rotates),
            experts=i in sparse,
        )
        for i, (rotates, kind) in enumerate(zip(rotary, kinds, strict=True))
    )
    return {"layers": tuple(layers), "max_position_embeddings": longest}


FAMILIES = {
    "llama4_text": Family(_llama4_text, "Llama4ForCausalLM", LLAMA4),
}
