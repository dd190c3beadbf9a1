"""Medusa heads in Hugging Face folders, as FasterDecoding publishes them (https://github.com/FasterDecoding/Medusa).

Head i is a torch ``Sequential`` of its blocks and its output layer. Block k has the tensors ``{i}.{k}.linear.weight``
and ``{i}.{k}.linear.bias``, and the output layer ``{i}.{blocks}.weight``. Example: the output layer of head 0 with one
block is ``0.1.weight``.

- Medusa-1: the heads have their own folder, with ``medusa_lm_head.safetensors``.
- Medusa-2: the heads were trained together with their target and are in the target's folder. Their tensors are
  ``medusa_head.{i}...``, next to the target's. The target's ``config.json`` has ``medusa_num_heads`` and
  ``medusa_num_layers``.

vLLM has other names: block k of head i is ``blocks.{i}.layers.{k}.weight``, its output layer ``lm_heads.{i}.weight``.
With ``original_lm_head`` all heads share ``lm_head.weight``. The tensor ``token_map`` holds the target's token of each
draft id, if only some tokens are drafted.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specjax.hf.keys import Keys, warn_unknown
from specjax.hf.names import LINEAR, SAME, Layout, Piece, Source
from specjax.hf.safetensors import Tensor, TensorSpec, open_file, open_tensors
from specjax.hf.weights import check_tensors, parameters_of, tensors_of, whole_parameter

MEDUSA_FILE = "medusa_lm_head.safetensors"

_PICKLE = "medusa_lm_head.pt"
_PREFIX = "medusa_head."  # in the names of tensors of heads that were saved as a part of their target
_SIZES = ("hidden_size", "vocab_size")
_MOST = 100  # heads, and blocks of each; a hostile config must not ask for names of millions of tensors


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """What a ``config.json`` says of Medusa heads. None stands for what it does not say.

    Attributes:
      heads: the number of heads.
      blocks: the number of blocks of each head.
      hidden_size: the target's width.
      vocab_size: the number of the target's tokens.
      biased: whether blocks have biases.
      shared: whether all heads have one output head.
    """

    heads: int
    blocks: int
    hidden_size: int | None = None
    vocab_size: int | None = None
    biased: bool | None = None
    shared: bool = False


def medusa_config(raw: Mapping[str, Any]) -> MedusaConfig:
    """Reads the ``config.json`` of Medusa heads.

    Raises:
      ValueError: a key is missing, is unknown, or has a value that is not understood.
    """
    # 1. The numbers of heads and blocks, by FasterDecoding's names or vLLM's.
    keys = Keys(raw, "config.json")
    count, depth = ("medusa_num_heads" if "medusa_num_heads" in keys else "num_heads"), "medusa_num_layers"
    if count not in keys:
        raise ValueError(
            "config.json lacks the key 'medusa_num_heads'; give a folder in the layout of FasterDecoding/Medusa or of "
            "vLLM, or, if the model does hold heads, add it to the config"
        )
    depth = depth if depth in keys else "num_hidden_layers"
    keys.only("model_type", "medusa", "", None)
    heads, blocks = keys.integer(count, most=_MOST), keys.integer(depth, 1, most=_MOST)
    width, vocab = (keys.integer(name, None, optional=True) for name in _SIZES)
    # 2. What only vLLM's configs have. ``token_map`` says the same as ``truncated_vocab_size``.
    biased = keys.flag("medusa_fc_bias", False) if keys.peek("medusa_fc_bias") is not None else None
    shared = keys.flag("original_lm_head", False)
    keys.only("logit_scale", 1.0, None)
    keys.ignore("truncated_vocab_size", "max_paths", "topk", "max_seq_len", "num_lookahead_tokens", "medusa_fc_bias")
    # 3. What changes nothing.
    keys.ignore("architectures", "base_model_name_or_path", "dtype", "torch_dtype", "transformers_version", "version")
    keys.ignore("decoding_strategy")  # how other engines choose among the heads' tokens
    warn_unknown("config.json", keys.switched_off())
    return MedusaConfig(heads, blocks, width, vocab, biased, shared)


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
        raise ValueError(
            f"two tensors of {folder} have one name but for the prefix {_PREFIX!r}; save the Medusa heads again"
        )
    return tensors


def medusa_parameters(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Returns the heads' parameters, each a ``Parameter``, in the structure of ``MedusaDrafter.params``.

    Args:
      raw: the content of ``config.json``. In a whole model's config, keys that are not of Medusa are not read.
      tensors: what ``open_medusa_tensors`` returned.

    Raises:
      ValueError: as for ``medusa_config``; or a tensor is missing, is unknown, has another shape, or does not hold
        floats; or ``token_map`` does not hold different tokens of the target.
    """
    if lies_in_target(raw):
        raw = {key: raw[key] for key in raw if key.startswith("medusa_") or key in _SIZES}
    config = medusa_config(raw)
    tensors = _by_one_name(tensors, config.blocks, config.shared)
    # Published configs may count fewer heads than there are: FasterDecoding's configs for Vicuna say 2 of 5 heads.
    last = re.compile(rf"\d+\.{config.blocks}\.weight")
    heads = config.heads if config.shared else max(config.heads, sum(bool(last.fullmatch(name)) for name in tensors))
    # Sizes that the config does not have come from the first output head; the other heads are checked against them.
    first = tensors.get("lm_head.weight" if config.shared else f"0.{config.blocks}.weight")
    known = first.shape if first is not None and len(first.shape) == 2 else (1, 1)
    vocab, width = config.vocab_size or known[0], config.hidden_size or known[1]
    draft_of_v, rows = None, vocab
    if "token_map" in tensors:
        draft_of_v = _draft_vocabulary(tensors["token_map"], vocab)
        rows = vocab if known[0] == vocab else int((draft_of_v >= 0).sum())
    biased = any(name.endswith(".linear.bias") for name in tensors) if config.biased is None else config.biased
    sources = _sources(heads, config.blocks, width, rows, biased, config.shared)
    floats = {name: tensor for name, tensor in tensors.items() if name != "token_map"}
    check_tensors(floats, sources, lambda name: None)
    params = parameters_of(floats, sources)
    if draft_of_v is not None:
        params[0]["draft_of_v"] = whole_parameter(draft_of_v)
    return params


