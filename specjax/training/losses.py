"""Losses of language models and of drafts that imitate one: means over positions."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def next_token(logits_btv: Array, tokens_bt: Array) -> Array:
    """Cross-entropy of each token given those before it, in nats.

    Args:
      logits_btv: floats, at position i of the token at i + 1.
      tokens_bt: int32.

    Returns:
      The mean over rows and positions, a scalar of the dtype of ``logits_btv``; so of all losses here.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1], tokens_bt[:, 1:]).mean()


def kl(draft_btv: Array, target_btv: Array) -> Array:
    """KL(p || q) in nats: what a draft costs that imitates its target (Hinton et al. 2015, arXiv 1503.02531; of drafts,
    Zhou et al. 2024, DistillSpec, arXiv 2310.08461).

    Args:
      draft_btv: floats, logits of q.
      target_btv: floats, logits of p.
    """
    return _kl(draft_btv, target_btv).mean()


def _kl(draft_btv: Array, target_btv: Array) -> Array:
    p = jax.nn.softmax(target_btv)
    return jnp.sum(p * (jax.nn.log_softmax(target_btv) - jax.nn.log_softmax(draft_btv)), axis=-1)


def total_variation(draft_btv: Array, target_btv: Array) -> Array:
    """TV(p, q) = 1 - sum_x min(p, q), from 0 to 1: one minus the acceptance of a draft token (Leviathan et al. 2023,
    cor. 3.6; as a loss, Zhou et al. 2024, DistillSpec, arXiv 2310.08461).

    Args:
      draft_btv: floats, logits of q.
      target_btv: floats, logits of p.
    """
    return _total_variation(draft_btv, target_btv).mean()


def _total_variation(draft_btv: Array, target_btv: Array) -> Array:
    return 1 - jnp.minimum(jax.nn.softmax(draft_btv), jax.nn.softmax(target_btv)).sum(-1)


def draft(loss: str, draft_btv: Array, target_btv: Array, tokens_bt: Array) -> Array:
    """The loss of a draft head that may draft only part of the vocabulary: all other logits are -inf.

    The target's distribution is restricted to what can be drafted; a position whose likeliest token (or, for
    "next_token", whose token) cannot be counts for nothing, as in the code that EAGLE-3 was published with
    (Li et al. 2025, arXiv 2503.01840).

    Args:
      loss: "next_token", "kl" or "total_variation".
      draft_btv: float32, the head's logits.
      target_btv: float32, the target's logits for the same tokens.
      tokens_bt: int32, the tokens that came.

    Returns:
      The mean over the positions that count, a float32 scalar; 0 where none does.
    """
    drafted_btv = jnp.isfinite(draft_btv)
    q = jnp.where(drafted_btv, draft_btv, _NEVER)
    wanted_bt = tokens_bt if loss == "next_token" else jnp.argmax(target_btv, axis=-1)
    counts_bt = jnp.take_along_axis(drafted_btv, wanted_bt[..., None], axis=-1)[..., 0].astype(jnp.float32)
    if loss == "next_token":
        values_bt = optax.softmax_cross_entropy_with_integer_labels(q, tokens_bt)
    else:
        p = jnp.where(drafted_btv, target_btv, _NEVER)
        values_bt = {"kl": _kl, "total_variation": _total_variation}[loss](q, p)
    return jnp.sum(values_bt * counts_bt) / jnp.maximum(jnp.sum(counts_bt), 1)


_NEVER = -1e9  # a logit whose token has no probability, and no infinities in its gradient
