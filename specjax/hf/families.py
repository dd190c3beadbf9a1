"""A reader of the ``config.json`` keys of each family.

A reader takes every key that it understands. Defaults are the defaults of transformers' config classes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from specjax.checks import check_integer
from specjax.hf.keys import Keys
from specjax.hf.rope import attention_scale, read_rope, take_rope
from specjax.transformer.config import (
    MAX_HEAD,
    MAX_LAYERS,
    Activation,
    DecoderConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


def take_sizes(keys: Keys, **defaults: Any) -> dict[str, Any]:
    """Takes the keys that nearly all families share, as arguments of DecoderConfig.

    ``defaults`` holds the family's own defaults. A key without a default must be there.
    """
    defaults = {"max_position_embeddings": 2048, "num_key_value_heads": None, "rms_norm_eps": 1e-6, **defaults}

    def default(key: str) -> tuple[Any, ...]:
        return (defaults[key],) if key in defaults else ()

    sizes = {key: keys.integer(key, *default(key)) for key in _SIZES}
    tied = defaults.get("tie_word_embeddings", False)
    if not tied and keys.peek("tie_word_embeddings") is None:
        keys.ignore("tie_word_embeddings")  # null is false, as in transformers 4
    return sizes | {
        "num_hidden_layers": keys.integer("num_hidden_layers", *default("num_hidden_layers"), most=MAX_LAYERS),
        "num_key_value_heads": keys.integer("num_key_value_heads", *default("num_key_value_heads"), optional=True),
        "norm_eps": keys.number("rms_norm_eps", *default("rms_norm_eps")),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", tied),
    }


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")


def take_activation(keys: Keys, key: str, default: str) -> Activation:
    """Takes the name of an activation; raises ValueError if it is unknown."""
    name = keys.take(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _head_width(keys: Keys, sizes: dict[str, Any]) -> int:
    """Takes the width of an attention head, by default ``hidden_size / num_attention_heads``."""
    head_dim = keys.integer("head_dim", None, most=MAX_HEAD, optional=True)
    if head_dim is not None:
        return head_dim
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads or width // heads > MAX_HEAD:
        raise ValueError(
            f"hidden_size {width} and num_attention_heads {heads} give no head_dim of at most {MAX_HEAD}; give head_dim"
        )
    return width // heads


def layers_of(
    sizes: dict[str, Any],
    head_dim: int,
    ropes: dict[str, dict[str, Any]],
    kinds: Any,
    window: int | None,
    **options: Any,
) -> dict[str, Any]:
    """Returns the layers, and the longest text that all of them serve, as arguments of DecoderConfig.

    Args:
      sizes: what ``take_sizes`` returned.
      head_dim: entries of an attention head that may be rotated.
      ropes: what ``take_rope`` returned.
      kinds: the type of each layer, as in ``layer_types``.
      window: tokens that a layer of sliding attention sees.
      **options: further arguments of ``read_rope``.

    Raises:
      ValueError: the types are not one known type for each layer, or a type lacks its window or rotary positions.
    """
    # 1. Frequencies are computed once for each type, not for each layer.
    if not isinstance(kinds, list) or len(kinds) != sizes["num_hidden_layers"]:
        raise ValueError(f"layer_types is {kinds!r}; it must name each of the {sizes['num_hidden_layers']} layers")
    longest = sizes["max_position_embeddings"]
    read = {kind: read_rope(ropes[kind], head_dim, longest, **options) for kind in ropes}
    # 2. Each layer gets what its type says. Without types of their own, rotary positions are under "".
    layers = []
    for kind in kinds:
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise ValueError(f"layer_types has {kind!r}; supported: {FULL_ATTENTION!r}, {SLIDING_ATTENTION!r}")
        if kind == SLIDING_ATTENTION and window is None:
            raise ValueError(f"layer_types has {kind!r}, but sliding_window is null or switched off; give one")
        key = kind if kind in read else ""
        if key not in read:
            raise ValueError(f"rope_parameters lacks {kind!r}, which layer_types names")
        layers.append(LayerConfig(rope=read[key][0], window=window if kind == SLIDING_ATTENTION else None))
    return {"layers": tuple(layers), "max_position_embeddings": min(longest for _, longest in read.values())}


def _same_kind(keys: Keys, sizes: dict[str, Any], window: int | None) -> list[str]:
    """Returns the type of each layer if all have the same type; takes a ``layer_types`` that agrees."""
    kinds = [FULL_ATTENTION if window is None else SLIDING_ATTENTION] * sizes["num_hidden_layers"]
    keys.only("layer_types", kinds, None)
    return kinds


def _uniform_layers(
    keys: Keys, sizes: dict[str, Any], head_dim: int, window: int | None = None, theta: float = 10000.0
) -> dict[str, Any]:
    """Takes the keys of layers that are all of one type, as arguments of DecoderConfig."""
    kinds = _same_kind(keys, sizes, window)
    return sizes | {"head_dim": head_dim} | layers_of(sizes, head_dim, take_rope(keys, theta), kinds, window)


def _llama(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys)
    head_dim = _head_width(keys, sizes)
    keys.only("sliding_window", None)
    keys.only("use_sliding_window", False)
    keys.only("rope_interleaved", False)  # SmolLM
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **_uniform_layers(keys, sizes, head_dim),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _mistral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    head_dim = _head_width(keys, sizes)
    window = keys.integer("sliding_window", 4096, optional=True)
    return DecoderConfig(
        **_uniform_layers(keys, sizes, head_dim, window), activation=take_activation(keys, "hidden_act", "silu")
    )


def _qwen_window(keys: Keys) -> int | None:
    """Takes the window of sliding attention, or None if it is switched off."""
    window = keys.integer("sliding_window", 4096, optional=True)
    return window if keys.flag("use_sliding_window", False) else None


def _qwen(keys: Keys, sizes: dict[str, Any], head_dim: int, bias: bool, **features: Any) -> DecoderConfig:
    """Reads Qwen2 and Qwen3: sliding attention from layer ``max_window_layers`` on, if it is switched on."""
    window, windows_from = _qwen_window(keys), keys.integer("max_window_layers", 28, least=0)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        first = sizes["num_hidden_layers"] if window is None else windows_from
        kinds = [SLIDING_ATTENTION if i >= first else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    return DecoderConfig(
        **sizes | layers_of(sizes, head_dim, take_rope(keys), kinds, window),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        **features,
    )


def _qwen2(keys: Keys) -> DecoderConfig:
    keys.only("use_mrope", False)
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=32)
    return _qwen(keys, sizes, _head_width(keys, sizes), True)


def _qwen3(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=32)
    bias = keys.flag("attention_bias", False)
    head_dim = keys.integer("head_dim", 128, most=MAX_HEAD)
    return _qwen(keys, sizes, head_dim, bias, output_bias=bias, query_key_norm=True)


def _qwen3_moe(keys: Keys) -> DecoderConfig:
    # 1. Attention: as in Qwen3, but a window is for all layers or for none.
    sizes = take_sizes(keys, max_position_embeddings=32768, num_key_value_heads=4)
    head_dim = _head_width(keys, sizes)
    window = _qwen_window(keys)
    keys.ignore("max_window_layers")  # transformers gives all layers a window, or none
    bias = keys.flag("attention_bias", False)
    # 2. Which layers have experts: every ``step``-th, but for those that are listed as dense.
    step, dense = keys.integer("decoder_sparse_step", 1), keys.take("mlp_only_layers", None)
    dense = [] if dense is None else dense
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {dense!r}; it must be a list of layers' numbers")
    for layer in dense:
        check_integer("mlp_only_layers", layer, 0, sizes["num_hidden_layers"] - 1)
    experts = ExpertsConfig(
        num_experts=take_num_experts(keys, "num_experts", 128),
        per_token=keys.integer("num_experts_per_tok", 8),
        intermediate_size=keys.integer("moe_intermediate_size", 768),
        renormalize=keys.flag("norm_topk_prob", False),
    )
    layers = _uniform_layers(keys, sizes, head_dim, window)
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(sizes["num_hidden_layers"])]
    return DecoderConfig(
        **with_experts(layers, sparse),
        activation=take_activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        experts=experts,
    )


def take_num_experts(keys: Keys, key: str, default: int) -> int:
    """Takes the number of experts under the family's own name, or under ``num_local_experts`` of transformers 5."""
    number = keys.integer(key, None, optional=True)
    other = keys.integer("num_local_experts", None, optional=True)
    if None not in (number, other) and number != other:
        raise ValueError(f"{key} is {number}, but num_local_experts {other}; give one of them")
    return number or other or default