def _by_one_name(tensors: Mapping[str, Tensor], blocks: int, shared: bool) -> dict[str, Tensor]:
    """Returns tensors of either layout by FasterDecoding's names, and a shared output head as ``lm_head.weight``."""
    found = {}
    for name, tensor in tensors.items():
        known = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name.removeprefix("medusa_heads."))
        known = re.sub(r"^lm_heads\.(\d+)\.", "lm_head." if shared else rf"\1.{blocks}.", known)
        if known in found and not (shared and known == "lm_head.weight"):
            raise ValueError(f"tensors {found[known].name!r} and {name!r} are both {known!r}; remove one of them")
        found[known] = tensor
    return found


def _draft_vocabulary(token_map: Tensor, vocab: int) -> np.ndarray:
    """Returns int32 ``[v]``, the draft's id of each of the target's tokens, -1 for none, from vLLM's ``token_map``."""
    if len(token_map.shape) != 1 or token_map.dtype.kind not in "iu":
        raise ValueError(f"tensor 'token_map' is {token_map.dtype} {token_map.shape}; it must be integers, one axis")
    token_u = token_map.read().astype(np.int64)
    outside = (token_u < 0) | (token_u >= vocab)
    if outside.any() or len(np.unique(token_u)) < len(token_u):
        raise ValueError(f"tensor 'token_map' must hold different tokens of the target's {vocab}; download it again")
    draft_of_v = np.full((vocab,), -1, np.int32)
    draft_of_v[token_u] = np.arange(len(token_u))
    return draft_of_v


def medusa_tensors(params: Any) -> list[TensorSpec]:
    """Returns the heads' tensors. Each array is made when it is written. ``params`` is ``MedusaDrafter.params``."""
    width, vocab = params[0]["lm_head"]["kernel"].shape
    return tensors_of(_sources(len(params), len(params[0]["blocks"]), width, vocab, True, False), params)


def _sources(heads: int, blocks: int, width: int, vocab: int, biased: bool, shared: bool) -> dict[str, Source]:
    """Returns the tensors of the heads by their names. A shared output head becomes that of head 0."""
    found = {}

    def add(name: str, *path: Any, shape: tuple[int, ...], layout: Layout) -> None:
        found[name] = Source(name, (Piece(path, None, shape, layout, 0),))

    for i in range(heads):
        for k in range(blocks):
            add(f"{i}.{k}.linear.weight", i, "blocks", k, "kernel", shape=(width, width), layout=LINEAR)
            if biased:
                add(f"{i}.{k}.linear.bias", i, "blocks", k, "bias", shape=(width,), layout=SAME)
        if i == 0 or not shared:
            name = "lm_head.weight" if shared else f"{i}.{blocks}.weight"
            add(name, i, "lm_head", "kernel", shape=(width, vocab), layout=LINEAR)
    return found
