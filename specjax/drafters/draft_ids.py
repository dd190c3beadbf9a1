"""Ids of a reduced draft vocabulary, and those of the target: ``draft_of_v``.

``draft_of_v`` is int32 ``[v]``: the draft's id of each of the target's tokens, -1 for tokens that are never drafted.
"""

import jax.numpy as jnp
from jax import Array


def by_targets_ids(logits_bu: Array, draft_of_v: Array) -> Array:
    """Returns logits ``[b, v]`` by the target's ids, -inf for tokens that are never drafted."""
    # Those tokens look up entry 0 and are masked.
    return jnp.where((draft_of_v >= 0)[None], logits_bu[:, jnp.maximum(draft_of_v, 0)], -jnp.inf)


def tokens_of_draft(draft_of_v: Array, size: int) -> Array:
    """Returns int32 ``[size]``, the target's ids of the draft vocabulary's tokens, in its order."""
    token_v = jnp.arange(draft_of_v.shape[0], dtype=jnp.int32)
    return jnp.zeros((size,), jnp.int32).at[jnp.where(draft_of_v >= 0, draft_of_v, size)].set(token_v, mode="drop")