def take_grouped_experts(keys: Keys, **defaults: Any) -> ExpertsConfig:
    """Takes the experts of DeepSeek-V3 (section 2.1.2) and of families like it.

    Experts are chosen by corrected sigmoid scores within the best groups. Shared experts see every token. ``defaults``
    holds the family's own defaults.
    """
    # The authors' code has other routers under these two keys; this is the one that transformers has.
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    size = keys.integer("moe_intermediate_size", defaults["moe_intermediate_size"])
    return ExpertsConfig(
        num_experts=take_num_experts(keys, "n_routed_experts", defaults["n_routed_experts"]),
        per_token=keys.integer("num_experts_per_tok", 8),
        intermediate_size=size,
        score="sigmoid",
        renormalize=keys.flag("norm_topk_prob", True),
        scale=keys.number("routed_scaling_factor", defaults["routed_scaling_factor"]),
        groups=keys.integer("n_group", defaults["n_group"]),
        best_groups=keys.integer("topk_group", defaults["topk_group"]),
        corrected=True,
        shared_size=size * keys.integer("n_shared_experts", 1, least=0),
    )


def with_experts(described: dict[str, Any], sparse: list[bool]) -> dict[str, Any]:
    """Returns the result of ``layers_of`` with experts in the layers for which ``sparse`` is true."""
    pairs = zip(described["layers"], sparse, strict=True)
    return described | {"layers": tuple(dataclasses.replace(layer, experts=mixed) for layer, mixed in pairs)}


