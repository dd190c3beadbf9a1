"""Reading and writing folders of Medusa heads."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.checkpoint.new_folder import write_json
from specjax.checks import errors_name
from specjax.drafters.medusa import MedusaDrafter, check_medusa_fit
from specjax.drafters.trees import MEDUSA_CHOICES, check_static_tree
from specjax.drafters.trees import Path as Choice
from specjax.hf.keys import read_json, without_keys
from specjax.hf.medusa import MEDUSA_FILE, lies_in_target, medusa_parameters, medusa_tensors, open_medusa_tensors
from specjax.hf.safetensors import write_tensors
from specjax.types import LanguageModel

CHOICES_FILE = "medusa_choices.json"
"""The tree of a folder's own, which was searched for its heads: a list of drafts, each a list of ranks."""


def medusa_choices(path: Path) -> tuple[Choice, ...]:
    """Returns the tree of a folder of Medusa heads: its own, or else Medusa's published one.

    Raises:
      ValueError: the file is damaged or holds no tree.
    """
    file = path / CHOICES_FILE
    if not file.exists():
        return MEDUSA_CHOICES
    with errors_name(file):
        try:
            tree = tuple(tuple(choice) for choice in json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"it is no list of lists of ranks: {error}") from None
        check_static_tree(tree, len(tree))
    return tree


def open_medusa(
    path: Path, target: LanguageModel, num_draft: int, dtype: jnp.dtype, ignore_config_keys: Iterable[str] = ()
) -> tuple[MedusaDrafter, Any]:
    """Opens Medusa heads as a drafter of chains (Cai et al. 2024, arXiv 2401.10774, section 2.1).

    Only the first ``num_draft`` heads are read.

    Args:
      path: a folder with ``config.json`` and ``medusa_lm_head.safetensors`` (or ``model.safetensors``), in the layout
        of FasterDecoding/Medusa or of vLLM; or the folder of a whole model that was trained together with its heads
        (Medusa-2, section 2.2.2).
      target: the model to draft for. Heads in a whole model's folder are for that model.
      num_draft: g, tokens proposed per round, at most the number of heads.
      dtype: dtype of parameters and computation.
      ignore_config_keys: as for ``specjax.load``.

    Returns:
      The drafter, with shapes and dtypes in place of parameters, and a tree of ``Parameter`` in the same structure.

    Raises:
      ValueError: a file is missing, damaged or pickled; the config has an unknown key or value; a tensor is missing,
        unknown, or of another shape; there are fewer heads than ``num_draft``; or the heads do not fit the target in
        width or vocabulary.
    """
    raw = without_keys(read_json(path / "config.json"), ignore_config_keys)
    with errors_name(path):
        params = medusa_parameters(raw, open_medusa_tensors(path, lies_in_target(raw)))
        vocab = MedusaDrafter(params).vocab_size
        if vocab != target.vocab_size:
            raise ValueError(
                f"the Medusa heads are for {vocab} tokens and the target has {target.vocab_size}; give its own"
            )
        check_medusa_fit(params, num_draft, _width(target))
    params = {i: params[i] for i in range(num_draft)}
    # The draft vocabulary stays what it is, integers.
    floats = {parameter.dtype: dtype for parameter in jax.tree.leaves(params) if parameter.dtype != jnp.int32}
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, floats.get(p.dtype, p.dtype)), params)
    return MedusaDrafter(abstract, num_draft), params


def fill_medusa(folder: Path, params: Any, target_name: str | None, tree: tuple[Choice, ...] | None = None) -> None:
    """Writes Medusa heads in the layout of FasterDecoding/Medusa into a folder.

    Args:
      folder: an empty folder.
      params: the parameters, in the structure of ``MedusaDrafter.params``.
      target_name: the target's name or path, for other engines.
      tree: for ``CHOICES_FILE``; None writes no such file.

    Raises:
      ValueError: the heads differ in their shapes or in the number of their blocks, or have parts that the layout has
        no names for.
    """
    if "draft_of_v" in params[0] or not all("bias" in block for block in params[0]["blocks"].values()):
        raise ValueError(
            "the Medusa heads draft a reduced vocabulary or have no biases, which only vLLM's layout has names for"
        )
    # The layout's config has one size for all heads.
    shapes = {i: jax.tree.map(jnp.shape, params[i]) for i in range(len(params))}
    other = next((i for i in shapes if shapes[i] != shapes[0]), None)
    if other is not None:
        raise ValueError(f"head {other} has the shapes {shapes[other]} and head 0 {shapes[0]}; the layout has one size")
    width, vocab = shapes[0]["lm_head"]["kernel"]
    config = {
        "model_type": "medusa",
        "base_model_name_or_path": target_name or "",
        "medusa_num_heads": len(params),
        "medusa_num_layers": len(params[0]["blocks"]),
        "hidden_size": width,
        "vocab_size": vocab,
    }
    write_json(folder / "config.json", config)
    # The layout has one file of a fixed name, whatever its size.
    (file,) = write_tensors(folder, medusa_tensors(params), shard_bytes=sys.maxsize)
    file.rename(folder / MEDUSA_FILE)
    if tree is not None:
        write_json(folder / CHOICES_FILE, tree)


def _width(target: LanguageModel) -> int:
    """Returns the width of the target's state after its final norm; computes nothing."""
    return target.state_specs(MedusaDrafter.capture)[0].shape[-1]
