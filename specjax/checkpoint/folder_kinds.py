"""Draft heads that are given as something else than they are, and other folders that are given as draft heads.

Only a folder that was refused is looked at again, so folders that open are not looked at twice.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specjax.hf.block import is_block
from specjax.hf.contents import kinds_of_tensors
from specjax.hf.gguf import is_gguf
from specjax.hf.keys import read_json
from specjax.hf.peagle import is_peagle
from specjax.hf.safetensors import open_tensors

_HOLDS = {
    "model": ("a language model", "give it as the target, or as the drafter model:{}"),
    "eagle": ("an EAGLE head", "give the drafter eagle:{}"),
    "block": ("a draft head of blocks", "give the drafter block:{}"),
    "mtp": ("MTP modules", "give the drafter mtp:{}"),
    "medusa": ("Medusa heads", "give the drafter medusa:{}"),
    "assistant": ("an assistant", "give the drafter assistant:{}"),
    "adapter": ("an adapter of a model", "open the folder of its base model, with adapter={!r}"),
}
_SPECULATORS = {
    "eagle": "eagle",
    "eagle3": "eagle",
    "mtp": "mtp",
    "dflash": "block",
    "dflash2": "block",
    "dspark": "block",
    "peagle": "block",
}


@contextlib.contextmanager
def opened_as(kind: str, path: Path) -> Iterator[None]:
    """Context manager that tells what a folder holds if it cannot be opened as ``kind``, a kind of draft head.

    Raises:
      ValueError: what was raised inside; if the folder holds something else, with the way to open it.
    """
    try:
        yield
    except ValueError as error:
        found = kinds_of(path)
        if kind in found or not found:
            raise
        what, cure = _HOLDS.get(found[-1], (f"a draft head of kind {found[-1]!r}", "give one that specjax computes"))
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path} holds {what}, not {_HOLDS[kind][0]}; {cure.format(str(path))}. It was refused because {reason}"
        ) from None


def kinds_of(path: Path) -> list[str]:
    """Returns what a folder holds: "adapter", or some of "eagle", "block", "mtp", "medusa", "assistant" and "model", or
    the name of another kind of draft head. A model's folder may hold draft heads, too; "model" comes last. Empty if
    nothing is known.
    """
    if path.is_file() and is_gguf(path):
        return ["model"]
    try:
        raw = read_json(path / "config.json")
    except ValueError:
        raw = {}
    if any(path.glob("adapter_model.*")) or ((path / "adapter_config.json").is_file() and not raw):
        return ["adapter"]
    if (path / "params").is_dir():
        return ["model"]
    try:
        return kinds_of_tensors(open_tensors(path)) or _by_config(raw)
    except ValueError:
        return _by_config(raw)


def _by_config(raw: Mapping[str, Any]) -> list[str]:
    """Returns what ``kinds_of`` does, from ``config.json`` alone."""
    kind = raw.get("speculators_model_type")
    if isinstance(kind, str):
        return [_SPECULATORS.get(kind, kind)]
    architectures = raw.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if is_block(raw) or is_peagle(raw):
        return ["block"]
    for kind in ("eagle", "medusa"):
        if kind in name.lower() or raw.get("model_type") == kind or f"{kind}_config" in raw:
            return [kind]
    if "medusa_num_heads" in raw and "model_type" not in raw:
        return ["medusa"]
    return ["model"] if "num_hidden_layers" in raw or "text_config" in raw else []
