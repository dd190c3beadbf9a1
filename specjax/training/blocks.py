"""Training of draft heads that draft blocks: many blocks of each text at once, computed as in drafting."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from specjax.drafters.dflash import DFlashHead
from specjax.training.losses import distance
from specjax.training.objectives import DraftObjective, read_by
from specjax.types import LanguageModel

ANCHOR_EVERY = 4  # tokens of a window for each anchor
DFLASH_DECAY, DSPARK_DECAY = 7.0, 4.0  # drafts over which the weight of a draft falls by e
CE_SHARE, L1_SHARE = 0.1, 0.9  # of the loss "dspark"


class Blocks(NamedTuple):
    """Blocks of m anchors in each text, and what they learn from. Draft k of anchor a stands for token a + 1 + k.

    Attributes:
      anchor_bm: int32, the positions of the anchors.
      first_bm: int32, the first position of each anchor's document.
      token_bmg: int32, the tokens of the text at the places of the drafts.
      counts_bmg: bool, whether the token is of the window and of the anchor's document.
    """

    anchor_bm: Array
    first_bm: Array
    token_bmg: Array
    counts_bmg: Array


def choose_blocks(tokens_bt: Array, anchors: int, drafts: int, start_token: int | None) -> Blocks:
    """Returns blocks at random anchors of each text, without replacement.

    The anchors are a function of the tokens alone, so a run that resumes draws the same ones.

    Args:
      tokens_bt: int32, at least two tokens a row.
      anchors: m, at most t - 1.
      drafts: g, drafts of a block.
      start_token: the token with which each document begins; None: a window is one document.
    """
    # 1. Documents: a position's first one is the last start up to the position.
    t = tokens_bt.shape[1]
    position_1t = jnp.arange(t, dtype=jnp.int32)[None]
    starts_bt = jnp.zeros(tokens_bt.shape, bool) if start_token is None else tokens_bt == start_token
    first_bt = jax.lax.cummax(jnp.where(starts_bt, position_1t, 0), axis=1)
    # 2. Anchors. The last position has no token after it, and the last of a document none that counts.
    mixed = jnp.sum(tokens_bt.astype(jnp.uint32) * (2 * position_1t.astype(jnp.uint32) + 1), dtype=jnp.uint32)
    rank_bt = jax.random.uniform(jax.random.key(mixed), (tokens_bt.shape[0], t - 1))
    anchor_bm = jax.lax.top_k(rank_bt - starts_bt[:, 1:].astype(jnp.float32), anchors)[1].astype(jnp.int32)
    # 3. What the drafts stand for.
    first_bm = jnp.take_along_axis(first_bt, anchor_bm, axis=1)
    place_bmg = anchor_bm[..., None] + 1 + jnp.arange(drafts, dtype=jnp.int32)[None, None]
    at = jnp.minimum(place_bmg, t - 1).reshape(tokens_bt.shape[0], -1)
    token_bmg, found_bmg = (jnp.take_along_axis(x, at, axis=1).reshape(place_bmg.shape) for x in (tokens_bt, first_bt))
    return Blocks(anchor_bm, first_bm, token_bmg, (place_bmg < t) & (found_bmg == first_bm[..., None]))


def block_logits(
    head: DFlashHead,
    params: Any,
    teacher: LanguageModel,
    tokens_bt: Array,
    features: tuple[Array, ...],
    blocks: Blocks,
) -> tuple[Array, Array | None]:
    """Returns what a draft head answers in blocks whose drafts are the tokens of the text.

    Args:
      head: the draft head.
      params: the draft head's parameters.
      teacher: the target.
      tokens_bt: int32, text.
      features: the target's captured states ``[b, t, d]`` over the text.
      blocks: the blocks.

    Returns:
      Float32 logits ``[b, m, g, v]`` in the target's ids, -inf for tokens that are never drafted, and the logits
      ``[b, m, g]`` of the confidence head, None if there is none.
    """
    states, logits = head.blocks(params, teacher, tokens_bt, features, blocks.anchor_bm, blocks.first_bm)
    b, m, g, _ = states.shape
    anchor_bm1 = jnp.take_along_axis(tokens_bt, blocks.anchor_bm, axis=1)[..., None]
    before = jnp.concatenate([anchor_bm1, blocks.token_bmg[..., :-1]], axis=-1).reshape(b * m, g)
    states, logits = states.reshape(b * m, g, -1), logits.reshape(b * m, g, -1)
    carry, drafts, trusts = head.start(params, b * m), [], []
    for k in range(g):
        draft, carry = head.step(params, carry, logits[:, k], states[:, k], before[:, k])
        drafts.append(draft)
        trusts += [head.confidence_logit(params, states[:, k], before[:, k])] if head.confidence else []
    answer = jnp.stack(drafts, axis=1).reshape(b, m, g, -1)
    return answer, jnp.stack(trusts, axis=1).reshape(b, m, g) if trusts else None


def block_objective(loss: str, head: DFlashHead, start_token: int | None) -> DraftObjective:
    """Returns the objective of a DFlash or DSpark head.

    Blocks follow random anchors, one for each ``ANCHOR_EVERY`` tokens. A block reads the target's states before its
    anchor, in the anchor's document. The loss of draft k, from 0, has the weight exp(-k / 7) in DFlash heads (Chen et
    al. 2026, arXiv 2602.06036) and exp(-k / 4) in DSpark heads (DeepSeek-AI 2026, arXiv 2607.05147, section 3.3). The
    loss is the weighted mean over the drafts. A confidence head adds its cross-entropy against the acceptance rate of
    the draft, whatever the loss.

    Args:
      loss: "next_token", "kl" or "total_variation", as for chains; or "dspark", 0.1 times the cross-entropy of the text
        plus 0.9 times the L1 distance of the distributions, which is twice the total variation.
      head: the draft head.
      start_token: as for ``choose_blocks``.
    """

    def objective(
        params: Any, tokens_bt: Array, teacher: LanguageModel | None, counts_bt: Array | None = None
    ) -> Array:
        teacher, taught = read_by(teacher, tokens_bt, head.capture)
        length, g = tokens_bt.shape[1], head.most_drafts
        blocks = choose_blocks(tokens_bt, max(1, length // ANCHOR_EVERY), g, start_token)
        draft, trust = block_logits(head, params, teacher, tokens_bt, taught.features, blocks)
        # Draft k of anchor a has the law of the target at position a + k. Example: anchor 9, draft 0 is token 10, of
        # which the target's logits at position 9 speak.
        place = blocks.anchor_bm[..., None] + jnp.arange(g, dtype=jnp.int32)[None, None]
        at = jnp.minimum(place, length - 1).reshape(tokens_bt.shape[0], -1, 1)
        target = jnp.take_along_axis(taught.logits_btv, at, axis=1).reshape(draft.shape)
        decay = DSPARK_DECAY if head.name == "DSpark" else DFLASH_DECAY
        counts = blocks.counts_bmg
        if counts_bt is not None:
            drafted = jnp.minimum(place + 1, length - 1).reshape(tokens_bt.shape[0], -1)
            counts &= jnp.take_along_axis(counts_bt, drafted, axis=1).reshape(counts.shape)
        weights = counts.astype(jnp.float32) * jnp.exp(-jnp.arange(g, dtype=jnp.float32) / decay)[None, None]
        return _block_loss(loss, draft, target, trust, blocks.token_bmg, weights)

    return objective


def _block_loss(loss: str, draft: Array, target: Array, trust: Array | None, tokens: Array, weights: Array) -> Array:
    """Returns the loss of drafts ``[b, m, g, v]`` with weights ``[b, m, g]``."""
    away = distance(draft, target)
    if loss in ("next_token", "dspark"):
        # A token that is never drafted has no finite cross-entropy.
        drafted = jnp.take_along_axis(draft, tokens[..., None], axis=-1)[..., 0] > -jnp.inf
        labels = jnp.where(drafted, tokens, jnp.argmax(draft, axis=-1).astype(tokens.dtype))
        entropy = optax.softmax_cross_entropy_with_integer_labels(draft, labels)
        entropy = jnp.where(drafted, entropy, 0)
        values = entropy if loss == "next_token" else CE_SHARE * entropy + L1_SHARE * 2 * away
    elif loss == "kl":
        # Over the tokens that can be drafted, as for other draft heads.
        target = jnp.where(draft > -jnp.inf, target, -jnp.inf)
        log_q, log_p = jax.nn.log_softmax(draft), jax.nn.log_softmax(target)
        values = jnp.sum(jnp.exp(log_p) * jnp.where(draft > -jnp.inf, log_p - log_q, 0), axis=-1)
    else:
        values = away
    if trust is not None:
        values = values + optax.sigmoid_binary_cross_entropy(trust, 1 - jax.lax.stop_gradient(away))
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)
