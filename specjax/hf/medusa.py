"""Medusa heads in Hugging Face folders, as FasterDecoding publishes them (https://github.com/FasterDecoding/Medusa).

Head i is a torch ``Sequential`` of its blocks and its output layer. Block k has the tensors ``{i}.{k}.linear.weight``
and ``{i}.{k}.linear.bias``, and the output layer ``{i}.{blocks}.weight``. Example: the output layer of head 0 with one
block is ``0.1.weight``.

- Medusa-1: the heads have their own folder, with ``medusa_lm_head.safetensors``.
- Medusa-2: the heads were trained together with their target and are in the target's folder. Their tensors are
  ``medusa_head.{i}...``, next to the target's. The target's ``config.json`` has ``medusa_num_heads`` and
  ``medusa_num_layers``.
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
_PREFIX = "medusa_head."  # in the names of tensors of heads that were saved as a part of their target
_SIZES = ("hidden_size", "vocab_size")
_MOST = 100  # heads, and blocks of each; a hostile config must not ask for names of millions of tensors


def medusa_config(raw: Mapping[str, Any]) -> tuple[int, int, int | None, int | None]:
    """Returns the number of heads, the number of blocks of each, the target's width, and the size of its vocabulary.

    Width and vocabulary are None if the config does not have them.

    Raises:
      ValueError: a key is missing, is unknown, or has a value that is not understood.
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
    keys.ignore("quantization_config")  # a left-over: only plain floats are read
    keys.ignore("decoding_strategy")  # how other engines choose among the heads' tokens
    warn_unknown("config.json", keys.switched_off())
    return heads, blocks, sizes[0], sizes[1]


def lies_in_target(raw: Mapping[str, Any]) -> bool:
    """Returns whether a ``config.json`` describes a whole model, not Medusa heads alone."""
    return isinstance(raw.get("model_type"), str) and raw["model_type"] not in ("", "medusa")


def open_medusa_tensors(folder: Path, in_target: bool = False) -> dict[str, Tensor]:
    """Opens the tensors of the heads in a folder, by their names without the prefix ``medusa_head.``.

    Args:
      folder: the folder of the heads.
      in_target: whether the folder is the target's, too. Then, if some names have the prefix, tensors without the
        prefix belong to the target.

    Raises:
      ValueError: as for ``open_tensors``; or there are only pickles, or two tensors would have the same name.
    """
    # 1. The file of heads alone, or any safetensors. Only pickles is a common case with its own cure.
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
    # 2. The heads' tensors, by one name wherever they were saved.
    if in_target and any(name.startswith(_PREFIX) for name in found):
        found = {name: tensor for name, tensor in found.items() if name.startswith(_PREFIX)}
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise ValueError(f"two tensors of {folder} have one name but for the prefix {_PREFIX!r}; save the heads again")
    return tensors


def medusa_parameters(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Returns the heads' parameters, each a ``Parameter``.

    Args:
      raw: the content of ``config.json``. In a whole model's config, keys that are not of Medusa are not read.
      tensors: what ``open_medusa_tensors`` returned.

    Raises:
      ValueError: as for ``medusa_config``; or a tensor is missing, is unknown, has another shape, or does not hold
        floats.
    """
    if lies_in_target(raw):
        raw = {key: raw[key] for key in raw if key.startswith("medusa_") or key in _SIZES}
    heads, blocks, width, vocab = medusa_config(raw)
    # Published configs may count fewer heads than there are: FasterDecoding's configs for Vicuna say 2 of 5 heads.
    heads = max(heads, sum(bool(re.fullmatch(rf"\d+\.{blocks}\.weight", name)) for name in tensors))
    # Sizes that the config does not have come from head 0; the other heads are checked against them.
    last = tensors.get(f"0.{blocks}.weight")
    if last is not None and len(last.shape) == 2:
        vocab, width = vocab or last.shape[0], width or last.shape[1]
    sources = _sources(heads, blocks, width or 1, vocab or 1)
    check_tensors(tensors, sources, lambda name: None)
    return parameters_of(tensors, sources)


def medusa_tensors(params: Any) -> list[TensorSpec]:
    """Returns the heads' tensors. Each array is made when it is written. ``params`` is ``MedusaDrafter.params``."""
    width, vocab = params[0]["lm_head"]["kernel"].shape
    return tensors_of(_sources(len(params), len(params[0]["blocks"]), width, vocab), params)


def _sources(heads: int, blocks: int, width: int, vocab: int) -> dict[str, Source]:
    """Returns the tensors of the heads by their names."""
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