def _mixtral(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=8, max_position_embeddings=4096 * 32, rms_norm_eps=1e-5)
    head_dim = _head_width(keys, sizes)
    layers = _uniform_layers(keys, sizes, head_dim, keys.integer("sliding_window", None, optional=True), theta=1e6)
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


def _gemma(keys: Keys, sizes: dict[str, Any], layers: dict[str, Any], head_dim: int, **features: Any) -> DecoderConfig:
    """Reads the keys that Gemma 2 and 3 share."""
    keys.ignore("hidden_act")  # transformers reads hidden_activation
    keys.only("use_bidirectional_attention", False, None)
    scalar = keys.number("query_pre_attn_scalar", 256)
    bias = keys.flag("attention_bias", False)
    return DecoderConfig(
        **sizes | layers,
        head_dim=head_dim,
        norm="rms_one_plus",
        sandwich_norms=True,
        activation=take_activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=math.sqrt(sizes["hidden_size"]),
        attention_scale=float(scalar) ** -0.5,
        **features,
    )


def _gemma2(keys: Keys) -> DecoderConfig:
    sizes = take_sizes(keys, num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=True)
    head_dim = keys.integer("head_dim", 256, most=MAX_HEAD)
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = [FULL_ATTENTION if i % 2 else SLIDING_ATTENTION for i in range(sizes["num_hidden_layers"])]
    window = keys.integer("sliding_window", 4096, optional=True)
    if window is not None:
        keys.only("sliding_window_size", window)  # a second name in the 9B and 27B models
    layers = layers_of(sizes, head_dim, take_rope(keys), kinds, window)
    return _gemma(
        keys,
        sizes,
        layers,
        head_dim,
        attention_softcap=keys.number("attn_logit_softcapping", 50.0, optional=True),
        logit_softcap=keys.number("final_logit_softcapping", 30.0, optional=True),
    )


