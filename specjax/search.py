"""The ids of the highest scores."""

import jax.numpy as jnp
from jax import Array, lax

from specjax.platforms import by_platform

_MOST_SEARCHED = 16  # ids that a TPU searches one by one


def most_likely(scores_xv: Array) -> Array:
    """Returns int32 ``[..]``, the lowest id of the highest score.

    The result is that of ``jnp.argmax``, unless a score is NaN: then it is the last id, and ``jnp.argmax`` returns the
    NaN's. Two reductions that XLA vectorises make it 5 times faster on a CPU.
    """
    vocab = scores_xv.shape[-1]
    highest_x1 = jnp.max(scores_xv, axis=-1, keepdims=True)
    id_xv = lax.broadcasted_iota(jnp.int32, scores_xv.shape, scores_xv.ndim - 1)
    return jnp.min(jnp.where(scores_xv == highest_x1, id_xv, vocab - 1), axis=-1)


def largest(scores_xv: Array, count: int) -> Array:
    """Returns int32 ``[.., count]``, the ids of the highest scores, highest first; among equals the lowest id first.

    The result is that of ``lax.top_k``, unless a score is NaN. A TPU would sort the whole vocabulary for it, so there
    the few ids are searched one after the other. Integers must be above the least of their dtype.
    """

    def searched(scores_xv: Array) -> Array:
        id_xv = lax.broadcasted_iota(jnp.int32, scores_xv.shape, scores_xv.ndim - 1)
        # Ids that were found are below all others, those of -inf included.
        whole = jnp.issubdtype(scores_xv.dtype, jnp.integer)
        least, out = (jnp.iinfo(scores_xv.dtype).min,) * 2 if whole else (jnp.finfo(scores_xv.dtype).min, -jnp.inf)
        left_xv, found = jnp.maximum(scores_xv, least), []
        for _ in range(count):
            found.append(most_likely(left_xv))
            left_xv = jnp.where(id_xv == found[-1][..., None], jnp.asarray(out, scores_xv.dtype), left_xv)
        return jnp.stack(found, axis=-1)

    def sorted_(scores_xv: Array) -> Array:
        return lax.top_k(scores_xv, count)[1].astype(jnp.int32)

    ways = {"tpu": searched} if count <= _MOST_SEARCHED else {}
    return by_platform(scores_xv, **ways, default=sorted_)
