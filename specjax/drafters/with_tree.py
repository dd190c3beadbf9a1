"""Drafters of trees made of drafters of chains, by the number of drafts."""

import dataclasses

from specjax.checks import check_integer
from specjax.drafters.block import BlockDrafter
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.model import ModelDrafter
from specjax.drafters.ngram import NGramDrafter
from specjax.drafters.pard import PardDrafter
from specjax.drafters.trees import MEDUSA_CHOICES, Path, drawn_tree
from specjax.types import Drafter

TREE_SIBLINGS = ("chosen", "distinct", "paths")
"""The answers to ``siblings`` of ``load_drafter``."""

_KINDS = ("model", "eagle", "block", "mtp", "medusa", "ngram")

_CURES = {
    "MTPDrafter": ", or give chained=True to draft with the first module alone",
    "SharedVocabularyDrafter": ", or give a draft model with the target's vocabulary",
}


def check_tree_of(kind: str, nodes: int | None, siblings: str | None) -> None:
    """Checks ``tree`` and ``siblings`` of ``load_drafter`` before anything is read.

    Raises:
      ValueError: the kind drafts no such tree; or ``siblings`` is given without a tree.
    """
    if nodes is None:
        if siblings is not None:
            raise ValueError(f"siblings is {siblings!r} and tree is None; give both for a tree, or neither for a chain")
        return
    check_integer("tree", nodes, 1)
    if kind not in _KINDS:
        kinds = ", ".join(each if each == "ngram" else f"{each}:DIR" for each in _KINDS)
        raise ValueError(f"tree is {nodes} and {kind} drafts chains; give one of {kinds} for a tree")
    if siblings not in (None, *TREE_SIBLINGS):
        raise ValueError(f"siblings is {siblings!r}; give one of {', '.join(TREE_SIBLINGS)}")
    wrong = "chosen" if kind == "model" else siblings if kind == "ngram" and siblings != "chosen" else None
    if siblings is not None and siblings == wrong:
        drafts = "are drawn" if kind == "model" else "are copied, never drawn"
        cure = "distinct or paths" if kind == "model" else "chosen"
        raise ValueError(f"siblings is {siblings!r} and the drafts of {kind} {drafts}; give {cure}")


def with_tree(
    drafter: Drafter,
    nodes: int | None,
    siblings: str | None = None,
    choices: tuple[Path, ...] = MEDUSA_CHOICES,
) -> Drafter:
    """Returns a drafter of chains as one of trees, whose paths are at most as long as its chains.

    ``check_tree_of`` has checked the arguments; without ``nodes`` the drafter stays what it is. Of ``choices``, Medusa
    heads draft the first that are no deeper than there are heads, unless siblings are drawn.

    Raises:
      ValueError: the drafter drafts no trees, or none of so many drafts.
    """
    if nodes is None:
        return drafter
    depth = drafter.num_draft
    if isinstance(drafter, NGramDrafter):
        matches = max(drafter.matches, -(-nodes // depth))
        return dataclasses.replace(drafter, num_draft=nodes, tree_depth=min(depth, nodes), matches=matches)
    if isinstance(drafter, PardDrafter) or not isinstance(
        drafter, (ModelDrafter, FeatureDrafter, BlockDrafter, MedusaDrafter)
    ):
        name = type(drafter).__name__
        raise ValueError(f"tree is {nodes} and a {name} drafts chains; leave out tree{_CURES.get(name, '')}")
    drawn = siblings is None and isinstance(drafter, (ModelDrafter, FeatureDrafter))
    if not drawn and siblings in (None, "chosen"):
        if isinstance(drafter, MedusaDrafter):
            return dataclasses.replace(drafter, num_draft=nodes, tree=_choices(choices, nodes, depth))
        return dataclasses.replace(drafter, num_draft=nodes, tree_depth=min(depth, nodes))
    siblings = siblings or "distinct"
    tree = drawn_tree(nodes, depth, siblings)
    options = {"num_draft": nodes, "tree": tree, "siblings": siblings}
    if isinstance(drafter, (FeatureDrafter, BlockDrafter)):
        options["tree_depth"] = max(map(len, tree))
    return dataclasses.replace(drafter, **options)


def _choices(choices: tuple[Path, ...], nodes: int, depth: int) -> tuple[Path, ...]:
    """Returns the choices of at most that depth."""
    tree = tuple(path for path in choices if len(path) <= depth)
    if nodes > len(tree):
        raise ValueError(
            f"tree is {nodes} and Medusa's choices for {depth} heads are {len(tree)} drafts; give at most that many, a "
            "higher num_draft, or MedusaDrafter(tree=...)"
        )
    return tree