def _gemma3_text(keys: Keys) -> DecoderConfig:
    # 1. Types of layers, as a list or as a pattern: with 6, every sixth layer has full attention.
    sizes = take_sizes(keys, **_GEMMA3_SIZES, tie_word_embeddings=True)
    head_dim = keys.integer("head_dim", 256, most=MAX_HEAD)
    kinds, pattern = keys.take("layer_types", None), keys.integer("sliding_window_pattern", 6)
    keys.ignore("_sliding_window_pattern")  # transformers made layer_types of it
    if kinds is None:
        kinds = [SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(sizes["num_hidden_layers"])]
    keys.only("attn_logit_softcapping", None)  # transformers reads it and does not apply it
    # 2. Both types of layers have their own rotary positions. A flat object would leave open which type it is for.
    local_theta = keys.number("rope_local_base_freq", 10000.0)
    flat = keys.peek("rope_parameters")
    if isinstance(flat, Mapping) and flat.keys().isdisjoint((FULL_ATTENTION, SLIDING_ATTENTION)) and flat:
        raise ValueError(
            f"rope_parameters is {flat!r}; for Gemma 3 it must name layer types: {FULL_ATTENTION!r}, "
            f"{SLIDING_ATTENTION!r}"
        )
    ropes = take_rope(keys, 1e6, {FULL_ATTENTION: None, SLIDING_ATTENTION: local_theta})
    if "" in ropes:  # the spelling of transformers 4: only full attention is scaled
        ropes = {FULL_ATTENTION: ropes[""], SLIDING_ATTENTION: {"rope_theta": local_theta}}
    layers = layers_of(sizes, head_dim, ropes, kinds, keys.integer("sliding_window", 4096, optional=True))
    return _gemma(
        keys,
        sizes,
        layers,
        head_dim,
        query_key_norm=True,
        logit_softcap=keys.number("final_logit_softcapping", None, optional=True),
    )


# Published configs of the multimodal models leave out sizes that equal these.
_GEMMA3_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


def _phi3(keys: Keys) -> DecoderConfig:
    # 1. Keys that only the authors' own code reads. The decoder computes one value of each.
    sizes = take_sizes(keys, max_position_embeddings=4096, rms_norm_eps=1e-5)
    head_dim = _head_width(keys, sizes)
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.only(bias, False)
    keys.only("full_attn_mod", 1)
    keys.only("interpolate_factor", 1)
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
    kinds = _same_kind(keys, sizes, window)
    return DecoderConfig(
        **sizes | layers_of(sizes, head_dim, ropes, kinds, window),
        head_dim=head_dim,
        activation=take_activation(keys, "hidden_act", "silu"),
    )


def _gpt2(keys: Keys) -> DecoderConfig:
    # 1. GPT-2 has its own names for all sizes.
    width, heads, layers = keys.integer("n_embd"), keys.integer("n_head"), keys.integer("n_layer", most=MAX_LAYERS)
    if width % heads or width // heads > MAX_HEAD:
        raise ValueError(f"n_embd {width} and n_head {heads} give no width of a head of at most {MAX_HEAD}")
    inner = keys.integer("n_inner", None, optional=True)
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    positions = keys.integer("n_positions", 1024)
    # 2. transformers takes the usual names of these sizes, too, so they must not say something else.
    usual = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
    }
    for key, value in usual.items():
        keys.only(key, value)
    keys.only("layer_types", [FULL_ATTENTION] * layers, None)
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=4 * width if inner is None else inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        layers=(LayerConfig(rope=None),) * layers,
        learned_positions=True,
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=take_activation(keys, "activation_function", "gelu_new"),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _deepseek_v3(keys: Keys) -> DecoderConfig:
    # 1. Keys that must agree with others, or that only the authors' code reads.
    sizes = take_sizes(keys, max_position_embeddings=4096, num_key_value_heads=128)
    keys.only("moe_layer_freq", 1)
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
    interleaved = keys.flag("rope_interleave", True)
    head = latent.plain_width + latent.rotary_width
    kinds = _same_kind(keys, sizes, None)
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


FAMILIES: dict[str, Callable[[Keys], DecoderConfig]] = {
    "deepseek_v3": _deepseek_v3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
