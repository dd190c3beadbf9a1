"""Folders of assistants, which draft from the target's cache."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from specjax.checks import errors_name
from specjax.drafters.assistant import AssistantDrafter, AssistantHead
from specjax.hf.assistant import assistant_fields, assistant_parameters
from specjax.hf.keys import read_json, without_keys
from specjax.hf.safetensors import open_tensors
from specjax.types import LanguageModel


def open_assistant(
    path: Path, target: LanguageModel, num_draft: int, dtype: jnp.dtype, ignore_config_keys: Iterable[str] = ()
) -> tuple[AssistantDrafter, Any]:
    """Opens an assistant of Gemma 4 as a drafter of chains.

    Args:
      path: a folder with ``config.json`` and safetensors.
      target: the model to draft for.
      num_draft: g, tokens proposed per round.
      dtype: dtype of parameters and computation; it must be that of the target's cache.
      ignore_config_keys: as for ``specjax.load``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: a file is missing or damaged; the config is not of an assistant; a tensor is missing, unknown, or of
        another shape; or the assistant does not fit the target.
    """
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path / "config.json"):
        head = AssistantHead(**assistant_fields(raw))
    with errors_name(path):
        if head.decoder.vocab_size != target.vocab_size:
            raise ValueError(
                f"the assistant is for {head.decoder.vocab_size} tokens and the target has {target.vocab_size}; give "
                "the assistant's own target"
            )
        drafter = AssistantDrafter(head.abstract_params(dtype), head, num_draft)
        drafter.init(target, 1, 1)
        return drafter, assistant_parameters(raw, open_tensors(path), head.abstract_params())
