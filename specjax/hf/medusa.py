"""Medusa heads in Hugging Face folders, as FasterDecoding publishes them (https://github.com/FasterDecoding/Medusa).

Head i is a torch ``Sequential`` of its blocks and its last layer: ``{i}.{k}.linear.weight``, ``{i}.{k}.linear.bias``
and ``{i}.{blocks}.weight``. Those of Medusa-1 have a folder of their own, with ``medusa_lm_head.safetensors``. Those of
Medusa-2 were trained together with their target and lie in its folder: tensors ``medusa_head.{i}...`` among its own,
``medusa_num_heads`` and ``medusa_num_layers`` in its ``config.json``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.names import LINEAR, SAME, Piece, Source
from specjax.hf.safetensors import Tensor, TensorSpec, open_file, open_tensors
from specjax.hf.weights import check_tensors, parameters_of, tensors_of

MEDUSA_FILE = "medusa_lm_head.safetensors"

_PICKLE = "medusa_lm_head.pt"
_PREFIX = "medusa_head."  # of heads that were saved as a part of their target
_SIZES = ("hidden_size", "vocab_size")
_MOST = 100  # heads, and blocks of each: names of tensors are made for all


def medusa_config(raw: Mapping[str, Any]) -> tuple[int, int, int | None, int | None]:
    """Returns the numbers of heads and of blocks, the width and the vocabulary, None where the config is silent.

    Raises:
      ValueError: a key is missing, unknown, or has a value that is not understood.
    """
    keys = Keys(raw, "config.json")
    if "medusa_num_heads" not in keys:
        raise ValueError(
            "config.json lacks the key 'medusa_num_heads'; give a folder in the layout of FasterDecoding/Medusa, or, "
            "if the model does hold heads, add it to the config"
        )
    keys.only("model_type", "medusa", "", None)
    heads, blocks = keys.integer("medusa_num_heads", most=_MOST), keys.integer("medusa_num_layers", 1, most=_MOST)
    sizes = [keys.integer(name, None, optional=True) for name in _SIZES]
    keys.ignore("architectures", "base_model_name_or_path", "dtype", "torch_dtype", "transformers_version", "version")
    keys.ignore("decoding_strategy")  # how other engines choose among the heads' tokens
    warn_unknown("config.json", keys.switched_off())
    return heads, blocks, sizes[0], sizes[1]


def lies_in_target(raw: Mapping[str, Any]) -> bool:
    """Returns whether a ``config.json`` is that of a whole model."""
    return isinstance(raw.get("model_type"), str) and raw["model_type"] not in ("", "medusa")


def open_medusa_tensors(folder: Path, in_target: bool = False) -> dict[str, Tensor]:
    """Opens the tensors of the heads in a folder, by their names without the prefix of a whole model.

    Args:
      folder: of the heads.
      in_target: it is their target's, too: where names have the prefix, those without it are the target's.

    Raises:
      ValueError: as for ``open_tensors``; or there are only pickles, or two tensors come to have one name.
    """
    pickles = _PICKLE if (folder / _PICKLE).is_file() else "pytorch_model*.bin" if in_target else ""
    if (folder / MEDUSA_FILE).is_file():
        found = {tensor.name: tensor for tensor in open_file(folder / MEDUSA_FILE)}
    elif pickles and any(folder.glob(pickles)) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds the pickle {pickles}, which is never opened; convert it as "
            "docs/huggingface.md#pickles says"
        )
    else:
        found = open_tensors(folder)
    if in_target and any(name.startswith(_PREFIX) for name in found):
        found = {name: tensor for name, tensor in found.items() if name.startswith(_PREFIX)}
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise ValueError(f"two tensors of {folder} have one name but for {_PREFIX!r}; save the heads again")
    return tensors


def medusa_parameters(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Returns the heads' parameters, each a ``Parameter`` that is read when it is used.

    Args:
      raw: the ``config.json``.
      tensors: what ``open_medusa_tensors`` returned.

    Raises:
      ValueError: as for ``medusa_config``, but that other keys of a whole model's config are the model's; or a tensor
        is missing, unknown, of another shape, or no float.
    """
    if lies_in_target(raw):
        raw = {key: raw[key] for key in raw if key.startswith("medusa_") or key in _SIZES}
    heads, blocks, width, vocab = medusa_config(raw)
    # Published configs may count fewer heads than there are: FasterDecoding's of Vicuna say 2 for 5.
    heads = max(heads, sum(bool(re.fullmatch(rf"\d+\.{blocks}\.weight", name)) for name in tensors))
    last = tensors.get(f"0.{blocks}.weight")
    if last is not None and len(last.shape) == 2:
        vocab, width = vocab or last.shape[0], width or last.shape[1]
    sources = _sources(heads, blocks, width or 1, vocab or 1)
    check_tensors(tensors, sources, None, lambda name: None)
    return parameters_of(tensors, sources)


def medusa_tensors(params: Any) -> list[TensorSpec]:
    """Returns the heads' tensors, each made when it is read; ``params`` are ``MedusaDrafter``'s."""
    width, vocab = params[0]["lm_head"]["kernel"].shape
    return tensors_of(_sources(len(params), len(params[0]["blocks"]), width, vocab), params)


def _sources(heads: int, blocks: int, width: int, vocab: int) -> dict[str, Source]:
    found = {}
    for i in range(heads):
        for k in range(blocks):
            block = (i, "blocks", k)
            kernel = Piece((*block, "kernel"), None, (width, width), LINEAR, 0)
            found[f"{i}.{k}.linear.weight"] = Source("{i}.{k}.linear.weight", (kernel,))
            bias = Piece((*block, "bias"), None, (width,), SAME, 0)
            found[f"{i}.{k}.linear.bias"] = Source("{i}.{k}.linear.bias", (bias,))
        last = Piece((i, "lm_head", "kernel"), None, (width, vocab), LINEAR, 0)
        found[f"{i}.{blocks}.weight"] = Source("{i}.{blocks}.weight", (last,))
    return found
