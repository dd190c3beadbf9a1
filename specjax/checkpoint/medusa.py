"""Folders of Medusa heads, in and out."""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from specjax.checkpoint.lent import read_onto
from specjax.checkpoint.models import check_dtype, default_dtype, new_folder, write_json
from specjax.checks import check_integer
from specjax.drafters.medusa import MedusaDrafter, check_medusa_fit
from specjax.hf.keys import read_json
from specjax.hf.medusa import MEDUSA_FILE, lies_in_target, medusa_parameters, medusa_tensors, open_medusa_tensors
from specjax.hf.safetensors import write_tensors
from specjax.sharding import RULES, Rules
from specjax.types import LanguageModel


def open_medusa(
    path: str | os.PathLike,
    target: LanguageModel,
    num_draft: int = 4,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> MedusaDrafter:
    """Opens Medusa heads as a drafter of chains (Cai et al. 2024, arXiv 2401.10774, section 2.1).

    Heads past the first ``num_draft`` are not read.

    Args:
      path: a folder with ``config.json`` and ``medusa_lm_head.safetensors`` (or ``model.safetensors``); or that of a
        whole model, trained together with its heads (Medusa-2, section 2.2.2), among whose tensors they lie.
      target: the model to draft for; heads of a whole model are for that model.
      num_draft: g, tokens proposed per round, at most one per head.
      dtype: of parameters and computation; None means ``specjax.default_dtype()``.
      mesh: as for ``specjax.load``.
      rules: as for ``specjax.shard``.

    Raises:
      ValueError: a file is missing, damaged or pickled; the config has a key or value that is not known; a tensor is
        missing, of another shape, or unknown; there are fewer heads than ``num_draft``; or the heads do not fit the
        target in width or vocabulary; or the mesh or the rules do not fit the heads.
      TypeError: as ``specjax.shard``.
    """
    check_integer("num_draft", num_draft, 1)
    dtype = check_dtype(default_dtype() if dtype is None else dtype)
    path = Path(path).absolute()
    raw = read_json(path / "config.json")
    try:
        params = medusa_parameters(raw, open_medusa_tensors(path, lies_in_target(raw)))
        vocab = params[0]["lm_head"]["kernel"].shape[1]
        if vocab != target.vocab_size:
            raise ValueError(
                f"the Medusa heads are for {vocab} tokens and the target has {target.vocab_size}; give its own"
            )
        check_medusa_fit(params, num_draft, _width(target))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    params = {i: params[i] for i in range(num_draft)}
    abstract = jax.tree.map(lambda parameter: jax.ShapeDtypeStruct(parameter.shape, dtype), params)
    return read_onto(mesh, rules, MedusaDrafter(abstract, num_draft), params)


def write_medusa(path: str | os.PathLike, params: Any, base_model: str = "") -> None:
    """Writes Medusa heads in the layout of FasterDecoding/Medusa, for ``open_medusa`` and for other engines.

    Args:
      path: the folder to make, or to replace.
      params: of the heads, as ``MedusaDrafter`` holds them.
      base_model: the target's name or path, for other engines.

    Raises:
      ValueError: the heads differ in their shapes or in the number of their blocks.
      OSError: the folder cannot be written; what was there stays.
    """
    shapes = {i: jax.tree.map(jnp.shape, params[i]) for i in range(len(params))}
    other = next((i for i in shapes if shapes[i] != shapes[0]), None)
    if other is not None:
        raise ValueError(f"head {other} has the shapes {shapes[other]} and head 0 {shapes[0]}; the layout has one size")
    width, vocab = shapes[0]["lm_head"]["kernel"]
    config = {
        "model_type": "medusa",
        "base_model_name_or_path": base_model,
        "medusa_num_heads": len(params),
        "medusa_num_layers": len(params[0]["blocks"]),
        "hidden_size": width,
        "vocab_size": vocab,
    }
    with new_folder(path) as folder:
        write_json(folder / "config.json", config)
        (file,) = write_tensors(folder, medusa_tensors(params), shard_bytes=sys.maxsize)
        file.rename(folder / MEDUSA_FILE)


def _width(target: LanguageModel) -> int:
    """Returns the width of the target's state after its final norm; nothing is computed."""
    return target.state_specs(MedusaDrafter.capture)[0].shape[-1]
