"""Losses of language models and of drafts that imitate one: means over positions."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def next_token(logits_btv: Array, tokens_bt: Array) -> Array:
    """Cross-entropy of each token given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_btv[:, :-1], tokens_bt[:, 1:]).mean()


def kl(draft_btv: Array, target_btv: Array) -> Array:
    """KL(p || q) of draft logits q against target logits p."""
    p = jax.nn.softmax(target_btv)
    return jnp.sum(p * (jax.nn.log_softmax(target_btv) - jax.nn.log_softmax(draft_btv)), axis=-1).mean()


def total_variation(draft_btv: Array, target_btv: Array) -> Array:
    """TV(p, q) = 1 - sum_x min(p, q): one minus the acceptance of a draft token (Leviathan et al. 2023, cor. 3.6;
    as a loss, Zhou et al. 2024, DistillSpec, arXiv 2310.08461)."""
    return 1 - jnp.minimum(jax.nn.softmax(draft_btv), jax.nn.softmax(target_btv)).sum(-1).mean()
