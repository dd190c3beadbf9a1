"""Rules that sample from the target and keep the drafts that agree with the samples: ``walk`` and ``coupled``."""

import dataclasses

import chex
import jax.numpy as jnp
from jax import Array, lax

from specjax.types import Draws, Proposal, Verdict
from specjax.verify import paths
from specjax.verify.chains import leading_successes


@dataclasses.dataclass(frozen=True)
class WalkRule:
    """The target samples the next token with the noise of its position. A draft that is this token is kept.

    Every emitted token is the target's own sample. So a seed gives the same text with any chain, any tree and no
    drafter.

    Attributes:
      shares_noise: whether drafts are drawn with the noise that the target samples with, see ``VerifyRule``.
      trees: True, see ``VerifyRule``.
    """

    shares_noise: bool
    trees: bool = dataclasses.field(default=True, init=False)

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        rows, g = proposal.tokens_bg.shape
        chex.assert_shape(target_btv, (rows, g + 1, None))
        if proposal.parents_bg is None:
            return _along_chain(proposal, target_btv, draws)
        return _through_tree(proposal, proposal.parents_bg, target_btv, draws)


def _along_chain(proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
    # The target's own samples at all g + 1 positions. The first that differs from the draft is emitted.
    rows, g = proposal.tokens_bg.shape
    offsets = [jnp.full((rows,), j, jnp.int32) for j in range(g + 1)]
    own_bt = jnp.stack([draws.emit(target_btv[:, j], offsets[j]) for j in range(g + 1)], axis=1)
    accepted_b = leading_successes((proposal.tokens_bg == own_bt[:, :g]) & paths.proposed(proposal))
    return Verdict(accepted_b, own_bt[jnp.arange(rows), accepted_b])


def _through_tree(proposal: Proposal, parents_bg: Array, target_btv: Array, draws: Draws) -> Verdict:
    # A tree has more places than its depth. So the samples are drawn one after the other, at the places that are
    # reached, until no row goes on.
    rows, g = parents_bg.shape
    row_b, index_1g = jnp.arange(rows), jnp.arange(g, dtype=jnp.int32)[None]
    proposed_bg = paths.proposed(proposal)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        kept_bg, next_b, going_b = carry
        place_b = paths.last_place(kept_bg)
        own_b = draws.emit(target_btv[row_b, place_b], kept_bg.sum(-1, dtype=jnp.int32))
        next_b = jnp.where(going_b, own_b, next_b)
        # The first child that is the sample; there is none for rows that do not go on.
        child_bg = (parents_bg == place_b[:, None] - 1) & (proposal.tokens_bg == next_b[:, None]) & proposed_bg
        child_b = jnp.min(jnp.where(child_bg, index_1g, g), axis=-1, initial=g)
        return kept_bg | (index_1g == child_b[:, None]), next_b, going_b & (child_b < g)

    start = (jnp.zeros((rows, g), bool), jnp.zeros((rows,), jnp.int32), jnp.ones((rows,), bool))
    kept_bg, next_b, _ = lax.while_loop(lambda carry: carry[2].any(), step, start)
    return Verdict(kept_bg.sum(-1, dtype=jnp.int32), next_b, paths.path_of(kept_bg))


walk = WalkRule(shares_noise=False)
"""The target's samples, followed through a tree of any drafts, such as the likeliest ones. Drafts have noise of their
own, or none."""

coupled = WalkRule(shares_noise=True)
"""Drafter-invariant sampling (Daliri, Musco, Suresh 2024, arXiv 2408.07978). Drafts are drawn with the noise of the
target's samples, so the two often agree."""
