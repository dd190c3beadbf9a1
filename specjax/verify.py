"""Verification rules: which draft tokens stay, and what is emitted after them.

Each rule keeps the target's distribution exactly, whatever the drafter. They are array functions that know no
model. p is the target, q the draft. A rule over one chain is split in two: a pure function from (drafts, p, q) to
acceptance thresholds and stop distributions, which tests enumerate, and a few lines that compare with uniforms.

At T = 0 the engine's distributions are one-hot, and every rule here becomes greedy verification: keep drafts while
they are the target's argmax, then emit its argmax.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from specjax.types import Draws, Proposal, Verdict


class Thresholds(NamedTuple):
    """Draft i succeeds when ``u_i * denominator < numerator``: strict and free of division.

    Attributes:
      numerator_bg: at least 0.
      denominator_bg: at least 0.
      scale_bt: ``[b, g+1]``; stopping after n drafts, the next token is drawn from max(scale_n p - q, 0).
    """

    numerator_bg: Array
    denominator_bg: Array
    scale_bt: Array


def at_tokens(probs_bgv: Array, tokens_bg: Array) -> Array:
    """Returns ``[b, g]``, the probability of each token."""
    return jnp.take_along_axis(probs_bgv, tokens_bg[..., None], axis=-1)[..., 0]


def token_thresholds(tokens_bg: Array, p_btv: Array, q_bgv: Array, length_b: Array) -> Thresholds:
    """Rejection sampling: draft i succeeds with probability min(1, p / q) (Leviathan et al. 2023, section 2.3).

    Args:
      tokens_bg: int32, the drafts.
      p_btv: float32, the target's g + 1 distributions.
      q_bgv: float32, those that the drafts were drawn from.
      length_b: int32, how many of the g count.
    """
    del length_b
    g = tokens_bg.shape[1]
    ones = jnp.ones((tokens_bg.shape[0], g + 1), p_btv.dtype)
    return Thresholds(at_tokens(p_btv[:, :g], tokens_bg), at_tokens(q_bgv, tokens_bg), ones)


def block_thresholds(tokens_bg: Array, p_btv: Array, q_bgv: Array, length_b: Array) -> Thresholds:
    """Block verification: P_i = min(1, P_{i-1} p / q); draft i < g succeeds with probability S / (S + 1 - P_i),
    S = sum_x max(P_i p_{i+1} - q_{i+1}, 0), and draft g with probability P_g (Sun et al. 2025, arXiv 2403.10444).
    The arguments are those of ``token_thresholds``."""
    rows, g = tokens_bg.shape
    p_at, q_at = at_tokens(p_btv[:, :g], tokens_bg), at_tokens(q_bgv, tokens_bg)
    ratio = jnp.where(q_at > 0, p_at / jnp.where(q_at > 0, q_at, 1), 0)
    scales = [jnp.ones((rows,), p_btv.dtype)]
    for i in range(g):
        scales.append(jnp.minimum(1, scales[-1] * ratio[:, i]))
    scale_bt = jnp.stack(scales, axis=1)
    reached_bg = scale_bt[:, 1:]
    q_next = jnp.concatenate([q_bgv[:, 1:], jnp.zeros_like(q_bgv[:, :1])], axis=1)
    left_bg = jnp.maximum(reached_bg[..., None] * p_btv[:, 1:] - q_next, 0).sum(-1)
    over_bg = left_bg + 1 - reached_bg
    certain_bg = over_bg <= 0  # S = 0 and P = 1: the two models agree from here on
    last_bg = jnp.arange(g, dtype=jnp.int32)[None] == length_b[:, None] - 1
    one = jnp.ones((), p_btv.dtype)
    return Thresholds(
        jnp.where(last_bg, reached_bg, jnp.where(certain_bg, one, left_bg)),
        jnp.where(last_bg | certain_bg, one, over_bg),
        scale_bt,
    )


def leading_successes(success_bg: Array) -> Array:
    """Returns how many drafts succeed before the first that fails."""
    return jnp.cumprod(success_bg.astype(jnp.int32), axis=-1).sum(-1, dtype=jnp.int32)


def last_success(success_bg: Array) -> Array:
    """Returns the place, from 1, of the last success, or 0. A failure before it does not matter."""
    place_g = jnp.arange(1, success_bg.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(success_bg, place_g[None], 0), axis=-1, initial=0)


def residual(p_bv: Array, q_bv: Array, scale_b: Array) -> Array:
    """Returns weights of the next token, max(scale p - q, 0), or p where these are all zero."""
    left_bv = jnp.maximum(scale_b[:, None] * p_bv - q_bv, 0)
    return jnp.where(left_bv.sum(-1, keepdims=True) > 0, left_bv, p_bv)


@dataclasses.dataclass(frozen=True)
class ChainRule:
    """A rule that compares uniforms with thresholds and draws the next token from a residual.

    Attributes:
      thresholds: ``(tokens_bg, p_btv, q_bgv, length_b) -> Thresholds``.
      keep: ``success_bg -> num_accepted_b``.
    """

    thresholds: Callable[[Array, Array, Array, Array], Thresholds]
    keep: Callable[[Array], Array]
    shares_noise: bool = dataclasses.field(default=False, init=False)

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        rows, g = proposal.tokens_bg.shape
        q_bgv = proposal.q(target_btv.shape[-1])
        numerator, denominator, scale_bt = self.thresholds(proposal.tokens_bg, target_btv, q_bgv, proposal.length_b)
        proposed_bg = jnp.arange(g, dtype=jnp.int32)[None] < proposal.length_b[:, None]
        success_bg = (draws.uniforms(g) * denominator < numerator) & proposed_bg
        accepted_b = self.keep(success_bg)
        row_b = jnp.arange(rows)
        q_next = jnp.concatenate([q_bgv, jnp.zeros_like(target_btv[:, :1])], axis=1)[row_b, accepted_b]
        q_next = jnp.where((accepted_b < proposal.length_b)[:, None], q_next, 0)
        weights_bv = residual(target_btv[row_b, accepted_b], q_next, scale_bt[row_b, accepted_b])
        return Verdict(accepted_b, draws.emit(weights_bv, accepted_b))


@dataclasses.dataclass(frozen=True)
class CoupledRule:
    """Draft and target sample with the same noise; drafts stay while the two samples agree."""

    shares_noise: bool = dataclasses.field(default=True, init=False)

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        rows, g = proposal.tokens_bg.shape
        offsets = [jnp.full((rows,), j, jnp.int32) for j in range(g + 1)]
        own_bt = jnp.stack([draws.emit(target_btv[:, j], offsets[j]) for j in range(g + 1)], axis=1)
        proposed_bg = jnp.arange(g, dtype=jnp.int32)[None] < proposal.length_b[:, None]
        accepted_b = leading_successes((proposal.tokens_bg == own_bt[:, :g]) & proposed_bg)
        return Verdict(accepted_b, own_bt[jnp.arange(rows), accepted_b])


token = ChainRule(token_thresholds, leading_successes)
"""Token-by-token rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318)."""

block = ChainRule(block_thresholds, last_success)
"""Block verification (Sun et al. 2025, arXiv 2403.10444): never keeps fewer tokens than ``token`` on average."""

coupled = CoupledRule()
"""Drafter-invariant sampling (Daliri, Musco, Suresh 2024, arXiv 2408.07978): a seed gives the same text with any
drafter, any number of drafts, or none."""
