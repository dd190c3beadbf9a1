"""Folders of EAGLE heads: published ones of all layouts in, speculators' layout out."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax.checkpoint.lent import is_targets_embedding, read_onto
from specjax.checkpoint.models import check_dtype, check_params, default_dtype, new_folder, write_json
from specjax.checks import check_integer
from specjax.drafters.eagle import EagleHead, check_fit
from specjax.drafters.feature import FeatureDrafter
from specjax.hf.eagle import (
    draft_vocabulary,
    eagle_fields,
    eagle_parameters,
    eagle_tensors,
    speculators_config,
    tensors_of_eagle,
)
from specjax.hf.keys import read_json
from specjax.hf.safetensors import open_tensors, write_tensors
from specjax.sharding import RULES, Rules
from specjax.types import LanguageModel

_LOG = logging.getLogger(__name__)


def open_eagle(
    path: str | os.PathLike,
    target: LanguageModel,
    num_draft: int = 4,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> FeatureDrafter:
    """Opens an EAGLE-1, EAGLE-2 or EAGLE-3 head as a drafter of chains.

    ``drafter.head.describe()`` says which of the target's states it reads, and so does the log of this module. An
    embedding that equals the target's is not kept.

    Args:
      path: a folder with ``config.json`` and safetensors, of SafeAILab's EAGLE, of SpecForge or of speculators.
      target: the model to draft for.
      num_draft: g, tokens proposed per round.
      dtype: of parameters and computation; None means ``specjax.default_dtype()``.
      mesh: as for ``specjax.load``.
      rules: as for ``specjax.shard``.

    Raises:
      ValueError: a file is missing, damaged or pickled; the config is of no EAGLE head, or has a key or value that is
        not known; a tensor is missing, of another shape, or unknown; the draft vocabulary is none of the target's; or
        the head does not fit the target in width, vocabulary or number of layers; or the mesh or the rules do not fit
        the head.
      TypeError: as ``specjax.shard``.
    """
    check_integer("num_draft", num_draft, 1)
    dtype = check_dtype(default_dtype() if dtype is None else dtype)
    path = Path(path).absolute()
    raw = read_json(path / "config.json")
    try:
        _, fields = _described(raw, target)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    found = open_tensors(path)
    try:
        tensors, draft_of_v = eagle_tensors(found), None
        if fields["version"] == 3:
            draft_of_v = draft_vocabulary(tensors, fields["draft_vocab_size"], fields["decoder"].vocab_size)
        head = _head(fields, target, own_embedding="embed_tokens.weight" in tensors, mapped=draft_of_v is not None)
        params = eagle_parameters(tensors, draft_of_v, head.abstract_params())
        if head.own_embedding and is_targets_embedding(params["embed_tokens"]["weight"], target):
            head = dataclasses.replace(head, own_embedding=False)
            del params["embed_tokens"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _LOG.info("%s: %s", path, head.describe())
    return read_onto(mesh, rules, FeatureDrafter(head.abstract_params(dtype), head, num_draft), params)


def write_eagle(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    params: Any,
    target: LanguageModel,
    *,
    verifier: str | None = None,
    num_draft: int = 4,
) -> None:
    """Writes a head in speculators' layout, for ``open_eagle`` and for other engines.

    Args:
      path: the folder to make, or to replace.
      config: what describes the head, with the keys of any layout that ``open_eagle`` reads.
      params: the head's, as ``EagleHead.init_params`` and ``open_eagle`` return them.
      target: the model it drafts for.
      verifier: the target's name or path, for other engines; None keeps what ``config`` says of it.
      num_draft: tokens per round, a hint for other engines, where ``config`` has none.

    Raises:
      ValueError: as for ``open_eagle``; or the parameters are not those that the config describes.
      OSError: the folder cannot be written; what was there stays.
    """
    check_integer("num_draft", num_draft, 1)
    config, fields = _described(config, target)
    head = _head(fields, target, own_embedding="embed_tokens" in params, mapped="draft_of_v" in params)
    _check_params(params, head)
    kind = config["speculators_model_type"]
    about = {
        "architectures": ["EagleSpeculator" if kind == "eagle" else "Eagle3Speculator"],
        "torch_dtype": str(params["fc"]["kernel"].dtype),
        "tie_word_embeddings": False,
    }
    if verifier is not None or "speculators_config" not in config:
        proposal = {"proposal_type": "greedy", "speculative_tokens": num_draft}
        about["speculators_config"] = {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        }
    with new_folder(path) as folder:
        write_json(folder / "config.json", config | about)
        write_tensors(folder, tensors_of_eagle(kind, params))


def eagle_head(config: Mapping[str, Any], target: LanguageModel) -> EagleHead:
    """Returns the head that a config of any layout describes, which drafts all of the vocabulary if it says so.

    The target embeds tokens for it, unless its states have another width than the head's.

    Args:
      config: what describes the head.
      target: the model it drafts for.

    Raises:
      ValueError: the config is of no EAGLE head, has a key or value that is not known, or does not fit the target.
    """
    _, fields = _described(config, target)
    width = fields["decoder"].hidden_size
    return _head(fields, target, own_embedding=fields.get("target_hidden_size") not in (None, width), mapped=False)


def _described(raw: Mapping[str, Any], target: LanguageModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a config in speculators' layout, and the arguments of ``EagleHead`` that it stands for."""
    if target.num_layers is None:
        raise ValueError("the target does not say how many layers it has; set LanguageModel.num_layers")
    try:
        config = speculators_config(raw, target.num_layers)
        return config, eagle_fields(config)
    except RecursionError:  # in the repr of a value for a message
        raise ValueError("a value is nested too deeply to be a head's; write the file again") from None


def _head(fields: Mapping[str, Any], target: LanguageModel, own_embedding: bool, mapped: bool) -> EagleHead:
    """Returns the head of what ``_described`` returned, fit for the target; ``mapped``: its draft ids are its own."""
    if not mapped and fields.get("draft_vocab_size") == fields["decoder"].vocab_size:
        fields = {**fields, "draft_vocab_size": None}
    head = EagleHead(**fields, own_embedding=own_embedding)
    check_fit(head, target)
    return head


def _check_params(params: Any, head: EagleHead) -> None:
    check_params(params, head.abstract_params())
    if "draft_of_v" in params:
        draft_of_v, count = np.asarray(params["draft_of_v"]), head.draft_vocab_size or 0
        if not np.array_equal(np.sort(draft_of_v[draft_of_v >= 0]), np.arange(count)):
            raise ValueError(f"draft_of_v must hold each draft id from 0 to {count - 1} once, and -1 elsewhere")
