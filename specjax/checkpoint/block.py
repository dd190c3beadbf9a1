"""Folders of DFlash, DFlash2 and DSpark heads. All published layouts are read; speculators' and z-lab's are written."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax.checkpoint.models import check_params
from specjax.checkpoint.new_folder import write_json
from specjax.checkpoint.shared import check_draft_ids, drop_targets_tables, speculators_about
from specjax.checks import errors_name
from specjax.drafters.block import BlockDrafter
from specjax.drafters.dflash import DFlashHead
from specjax.hf.block import block_fields, block_tensors, tensors_of_block
from specjax.hf.draft_head import draft_vocabulary, head_parameters
from specjax.hf.keys import read_json, without_keys
from specjax.hf.safetensors import open_tensors, write_tensors
from specjax.types import LanguageModel

_CLASSES = {"dflash": "DFlashSpeculator", "dflash2": "DFlash2DraftModel", "dspark": "DSparkSpeculator"}
_LOG = logging.getLogger(__name__)


def open_block(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    ignore_config_keys: Iterable[str] = (),
    *,
    window_stays: bool = False,
    argmax: bool = False,
    cuts: bool = False,
) -> tuple[BlockDrafter, Any]:
    """Opens a DFlash, DFlash2 or DSpark head as a drafter of blocks.

    ``drafter.head.describe()`` says which of the target's states the draft head reads; the log of this module says the
    same. An embedding or output head that equals the target's is dropped, and the target's is used. A folder without
    them uses the target's, too.

    Args:
      path: a folder with ``config.json`` and safetensors, of z-lab, DeepSpec, SpecForge or speculators.
      target: the model to draft for.
      num_draft: g, tokens proposed per round.
      dtype: dtype of parameters and computation.
      ignore_config_keys: as for ``specjax.load``.
      window_stays: as for ``DFlashHead``.
      argmax, cuts: as for ``BlockDrafter``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: a file is missing, damaged or pickled; the config is not of a block draft head, or has an unknown key
        or value; a tensor is missing, unknown, or of another shape; the draft vocabulary does not map into the
        target's; a block has fewer drafts than ``num_draft``; ``cuts`` and no confidence head;
        or the draft head does not fit the target in width, vocabulary or number of layers.
    """
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path / "config.json"):
        fields: dict[str, Any] = _describe(raw, target) | {"window_stays": window_stays}
    found = open_tensors(path)
    # Which tensors there are decides whether the draft head embeds and unembeds by itself, and has its own draft ids.
    with errors_name(path):
        tensors = block_tensors(found)
        draft_of_v = draft_vocabulary(tensors, fields["draft_vocab_size"], fields["decoder"].vocab_size)
        own = {"own_embedding": "embed_tokens.weight" in tensors, "own_head": "lm_head.weight" in tensors}
        head = _head(fields, target, **own, mapped=draft_of_v is not None)
        params = head_parameters(tensors, draft_of_v, head.abstract_params())
        head = dataclasses.replace(head, **drop_targets_tables(params, own, target))
        drafter = BlockDrafter(head.abstract_params(dtype), head, num_draft, argmax=argmax, cuts=cuts)
    _LOG.info("%s: %s", path, head.describe())
    return drafter, params


def fill_block(
    folder: Path,
    config: Mapping[str, Any],
    params: Any,
    target: LanguageModel,
    target_name: str | None,
    num_draft: int,
) -> None:
    """Writes a DFlash, DFlash2 or DSpark head into a folder, in the layout of its config.

    Args:
      folder: an empty folder.
      config: describes the draft head, with the keys of any layout that ``open_block`` reads. With
        ``speculators_model_type`` the folder has speculators' layout, otherwise z-lab's or that of its kin.
      params: the parameters, in the structure that ``DFlashHead.init_params`` returns.
      target: the model that the head drafts for.
      target_name: the target's name or path, for other engines. None keeps the target that ``config`` names.
      num_draft: tokens per round, a hint for other engines. Used only if ``config`` has no ``speculators_config``, or
        with ``target_name``.

    Raises:
      ValueError: as for ``open_block``; or the parameters are other than the config describes.
    """
    # 1. Check that the config describes these parameters: other engines trust it.
    fields = _describe(config, target)
    own = {"own_embedding": "embed_tokens" in params, "own_head": "lm_head" in params}
    head = _head(fields, target, **own, mapped="draft_of_v" in params)
    check_params(params, head.abstract_params())
    check_draft_ids(params, head.draft_vocab_size)
    # 2. What other engines ask for beyond the draft head itself.
    about: dict[str, Any] = {"torch_dtype": str(params["fc"]["kernel"].dtype), "tie_word_embeddings": False}
    kind = config.get("speculators_model_type")
    if kind is None:
        about |= {"num_target_layers": target.num_layers}
    else:
        about |= {"architectures": [_CLASSES[kind]]}
        if target_name is not None or "speculators_config" not in config:
            about["speculators_config"] = speculators_about(kind, num_draft, target_name)
    write_json(folder / "config.json", {**config, **about})
    write_tensors(folder, tensors_of_block(params))


def block_head(config: Mapping[str, Any], target: LanguageModel) -> DFlashHead:
    """Returns the draft head that a config of any layout describes.

    The head embeds and unembeds as the target does. With a smaller draft vocabulary it has its own output head.

    Args:
      config: describes the draft head.
      target: the model that the head drafts for.

    Raises:
      ValueError: the config is not of a block draft head, has an unknown key or value, or does not fit the target.
    """
    fields = _describe(config, target)
    reduced = fields["draft_vocab_size"] != fields["decoder"].vocab_size
    return _head(fields, target, own_embedding=False, own_head=reduced, mapped=reduced)


def _describe(raw: Mapping[str, Any], target: LanguageModel) -> dict[str, Any]:
    """Returns the arguments of ``DFlashHead`` that a config describes."""
    target.require("num_layers")
    assert target.num_layers is not None
    try:
        return block_fields(raw, target.num_layers)
    except RecursionError:  # in the repr of a value for a message
        raise ValueError("a value is nested too deeply to be a draft head's; write the file again") from None


def _head(
    fields: Mapping[str, Any], target: LanguageModel, own_embedding: bool, own_head: bool, mapped: bool
) -> DFlashHead:
    """Returns the head of the arguments that ``_describe`` returned, after checking that it fits the target.

    ``mapped``: draft ids differ from the target's ids.
    """
    # Draft ids that are the target's need no table.
    if not mapped and fields["draft_vocab_size"] == fields["decoder"].vocab_size:
        fields = {**fields, "draft_vocab_size": None}
    head = DFlashHead(**fields, own_embedding=own_embedding, own_head=own_head)
    head.check_fit(target)
    return head
