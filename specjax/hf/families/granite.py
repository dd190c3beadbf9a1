"""Granite: dense, with experts, and Granite 4, which has Mamba-2 in most layers."""

from typing import Any

from specjax.checks import check_integer
from specjax.hf.families.llama import LLAMA
from specjax.hf.families.shared import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    Family,
    head_width,
    layers_of,
    recurrence_rows,
    take_activation,
    take_num_experts,
    take_sizes,
    uniform_layers,
    with_experts,
    with_recurrence,
    without_positions,
)
from specjax.hf.keys import Keys
from specjax.hf.names import (
    ATTENTION,
    CONVOLUTION,
    ENDS,
    LAYER_NORMS,
    LINEAR,
    SAME,
    Layout,
    Table,
    layer_path,
    layer_tensor,
)
from specjax.hf.rope import take_rope
from specjax.transformer.config import MAX_HEAD, DecoderConfig, ExpertsConfig, MambaConfig

_HALVES = Layout(axis=1, transpose=True)  # for each expert, the gate's rows, then the up-projection's
_INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it
_EXPERTS: Table = {
    layer_path("mlp.gate.kernel"): (layer_tensor("block_sparse_moe.router.layer.weight"), LINEAR),
    layer_path("mlp.experts.gate_proj"): (layer_tensor("block_sparse_moe.input_linear.weight"), _HALVES),
    layer_path("mlp.experts.up_proj"): (layer_tensor("block_sparse_moe.input_linear.weight"), _HALVES),
    layer_path("mlp.experts.down_proj"): (layer_tensor("block_sparse_moe.output_linear.weight"), LINEAR),
}
_MODULES = {
    ".experts.gate_up_proj": ".input_linear.weight",
    ".experts.down_proj": ".output_linear.weight",
    ".router.weight": ".router.layer.weight",
}
# Beside experts, the shared MLP is one of the mixture's parts. In a model without experts it is the layer's MLP.
_SHARED: Table = {
    layer_path(f"mlp.{part}{ours}.kernel"): (layer_tensor(f"shared_mlp.{theirs}.weight"), LINEAR)
    for part in ("", "shared_experts.")
    for ours, theirs in (("gate_proj", "input_linear"), ("up_proj", "input_linear"), ("down_proj", "output_linear"))
}
# Tensors hold the gate, values, keys, queries and steps of all heads, in this order.
_CONVOLVED = ("v", "k", "q")
_PROJECTED = ("gate", *_CONVOLVED, "step")
_MAMBA: Table = {
    **recurrence_rows("mamba", LINEAR, **{f"{part}_proj__kernel": "in_proj.weight" for part in _PROJECTED}),
    **recurrence_rows("mamba", SAME, **{f"{part}_proj__bias": "in_proj.bias" for part in _PROJECTED}),
    **recurrence_rows("mamba", CONVOLUTION, **{f"{part}_conv__taps": "conv1d.weight" for part in _CONVOLVED}),
    **recurrence_rows("mamba", SAME, **{f"{part}_conv__bias": "conv1d.bias" for part in _CONVOLVED}),
    **recurrence_rows("mamba", LINEAR, o_proj__kernel="out_proj.weight"),
    **recurrence_rows("mamba", SAME, o_proj__bias="out_proj.bias"),
    **recurrence_rows("mamba", SAME, decay_log="A_log", step_bias="dt_bias", skip="D", norm__weight="norm.weight"),
}
GRANITE_MOE: Table = {**ENDS, **LAYER_NORMS, **ATTENTION, **_EXPERTS, **_SHARED}
GRANITE_HYBRID: Table = {**GRANITE_MOE, **_MAMBA}


def _decoder(keys: Keys, described: dict[str, Any], **features: Any) -> DecoderConfig:
    """Takes the keys of activation, biases and multipliers; ``described`` are the other arguments."""
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **described,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=float(keys.number("embedding_multiplier", 1.0)),
        attention_scale=float(keys.number("attention_multiplier", 1.0)),
        residual_scale=float(keys.number("residual_multiplier", 1.0)),
        logit_scale=1 / keys.number("logits_scaling", 1.0),
        **features,
    )


def _granite(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys)
    described = uniform_layers(keys, sizes, head_width(keys, sizes))
    return _decoder(keys, described, mlp_bias=keys.flag("mlp_bias", False))


def _granitemoe(keys: Keys) -> DecoderConfig:
    return _with_experts(keys, 0)


