"""Drafters from the option ``--drafter``: ``model:DIR``, ``cascade:ngram,eagle:DIR`` and so on."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

import specjax
from specjax.commands import hosts
from specjax.quantized import Kind


def named_drafter(
    spec: str,
    target: specjax.LanguageModel | specjax.Opened,
    tokenizer: Any,
    num_draft: int,
    mesh: Mesh | None = None,
    rules: specjax.sharding.Rules = specjax.sharding.RULES,
    ignore_config_keys: Sequence[str] = (),
    quantize: Kind | None = None,
    tree: int | None = None,
    dtype: str | None = None,
) -> Any:
    """Opens a drafter, and notes facts about it that a user may not expect on standard error.

    The arguments are those of ``specjax.load_drafter``. ``spec`` is not "none".

    Raises:
      ValueError: as for ``specjax.load_drafter``.
    """
    drafter = specjax.load_drafter(
        spec,
        target,
        num_draft,
        tokenizer=tokenizer,
        mesh=mesh,
        rules=rules,
        ignore_config_keys=ignore_config_keys,
        quantize=quantize,
        tree=tree,
        dtype=dtype,
    )
    # A draft head's config may leave open which of the target's states it reads. A draft of another tokenizer can
    # draft only some tokens. Both may explain a low acceptance rate.
    model = target.model if isinstance(target, specjax.Opened) else target
    for part in parts_of(drafter):
        if hasattr(part, "head") and hasattr(part.head, "describe"):
            hosts.note(f"{spec}: {part.head.describe()}\n")
        if isinstance(part, specjax.SharedVocabularyDrafter):
            shared = int((part.draft_of_v >= 0).sum())
            hosts.note(
                f"{spec} has another tokenizer: it drafts the {shared} of {model.vocab_size} tokens that both have\n"
            )
    return drafter


def parts_of(drafter: Any) -> list[Any]:
    """Returns the drafters of a cascade, also of nested ones; for any other drafter, the drafter alone."""
    if isinstance(drafter, specjax.Cascade):
        return parts_of(drafter.first) + parts_of(drafter.second)
    return [drafter]
