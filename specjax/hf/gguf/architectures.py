"""The architectures of GGUF files, as families of Hugging Face: keys of configs, and names of tensors.

Names and layouts are those of llama.cpp's converter (``conversion/`` and ``gguf-py/gguf/tensor_mapping.py``); where it
changed a tensor, ``Architecture`` says how.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from specjax.hf.gguf.file import Header, Stored
from specjax.hf.gguf.tensors import Part, values
from specjax.hf.keys import Keys, switch, warn_unknown
from specjax.hf.safetensors import show
from specjax.transformer.config import MAX_HEAD

_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3 = {**_LLAMA, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    **_QWEN3,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {**_LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_MIXTRAL_EXPERTS = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
_QWEN_EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
_ROPE_TABLES = ("factors_short", "factors_long", "freqs")  # tables of rotary positions: rope_freqs.weight and so on
# These tables, and frequencies, which follow from the metadata.
_OF_ROPE = re.compile(rf"rope_({'|'.join(_ROPE_TABLES)})\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LAYER = re.compile(r"blk\.(?P<i>\d+)\.(?P<what>\w+?)(\.(?P<e>\d+)|(?P<stack>_exps))?\.(?P<end>weight|bias)")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a config is read from.

    Attributes:
      keys: the metadata of the architecture, less the architecture's name.
      header: the file.
      config: the keys of the config that are read so far.
    """

    keys: Keys
    header: Header
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How GGUF files store a family.

    Attributes:
      model_type: the family's.
      read: returns the keys of a config that the family adds to the common ones.
      names: Hugging Face names of the tensors of a layer.
      permuted: whether the rows of each attention head's query and key are stored in interleaved pairs. Example, width
        6: stored rows 0 to 5 are rows 0, 3, 1, 4, 2, 5 of the Hugging Face tensor.
      norm_shift: is added to norms. -1 undoes the 1 that the converter added.
      block: the Hugging Face block of router and experts.
      experts: Hugging Face names of an expert's projections.
    """

    model_type: str
    read: Callable[[Reading], dict[str, Any]]
    names: Mapping[str, str]
    permuted: bool = False
    norm_shift: float = 0.0
    block: str = "mlp"
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def config_of(header: Header, ignore_config_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the content of the ``config.json`` that a model's Hugging Face folder has, without stop tokens.

    Args:
      header: of the file.
      ignore_config_keys: keys of the metadata to leave out, such as "llama.attention.value_length".

    Raises:
      ValueError: the architecture is not supported, or the metadata lack a key or have a value that is not supported.
    """
    name, architecture = _architecture(header)
    left_out = set(ignore_config_keys)
    metadata = {key: value for key, value in header.metadata.items() if key not in left_out}
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = Keys({key: _one_for_all(value) for key, value in own.items()}, name)
    # 1. Common keys.
    layers = keys.integer("block_count")
    held = 1 + max((int(found["i"]) for found in map(_LAYER.fullmatch, header.tensors) if found), default=-1)
    if layers != held:
        raise ValueError(f"{name}.block_count is {layers}, and the file holds {held} layers; download it again")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("there is no tensor 'token_embd.weight' with two axes; the file holds no language model")
    heads = keys.integer("attention.head_count")
    config = {
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    config |= _heads(keys)
    # 2. The family's own, and keys that change nothing. Some files count tokens that have no row.
    config |= architecture.read(Reading(keys, header, config))
    config |= _rope(Reading(keys, header, config))
    keys.ignore("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
    keys.only("attention.causal", True)
    for key in ("expert_count", "expert_used_count"):
        keys.only(key, 0)
    # 3. Keys that nobody took.
    left = keys.unknown({})
    if changing := [key for key in left if key.startswith(("rope.", "attention.", "expert")) and keys.peek(key)]:
        key, value = f"{name}.{changing[0]}", show(keys.peek(changing[0]))
        raise ValueError(f"the metadata key {key} is {value}, which is unknown and might change the model{switch(key)}")
    warn_unknown(header.path, (f"{name}.{key}" for key in left))
    return config


def parts_of(header: Header, config: Mapping[str, Any]) -> Iterator[Part]:
    """Yields the tensors that a Hugging Face folder has. A tensor that is not known keeps its name.

    Args:
      header: of the file.
      config: from ``config_of``.
    """
    _, architecture = _architecture(header)
    for stored in header.tensors.values():
        if _OF_ROPE.fullmatch(stored.name):
            continue
        layer = _LAYER.fullmatch(stored.name)
        if layer is None:
            name = _ENDS.get(stored.name, stored.name)
            shift = architecture.norm_shift if stored.name == "output_norm.weight" else 0.0
            yield Part(name, stored, stored.shape, shift=shift)
        else:
            yield from _layer_parts(architecture, stored, layer, config)


def _layer_parts(
    architecture: Architecture, stored: Stored, layer: re.Match[str], config: Mapping[str, Any]
) -> Iterator[Part]:
    """Yields the tensors that a tensor of a layer holds: one, or one for each expert."""
    place, what, end = f"model.layers.{layer['i']}", layer["what"], layer["end"]
    block = f"{place}.{architecture.block}"
    # 1. Experts: in one stack, or in files before 2024-04 as a tensor each. And their router.
    expert = architecture.experts.get(what)
    if expert and layer["stack"] and len(stored.shape) == 3:
        for e in range(stored.shape[0]):
            name = f"{block}.experts.{e}.{expert}.{end}"
            yield Part(name, stored, stored.shape[1:], first=e * stored.shape[1])
        return
    if expert and layer["e"]:
        yield Part(f"{block}.experts.{layer['e']}.{expert}.{end}", stored, stored.shape)
        return
    if architecture.experts and what == "ffn_gate_inp":
        yield Part(f"{block}.gate.{end}", stored, stored.shape)
        return
    # 2. All others.
    known = None if layer["stack"] or layer["e"] else architecture.names.get(what)
    order = None
    if architecture.permuted and what in ("attn_q", "attn_k"):
        order = _order(stored.shape[0], config["num_attention_heads" if what == "attn_q" else "num_key_value_heads"])
    shift = architecture.norm_shift if what.endswith("norm") else 0.0
    yield Part(f"{place}.{known}.{end}" if known else stored.name, stored, stored.shape, order=order, shift=shift)


def _order(rows: int, heads: int) -> np.ndarray:
    """Returns which stored row is each row of a Hugging Face tensor of rotated attention heads.

    llama.cpp rotates neighbouring entries, Hugging Face rotates halves of an attention head.
    """
    if rows % (2 * heads):
        raise ValueError(
            f"a query or key projection has {rows} rows, which {heads} attention heads cannot share; download again"
        )
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _architecture(header: Header) -> tuple[str, Architecture]:
    """Returns the architecture that a file names; raises ValueError if it is not supported."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture is {name!r}; supported: {', '.join(ARCHITECTURES)}: of other models, download the "
            "safetensors"
        )
    found = ARCHITECTURES[name]
    # llama.cpp calls Mixtral a Llama with experts.
    return name, MIXTRAL if name == "llama" and _one_for_all(header.metadata.get("llama.expert_count", 0)) else found


def _one_for_all(value: Any) -> Any:
    """Returns the value of a key that has one for each layer, if all are the same."""
    if not isinstance(value, np.ndarray):
        return value
    return value[0].item() if value.size and (value == value[0]).all() else value.tolist()


def _heads(keys: Keys) -> dict[str, Any]:
    """Returns the width of attention heads, if the metadata name one."""
    width = keys.integer("attention.key_length", None, most=MAX_HEAD, optional=True)
    if width is None:
        keys.only("attention.value_length", None)
        return {}
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        keys.only(key, width)
    return {"head_dim": width}


# Rotary positions.


def _rope(reading: Reading) -> dict[str, Any]:
    """Returns the keys of rotary positions."""
    keys, config = reading.keys, reading.config
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rotated = keys.integer("rope.dimension_count", width)
    keys.only("rope.dimension_count_swa", rotated)
    rope: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if config["model_type"] == "phi3":
        rope["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        raise ValueError(
            f"rope.dimension_count is {rotated}, and attention heads are {width} wide; supported: the same"
        )
    return rope | _scaling(reading)


def _scaling(reading: Reading) -> dict[str, Any]:
    """Returns the keys of the scaling of rotary positions; none, if there is no scaling."""
    # 1. What the metadata and tables say.
    keys, longest = reading.keys, reading.config["max_position_embeddings"]
    kind = keys.take("rope.scaling.type", "linear")
    linear = keys.number("rope.scale_linear", 1.0)  # the older key
    factor = keys.number("rope.scaling.factor", linear)
    original = keys.integer("rope.scaling.original_context_length", longest)
    tables = {name: values(reading.header, f"rope_{name}.weight") for name in _ROPE_TABLES}
    tables = {name: table.tolist() for name, table in tables.items() if table is not None}
    # 2. Tables. Of Llama 3's scaling the file keeps the result: any divisors of frequencies are a LongRoPE whose two
    # tables are the same, so that no text is too long for the first. The scale of Phi-3's follows from the lengths.
    if list(tables) == ["freqs"]:
        if kind != "none" and factor != 1:
            raise ValueError(
                f"rope.scaling.type is {kind!r}, next to a table rope_freqs.weight; supported: one of them"
            )
        both = {"short_factor": tables["freqs"], "long_factor": tables["freqs"], "attention_factor": 1.0}
        return {"rope_scaling": {"rope_type": "longrope", **both, "original_max_position_embeddings": longest}}
    if list(tables) == ["factors_short", "factors_long"]:
        keys.ignore("rope.scaling.attn_factor")
        both = {"short_factor": tables["factors_short"], "long_factor": tables["factors_long"]}
        return {"rope_scaling": {"type": "longrope", **both}, "original_max_position_embeddings": original}
    if tables:
        raise ValueError(
            f"the tables of rotary positions are {', '.join(f'rope_{name}.weight' for name in tables)}; supported: "
            "rope_freqs.weight, or rope_factors_short.weight and rope_factors_long.weight: download again"
        )
    # 3. Formulas.
    if kind == "none":
        return {}
    if kind == "linear":
        return {} if factor == 1 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise ValueError(f"rope.scaling.type is {kind!r}; supported: none, linear, yarn, longrope with its tables")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if (value := keys.number(f"rope.scaling.yarn_{name}", None, optional=True)) is not None:
            scaling[name] = value
    # The first key is the model's own. The second is a part of the scale, next to the part that YaRN computes.
    if (scale := keys.number("rope.scaling.yarn_attn_factor", None, optional=True)) is not None:
        scaling["attention_factor"] = scale
    elif (scale := keys.number("rope.scaling.attn_factor", None, optional=True)) is not None:
        scaling["attention_factor"] = scale * (1 + 0.1 * math.log(factor))
    return {"rope_scaling": scaling}


# The families' own keys.


def _llama(reading: Reading) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in reading.header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in reading.header.tensors,
    }


def _qwen(reading: Reading) -> dict[str, Any]:
    del reading
    return {"use_sliding_window": False}


def _mixtral(reading: Reading) -> dict[str, Any]:
    return {
        "num_local_experts": _num_experts(reading),
        "num_experts_per_tok": reading.keys.integer("expert_used_count"),
        "sliding_window": None,
    }


def _qwen3_moe(reading: Reading) -> dict[str, Any]:
    return {
        "num_experts": _num_experts(reading),
        "num_experts_per_tok": reading.keys.integer("expert_used_count"),
        "moe_intermediate_size": reading.keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does, and transformers only if the config says so
        "use_sliding_window": False,
    }


def _num_experts(reading: Reading) -> int:
    """Takes the number of experts, which must be that of the router."""
    count, router = reading.keys.integer("expert_count"), reading.header.tensors.get("blk.0.ffn_gate_inp.weight")
    if router is None or router.shape[0] != count:
        held = "is not there" if router is None else f"is for {router.shape[0]}"
        raise ValueError(f"expert_count is {count}, and the router 'blk.0.ffn_gate_inp.weight' {held}")
    return count


def _gemma2(reading: Reading) -> dict[str, Any]:
    return {
        **_gemma_heads(reading, 46),
        "sliding_window": reading.keys.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": reading.keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(reading: Reading) -> dict[str, Any]:
    # The converter leaves the window out if no layer has one.
    window = reading.keys.integer("attention.sliding_window", 0, least=0)
    pattern = reading.keys.integer("attention.sliding_window_pattern", 6)
    return {
        **_gemma_heads(reading, 62),
        "sliding_window": window or None,
        "sliding_window_pattern": pattern if window else 1,
        "rope_local_base_freq": reading.keys.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", None, optional=True),
    }


def _gemma_heads(reading: Reading, layers_of_27b: int) -> dict[str, Any]:
    """Returns the width of attention heads, and the scale of attention, which the metadata leave out.

    As in llama.cpp, the scale follows from the width of attention heads. The models of 27 billion parameters are known
    by their number of layers. Their scale follows from the model's width by the number of attention heads.
    transformers has 256 for all.
    """
    config, width = reading.config, reading.config.get("head_dim", 256)
    large = config["num_hidden_layers"] == layers_of_27b
    scale = config["hidden_size"] // config["num_attention_heads"] if large else width
    return {"head_dim": width, "query_pre_attn_scalar": scale}


def _phi3(reading: Reading) -> dict[str, Any]:
    key, known = "attention.sliding_window", _window_of_phi3(reading.config)
    keys = reading.keys
    window = keys.integer(key, least=0) if known is None else keys.integer(key, known, least=0)
    return {"sliding_window": window or None}


def _window_of_phi3(config: dict[str, Any]) -> int | None:
    """Returns the window of the models that had files before 2024-08, which lack the key; None for others.

    llama.cpp knew the models by these sizes: mini and medium with 4096 tokens, mini with 131072, medium with 131072.
    """
    layers, length = config["num_hidden_layers"], config["max_position_embeddings"]
    if layers in (32, 40) and length == 4096:
        return 2047
    if layers == 32 and config["num_key_value_heads"] == 32 and length == 131072:
        return 262144
    return 131072 if layers == 40 and length == 131072 else None


MIXTRAL = Architecture("mixtral", _mixtral, _LLAMA, permuted=True, block="block_sparse_moe", experts=_MIXTRAL_EXPERTS)
ARCHITECTURES = {
    "llama": Architecture("llama", _llama, _LLAMA, permuted=True),
    "qwen2": Architecture("qwen2", _qwen, _LLAMA),
    "qwen3": Architecture("qwen3", _qwen, _QWEN3),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, _QWEN3, experts=_QWEN_EXPERTS),
    "gemma2": Architecture("gemma2", _gemma2, _GEMMA, norm_shift=-1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, _GEMMA, norm_shift=-1.0),
    "phi3": Architecture("phi3", _phi3, _PHI3),
}
"""Architectures by the names that GGUF files have for them. A file of "llama" with experts is ``MIXTRAL``."""