def _granitemoeshared(keys: Keys) -> DecoderConfig:
    return _with_experts(keys, keys.integer("shared_intermediate_size", 0, least=0))


def _with_experts(keys: Keys, shared_size: int) -> DecoderConfig:
    """Reads a model of attention layers that all have experts."""
    sizes = take_sizes(keys)
    described = uniform_layers(keys, sizes, head_width(keys, sizes))
    experts = _take_experts(keys, sizes, take_num_experts(keys, "num_local_experts", 8), shared_size)
    return _decoder(keys, with_experts(described, [True] * sizes["num_hidden_layers"]), experts=experts)


def _take_experts(keys: Keys, sizes: dict[str, Any], num_experts: int, shared_size: int) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=num_experts,
        per_token=keys.integer("num_experts_per_tok", 2),
        intermediate_size=sizes["intermediate_size"],
        shared_size=shared_size,
    )


def _granitemoehybrid(keys: Keys) -> DecoderConfig:
    # 1. Layers: recurrent unless the config says otherwise, and with rotary positions only if it says so.
    sizes = take_sizes(keys)
    head_dim, count = head_width(keys, sizes), sizes["num_hidden_layers"]
    position = keys.take("position_embedding_type", None)
    if position not in (None, "nope", "rope"):
        raise ValueError(f"position_embedding_type is {position!r}; supported: 'rope', 'nope' and null")
    described = sizes | layers_of(sizes, head_dim, take_rope(keys), [FULL_ATTENTION] * count, None)
    described = without_positions(described, [position != "rope"] * count)
    kinds = keys.take("layer_types", None)
    kinds = keys.take("layers_block_type", [LINEAR_ATTENTION] * count) if kinds is None else kinds
    keys.only("layers_block_type", kinds, None)  # an older name
    layers = with_recurrence(described["layers"], kinds)
    mamba = _take_mamba(keys, sizes["hidden_size"])
    # 2. All layers have experts and a shared MLP, or the shared MLP alone.
    shared_size = keys.integer("shared_intermediate_size", 1024)
    num_experts = keys.integer("num_local_experts", 8, least=0)
    described |= {"layers": layers, "head_dim": head_dim}
    if num_experts:
        described = with_experts(described, [True] * count)
        described["experts"] = _take_experts(keys, sizes, num_experts, shared_size)
    else:
        keys.ignore("num_experts_per_tok")
        described["intermediate_size"] = shared_size
    return _decoder(keys, described, recurrence=mamba if any(layer.recurrent for layer in layers) else None)


def _take_mamba(keys: Keys, hidden_size: int) -> MambaConfig:
    """Takes the keys of Mamba-2.

    Raises:
      ValueError: a size is out of range, the heads do not make up ``mamba_expand * hidden_size`` entries, or steps
        are clamped.
    """
    # transformers clamps the steps of several tokens, and not the step of a single one.
    keys.only("time_step_limit", [0.0, float("inf")], [0.0, _INFINITY])
    keys.ignore("mamba_chunk_size")
    heads, expand = keys.integer("mamba_n_heads", 128), keys.integer("mamba_expand", 2)
    width = keys.take("mamba_d_head", "auto")
    width = expand * hidden_size // heads if width == "auto" else width
    check_integer("mamba_d_head", width, 1, MAX_HEAD)
    if width * heads != expand * hidden_size:
        raise ValueError(
            f"mamba_n_heads {heads} of mamba_d_head {width} entries are not the mamba_expand {expand} * hidden_size "
            f"{hidden_size} entries of the layer; correct one of them"
        )
    return MambaConfig(
        heads=heads,
        head_width=width,
        groups=keys.integer("mamba_n_groups", 1),
        state_width=keys.integer("mamba_d_state", 256, most=MAX_HEAD),
        taps=keys.integer("mamba_d_conv", 4, most=MAX_HEAD),
        conv_bias=keys.flag("mamba_conv_bias", True),
        proj_bias=keys.flag("mamba_proj_bias", False),
    )


FAMILIES = {
    "granite": Family(_granite, "GraniteForCausalLM", LLAMA),
    "granitemoe": Family(_granitemoe, "GraniteMoeForCausalLM", GRANITE_MOE, modules=_MODULES),
    "granitemoeshared": Family(_granitemoeshared, "GraniteMoeSharedForCausalLM", GRANITE_MOE, modules=_MODULES),
    "granitemoehybrid": Family(_granitemoehybrid, "GraniteMoeHybridForCausalLM", GRANITE_HYBRID, modules=_MODULES),
}
