"""Folders of P-EAGLE heads. The layouts of speculators and SpecForge are read; speculators' is written."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax.checkpoint.eagle import describe_eagle, fitting_head
from specjax.checkpoint.models import check_params
from specjax.checkpoint.new_folder import write_json
from specjax.checkpoint.shared import check_draft_ids, drop_targets_tables, speculators_about
from specjax.checks import errors_name
from specjax.drafters.block import BlockDrafter
from specjax.drafters.peagle import PEagleHead
from specjax.hf.draft_head import draft_vocabulary, head_parameters
from specjax.hf.eagle import eagle_tensors, tensors_of_eagle
from specjax.hf.keys import read_json, without_keys
from specjax.hf.peagle import KIND, MASK, split_config
from specjax.hf.safetensors import open_tensors, write_tensors
from specjax.types import LanguageModel

_LOG = logging.getLogger(__name__)


def open_peagle(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    ignore_config_keys: Iterable[str] = (),
    *,
    argmax: bool = False,
    cuts: bool = False,
) -> tuple[BlockDrafter, Any]:
    """Opens a P-EAGLE head as a drafter of blocks.

    ``drafter.head.describe()`` says which of the target's states the draft head reads; the log of this module says the
    same. An embedding or output head that equals the target's is dropped, and the target's is used.

    Args:
      path: a folder with ``config.json`` and safetensors, of speculators or SpecForge.
      target: the model to draft for.
      num_draft: g, tokens proposed per round.
      dtype: dtype of parameters and computation.
      ignore_config_keys: as for ``specjax.load``.
      argmax, cuts: as for ``BlockDrafter``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: as for ``specjax.checkpoint.eagle.open_eagle``; the config has no token for the mask;
        or ``cuts`` is true.
    """
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path / "config.json"):
        config, mask = split_config(raw)
        _, fields = describe_eagle(config, target)
    found = open_tensors(path)
    with errors_name(path):
        tensors = eagle_tensors(found, tied=False)
        draft_of_v = draft_vocabulary(tensors, fields["draft_vocab_size"], fields["decoder"].vocab_size)
        own = {"own_embedding": "embed_tokens.weight" in tensors, "own_head": "lm_head.weight" in tensors}
        head = PEagleHead(fitting_head(fields, target, **own, mapped=draft_of_v is not None), mask)
        params = head_parameters(tensors, draft_of_v, head.abstract_params())
        eagle = dataclasses.replace(head.eagle, **drop_targets_tables(params, own, target))
        head = dataclasses.replace(head, eagle=eagle)
        drafter = BlockDrafter(head.abstract_params(dtype), head, num_draft, argmax=argmax, cuts=cuts)
    _LOG.info("%s: %s", path, head.describe())
    return drafter, params


def fill_peagle(
    folder: Path,
    config: Mapping[str, Any],
    head: PEagleHead,
    params: Any,
    target: LanguageModel,
    target_name: str | None,
    num_draft: int,
) -> None:
    """Writes a P-EAGLE head in speculators' layout into a folder.

    Args:
      folder: an empty folder.
      config: describes the draft head, with the keys of a layout that ``open_peagle`` reads.
      head: the draft head.
      params: the parameters, in the structure that ``PEagleHead.init_params`` returns.
      target: the model that the head drafts for.
      target_name: as for ``specjax.checkpoint.eagle.fill_eagle``.
      num_draft: as for ``specjax.checkpoint.eagle.fill_eagle``.

    Raises:
      ValueError: as for ``open_peagle``; or the parameters are other than the config describes.
    """
    eagle, mask = split_config(config)
    eagle, fields = describe_eagle(eagle, target)
    own = {"own_embedding": "embed_tokens" in params, "own_head": bool(head.eagle.own_head)}
    described = PEagleHead(fitting_head(fields, target, **own, mapped="draft_of_v" in params), mask)
    check_params(params, described.abstract_params())
    check_draft_ids(params, described.eagle.draft_vocab_size)
    about: dict[str, Any] = {"architectures": ["PEagleSpeculator"], "speculators_model_type": KIND, MASK: mask}
    about |= {"torch_dtype": str(params["fc"]["kernel"].dtype), "tie_word_embeddings": False}
    if target_name is not None or "speculators_config" not in config:
        about["speculators_config"] = speculators_about(KIND, num_draft, target_name)
    write_json(folder / "config.json", eagle | about)
    write_tensors(folder, tensors_of_eagle("eagle3", params))
