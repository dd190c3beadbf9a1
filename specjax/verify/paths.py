"""Paths through trees of drafts, in integers: who follows whom, and which drafts one verdict keeps.

Draft j of row i follows draft ``parents_bg[i, j] < j``, or the root, -1. A chain has parents (-1, 0, 1, ..).
"""

import jax.numpy as jnp
from jax import Array

from specjax.types import Proposal


def parents_of(proposal: Proposal) -> Array:
    """Returns int32 ``[b, g]``, the draft that each draft follows; those of a chain if the proposal has none."""
    if proposal.parents_bg is not None:
        return proposal.parents_bg
    rows, g = proposal.tokens_bg.shape
    return jnp.broadcast_to(jnp.arange(g, dtype=jnp.int32)[None] - 1, (rows, g))


def proposed(proposal: Proposal) -> Array:
    """Returns bool ``[b, g]``, whether each draft counts."""
    return jnp.arange(proposal.tokens_bg.shape[1], dtype=jnp.int32)[None] < proposal.length_b[:, None]


def first_path(success_bg: Array, parents_bg: Array, line_bgg: Array) -> Array:
    """Returns bool ``[b, g]``, the drafts of the path from the root that takes the first success among siblings.

    The path ends at a draft without a child that succeeds. Successes off the path do not matter.
    """
    index_g = jnp.arange(parents_bg.shape[1], dtype=jnp.int32)
    elder_bgg = (parents_bg[:, :, None] == parents_bg[:, None]) & (index_g[None, None] < index_g[None, :, None])
    first_bg = success_bg & ~(elder_bgg & success_bg[:, None]).any(-1)
    return (first_bg[:, None] | ~line_bgg).all(-1)


def last_place(kept_bg: Array) -> Array:
    """Returns int32 ``[b]``, the place in the target's pass of the last draft that is kept: 0 for none."""
    place_g = jnp.arange(1, kept_bg.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(kept_bg, place_g[None], 0), axis=-1, initial=0)


def path_of(kept_bg: Array) -> Array:
    """Returns int32 ``[b, g]``, the kept drafts in order, then 0. Parents come before their children.

    Example: drafts 0 and 3 of five are kept: (0, 3, 0, 0, 0).
    """
    index_1g = jnp.arange(kept_bg.shape[1], dtype=jnp.int32)[None]
    ordered_bg = jnp.sort(jnp.where(kept_bg, index_1g, kept_bg.shape[1]), axis=-1)
    return jnp.where(index_1g < kept_bg.sum(-1, keepdims=True, dtype=jnp.int32), ordered_bg, 0)
