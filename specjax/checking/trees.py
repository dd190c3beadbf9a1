"""Whether proposals of trees keep the contract of ``specjax.Drafter``."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from specjax.types import Drafter, Proposal, ancestors


def check_parents(drafter: Drafter, proposal: Proposal, real_bg: Any, broken: Callable[[str], ValueError]) -> None:
    """Checks that the drafts of each row are a tree as the drafter says: its depth, and how siblings come about.

    Args:
      drafter: has ``tree_depth``.
      proposal: of the drafter, as NumPy arrays.
      real_bg: bool, the drafts that count.
      broken: makes the error from what is wrong.
    """
    parents_bg, tokens_bg = np.asarray(proposal.parents_bg), np.asarray(proposal.tokens_bg)
    if ((parents_bg < -1) | (parents_bg >= np.arange(parents_bg.shape[1])))[real_bg].any():
        raise broken(f"parents_bg is {parents_bg}; a draft follows an earlier one, or -1, the row's last token")
    depth = int(np.asarray(ancestors(jnp.asarray(parents_bg))).sum(-1)[real_bg].max(initial=0))
    most = getattr(drafter, "tree_depth")  # noqa: B009, it is optional
    if depth > most:
        raise broken(f"a path has {depth} drafts and tree_depth is {most}; give the most that a path may have")
    # Siblings: by parent, and by parent and token.
    parents = [row[real].tolist() for row, real in zip(parents_bg, real_bg, strict=True)]
    tokens = [row[real].tolist() for row, real in zip(tokens_bg, real_bg, strict=True)]
    pairs = [list(zip(*row, strict=True)) for row in zip(parents, tokens, strict=True)]
    drawn, alike = proposal.probs_bgv is not None, any(len(set(row)) < len(row) for row in pairs)
    if alike and not (drawn and proposal.replacement):
        without = "that were drawn without replacement" if drawn else "without probs_bgv"
        raise broken(f"siblings {without} are the same token; propose each token once after one parent")
    below = [[parent for parent in row if parent >= 0] for row in parents]
    branches = any(len(set(row)) < len(row) for row in below)
    says = getattr(drafter, "siblings", None)
    right = {
        None: True,
        "chosen": not drawn,
        "distinct": drawn and not proposal.replacement,
        "independent": drawn and proposal.replacement,
        "paths": drawn and proposal.replacement and not branches,
    }
    if not right[says]:
        has = f"{'' if drawn else 'no '}probs_bgv, replacement={proposal.replacement}"
        raise broken(
            f"siblings is {says!r}, and the proposal has {has} and {'' if branches else 'no '}siblings below the root; "
            "specjax.Drafter says what each value of siblings means"
        )


def deepest_path(proposal: Proposal) -> Array:
    """Returns the drafts on the path to each row's first deepest draft, int32 ``[b, g]``, and then g."""
    assert proposal.parents_bg is not None
    g = proposal.parents_bg.shape[1]
    line_bgg = ancestors(proposal.parents_bg)
    last_b = jnp.argmax(line_bgg.sum(-1), axis=1)
    on_bg = jnp.take_along_axis(line_bgg, last_b[:, None, None], axis=1)[:, 0]
    return jnp.sort(jnp.where(on_bg, jnp.arange(g, dtype=jnp.int32)[None], g), axis=1)
