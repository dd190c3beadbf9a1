"""OLMo 2 and 3."""

from typing import Any

from specjax.hf.families.shared import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Family,
    head_width,
    layers_of,
    take_activation,
    take_sizes,
    uniform_layers,
)
from specjax.hf.keys import Keys
from specjax.hf.names import ATTENTION, ENDS, MLP, QUERY_KEY_NORMS, Table, norms
from specjax.hf.rope import take_rope
from specjax.transformer.config import DecoderConfig

OLMO: Table = {
    **ENDS,
    **norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
    **ATTENTION,
    **QUERY_KEY_NORMS,
    **MLP,
}
_THETA = 500_000.0  # default of OLMo 3


def _olmo(keys: Keys, described: dict[str, Any]) -> DecoderConfig:
    """Reads the keys that OLMo 2 and 3 share; ``described`` are sizes and layers."""
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **described,
        norm_places="after",
        query_key_norm="joint",
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
    )


def _olmo2(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, rms_norm_eps=1e-5)
    return _olmo(keys, uniform_layers(keys, sizes, head_width(keys, sizes)))


def _olmo3(keys: Keys) -> DecoderConfig:
    # 1. Windows in three layers of four, unless the config lists the layers.
    sizes = take_sizes(keys, rms_norm_eps=1e-5)
    head_dim = head_width(keys, sizes)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = [SLIDING_ATTENTION if (i + 1) % 4 else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    window = keys.integer("sliding_window", 4096, optional=True)
    # 2. Only full attention is scaled. A base at the top level has two readings.
    ropes = take_rope(keys, _THETA, {FULL_ATTENTION: None, SLIDING_ATTENTION: _THETA})
    if "" in ropes:
        theta = ropes[""]["rope_theta"]
        if theta != _THETA:
            raise ValueError(
                f"rope_theta is {theta}, which transformers 5 uses for full attention only, and transformers 4 for all "
                "layers; give rope_parameters for each layer type"
            )
        ropes = {FULL_ATTENTION: ropes[""], SLIDING_ATTENTION: {"rope_theta": theta}}
    return _olmo(keys, {**sizes, "head_dim": head_dim, **layers_of(sizes, head_dim, ropes, kinds, window)})


FAMILIES = {
    "olmo2": Family(_olmo2, "Olmo2ForCausalLM", OLMO),
    "olmo3": Family(_olmo3, "Olmo3ForCausalLM", OLMO),
}
