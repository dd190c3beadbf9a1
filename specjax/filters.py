"""Top-k and top-p without a sort: the least weight that a token must have.

A sort of the vocabulary is slow on every device. A threshold is enough, since ties stay together. Non-negative floats
are ordered like their bit patterns, so a threshold is found to the last bit by a search over 30 bits. Each step sums
over the entries at or above some candidates.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax.sharding import open_parts

BUCKETS, PER_BUCKET = 2048, 4
"""A large vocabulary is dealt to so many buckets, of which the largest few entries are searched."""
_LARGE = 4 * BUCKETS * PER_BUCKET  # entries; with fewer, a search of all of them is as fast


@jax.jit  # so that all draws of a round share one trace
def least_kept(weights_xv: Array, total_x1: Array, top_k_x1: Array, top_p_x1: Array, ignored_x1: Array) -> Array:
    """Returns float32 ``[x, 1]``, the least weight that top-k and then top-p keep.

    Args:
      weights_xv: float32 from 0 to 1, x distributions that need not sum to 1.
      total_x1: float32, their sums.
      top_k_x1: int32, how many tokens to keep, and those that tie with the last of them; 0 keeps all.
      top_p_x1: float32, the share of top-k's weight that the kept tokens must reach; 1 keeps all.
      ignored_x1: bool, distributions whose threshold may be anything.
    """
    # On a CPU halvings are fastest. On a GPU the host would wait for a loop inside of a branch, and each step of the
    # search is a kernel or two. On a TPU each pass over a large vocabulary is dear.
    tpu = functools.partial(search_all, bits=3)
    if weights_xv.shape[1] >= _LARGE and open_parts("tensor") == 1:
        tpu = among_largest  # where the vocabulary is not split over devices: sums of a split one are all that is sent
    return lax.platform_dependent(
        weights_xv,
        total_x1,
        top_k_x1,
        top_p_x1,
        ignored_x1,
        cpu=functools.partial(search_all, bits=1),
        tpu=tpu,
        default=functools.partial(search_all, bits=3, unrolled=True),
    )


def search_all(
    weights_xv: Array,
    total_x1: Array,
    top_k_x1: Array,
    top_p_x1: Array,
    ignored_x1: Array | None = None,
    *,
    bits: int,
    unrolled: bool = False,
) -> Array:
    """Searches all entries, and finds ``bits`` in each step; arguments and result are those of ``least_kept``."""
    del ignored_x1
    return jnp.maximum(*_thresholds(weights_xv, total_x1, top_k_x1, top_p_x1, bits, unrolled))


def among_largest(weights_xv: Array, total_x1: Array, top_k_x1: Array, top_p_x1: Array, ignored_x1: Array) -> Array:
    """Searches the largest entries of each bucket, and all entries only if these do not suffice.

    Arguments and result are those of ``least_kept``. Entries that are left out are at most ``bound``, the largest last
    entry of a bucket. So a threshold above ``bound`` is exact. Example, top-k of 50: all entries are searched if 4 of
    the 50 are in one of the 2048 buckets, which one of 37,000 distributions has if tokens are dealt at random.
    """
    largest_xn, bound_x1 = _largest_of_buckets(weights_xv)
    kth_x1, last_x1 = _thresholds(largest_xn, total_x1, top_k_x1, top_p_x1, bits=3)
    found_x1 = jnp.maximum(kth_x1, last_x1)
    exact_x1 = ((top_k_x1 == 0) | (kth_x1 > bound_x1)) & ((top_p_x1 == 1) | (last_x1 > bound_x1)) | ignored_x1
    # A row takes the exact result of its buckets whatever other rows need: the other sums are rounded differently.
    return lax.cond(
        jnp.all(exact_x1),
        lambda: found_x1,
        lambda: jnp.where(exact_x1, found_x1, search_all(weights_xv, total_x1, top_k_x1, top_p_x1, bits=3)),
    )


def _largest_of_buckets(weights_xv: Array) -> tuple[Array, Array]:
    """Returns the largest entries of each bucket, ``[x, n]``, and a bound ``[x, 1]`` of all other entries."""
    rows, vocab = weights_xv.shape
    dealt = weights_xv[:, : vocab - vocab % BUCKETS].reshape(rows, -1, BUCKETS)
    none = jnp.full_like(dealt, -1.0)
    # One pass over the entries: a reduction that carries the four largest, in order.
    best = lax.reduce([dealt, none, none, none], [jnp.float32(-1.0)] * PER_BUCKET, _merge, (1,))
    rest = weights_xv[:, vocab - vocab % BUCKETS :]
    return jnp.concatenate([*best, rest], axis=1), jnp.max(best[-1], axis=1, keepdims=True)


def _merge(first: Sequence[Array], second: Sequence[Array]) -> tuple[Array, ...]:
    """Returns the four largest of two descending quadruples, descending (half of Batcher's bitonic merge)."""
    a, b, c, d = (jnp.maximum(x, y) for x, y in zip(first, reversed(second), strict=True))
    a, c, b, d = jnp.maximum(a, c), jnp.minimum(a, c), jnp.maximum(b, d), jnp.minimum(b, d)
    return jnp.maximum(a, b), jnp.minimum(a, b), jnp.maximum(c, d), jnp.minimum(c, d)


def _thresholds(
    weights_xn: Array, total_x1: Array, top_k_x1: Array, top_p_x1: Array, bits: int, unrolled: bool = False
) -> tuple[Array, Array]:
    """Returns the thresholds of top-k and of top-p after it, each 0 where it keeps all."""
    kth_x1 = _largest(weights_xn, jnp.ones_like(weights_xn), top_k_x1.astype(jnp.float32), bits, unrolled)
    kth_x1 = jnp.where(top_k_x1 == 0, 0.0, kth_x1)
    kept_xn = jnp.where(weights_xn >= kth_x1, weights_xn, 0.0)
    total_x1 = jnp.where(top_k_x1 == 0, total_x1, jnp.sum(kept_xn, axis=1, keepdims=True))
    last_x1 = _largest(weights_xn, kept_xn, top_p_x1 * total_x1, bits, unrolled)
    # At top_p = 1 all tokens stay; rounding of the sum would drop the least likely.
    return kth_x1, jnp.where(top_p_x1 == 1, 0.0, last_x1)


def _largest(weights_xn: Array, counted_xn: Array, wanted_x1: Array, bits: int, unrolled: bool) -> Array:
    """Returns ``[x, 1]``, the largest float32 w in [0, 1] at which ``counted``, summed over weights >= w, is enough."""
    wanted_x = wanted_x1[:, 0]

    def step(low: int | Array, found_x: Array) -> Array:
        # One reduction, and so one pass, sums for all candidates. Their sums fall, so the number of sums that suffice
        # is the best digit.
        tried = [found_x | (jnp.int32(digit) << low) for digit in range(1, 1 << bits)]
        least = [lax.bitcast_convert_type(tried_x, jnp.float32)[:, None] for tried_x in tried]
        counted = [jnp.where(weights_xn >= least_x1, counted_xn, 0.0) for least_x1 in least]
        reached = lax.reduce(counted, [jnp.float32(0)] * len(counted), _add, (1,))
        digit_x = sum((reached_x >= wanted_x).astype(jnp.int32) for reached_x in reached)
        return found_x | (digit_x << low)

    found_x = jnp.zeros(wanted_x.shape, jnp.int32)
    if not unrolled:
        found_x = lax.fori_loop(0, 30 // bits, lambda i, found_x: step(30 - bits * (i + 1), found_x), found_x)
    else:
        for low in range(30 - bits, -1, -bits):
            found_x = step(low, found_x)
    return lax.bitcast_convert_type(found_x, jnp.float32)[:, None]


def _add(first: Sequence[Array], second: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(first, second, strict=True))
