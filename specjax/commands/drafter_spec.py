"""Drafters by name, as ``--drafter`` takes them: ``model:DIR``, ``cascade:ngram,eagle:DIR`` and so on."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

import specjax
from specjax.commands import hosts


def named_drafter(
    spec: str,
    target: specjax.LanguageModel,
    tokenizer: Any,
    num_draft: int,
    mesh: Mesh | None = None,
    rules: specjax.sharding.Rules = specjax.sharding.RULES,
    ignore_config_keys: Sequence[str] = (),
) -> Any:
    """Returns the drafter of a value other than none; ``mesh`` and ``rules`` are those of ``specjax.load_drafter``."""
    drafter = specjax.load_drafter(
        spec, target, num_draft, tokenizer=tokenizer, mesh=mesh, rules=rules, ignore_config_keys=ignore_config_keys
    )
    for part in parts_of(drafter):
        if hasattr(part, "head") and hasattr(part.head, "describe"):
            hosts.note(f"{spec}: {part.head.describe()}\n")
        if isinstance(part, specjax.SharedVocabularyDrafter):
            shared = int((part.draft_of_v >= 0).sum())
            hosts.note(
                f"{spec} has another tokenizer: it drafts the {shared} of {target.vocab_size} tokens that both have\n"
            )
    return drafter


def parts_of(drafter: Any) -> list[Any]:
    """Returns the drafters of a cascade, or the one that there is."""
    if isinstance(drafter, specjax.Cascade):
        return parts_of(drafter.first) + parts_of(drafter.second)
    return [drafter]
