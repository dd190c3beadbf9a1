"""EAGLE heads in the layouts in which they are published: SafeAILab's EAGLE, SpecForge and speculators.

Other layouts are first converted to speculators' layout, which is then read. Tensors have the names of the parameters,
except the two of the draft vocabulary:

- ``d2t`` ``[u]`` holds *offsets*: draft id i stands for the target's token ``i + d2t[i]``. Example: d2t = [0, 0, 5]
  says that draft ids 0, 1, 2 are the target's tokens 0, 1, 7.
- ``t2d`` ``[v]`` marks the target's tokens that can be drafted.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checks import check_integer
from specjax.hf.config import read_keys
from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.names import LINEAR, SAME, ParameterPath, Piece, Source, parameters
from specjax.hf.safetensors import Tensor, TensorSpec
from specjax.hf.weights import check_tensors, parameters_of, tensors_of, whole_parameter
from specjax.transformer.config import DecoderConfig

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
_LAYERS = ("llama", "qwen3")
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_SIZES = ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS_KEYS = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "has_no_defaults_at_init"),
    *("speculators_version", "speculators_config", "embed_requires_grad", "enable_sp_ulysses"),
    "quantization_config",  # a left-over: only plain floats are read
    # Attributes of the config's class, which some versions of speculators write, too.
    *("base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan", "keys_to_ignore_at_inference", "sub_configs"),
    *("attribute_map", "base_config_key", "is_composition", "_auto_class"),
    "tie_word_embeddings",  # the tensors say which output head there is
)
"""Keys of speculators' configs that do not describe the draft head: names, training, how an engine runs it."""

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
    decoder, unknown = _decoder(keys.take("transformer_layer_config"))
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


def _decoder(raw: Any) -> tuple[DecoderConfig, tuple[str, ...]]:
    """Returns the layers that a config describes, and the names of its unknown keys."""
    kind = raw.get("model_type", "llama") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in _LAYERS:
        raise ValueError(f"the layers are of model_type {kind!r}; supported: {', '.join(_LAYERS)}")
    others = ("architectures", "auto_map", "tie_word_embeddings")  # describe the whole draft head
    layer = {key: value for key, value in raw.items() if key not in others}
    # SpecForge's layers have no windows, but its configs still have the keys of the target's windows.
    layer.pop("max_window_layers", None)
    if layer.get("use_sliding_window") is False:
        layer.pop("sliding_window", None)
    # With text alone, all axes of a multimodal rotation have the same position, so that it is the ordinary one.
    if isinstance(scaling := layer.get("rope_scaling"), Mapping) and "mrope_section" in scaling:
        plain = {key: value for key, value in scaling.items() if key not in ("mrope_section", "mrope_interleaved")}
        ordinary = all(plain.get(key) in (None, "mrope", "default") for key in ("rope_type", "type"))
        layer["rope_scaling"] = None if ordinary else plain
    # Strict, since some layouts have the draft head's own keys among the layer's.
    config, _, unknown = read_keys(layer, strict=True)
    return config, unknown


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


def eagle_parameters(tensors: Mapping[str, Tensor], draft_of_v: np.ndarray | None, abstract: Any) -> Any:
    """Returns the parameters of a draft head, each read by ``Parameter.read``.

    Args:
      tensors: what ``eagle_tensors`` returned.
      draft_of_v: what ``draft_vocabulary`` returned.
      abstract: nested dicts of leaves with the parameters' shapes.

    Returns:
      Nested dicts of ``Parameter``, in the structure of ``abstract``.

    Raises:
      ValueError: a tensor is missing, is unknown, has another shape than in ``abstract``, or does not hold floats.
    """
    wanted = _sources(abstract)
    floats = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    check_tensors(floats, wanted, _why_left_out)
    opened = parameters_of(floats, wanted)
    if draft_of_v is not None:
        opened["draft_of_v"] = whole_parameter(draft_of_v)
    return opened


def _why_left_out(name: str) -> str | None:
    """Returns why a tensor is not needed, or None if there is no known reason."""
    if name.endswith(".rotary_emb.inv_freq"):
        return "a buffer, computed anew"
    return "the target's, for training" if name in ("verifier_norm.weight", "verifier_lm_head.weight") else None


