"""The texts that name drafters: kind, folder and options, such as ``eagle:DIR@rope=target``."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from specjax.checkpoint.fetched import model_path

_FOLDERS = ("model", "eagle", "block", "mtp", "medusa", "assistant")
_WITHOUT_FOLDER = ("ngram", "suffix")
_FLAG = ("false", "true")
OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "eagle": {"rope": ("own", "target"), "norm_output": ("states", "logits"), "window": ("slides", "stays")},
    "block": {"argmax": _FLAG, "cuts": _FLAG, "window": ("slides", "stays")},
    "mtp": {"chained": _FLAG, "zero_first": _FLAG, "chain_states": ("normed", "unnormed")},
}
"""What the folders of draft heads leave open and engines answer differently: the answers, the default first."""

_ALLOWED = (
    "model:DIR, eagle:DIR, block:DIR, mtp:DIR, medusa:DIR, assistant:DIR, ngram, suffix, suffix:FILE.txt, "
    "early-exit:LAYERS, or cascade:A,B of these, where B drafts the rows in which A has nothing"
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a text says of a drafter.

    Attributes:
      kind: the text up to its colon.
      value: the folder or file, the number of layers, or the drafters of a cascade with commas.
      options: answers to the questions of ``OPTIONS``; a question that is not there has its default.
    """

    kind: str
    value: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def choice(self, name: str) -> str:
        """Returns the answer to a question of ``OPTIONS``."""
        return self.options.get(name, OPTIONS[self.kind][name][0])

    def flag(self, name: str) -> bool:
        """Returns the answer to a question of ``OPTIONS`` that is true or false."""
        return self.choice(name) == "true"


def parse(spec: str) -> Spec:
    """Reads a text that names a drafter.

    Raises:
      TypeError: ``spec`` is not a string.
      ValueError: the text names no drafter, or an option that its kind does not have.
    """
    # Each kind has its own idea of a value, so each is checked by itself.
    if not isinstance(spec, str):
        raise TypeError(f"spec is {spec!r}; give a string: {_ALLOWED}")
    kind, _, value = spec.partition(":")
    parts = value.split(",") if kind == "cascade" else []
    if _names_one(spec) or (len(parts) > 1 and all(map(_names_one, parts))):
        return _with_options(kind, value)
    # A folder alone is the likeliest slip, so its message says how to name the kind.
    if os.path.isdir(spec):
        raise ValueError(
            f"spec is {spec!r}, a folder without its kind; give model:{spec} for a language model, or eagle:, block:, "
            "mtp:, medusa: or assistant: and the folder for draft heads"
        )
    raise ValueError(f"spec is {spec!r}; give {_ALLOWED}")


def _names_one(spec: str) -> bool:
    """Returns whether a text names a drafter that is no cascade."""
    kind, _, value = spec.partition(":")
    if kind == "early-exit":
        return value.isascii() and value.isdecimal()
    return spec in _WITHOUT_FOLDER or (kind in (*_FOLDERS, "suffix") and value != "")


def _with_options(kind: str, value: str) -> Spec:
    """Takes the options from the end of a folder's text. A folder may have an @ in its own name."""
    options, known = {}, OPTIONS.get(kind, {})
    while kind in _FOLDERS:
        folder, at, last = value.rpartition("@")
        name, equals, choice = last.partition("=")
        if not at or not folder or name not in known:
            break
        choice = choice if equals else "true"
        if choice not in known[name] or name in options:
            allowed = " or ".join(known[name])
            raise ValueError(f"option {name!r} of {kind}:{folder} is {choice!r}; give it once, as {allowed}")
        options[name], value = choice, folder
    if kind in _FOLDERS and "@" in value and not os.path.exists(value):
        raise ValueError(
            f"{value} does not exist; if the text after @ is an option, {kind} drafters have {sorted(known) or 'none'}"
        )
    return Spec(kind, value, options)


def folders_of(spec: str) -> list[Path]:
    """Returns the folders and files that a text names; raises as ``parse`` and ``model_path`` do."""
    parsed = [parse(part) for part in spec.removeprefix("cascade:").split(",") if part != "none"]
    paths = [part for part in parsed if part.kind in (*_FOLDERS, "suffix") and part.value]
    return [Path(part.value) if part.kind == "suffix" else model_path(part.value) for part in paths]


def short_name(spec: str) -> str:
    """Returns the name of a spec's drafter for tables and plots, such as "ngram, else py-14m-eagle"."""
    kind, _, value = spec.partition(":")
    if kind == "cascade":
        return ", else ".join(map(short_name, value.split(",")))
    return f"first {value} layers" if kind == "early-exit" else Path(value).name or kind
