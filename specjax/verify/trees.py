"""Rules over trees of drafts that compare uniforms with thresholds: ``recursive``, ``traversal`` and ``multipath``.

p is the target's distribution, q the distribution that a draft was drawn from. A rule has two parts. The first is a
pure function from (drafts, p, q) to the chance of each draft and to what is left of p at each place; tests enumerate
this part. The second compares the chances with uniforms, and keeps one path from the root. A chain is a tree, too.

Drafts are in any order in which parents come before their children, and siblings in the order of drawing. So one pass
over the drafts by their index serves trees of all shapes, which may differ by row and round.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax.types import Draws, Proposal, Verdict, ancestors
from specjax.verify import paths
from specjax.verify.chains import residual


class TreeThresholds(NamedTuple):
    """The chances of all drafts, each for the case that everything before it failed.

    Attributes:
      chance_bg: float32, at least 0: draft i succeeds if ``u_i < chance_i``. The comparison is strict, so a draft with
        p = 0 never succeeds.
      left_btv: float32 ``[b, g+1, v]``, the weights of the next token if the path ends at a place: 0 is the root, j + 1
        draft j.
    """

    chance_bg: Array
    left_btv: Array


def recursive_thresholds(proposal: Proposal, p_btv: Array) -> TreeThresholds:
    """Recursive rejection (Miao et al. 2024, arXiv 2305.09781; without replacement Jeon et al. 2024, arXiv 2402.14160).

    A child x succeeds with probability min(1, M(x) / Q(x)), where M is p at first and norm(max(M - Q, 0)) after each
    child that fails. Q is what the child was drawn from.

    Args:
      proposal: the drafts; a chain if it has no parents.
      p_btv: float32 ``[b, g+1, v]``, the target's distributions.
    """
    rows, g = proposal.tokens_bg.shape
    row_b, parents_bg, proposed_bg = jnp.arange(rows), paths.parents_of(proposal), paths.proposed(proposal)

    def child(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chance_bg, left_btv = carry
        place_b, token_b = parents_bg[:, j] + 1, proposal.tokens_bg[:, j]
        left_bv, q_bv = left_btv[row_b, place_b], _drawn_from(proposal, parents_bg, p_btv, j)
        chance_b = left_bv[row_b, token_b] / q_bv[row_b, token_b]
        fails_bv = residual(left_bv, q_bv, jnp.ones_like(chance_b))
        fails_bv = fails_bv / fails_bv.sum(-1, keepdims=True)
        counts_b = _counts(proposed_bg[:, j], chance_b)
        left_btv = left_btv.at[row_b, place_b].set(jnp.where(counts_b[:, None], fails_bv, left_bv))
        return chance_bg.at[:, j].set(chance_b), left_btv

    start = (jnp.zeros((rows, g), p_btv.dtype), p_btv)
    return TreeThresholds(*lax.fori_loop(jnp.int32(0), jnp.int32(g), child, start))


def traversal_thresholds(proposal: Proposal, p_btv: Array) -> TreeThresholds:
    """Traversal verification (Weng et al. 2025, arXiv 2505.12398). On a chain it is block verification.

    P is 1 at the root and min(1, P M(x) / Q(x)) at a child x, with the P and M of its parent. After each child whose
    subtree fails, with R = max(P M - Q, 0) and S = sum R, the parent has M = R / S and P = S / (S + 1 - P). A draft
    whose children all failed succeeds with probability P. The arguments are those of ``recursive_thresholds``.
    """
    rows, g = proposal.tokens_bg.shape
    row_b, parents_bg, proposed_bg = jnp.arange(rows), paths.parents_of(proposal), paths.proposed(proposal)

    def child(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        reach_bt, miss_bt, left_btv = carry
        place_b, token_b = parents_bg[:, j] + 1, proposal.tokens_bg[:, j]
        reach_b, miss_b, left_bv = reach_bt[row_b, place_b], miss_bt[row_b, place_b], left_btv[row_b, place_b]
        q_bv = _drawn_from(proposal, parents_bg, p_btv, j)
        # What the child starts with, and what its failure leaves to the parent.
        child_b = jnp.minimum(1, reach_b * left_bv[row_b, token_b] / q_bv[row_b, token_b])
        after_b, fails_b, fails_bv = _after_failure(reach_b, miss_b, left_bv, q_bv)
        counts_b = _counts(proposed_bg[:, j], child_b)
        reach_bt = reach_bt.at[row_b, place_b].set(jnp.where(counts_b, after_b, reach_b)).at[:, j + 1].set(child_b)
        miss_bt = miss_bt.at[row_b, place_b].set(jnp.where(counts_b, fails_b, miss_b)).at[:, j + 1].set(1 - child_b)
        return reach_bt, miss_bt, left_btv.at[row_b, place_b].set(jnp.where(counts_b[:, None], fails_bv, left_bv))

    start = (jnp.ones((rows, g + 1), p_btv.dtype), jnp.zeros((rows, g + 1), p_btv.dtype), p_btv)
    reach_bt, _, left_btv = lax.fori_loop(jnp.int32(0), jnp.int32(g), child, start)
    return TreeThresholds(reach_bt[:, 1:], left_btv)


def _counts(proposed_b: Array, chance_b: Array) -> Array:
    """Returns ``proposed_b``. By way of a chance, which is never negative, a write depends on all reads before it.

    Otherwise XLA may order a read after the write. Then XLA copies all places for each draft, which takes many times as
    long.
    """
    return proposed_b & (chance_b >= 0)


def _drawn_from(proposal: Proposal, parents_bg: Array, p_btv: Array, j: Array) -> Array:
    """Returns ``[b, v]``, what draft j was drawn from, given its elder siblings.

    A token that this distribution cannot draw counts as deterministic: its q is one-hot. A drafter gives such drafts
    where it draws without replacement and the distribution has fewer tokens than there are siblings.
    """
    rows, g = proposal.tokens_bg.shape
    row_b, vocab = jnp.arange(rows), p_btv.shape[-1]
    token_b = proposal.tokens_bg[:, j]
    certain_bv = jax.nn.one_hot(token_b, vocab, dtype=p_btv.dtype)
    if proposal.probs_bgv is None:
        return certain_bv
    q_bv = proposal.probs_bgv[:, j]
    if not proposal.replacement:
        elder_bg = (parents_bg == parents_bg[:, j, None]) & (jnp.arange(g, dtype=jnp.int32)[None] < j)
        drawn_bg = jnp.where(elder_bg, proposal.tokens_bg, vocab)
        q_bv = q_bv.at[row_b[:, None], drawn_bg].set(0, mode="drop")
        q_bv = q_bv / jnp.maximum(q_bv.sum(-1, keepdims=True), jnp.finfo(q_bv.dtype).tiny)
    return jnp.where(q_bv[row_b, token_b][:, None] > 0, q_bv, certain_bv)


def _after_failure(reach_b: Array, miss_b: Array, p_bv: Array, q_bv: Array) -> tuple[Array, Array, Array]:
    """Returns P, 1 - P and the normalised residual of a place after a child failed that was drawn from q.

    ``miss_b`` is 1 - P of before. It is carried, since S + 1 - P would lose a small S beside 1.
    """
    left_b = jnp.maximum(reach_b[:, None] * p_bv - q_bv, 0).sum(-1)
    left_bv = residual(p_bv, q_bv, reach_b)
    over_b = left_b + miss_b
    certain_b = over_b <= 0  # S = 0 and P = 1: p and q agree
    over_b = jnp.where(certain_b, 1, over_b)
    return (
        jnp.where(certain_b, 1, left_b / over_b),
        jnp.where(certain_b, 0, miss_b / over_b),
        left_bv / left_bv.sum(-1, keepdims=True),
    )


def multipath_thresholds(proposal: Proposal, p_btv: Array) -> TreeThresholds:
    """Greedy multi-path block verification, after Thomas and Pal 2026, arXiv 2602.16961.

    The drafts are K independent paths from the root. From the root on, the path is followed whose next token has the
    highest p / q of all paths that still agree with it, and block verification runs along this path. Its q is the law
    of the token that was followed, the best of several. With one path this is block verification.

    The law of the best: let R be the weight of paths that left for a worse token, relative to the path itself, 0 at the
    root, and R_x = R + sum of q over the tokens ranked after x. Then token x is followed with probability
    ((R_x + q(x))^K - R_x^K) / ((R + 1)^K - R^K), and afterwards R = R_x / q(x). K counts the drafts at a depth, so
    paths may have different lengths. Deterministic drafts may be any tree: the likeliest is followed, with a one-hot q.

    The arguments are those of ``recursive_thresholds``.

    Raises:
      ValueError: the drafts were drawn without replacement.
    """
    if proposal.parents_bg is not None and proposal.probs_bgv is not None and not proposal.replacement:
        raise ValueError(
            "the proposal has replacement=False, and multipath verifies independent paths; draw siblings with "
            "replacement, or give verify=specjax.verify.traversal"
        )
    rows, g = proposal.tokens_bg.shape
    row_b, parents_bg, proposed_bg = jnp.arange(rows), paths.parents_of(proposal), paths.proposed(proposal)
    line_bgg = ancestors(parents_bg)
    depth_bg = line_bgg.sum(-1, dtype=jnp.int32)
    ones_b, zeros_b = jnp.ones((rows,), p_btv.dtype), jnp.zeros((rows,), p_btv.dtype)

    def level(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        depth, live_bt, end_b, reach_b, worse_b, stay_b, chance_bt, left_btv = carry
        going_b = live_bt.any(-1)
        # Places of paths that agree so far have the same p, and their children the same q. The first stands for all.
        end_b = jnp.where(going_b, jnp.argmax(live_bt, axis=-1).astype(jnp.int32), end_b)
        p_bv = p_btv[row_b, end_b]
        child_bg = live_bt[row_b[:, None], parents_bg + 1] & proposed_bg
        more_b = child_bg.any(-1)
        count_b = ((depth_bg == depth + 1) & proposed_bg).sum(-1, dtype=jnp.int32)
        token_b, q_bv, worse_after_b, stay_after_b = _best(proposal, child_bg, p_bv, worse_b, stay_b, count_b)

        # Block verification, one draft on.
        after_b, _, fails_bv = _after_failure(reach_b, 1 - reach_b, p_bv, q_bv)
        chance_bt = chance_bt.at[:, depth].set(jnp.where(more_b, after_b, reach_b))
        left_btv = left_btv.at[:, depth].set(jnp.where(more_b[:, None], fails_bv, p_bv))
        q_b = q_bv[row_b, token_b]
        ratio_b = jnp.where(q_b > 0, p_bv[row_b, token_b] / jnp.where(q_b > 0, q_b, 1), 0)
        live_bt = jnp.pad(child_bg & (proposal.tokens_bg == token_b[:, None]), ((0, 0), (1, 0)))
        reach_b = jnp.minimum(1, reach_b * ratio_b)
        return depth + 1, live_bt, end_b, reach_b, worse_after_b, stay_after_b, chance_bt, left_btv

    root_bt = jnp.broadcast_to(jnp.arange(g + 1)[None] == 0, (rows, g + 1))
    end_b = jnp.zeros((rows,), jnp.int32)
    chance_bt = jnp.zeros((rows, g + 1), p_btv.dtype)
    start = (jnp.int32(0), root_bt, end_b, ones_b, zeros_b, ones_b, chance_bt, p_btv)
    _, _, end_b, _, _, _, chance_bt, left_btv = lax.while_loop(lambda carry: carry[1].any(), level, start)

    # From depths to places. Drafts off the path to its end never succeed.
    depth_bt = jnp.pad(depth_bg, ((0, 0), (1, 0)))
    followed_bg = jnp.pad(line_bgg, ((0, 0), (1, 0), (0, 0)))[row_b, end_b]
    chance_bg = jnp.where(followed_bg, chance_bt[row_b[:, None], depth_bg], 0)
    return TreeThresholds(chance_bg, left_btv[row_b[:, None], depth_bt])


def _best(
    proposal: Proposal, child_bg: Array, p_bv: Array, worse_b: Array, stay_b: Array, count_b: Array
) -> tuple[Array, Array, Array, Array]:
    """Returns the token to follow, the law of this choice, and how the paths divide after it.

    Args:
      proposal: the drafts.
      child_bg: bool, the drafts to choose from. They were drawn from one distribution.
      p_bv: the target's distribution at their place.
      worse_b: R / (R + 1), the share of paths that left for a worse token, of all that did not leave for a better one.
      stay_b: 1 / (R + 1), the share that did not leave.
      count_b: int32, K.
    """
    rows, vocab = p_bv.shape
    row_b = jnp.arange(rows)
    if proposal.probs_bgv is None:
        p_bg = jnp.where(child_bg, p_bv[row_b[:, None], proposal.tokens_bg], -1)
        token_b = proposal.tokens_bg[row_b, jnp.argmax(p_bg, axis=-1)]
        return token_b, jax.nn.one_hot(token_b, vocab, dtype=p_bv.dtype), worse_b, stay_b
    q_bv = proposal.probs_bgv[row_b, jnp.argmax(child_bg, axis=-1)]

    # Rank all tokens by p / q, and sum q over the tokens after each. The same ranks choose the draft.
    key_bv, token_mask = _ranks(p_bv, q_bv)
    order_bv = (jnp.sort(key_bv, axis=-1, stable=False) & token_mask).astype(jnp.int32)
    after_bv = lax.cumsum(jnp.take_along_axis(q_bv, order_bv, axis=-1), axis=1, reverse=True)
    after_bv = jnp.pad(after_bv[:, 1:], ((0, 0), (0, 1)))
    after_bv = jnp.zeros_like(q_bv).at[row_b[:, None], order_bv].set(after_bv, unique_indices=True)
    key_bg = jnp.where(child_bg, key_bv[row_b[:, None], proposal.tokens_bg], jnp.uint32(0xFFFFFFFF))
    token_b = jnp.minimum((key_bg.min(-1) & token_mask).astype(jnp.int32), vocab - 1)

    # ((R_x + q)^K - R_x^K) / ((R + 1)^K - R^K) without differences of powers; all is divided by R + 1.
    count_b1 = jnp.maximum(count_b, 1).astype(p_bv.dtype)[:, None]
    taken_bv = stay_b[:, None] * q_bv
    below_bv = worse_b[:, None] + stay_b[:, None] * after_bv
    upto_bv = below_bv + taken_bv
    share_bv = taken_bv / jnp.where(upto_bv > 0, upto_bv, 1)
    some_bv = -jnp.expm1(count_b1 * jnp.log1p(-share_bv))  # that one of K paths takes x, if none takes a better token
    some_b1 = -jnp.expm1(count_b1 * jnp.log1p(-stay_b[:, None]))
    law_bv = upto_bv**count_b1 * some_bv / some_b1
    at_b = upto_bv[row_b, token_b]
    at_b = jnp.where(at_b > 0, at_b, 1)
    return token_b, law_bv, below_bv[row_b, token_b] / at_b, taken_bv[row_b, token_b] / at_b


def _ranks(p_bv: Array, q_bv: Array) -> tuple[Array, Array]:
    """Returns a uint32 key for each token, smaller for a higher p / q, and the mask of its bits that hold the token.

    A sort of keys alone is about 20 times as fast on a CPU as a sort of ratios with their tokens. The upper bits are
    those of the ratio, as many as fit: with 2^16 tokens the ratio is known to 1 part in 256. Any ranking that follows
    from p and q keeps the law exact, and nearly equal ratios keep nearly as many drafts in any order.
    """
    rows, vocab = p_bv.shape
    token_bits = max(vocab - 1, 1).bit_length()
    ratio_bv = jnp.where(q_bv > 0, p_bv / jnp.where(q_bv > 0, q_bv, 1), 0).astype(jnp.float32)
    descending_bv = ~(lax.bitcast_convert_type(ratio_bv, jnp.uint32) << 1)  # no ratio has a sign
    token_bv = lax.broadcasted_iota(jnp.uint32, (rows, vocab), 1)
    return descending_bv >> token_bits << token_bits | token_bv, jnp.uint32((1 << token_bits) - 1)


def own_success(success_bg: Array, line_bgg: Array) -> Array:
    """Returns bool ``[b, g]``, whether each draft succeeds: a path goes on to a child that does."""
    del line_bgg
    return success_bg


def success_below(success_bg: Array, line_bgg: Array) -> Array:
    """Returns bool ``[b, g]``, whether each draft or one after it succeeds: a path goes on to a subtree with a success.

    Failures before the last success of a path do not matter.
    """
    return (line_bgg & success_bg[:, :, None]).any(1)


@dataclasses.dataclass(frozen=True)
class TreeRule:
    """A rule that compares uniforms with chances, keeps a path and draws the next token from what is left at its end.

    Attributes:
      thresholds: ``thresholds(proposal, p_btv) -> TreeThresholds``.
      keep: ``keep(success_bg, line_bgg)``, the drafts to which a path goes on: the first such one among siblings.
      paths: whether drafts that were drawn must be independent paths, see ``VerifyRule``.
      shares_noise: False, see ``VerifyRule``.
      trees: True, see ``VerifyRule``.
    """

    thresholds: Callable[[Proposal, Array], TreeThresholds]
    keep: Callable[[Array, Array], Array]
    paths: bool = False
    shares_noise: bool = dataclasses.field(default=False, init=False)
    trees: bool = dataclasses.field(default=True, init=False)

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        rows, g = proposal.tokens_bg.shape
        chex.assert_shape(target_btv, (rows, g + 1, None))
        if not g:
            none_b = jnp.zeros((rows,), jnp.int32)
            return Verdict(none_b, draws.emit(target_btv[:, 0], none_b))
        parents_bg = paths.parents_of(proposal)
        line_bgg = ancestors(parents_bg)
        chance_bg, left_btv = self.thresholds(proposal, target_btv)
        success_bg = (draws.uniforms(g) < chance_bg) & paths.proposed(proposal)
        kept_bg = paths.first_path(self.keep(success_bg, line_bgg), parents_bg, line_bgg)
        accepted_b = kept_bg.sum(-1, dtype=jnp.int32)
        next_b = draws.emit(left_btv[jnp.arange(rows), paths.last_place(kept_bg)], accepted_b)
        return Verdict(accepted_b, next_b, None if proposal.parents_bg is None else paths.path_of(kept_bg))


recursive = TreeRule(recursive_thresholds, own_success)
"""Sibling after sibling, each against what its elder siblings left (Miao et al. 2024, arXiv 2305.09781). On a chain it
is ``token``."""

traversal = TreeRule(traversal_thresholds, success_below)
"""Leaves first, then their parents (Weng et al. 2025, arXiv 2505.12398). It mostly keeps more drafts on average than
``recursive``, but not on every tree. On a chain it is ``block``."""

multipath = TreeRule(multipath_thresholds, success_below, paths=True)
"""The best of several independent paths, verified as a block (Thomas and Pal 2026, arXiv 2602.16961). On a chain it is
``block``. Trees that are drawn and branch below the root are refused: their text would have another law."""
