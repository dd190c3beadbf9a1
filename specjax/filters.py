"""Top-k, top-p and min-p without a sort: the least weight that a token must have.

A sort of the vocabulary is slow on every device. A threshold is enough, since ties stay together. Non-negative floats
are ordered like their bit patterns, so a threshold is found to the last bit by a search over 30 bits. Each step sums
over the entries at or above some candidates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax.platforms import by_platform
from specjax.sharding import open_parts

LEVELS = ((128, 8), (2048, 4))
"""A large vocabulary is dealt to so many buckets, and the so many largest entries of each are searched. If they do not
suffice, the vocabulary is dealt to the next number of buckets."""
SELDOM = "seldom"
"""The named scope of branches that few rounds take with top-k, for readers of the compiled program (``specjax.aot``).
Without it, a wide nucleus takes them: of 40 distributions, one of 200 tokens does in 2 of 3 rounds."""
_LARGE = 32768  # entries; with fewer, a search of all of them is as fast
_FEW = 2048  # entries; with fewer, small operations take longer than the pass over the entries


class Filters(NamedTuple):
    """What x distributions ask for, each ``[x, 1]``.

    Attributes:
      top_k: int32, how many tokens to keep, and those that tie with the last of them; 0 keeps all.
      top_p: float32, the share of top-k's weight that the kept tokens must reach; 1 keeps all.
      min_p: float32, the least share of the highest weight; 0 keeps all.
      unused: bool, distributions whose result may be anything.
    """

    top_k: Array
    top_p: Array
    min_p: Array
    unused: Array


class Kept(NamedTuple):
    """What filters keep of x distributions, each float32 ``[x, 1]``.

    Attributes:
      least: the least weight that is kept.
      total: the sum of the weights that are kept.
    """

    least: Array
    total: Array


@jax.jit  # so that all draws of a round share one trace
def keep(weights_xv: Array, total_x1: Array, filters: Filters) -> Kept:
    """Returns what top-k, then top-p, then min-p keep.

    Args:
      weights_xv: float32 from 0 to 1, the highest 1: x distributions that need not sum to 1.
      total_x1: float32, their sums.
      filters: what each asks for.
    """
    # On a CPU halvings are fastest. On a GPU the host would wait for a loop inside of a branch, and each step of the
    # search is a kernel or two. On a TPU each pass over a large vocabulary is dear.
    tpu = functools.partial(among_all, bits=3)
    if weights_xv.shape[1] >= _LARGE and open_parts("tensor") == 1:
        tpu = among_largest  # if the vocabulary is split over devices, only sums are exchanged, so buckets are not used
    return by_platform(
        weights_xv,
        total_x1,
        filters,
        cpu=functools.partial(among_all, bits=1),
        tpu=tpu,
        default=without_loop,
    )


def among_all(weights_xv: Array, total_x1: Array, filters: Filters, *, bits: int, unrolled: bool = False) -> Kept:
    """Searches all entries, and finds ``bits`` in each step; the rest is as in ``keep``."""
    return _search(weights_xv, total_x1, filters, bits, unrolled)[0]


def without_loop(weights_xv: Array, total_x1: Array, filters: Filters) -> Kept:
    """Searches all entries in steps that are unrolled; the rest is as in ``keep``."""
    # A branch of cheap operations alone becomes a select, and XLA would run it in every round. A barrier prevents that.
    return among_all(lax.optimization_barrier(weights_xv), total_x1, filters, bits=3, unrolled=True)


def among_largest(weights_xv: Array, total_x1: Array, filters: Filters) -> Kept:
    """Searches the largest entries of few buckets; if they do not suffice, those of many buckets, then all entries.

    Arguments and result are those of ``keep``. Entries that are left out are at most ``bound``, the largest last entry
    of a bucket. So thresholds above ``bound`` are exact. Example, top-k of 50: more entries are searched if 8 of the 50
    are in one of the 128 buckets, which one of 1.4 million distributions has if tokens are dealt at random.
    """

    def search(entries_xn: Array, bound_x1: Array) -> tuple[Kept, Array]:
        bits = 5 if entries_xn.shape[1] < _FEW else 3
        kept, (kth_x1, last_x1) = _search(entries_xn, total_x1, filters, bits)
        exact_x1 = (filters.top_k == 0) | (kth_x1 > bound_x1)
        exact_x1 &= (filters.top_p == 1) | (last_x1 > bound_x1)
        return kept, exact_x1 & (kept.least > bound_x1) | filters.unused

    kept, exact_x1 = search(*_largest_of_buckets(weights_xv, *LEVELS[0]))
    for level in LEVELS[1:]:
        kept, exact_x1 = _unless(exact_x1, kept, lambda level=level: search(*_largest_of_buckets(weights_xv, *level)))
    return _unless(exact_x1, kept, lambda: search(weights_xv, jnp.full_like(total_x1, -1.0)))[0]


def _unless(exact_x1: Array, kept: Kept, search: Callable[[], tuple[Kept, Array]]) -> tuple[Kept, Array]:
    """Searches again if any result is not exact; returns results and whether each is exact.

    A row keeps an exact result whatever other rows need: sums over more entries are rounded differently.
    """

    def again() -> tuple[Kept, Array]:
        other, other_exact_x1 = search()
        return jax.tree.map(functools.partial(jnp.where, exact_x1), kept, other), exact_x1 | other_exact_x1

    with jax.named_scope(SELDOM):
        return lax.cond(jnp.all(exact_x1), lambda: (kept, exact_x1), again)


def _largest_of_buckets(weights_xn: Array, buckets: int, count: int) -> tuple[Array, Array]:
    """Returns the largest entries of each bucket, ``[x, m]``, and a bound ``[x, 1]`` of all other entries."""
    rows, entries = weights_xn.shape
    whole_xn = jnp.pad(weights_xn, ((0, 0), (0, -entries % buckets)), constant_values=-1.0)
    dealt = whole_xn.reshape(rows, -1, buckets)
    none = jnp.full_like(dealt, -1.0)
    # One pass over the entries: a reduction that carries the largest, in order.
    best = lax.reduce([dealt] + [none] * (count - 1), [jnp.float32(-1.0)] * count, _merge, (1,))
    return jnp.concatenate(best, axis=1), jnp.max(best[-1], axis=1, keepdims=True)


def _merge(first: Sequence[Array], second: Sequence[Array]) -> tuple[Array, ...]:
    """Returns the n largest of twice n values, all descending; n is a power of 2 (half of Batcher's bitonic merge)."""
    best = [jnp.maximum(x, y) for x, y in zip(first, reversed(second), strict=True)]
    apart = len(best) // 2
    while apart:
        for i in range(len(best)):
            if not i & apart:
                x, y = best[i], best[i + apart]
                best[i], best[i + apart] = jnp.maximum(x, y), jnp.minimum(x, y)
        apart //= 2
    return tuple(best)


def _search(
    weights_xn: Array, total_x1: Array, filters: Filters, bits: int, unrolled: bool = False
) -> tuple[Kept, tuple[Array, Array]]:
    """Returns what is kept, and the thresholds of top-k and of top-p after it, each 0 where it keeps all."""
    no_top_k_x1 = filters.top_k == 0
    kth_x1 = _largest(weights_xn, jnp.ones_like(weights_xn), filters.top_k.astype(jnp.float32), bits, unrolled)
    kth_x1 = jnp.where(no_top_k_x1, 0.0, kth_x1)
    kept_xn = jnp.where(weights_xn >= kth_x1, weights_xn, 0.0)
    total_x1 = jnp.where(no_top_k_x1, total_x1, jnp.sum(kept_xn, axis=1, keepdims=True))
    last_x1 = _largest(weights_xn, kept_xn, filters.top_p * total_x1, bits, unrolled)
    # At top_p = 1 all tokens stay; rounding of the sum would drop the least likely.
    last_x1 = jnp.where(filters.top_p == 1, 0.0, last_x1)
    # No filter drops the most likely token, and its weight is 1.
    least_x1 = jnp.maximum(jnp.maximum(kth_x1, last_x1), filters.min_p)
    kept_x1 = jnp.sum(jnp.where(weights_xn >= least_x1, weights_xn, 0.0), axis=1, keepdims=True)
    return Kept(least_x1, kept_x1), (kth_x1, last_x1)


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
