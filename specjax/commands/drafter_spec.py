"""Drafters from the option ``--drafter``: ``model:DIR``, ``cascade:ngram,eagle:DIR`` and so on."""

import argparse
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

import specjax
from specjax.commands import hosts
from specjax.quantized import Kind

TREE_RULES = {
    "walk": specjax.verify.walk,
    "recursive": specjax.verify.recursive,
    "traversal": specjax.verify.traversal,
    "multipath": specjax.verify.multipath,
}


def add_tree(parser: Any) -> None:
    """Adds ``--tree`` and its options to a parser, or to a group of its options."""
    parser.add_argument(
        "--tree",
        type=int,
        metavar="NODES",
        help="draft a tree of so many tokens, in which --num-draft is the longest path; for eagle, mtp, medusa, block, "
        "model and ngram",
    )
    parser.add_argument(
        "--siblings",
        metavar="HOW",
        help="of trees: chosen (the likeliest tokens), distinct (drawn ones that differ) or paths (independent "
        "chains); default: distinct for model, eagle and mtp, else chosen",
    )
    parser.add_argument(
        "--tree-rule",
        choices=TREE_RULES,
        help="how trees are verified (default: walk if siblings are chosen, else traversal)",
    )


def check_tree_options(args: argparse.Namespace) -> None:
    """Raises ValueError if an option of trees is given without ``--tree``."""
    for name in ("tree_rule", "siblings"):
        if args.tree is None and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(args, name)} and there is no --tree; give both, or neither")


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
    siblings: str | None = None,
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
        siblings=siblings,
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
