"""Drafters by name, as ``--drafter`` takes them: ``model:DIR``, ``cascade:ngram,eagle:DIR`` and so on."""

import functools
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import specjax
from specjax.commands import hosts

HEADS = {"mtp": specjax.open_mtp, "eagle": specjax.open_eagle, "medusa": specjax.open_medusa}


def named_drafter(
    spec: str,
    target: specjax.LanguageModel,
    tokenizer: Any,
    num_draft: int,
    mesh: Mesh | None = None,
    rules: specjax.sharding.Rules = specjax.sharding.RULES,
) -> Any:
    """Returns the drafter of a value other than none; ``mesh`` and ``rules`` are those of ``specjax.load_drafter``."""
    # Drafters without a folder, and cascades, whose parts are specs.
    kind, _, value = spec.partition(":")
    if spec == "ngram":
        return specjax.NGramDrafter(num_draft=num_draft)
    if kind == "early-exit" and value.isascii() and value.isdecimal():
        return specjax.EarlyExitDrafter(int(value), num_draft)
    parts = value.split(",")
    if kind == "cascade" and len(parts) > 1 and "none" not in parts:
        return functools.reduce(
            specjax.Cascade, (named_drafter(part, target, tokenizer, num_draft, mesh, rules) for part in parts)
        )
    if kind not in ("model", *HEADS) or not value:
        raise ValueError(
            f"--drafter is {spec!r}; give model:DIR, ngram or none, a head as mtp:DIR, eagle:DIR or medusa:DIR, "
            "early-exit:LAYERS, or cascade:A,B, of which B drafts where A has nothing"
        )
    # Draft heads and draft models. It is said what a user cannot see from the spec.
    if kind in HEADS:
        drafter = HEADS[kind](value, target, num_draft, mesh=mesh, rules=rules)
        if kind == "eagle":
            hosts.note(f"{value}: {drafter.head.describe()}\n")
        return drafter
    drafter = specjax.load_drafter(value, target, num_draft, tokenizer=tokenizer, mesh=mesh, rules=rules)
    if isinstance(drafter, specjax.SharedVocabularyDrafter):
        shared = int((drafter.draft_of_v >= 0).sum())
        hosts.note(
            f"{value} has another tokenizer: it drafts the {shared} of {target.vocab_size} tokens that both have\n"
        )
    return drafter


def folders_of(spec: str) -> list[Path]:
    """Returns the folders that a value names."""
    parts = (part.partition(":") for part in spec.removeprefix("cascade:").split(","))
    return [Path(value) for kind, _, value in parts if kind in ("model", *HEADS) and value]


def short_name(spec: str) -> str:
    """Returns what figures call a drafter."""
    kind, _, value = spec.partition(":")
    if kind == "cascade":
        return ", else ".join(map(short_name, value.split(",")))
    return f"first {value} layers" if kind == "early-exit" else Path(value).name or kind
