"""The rule for a drafter."""

from specjax.types import Drafter, VerifyRule
from specjax.verify.chains import block
from specjax.verify.trees import traversal
from specjax.verify.walks import walk


def default_rule(drafter: Drafter | None) -> VerifyRule:
    """Returns ``block`` for chains, ``traversal`` for trees that are drawn, and ``walk`` for other trees."""
    if getattr(drafter, "tree_depth", None) is None:
        return block
    return walk if getattr(drafter, "siblings", "chosen") == "chosen" else traversal
