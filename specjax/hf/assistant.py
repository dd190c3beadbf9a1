"""Gemma 4's assistants in Hugging Face folders: their config and their tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.hf.class_keys import NO_EFFECT
from specjax.hf.config import decoder_config
from specjax.hf.families.gemma4 import GEMMA4
from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.names import SAME, linear, sources_of
from specjax.hf.safetensors import Tensor
from specjax.hf.weights import Parameter, check_tensors, parameters_of, plain_tensors
from specjax.transformer.config import EXTERNAL, DecoderConfig

_TEXTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
_TABLE, _HEAD, _ORDER = "model.embed_tokens.weight", "lm_head.weight", "masked_embedding.token_ordering"


def assistant_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``AssistantHead`` that a ``config.json`` describes.

    Raises:
      ValueError: the config is not of an assistant, or has a value that is not computed.
    """
    keys = Keys(raw, "config.json")
    keys.ignore(*NO_EFFECT, "tie_word_embeddings")  # the tensors decide
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise ValueError(f"model_type is {kind!r}; an assistant has {' or '.join(map(repr, _TEXTS))}")
    text = keys.take("text_config", None)
    if not isinstance(text, Mapping) or text.get("model_type", _TEXTS[kind]) != _TEXTS[kind]:
        raise ValueError(f"text_config is {text!r}; it must be the config of a model of model_type {_TEXTS[kind]!r}")
    fields: dict[str, Any] = {
        "decoder": _decoder({**text, "model_type": _TEXTS[kind]}),
        "target_width": keys.integer("backbone_hidden_size", 1536 if kind == "gemma4_assistant" else 3840),
    }
    centroids, chosen = keys.integer("num_centroids", 2048), keys.integer("centroid_intermediate_top_k", 32)
    if keys.flag("use_ordered_embeddings", False):
        fields |= {"centroids": centroids, "chosen": chosen}
    warn_unknown("config.json", keys.unknown({}))
    return fields


def _decoder(text: dict[str, Any]) -> DecoderConfig:
    """Returns the assistant's decoder. All its layers share the target's keys and values."""
    shared, count = text.pop("num_kv_shared_layers", None), text.get("num_hidden_layers", 30)
    if shared not in (None, 0, count):
        raise ValueError(f"num_kv_shared_layers is {shared!r}; an assistant shares all its {count} layers")
    text.pop("architectures", None)
    config = decoder_config(text)
    if config.per_layer or config.experts:
        raise ValueError(
            "text_config has hidden_size_per_layer_input or enable_moe_block, which an assistant does not have; set "
            "them to 0 and false"
        )
    # Transformers' window counts the tokens before the query, and one more. Example: with a window of 7, the query at
    # position 20 sees the slots 12 to 19 of the target's cache. Slot 20 is not written yet.
    layers = tuple(
        dataclasses.replace(layer, shares=EXTERNAL, keys_as_values=False, window=layer.window and layer.window + 1)
        for layer in config.each_layer
    )
    return dataclasses.replace(config, layers=layers)


def assistant_parameters(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], abstract: Any) -> Any:
    """Returns an assistant's parameters, each read by ``Parameter.read``.

    Args:
      raw: the content of ``config.json``.
      tensors: the folder's tensors.
      abstract: nested dicts of leaves with the parameters' shapes.

    Returns:
      Nested dicts of ``Parameter``, in the structure of ``abstract``.

    Raises:
      ValueError: a tensor is missing, is unknown, or has another shape or dtype than the config says; or the order of
        tokens is no permutation.
    """
    order = abstract.get("tokens_cx")
    table = {
        **GEMMA4,
        "embed_tokens.weight": (_HEAD if _HEAD in tensors else _TABLE, SAME),
        **linear("pre_projection", "pre_projection"),
        **linear("post_projection", "post_projection"),
        **linear("centroids", "masked_embedding.centroids"),
    }
    wanted = sources_of(table, {name: part for name, part in abstract.items() if name != "tokens_cx"})
    # The target embeds tokens, so of two tables only the output head counts.
    dropped = {_ORDER, _TABLE} if _HEAD in tensors else {_ORDER}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    plain, form = plain_tensors(raw, kept, wanted)
    check_tensors(plain, wanted, lambda name: None, form)
    params = parameters_of(plain, wanted)
    return params if order is None else params | {"tokens_cx": _order(tensors, order.shape)}


def _order(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Parameter:
    """Returns the tokens of each centroid; raises ValueError unless each token has one centroid."""
    tensor = tensors.get(_ORDER)
    count = shape[0] * shape[1]
    if tensor is None or tensor.shape != (count,) or tensor.dtype.kind not in "iu":
        found = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
        raise ValueError(f"tensor {_ORDER!r} is {found}; it must be integers ({count},)")
    tokens = np.asarray(tensor.read())
    if not np.array_equal(np.sort(tokens), np.arange(count)):
        raise ValueError(f"tensor {_ORDER!r} must hold each token from 0 to {count - 1} once; download it again")
    tokens_cx = tokens.astype(np.int32).reshape(shape)
    return Parameter(shape, np.dtype("int32"), lambda dtype, index=(): tokens_cx[index].astype(dtype))