def draft_vocabulary(tensors: Mapping[str, Tensor], draft_vocab_size: int, vocab_size: int) -> np.ndarray | None:
    """Returns int32 ``[v]``: the draft id of each of the target's tokens, -1 for none.

    Args:
      tensors: what ``eagle_tensors`` returned.
      draft_vocab_size: u, the number of tokens that can be drafted.
      vocab_size: v, the number of the target's tokens.

    Returns:
      The draft ids, or None if each draft id is the target's id.

    Raises:
      ValueError: ``d2t`` is missing; it does not map draft ids to distinct tokens of the target; or ``t2d`` marks other
        tokens.
    """
    # 1. Which token of the target each draft id stands for.
    same_size = draft_vocab_size == vocab_size
    if "d2t" not in tensors and not same_size:
        raise ValueError(
            f"tensor 'd2t' is missing, which says which {draft_vocab_size} of the {vocab_size} tokens can be drafted; "
            "download the draft head again"
        )
    target_of_u = np.arange(draft_vocab_size)
    if "d2t" in tensors:
        target_of_u += _buffer(tensors["d2t"], (draft_vocab_size,), "iu").astype(np.int64)
    inside = (target_of_u >= 0) & (target_of_u < vocab_size)
    if not inside.all() or len(np.unique(target_of_u)) < draft_vocab_size:
        token = int(np.argmin(inside)) if not inside.all() else None
        what = "two draft ids to one token" if token is None else f"draft id {token} to token {target_of_u[token]}"
        raise ValueError(
            f"tensor 'd2t' leads {what} of the target's {vocab_size}; it must hold offsets, the target's id less the "
            "draft's"
        )
    # 2. The inverse, which drafting needs. ``t2d`` holds the same once more: a difference shows that ``d2t`` does
    # not hold offsets.
    draft_of_v = np.full((vocab_size,), -1, np.int32)
    draft_of_v[target_of_u] = np.arange(draft_vocab_size)
    if "t2d" in tensors:
        drafted_v = _buffer(tensors["t2d"], (vocab_size,), "biu").astype(bool)
        if (other := np.flatnonzero(drafted_v != (draft_of_v >= 0))).size:
            raise ValueError(
                f"tensors 'd2t' and 't2d' differ on {other.size} tokens, such as {other[0]}; 'd2t' must hold offsets, "
                "the target's id less the draft's, and 't2d' mark the same tokens"
            )
    return None if same_size and (target_of_u == np.arange(vocab_size)).all() else draft_of_v


def _buffer(tensor: Tensor, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    """Returns the array of a tensor; raises ValueError unless it has that shape and a dtype of NumPy's ``kinds``."""
    if tensor.shape != shape or tensor.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "booleans"
        raise ValueError(f"tensor {tensor.name!r} is {tensor.dtype} {tensor.shape}; it must be {wanted} {shape}")
    return tensor.read()


def tensors_of_eagle(kind: str, params: Any) -> list[TensorSpec]:
    """Returns the tensors of a draft head in speculators' layout. Each array is made when it is written.

    Args:
      kind: ``speculators_model_type``.
      params: nested dicts of arrays.

    Raises:
      ValueError: the layout has no name for one of the parameters.
    """
    # EAGLE-1 has other names in speculators' layout than EAGLE-3.
    wanted = _sources(params)
    if kind == "eagle":
        renamed = {name: name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer.") for name in wanted}
        if unnamed := [name for name in renamed.values() if name.startswith("layers.")]:
            raise ValueError(f"speculators' layout has no name for {unnamed[0]!r}: its EAGLE-1 heads have one layer")
        wanted = {renamed[name]: source for name, source in wanted.items()}
    specs = tensors_of(wanted, params)
    # Sorted by draft id, the tokens that cannot be drafted come first: their id is -1.
    if "draft_of_v" in params:
        draft_of_v = np.asarray(params["draft_of_v"])
        target_of_u = np.argsort(draft_of_v, kind="stable")[np.sum(draft_of_v < 0) :]
        specs.append(_spec("d2t", target_of_u - np.arange(len(target_of_u))))
        specs.append(_spec("t2d", draft_of_v >= 0))
    return specs


def _spec(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name, array.dtype, array.shape, lambda: array)


def _sources(params: Any) -> dict[str, Source]:
    """Returns the tensors of a draft head's weights by their names, which are the names of the parameters."""
    found = {}
    for path, leaf in parameters(params).items():
        if path != ("draft_of_v",):
            name = _name(path)
            layout = LINEAR if path[-1] == "kernel" else SAME
            found[name] = Source(name, (Piece(path, None, tuple(leaf.shape), layout, 0),))
    return found


def _name(path: ParameterPath) -> str:
    """Returns the name of a parameter's tensor: its path, but with ``weight`` for ``kernel``."""
    *module, last = map(str, path)
    return ".".join((*module, "weight" if last == "kernel" else last))
