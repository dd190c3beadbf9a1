"""Folders of language models that draft a whole block (PARD): a model's folder whose config names a mask."""

from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from specjax.checkpoint.models import load
from specjax.checks import check_integer, errors_name
from specjax.drafters.pard import PardDrafter
from specjax.hf.block import is_block
from specjax.hf.keys import key_names, read_json
from specjax.hf.peagle import is_peagle
from specjax.quantized import Kind
from specjax.sharding import Rules
from specjax.types import LanguageModel

_MASK = "pard_token"
_KEYS = (_MASK, "spd_type")


def is_pard(path: Path) -> bool:
    """Returns whether a folder holds a language model whose config names the token of a mask."""
    if not (path / "config.json").is_file():
        return False
    raw = read_json(path / "config.json")
    return _MASK in raw and not is_block(raw) and not is_peagle(raw)


def open_pard(
    path: Path,
    target: LanguageModel,
    num_draft: int,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    rules: Rules,
    ignore_config_keys: Iterable[str],
    quantize: Kind | None,
    argmax: bool,
) -> PardDrafter:
    """Opens a folder for which ``is_pard`` is true; the arguments are those of ``load_drafter``.

    Raises:
      ValueError: as for ``specjax.load``; or the model has another vocabulary than the target, or no such token.
    """
    with errors_name(path / "config.json"):
        mask = read_json(path / "config.json")[_MASK]
        check_integer(_MASK, mask, 0, target.vocab_size - 1)
    model = load(path, dtype, mesh, rules, (*key_names(ignore_config_keys), *_KEYS), quantize)
    if model.vocab_size != target.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens and the target one of {target.vocab_size}; give a "
            "draft model of the target's family"
        )
    return PardDrafter(model, num_draft, mask_token=mask, argmax=argmax)
