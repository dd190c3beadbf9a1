"""Rules over one chain of drafts that compare uniforms with thresholds: ``token`` and ``block``.

p is the target's distribution, q the distribution that a draft was drawn from. A rule has two parts. The first is a
pure function from (drafts, p, q) to acceptance thresholds and residual scales; tests enumerate this part. The second
compares the thresholds with uniforms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import Array

from specjax.types import Draws, Proposal, Verdict


class Thresholds(NamedTuple):
    """Acceptance thresholds: draft i succeeds if ``u_i * denominator < numerator``.

    The comparison is strict, so a draft with p = 0 never succeeds. Nothing is divided, so q = 0 is no special case.

    Attributes:
      numerator_bg: float32, at least 0.
      denominator_bg: float32, at least 0.
      scale_bt: float32 ``[b, g+1]``. If n drafts are accepted, the next token is drawn from max(scale_n p - q, 0).
    """

    numerator_bg: Array
    denominator_bg: Array
    scale_bt: Array


def at_tokens(probs_bgv: Array, tokens_bg: Array) -> Array:
    """Returns ``[b, g]``, the probability of each token."""
    return jnp.take_along_axis(probs_bgv, tokens_bg[..., None], axis=-1)[..., 0]


def token_thresholds(tokens_bg: Array, p_btv: Array, q_bgv: Array, length_b: Array) -> Thresholds:
    """Rejection sampling: draft i succeeds with probability min(1, p / q) (Leviathan et al. 2023, section 2.3).

    Example: a draft with p = 0.2 and q = 0.5 succeeds if u < 0.4.

    Args:
      tokens_bg: int32, the drafts.
      p_btv: float32, the target's g + 1 distributions.
      q_bgv: float32, the distributions that the drafts were drawn from.
      length_b: int32, how many of the g drafts count.
    """
    del length_b
    g = tokens_bg.shape[1]
    ones = jnp.ones((tokens_bg.shape[0], g + 1), p_btv.dtype)
    return Thresholds(at_tokens(p_btv[:, :g], tokens_bg), at_tokens(q_bgv, tokens_bg), ones)


def block_thresholds(tokens_bg: Array, p_btv: Array, q_bgv: Array, length_b: Array) -> Thresholds:
    """Block verification (Sun et al. 2025, arXiv 2403.10444).

    P_0 = 1 and P_i = min(1, P_{i-1} p / q) at draft i. With S = sum_x max(P_i p_{i+1} - q_{i+1}, 0), draft i succeeds
    with probability S / (S + 1 - P_i). The last draft succeeds with probability P_i. The arguments are those of
    ``token_thresholds``.
    """
    # P_0 .. P_g, one after the other, since each is clipped. A draft with q = 0 was never drawn.
    rows, g = tokens_bg.shape
    p_at, q_at = at_tokens(p_btv[:, :g], tokens_bg), at_tokens(q_bgv, tokens_bg)
    ratio = jnp.where(q_at > 0, p_at / jnp.where(q_at > 0, q_at, 1), 0)
    scales = [jnp.ones((rows,), p_btv.dtype)]
    for i in range(g):
        scales.append(jnp.minimum(1, scales[-1] * ratio[:, i]))
    scale_bt = jnp.stack(scales, axis=1)
    # S and S + 1 - P of every draft but the last one, after which there is no q.
    reached_bg = scale_bt[:, 1:]
    left_bg = jnp.maximum(reached_bg[:, :-1, None] * p_btv[:, 1:g] - q_bgv[:, 1:], 0).sum(-1)
    left_bg = jnp.pad(left_bg, ((0, 0), (0, min(g, 1))))
    over_bg = left_bg + 1 - reached_bg
    certain_bg = over_bg <= 0  # S = 0 and P = 1: p and q agree at the next position
    # The last draft of a row has no next distribution to compare.
    last_bg = jnp.arange(g, dtype=jnp.int32)[None] == length_b[:, None] - 1
    one = jnp.ones((), p_btv.dtype)
    return Thresholds(
        jnp.where(last_bg, reached_bg, jnp.where(certain_bg, one, left_bg)),
        jnp.where(last_bg | certain_bg, one, over_bg),
        scale_bt,
    )


def leading_successes(success_bg: Array) -> Array:
    """Returns int32 ``[b]``, how many drafts succeed before the first that fails."""
    return jnp.cumprod(success_bg.astype(jnp.int32), axis=-1).sum(-1, dtype=jnp.int32)


def last_success(success_bg: Array) -> Array:
    """Returns int32 ``[b]``, the place of the last success, counted from 1, or 0 without any.

    Failures before the last success do not matter: [True, False, True] gives 3.
    """
    place_g = jnp.arange(1, success_bg.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(success_bg, place_g[None], 0), axis=-1, initial=0)


def residual(p_bv: Array, q_bv: Array, scale_b: Array) -> Array:
    """Returns ``[b, v]``, the next token's weights max(scale p - q, 0), or p if all of them are 0."""
    left_bv = jnp.maximum(scale_b[:, None] * p_bv - q_bv, 0)
    return jnp.where(left_bv.sum(-1, keepdims=True) > 0, left_bv, p_bv)


@dataclasses.dataclass(frozen=True)
class ChainRule:
    """A rule that compares uniforms with thresholds and draws the next token from a residual.

    Attributes:
      thresholds: ``thresholds(tokens_bg, p_btv, q_bgv, length_b) -> Thresholds``.
      keep: ``keep(success_bg) -> num_accepted_b``.
      shares_noise: False, see ``VerifyRule``.
      trees: False, see ``VerifyRule``.

    Raises:
      ValueError: the proposal is a tree.
    """

    thresholds: Callable[[Array, Array, Array, Array], Thresholds]
    keep: Callable[[Array], Array]
    shares_noise: bool = dataclasses.field(default=False, init=False)
    trees: bool = dataclasses.field(default=False, init=False)

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        if proposal.parents_bg is not None:
            raise ValueError(
                "the proposal is a tree (it has parents_bg), and this rule verifies chains; give a rule for trees, "
                "such as verify=specjax.verify.traversal"
            )
        rows, g = proposal.tokens_bg.shape
        chex.assert_shape(target_btv, (rows, g + 1, None))
        q_bgv = proposal.q(target_btv.shape[-1])
        numerator, denominator, scale_bt = self.thresholds(proposal.tokens_bg, target_btv, q_bgv, proposal.length_b)
        proposed_bg = jnp.arange(g, dtype=jnp.int32)[None] < proposal.length_b[:, None]
        success_bg = (draws.uniforms(g) * denominator < numerator) & proposed_bg
        accepted_b = self.keep(success_bg)
        # After all drafts of a row nothing was rejected, so nothing is subtracted: the next token comes from p.
        row_b = jnp.arange(rows)
        weights_bv = target_btv[row_b, accepted_b]
        if g:
            q_bv = q_bgv[row_b, jnp.minimum(accepted_b, g - 1)]
            q_bv = jnp.where((accepted_b < proposal.length_b)[:, None], q_bv, 0)
            weights_bv = residual(weights_bv, q_bv, scale_bt[row_b, accepted_b])
        return Verdict(accepted_b, draws.emit(weights_bv, accepted_b))


token = ChainRule(token_thresholds, leading_successes)
"""Token-by-token rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318)."""

block = ChainRule(block_thresholds, last_success)
"""Block verification (Sun et al. 2025, arXiv 2403.10444). Its mean accepted length is never below that of ``token``."""
