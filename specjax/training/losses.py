"""Losses of language models and of drafters that imitate one. Each loss is a mean over positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from specjax.drafters.draft_ids import tokens_of_draft


def next_token(logits_btv: Array, tokens_bt: Array) -> Array:
    """Cross-entropy of each token given the tokens before it, in nats.

    Args:
      logits_btv: floats; position i holds the logits of the token at i + 1.
      tokens_bt: int32, the tokens at positions 0 .. t - 1.

    Returns:
      The mean over rows and positions, a scalar of the dtype of ``logits_btv``.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1], tokens_bt[:, 1:]).mean()


def kl(draft_btv: Array, target_btv: Array, counts_bt: Array | None = None) -> Array:
    """KL(p || q) in nats, the distillation loss (Hinton et al. 2015, arXiv 1503.02531).

    For draft models see Zhou et al. 2024, DistillSpec, arXiv 2310.08461.

    Args:
      draft_btv: floats, logits of q, the draft's distribution.
      target_btv: floats, logits of p, the target's distribution.
      counts_bt: bool, the positions that count; None for all.

    Returns:
      The mean over the positions that count, a scalar of the dtype of the logits; 0 if no position counts.
    """
    p = jax.nn.softmax(target_btv)
    values_bt = jnp.sum(p * (jax.nn.log_softmax(target_btv) - jax.nn.log_softmax(draft_btv)), axis=-1)
    return _mean(values_bt, counts_bt)


def total_variation(draft_btv: Array, target_btv: Array, counts_bt: Array | None = None) -> Array:
    """TV(p, q) = 1 - sum_x min(p, q), from 0 to 1: one minus the acceptance rate of a draft token.

    The acceptance rate is from Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6. As a loss the distance is from
    Zhou et al. 2024, DistillSpec, arXiv 2310.08461.

    Args:
      draft_btv: floats, logits of q, the draft's distribution.
      target_btv: floats, logits of p, the target's distribution.
      counts_bt: bool, the positions that count; None for all.

    Returns:
      The mean over the positions that count, a scalar of the dtype of the logits; 0 if no position counts.
    """
    return _mean(distance(draft_btv, target_btv), counts_bt)


def distance(draft: Array, target: Array) -> Array:
    """Returns TV(p, q) at each place: ``[..., v]`` logits of q and p, ``[...]`` distances."""
    return 1 - jnp.minimum(jax.nn.softmax(draft), jax.nn.softmax(target)).sum(-1)


def _mean(values_bt: Array, counts_bt: Array | None) -> Array:
    if counts_bt is None:
        return values_bt.mean()
    weights_bt = counts_bt.astype(values_bt.dtype)
    return jnp.sum(values_bt * weights_bt) / jnp.maximum(jnp.sum(weights_bt), 1)


IMITATIONS = {"kl": kl, "total_variation": total_variation}
"""The losses that imitate a target, by the names that recipes use."""

LOSSES = ("next_token", *IMITATIONS)
"""The names of the losses that every kind can be trained with."""

DSPARK = "dspark"
"""The name of DSpark's loss, for heads that draft blocks (``specjax.training.blocks``)."""


class Lesson(NamedTuple):
    """What a draft head should answer at some positions, in the ids of its draft vocabulary of u tokens.

    Attributes:
      logits_btu: float32, the target's logits of the tokens that can be drafted.
      wanted_bt: int32, the draft's id of the wanted token, or -1 if that token cannot be drafted.
    """

    logits_btu: Array
    wanted_bt: Array

    def part(self, first: int, last: int | None = None) -> "Lesson":
        """Returns the lesson of positions ``first`` to before ``last``, as slices do."""
        return Lesson(self.logits_btu[:, first:last], self.wanted_bt[:, first:last])


def lesson(
    loss: str,
    target_btv: Array,
    tokens_bt: Array,
    draft_of_v: Array | None = None,
    size: int = 0,
    counts_bt: Array | None = None,
) -> Lesson:
    """Returns what a draft head should answer.

    The target's distribution is restricted to the draft vocabulary. A position counts only if its wanted token can be
    drafted: for "next_token" the token of the text, for the other losses the target's most likely token. The published
    code of EAGLE-3 does the same (Li et al. 2025, arXiv 2503.01840).

    Args:
      loss: one of ``LOSSES``.
      target_btv: float32, the target's logits.
      tokens_bt: int32, the tokens of the text at the positions of which the logits speak.
      draft_of_v: int32, the draft's id of each token, -1 for tokens that are never drafted; None: all are, by their
        own ids.
      size: u, if ``draft_of_v`` is given.
      counts_bt: bool, the positions that may count at all; None for all.
    """
    wanted_bt = tokens_bt if loss == "next_token" else jnp.argmax(target_btv, axis=-1).astype(jnp.int32)
    if draft_of_v is not None:
        target_btv, wanted_bt = target_btv[..., tokens_of_draft(draft_of_v, size)], draft_of_v[wanted_bt]
    return Lesson(target_btv, wanted_bt if counts_bt is None else jnp.where(counts_bt, wanted_bt, -1))


def draft(loss: str, draft_btu: Array, wanted: Lesson) -> Array:
    """Loss of a draft head against a lesson.

    Args:
      loss: one of ``LOSSES``, that of the lesson.
      draft_btu: float32, the draft head's logits for the positions of the lesson.
      wanted: the lesson.

    Returns:
      The mean over the positions that count, a float32 scalar; 0 if no position counts.
    """
    counts_bt = wanted.wanted_bt >= 0
    if loss == "next_token":
        labels_bt = jnp.maximum(wanted.wanted_bt, 0)
        return _mean(optax.softmax_cross_entropy_with_integer_labels(draft_btu, labels_bt), counts_bt)
    return IMITATIONS[loss](draft_btu, wanted.logits_btu, counts_bt)
