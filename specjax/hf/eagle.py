"""EAGLE heads in the layouts in which they are published: SafeAILab's EAGLE, SpecForge and speculators.

Other layouts are first converted to speculators' layout, which is then read. ``specjax.hf.draft_head`` says how
tensors are called.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checks import check_integer
from specjax.hf.draft_head import SPECULATORS_KEYS, head_layers, head_sources, vocabulary_tensors
from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.safetensors import Tensor, TensorSpec
from specjax.hf.weights import tensors_of

VERSIONS = {"eagle": 1, "eagle3": 3}
"""``speculators_model_type``, and the version of EAGLE that it names."""

# Model classes of the original layouts, and the version of EAGLE. None: the class may be of either version.
_ARCHITECTURES = {
    "LlamaForCausalLM": None,
    "Qwen3ForCausalLM": None,
    "EagleLlamaForCausalLM": 1,
    "LlamaForCausalLMEagle": 1,
    "Eagle3LlamaForCausalLM": 3,
    "LlamaForCausalLMEagle3": 3,
}
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_SIZES = ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# Keys of a target with experts, which configs of EAGLE-3 heads may still have. The heads' own layers have no experts:
# if there were any, their tensors would be unknown.
_OF_EXPERTS = (
    *("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts"),
    *("num_experts_per_tok", "num_local_experts", "experts_per_token", "shared_expert_intermediate_size"),
)


# Configs.


def speculators_config(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Converts the ``config.json`` of a draft head to speculators' layout, with the indices of states made explicit.

    Published configs number the states that EAGLE-3 reads in two conventions. Layers are counted from 0.

    - At the top level, number i is the *input* of layer i (vLLM, speculators). This is the hidden-state index i.
    - In ``eagle_config``, number i is the *output* of layer i (SpecForge, SGLang, ModelOpt). This is the hidden-state
      index i + 1.

    Example: [2, 16, 29] at the top level and [1, 15, 28] in ``eagle_config`` are the same states. Without either key,
    the states are the inputs of layers 2, n // 2 and n - 3. States are fused in the order of the layers, in whatever
    order they are listed.

    Args:
      raw: the content of the file, in any layout.
      num_layers: n, the number of the target's layers.

    Raises:
      ValueError: the config is not of a known draft head, or has two different values for one thing.
    """
    config = dict(raw) if "speculators_model_type" in raw else _from_original(raw)
    if config["speculators_model_type"] != "eagle3":
        return config
    indices = config.get(_LAYER_IDS)
    if indices is None:
        indices = [2, num_layers // 2, num_layers - 3]
        if not indices[0] < indices[1] < indices[2]:
            raise ValueError(
                f"{_LAYER_IDS} is missing, and its default for {num_layers} layers, {indices}, is not three states; "
                "give it"
            )
    return config | {_LAYER_IDS: sorted(_indices(indices))}


def eagle_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``specjax.drafters.eagle.EagleHead`` for a config of ``speculators_config``.

    A missing ``rope_theta`` means 10000, whatever the target's is.

    Raises:
      ValueError: a key is missing or out of range, or is unknown and might change the draft head.
    """
    # 1. Both versions: one decoder layer or more.
    keys = Keys(config, "config.json")
    kind = keys.take("speculators_model_type")
    if not isinstance(kind, str) or kind not in VERSIONS:
        raise ValueError(f"speculators_model_type is {kind!r}, no EAGLE head; supported: {', '.join(VERSIONS)}")
    keys.ignore(*SPECULATORS_KEYS)
    decoder, unknown = head_layers(keys.take("transformer_layer_config"))
    fields: dict[str, Any] = {"version": VERSIONS[kind], "decoder": decoder}
    # 2. EAGLE-1 always reads the last state; EAGLE-3 has options, and engines read some of them differently.
    if kind == "eagle":
        keys.only("transformer_layer_architecture", "LlamaDecoderLayer")
        keys.only("layernorms", False)
        fields |= {"capture": (-1,), "fc_bias": keys.flag("fusion_bias", False)}
    else:
        indices = keys.take(_LAYER_IDS)
        fields |= {
            "capture": tuple(indices),
            "target_hidden_size": keys.integer("target_hidden_size", None, optional=True),
            "draft_vocab_size": keys.integer("draft_vocab_size"),
        }
        if "norm_before_residual" not in keys:
            raise ValueError(
                "norm_before_residual is missing, which is false for speculators and true for vLLM; give it"
            )
        fields |= {flag: keys.flag(flag, False) for flag in _FLAGS}
    warn_unknown("config.json", (*keys.switched_off(), *unknown))
    return fields


def _indices(value: Any) -> list[int]:
    """Returns a list of layers' numbers; raises ValueError if ``value`` is none."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_LAYER_IDS} is {value!r}; it must be a list of layers' numbers")
    for index in value:
        check_integer(_LAYER_IDS, index, 0)
    return list(value)


def _from_original(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Converts configs of SafeAILab and SpecForge to speculators' layout. They mix keys of layer and draft head."""
    # 1. The version. Names that say nothing of it are decided by keys that only EAGLE-3 has.
    layer = {"model_type": "llama", **raw}
    architectures = layer.pop("architectures", None) or ["LlamaForCausalLM"]
    known = isinstance(architectures, list) and isinstance(architectures[0], str) and architectures[0] in _ARCHITECTURES
    if not known:
        raise ValueError(f"architectures is {architectures!r}, no EAGLE head; supported: {', '.join(_ARCHITECTURES)}")
    version = _ARCHITECTURES[architectures[0]]
    inner = layer.pop("eagle_config", None)
    if version is None:
        version = 1 if inner is None and "draft_vocab_size" not in layer else 3
    # 2. The draft head's keys leave the layer's.
    if version == 1:
        bias = layer.pop("bias", True)  # SafeAILab's reader has this default
        head = {"speculators_model_type": "eagle", "fusion_bias": bias}
        return head | {"transformer_layer_config": layer}
    if architectures[0] == "LlamaForCausalLMEagle3":  # SpecForge's class, for targets of any family
        layer["model_type"] = "llama"
    layer = {key: layer[key] for key in layer if key not in _OF_EXPERTS}
    head = {"speculators_model_type": "eagle3", **_flat_options(layer, inner)}
    return head | {"transformer_layer_config": layer}


def _flat_options(layer: dict[str, Any], inner: Any) -> dict[str, Any]:
    """Takes EAGLE-3's options from the top level (``layer``) and from ``eagle_config`` (``inner``)."""
    # 1. Options that both places may have, in one meaning.
    if not isinstance(inner, Mapping | None):
        raise ValueError(f"eagle_config is {inner!r}; it must be an object")
    outer, inner = Keys(layer, "config.json"), Keys(inner or {}, "eagle_config")
    found: dict[str, Any] = {}
    for key in (*_FLAGS, *_SIZES):
        values = [value for keys in (outer, inner) if (value := keys.take(key, None)) is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f"{key} is {values[0]!r}, but {values[1]!r} in eagle_config; give one of them")
        found[key] = values[0] if values else None
    for flag in _FLAGS:
        found[flag] = False if found[flag] is None else found[flag]
    # 2. The states to read, which the two places number in two conventions (``speculators_config``).
    indices, outputs = outer.take(_LAYER_IDS, None), inner.take(_LAYER_IDS, None)
    if outputs is not None:
        outputs = [index + 1 for index in _indices(outputs)]
        if indices is not None and indices != outputs:
            raise ValueError(
                f"{_LAYER_IDS} {indices!r} are inputs of layers, and those in eagle_config, outputs, the inputs of "
                f"layers {outputs}; give one of them"
            )
    found[_LAYER_IDS] = indices = outputs if indices is None else indices
    number = found.pop("num_aux_hidden_states")
    if number is not None and number != (3 if indices is None else len(_indices(indices))):
        raise ValueError(f"num_aux_hidden_states is {number!r}, but {_LAYER_IDS} {indices}; give one of them")
    # 3. Variants of other engines that the head does not compute.
    inner.only("use_aux_hidden_state", True)
    inner.only("use_input_layernorm_in_first_layer", True)
    inner.only("use_last_layernorm", True)
    inner.only("use_mtp_layernorm", False)
    inner.only("next_layer_regular", True)
    warn_unknown("eagle_config", inner.switched_off())
    outer.only("bias", False)  # engines disagree on which layers have it
    # 4. What was taken is no key of the layer.
    for key in (*_FLAGS, *_SIZES, _LAYER_IDS, "bias", "target_model_type"):
        layer.pop(key, None)
    if found["draft_vocab_size"] is None:
        found["draft_vocab_size"] = layer.get("vocab_size")
    return found


# Tensors.


def eagle_tensors(found: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Returns a folder's tensors, of any layout, by the names of speculators' EAGLE-3.

    Args:
      found: the folder's tensors by their names.
      tied: whether an embedding without an output head next to it is the output head, too.

    Raises:
      ValueError: two tensors would have the same name.
    """
    tensors: dict[str, Tensor] = {}
    for name in found:
        known = re.sub(r"^(midlayer|transformer)\.", "layers.0.", name.removeprefix("model."))
        known = re.sub(r"^fusion_fc\.", "fc.", known)
        if known in tensors:
            raise ValueError(f"tensors {tensors[known].name!r} and {name!r} are both {known!r}; remove one of them")
        tensors[known] = found[name]
    if tied and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors


def tensors_of_eagle(kind: str, params: Any) -> list[TensorSpec]:
    """Returns the tensors of a draft head in speculators' layout. Each array is made when it is written.

    Args:
      kind: ``speculators_model_type``.
      params: nested dicts of arrays.

    Raises:
      ValueError: the layout has no name for one of the parameters.
    """
    # EAGLE-1 has other names in speculators' layout than EAGLE-3.
    wanted = head_sources(params)
    if kind == "eagle":
        renamed = {name: name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer.") for name in wanted}
        if unnamed := [name for name in renamed.values() if name.startswith("layers.")]:
            raise ValueError(f"speculators' layout has no name for {unnamed[0]!r}: its EAGLE-1 heads have one layer")
        wanted = {renamed[name]: source for name, source in wanted.items()}
    specs = tensors_of(wanted, params)
    # Sorted by draft id, the tokens that cannot be drafted come first: their id is -1.
    if "draft_of_v" in params:
        specs += vocabulary_tensors(np.asarray(params["draft_of_v"]))
    return specs
