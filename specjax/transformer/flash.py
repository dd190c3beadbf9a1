"""Attention of few queries over a cached prefix and their own block, in one GPU kernel.

Flash decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding): the slots of a row are shared out between
programs, each with a softmax of its own, and the parts are merged by their log-sum-exp. A program reads the slots in
use and no others. So there is no branch over windows, and the bytes follow each row's length.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

SLOTS_PER_STEP = 64  # at most
STEP_BYTES = 16 * 1024  # of keys in a step: keys, values and queries share 99 KB of a small GPU's memory
SLOTS_PER_QUERY = 16  # of a split, at least, so that the parts cost an eighth of the bytes of keys and values
PROGRAMS = 128  # enough for the processors of a large GPU
MOST_QUERIES = 128  # per row and key head; wider feeds are products of matrices, which XLA does well
LOWEST = -1e30  # below every score; finite, since the difference of two infinities is NaN


class Places(NamedTuple):
    """What the fed places may see.

    Attributes:
      start_b: int32, the slot of the first place.
      length_b: int32, how many slots of the prefix are seen, from slot 0 on; 0 for a row that rests.
      first_bt: int32, the lowest slot that each place sees; None where no window limits it.
      seen_btt: bool, ``[b or 1, t, t]``: whether place i sees place j. Each place must see one.
    """

    start_b: Array
    length_b: Array
    first_bt: Array | None
    seen_btt: Array


def serves(query_bkqh: Array, keys_bksh: Array, value_width: int) -> bool:
    """Returns whether the kernel serves arrays of these shapes, on a GPU and with this version of JAX.

    It has no derivative.
    """
    queries, width = query_bkqh.shape[2:]
    tiled = width % 16 == 0 and value_width % 16 == 0 and query_bkqh.dtype == keys_bksh.dtype
    # The compiler splits no kernel over devices: it would gather the caches.
    mesh = jax.sharding.get_abstract_mesh()
    split = any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return tiled and queries <= MOST_QUERIES and not split and _pallas() is not None


@functools.partial(jax.jit, static_argnames=("cap", "value_width", "interpret"))
def attend(
    query_bkqh: Array,
    keys_bksh: Array,
    values_bksh: Array | None,
    places: Places,
    sinks_kq: Array | None = None,
    *,
    cap: float | None,
    value_width: int,
    interpret: bool = False,
) -> Array:
    """Attends to the prefix and the block, both of which are in the cache.

    Args:
      query_bkqh: floats, queries, scaled: those of t places for each of the q / t heads that share a key head.
      keys_bksh: floats of the same type, keys.
      values_bksh: floats, values. None: the values are the first ``value_width`` entries of the keys.
      places: what the places see.
      sinks_kq: float32, a logit for each query that takes part in its softmax and has no value; None for no sinks.
      cap: soft cap of the products, or None.
      value_width: the width of the values.
      interpret: whether to run the kernel step by step in JAX, on any device.

    Returns:
      ``[b, k, q, value_width]`` of the queries' type.
    """
    pl, gpu = _pallas()
    b, k, q, h = query_bkqh.shape
    slots, t = keys_bksh.shape[2], places.seen_btt.shape[-1]
    # A tile's sums must fit the registers of its threads.
    tile = min(pl.next_power_of_2(max(q, 16)), max(8192 // pl.next_power_of_2(max(h, value_width)), 16), 64)
    tiles = pl.cdiv(q, tile)
    fit = max(STEP_BYTES // (h * keys_bksh.dtype.itemsize), 16)
    slots_per_step = min(SLOTS_PER_STEP, 1 << (fit.bit_length() - 1))
    share = max(SLOTS_PER_QUERY * q, slots_per_step)
    splits = max(min(PROGRAMS // (b * k * tiles), pl.cdiv(slots, share)), 1)

    def per_head(count: int, width: int):
        return pl.BlockSpec((None, None, count, width), lambda row, head, *_: (row, head, 0, 0))

    shared = places.seen_btt.shape[0] == 1
    whole = pl.BlockSpec()
    seen = pl.BlockSpec((None, t, t), lambda row, *_: (0 if shared else row, 0, 0))
    first = None if places.first_bt is None else pl.BlockSpec((None, t), lambda row, *_: (row, 0))
    values = None if values_bksh is None else per_head(slots, value_width)
    kernel = functools.partial(
        _kernel, tile=tile, splits=splits, step_slots=slots_per_step, cap=cap, value_width=value_width
    )
    out, height = pl.pallas_call(
        kernel,
        grid=(b, k, tiles, splits),
        in_specs=[whole, whole, first, seen, per_head(q, h), per_head(slots, h), values],
        out_specs=[
            pl.BlockSpec((None, None, None, q, value_width), lambda row, head, _, split: (split, row, head, 0, 0)),
            pl.BlockSpec((None, None, None, q), lambda row, head, _, split: (split, row, head, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, b, k, q, value_width), jnp.float32),
            jax.ShapeDtypeStruct((splits, b, k, q), jnp.float32),
        ],
        compiler_params=None if interpret else gpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_decoding",
    )(*places[:3], places.seen_btt.astype(jnp.int32), query_bkqh, keys_bksh, values_bksh)
    # A sink is one more part, which has no values.
    parts = height if sinks_kq is None else jnp.append(height, jnp.broadcast_to(sinks_kq, height[:1].shape), axis=0)
    share = jax.nn.softmax(parts, axis=0)[:splits]
    return jnp.sum(share[..., None] * out, axis=0).astype(query_bkqh.dtype)


def _kernel(
    start_ref, length_ref, first_ref, seen_ref, query_ref, keys_ref, values_ref, out_ref, height_ref,
    *, tile, splits, step_slots, cap, value_width,
):  # fmt: skip
    """Writes one split's normalised sum of values and the log of its sum of weights, for one tile of queries."""
    pl, _ = _pallas()
    row, split = pl.program_id(0), pl.program_id(3)
    start, length = start_ref[row], length_ref[row]
    (queries, width), slots, t = query_ref.shape, keys_ref.shape[0], seen_ref.shape[-1]
    # Indices past an end are set to the last: what is read there is masked, and what is written is equal.
    query_q = jnp.minimum(pl.program_id(2) * tile + jnp.arange(tile, dtype=jnp.int32), queries - 1)
    place_q = query_q % t
    query = [query_ref[query_q, part] for part in _parts(width, pl)]
    values_ref = keys_ref if values_ref is None else values_ref
    first_q = None if first_ref is None else first_ref[place_q]

    block_slots = min(pl.next_power_of_2(max(t, 16)), step_slots)

    def visit(slot_s, seen_qs, carry):
        peak_q, total_q, sums = carry
        slot_s = jnp.minimum(slot_s, slots - 1)
        scores = sum(_dot(x, keys_ref[slot_s, part], 1) for x, part in zip(query, _parts(width, pl), strict=True))
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        scores = jnp.where(seen_qs, scores, LOWEST)
        new_q = jnp.maximum(peak_q, jnp.max(scores, axis=1))
        weights = jnp.where(seen_qs, jnp.exp(scores - new_q[:, None]), 0.0)
        old_q = jnp.exp(peak_q - new_q)
        sums = tuple(
            sum_ * old_q[:, None] + _dot(weights.astype(values_ref.dtype), values_ref[slot_s, part], 0)
            for sum_, part in zip(sums, _parts(value_width, pl), strict=True)
        )
        return new_q, total_q * old_q + jnp.sum(weights, axis=1), sums

    def prefix(step, carry):
        slot_s = (step * splits + split) * step_slots + jnp.arange(step_slots, dtype=jnp.int32)
        seen = jnp.broadcast_to(slot_s[None] < length, (tile, step_slots))
        return visit(slot_s, seen if first_q is None else seen & (slot_s[None] >= first_q[:, None]), carry)

    def block(step, carry):
        place_s = step * block_slots + jnp.arange(block_slots, dtype=jnp.int32)
        last_s = jnp.minimum(place_s, t - 1)
        seen = seen_ref[place_q[:, None], last_s[None]] != 0
        return visit(start + last_s, seen & (place_s[None] < t), carry)

    sums = tuple(jnp.zeros((tile, part.size), jnp.float32) for part in _parts(value_width, pl))
    carry = jnp.full((tile,), LOWEST, jnp.float32), jnp.zeros((tile,), jnp.float32), sums
    # Every program takes each splits-th step, so that all of them work at any length.
    lowest = 0 if first_q is None else jnp.maximum(jnp.min(first_q), 0) // (step_slots * splits)
    carry = lax.fori_loop(lowest, pl.cdiv(length - split * step_slots, step_slots * splits), prefix, carry)
    steps = jnp.where(split == 0, jnp.int32(pl.cdiv(t, block_slots)), jnp.int32(0))
    peak_q, total_q, sums = lax.fori_loop(jnp.int32(0), steps, block, carry)
    # A split without any slot has weight 0 in the merge.
    total_q = jnp.where(total_q > 0, total_q, 1.0)
    for sum_, part in zip(sums, _parts(value_width, pl), strict=True):
        out_ref[query_q, part] = sum_ / total_q[:, None]
    height_ref[query_q] = peak_q + jnp.log(total_q)


def _parts(width: int, pl):
    """Returns slices of powers of two, which a program needs, that make up the width. Example: 576 is 512 and 64."""
    powers = [power for power in (1 << i for i in reversed(range(width.bit_length()))) if width & power]
    return [pl.ds(sum(powers[:i]), power) for i, power in enumerate(powers)]


def _dot(x: Array, y: Array, axis: int) -> Array:
    """Returns the product over the last axis of x and this axis of y."""
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


@functools.cache
def _pallas() -> Any:
    """Returns Pallas and its part for GPUs through Triton, or None where JAX has none.

    Imported late, since it takes a while and few programs need it.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of JAX announce that the part will go
            from jax.experimental import pallas
            from jax.experimental.pallas import triton

            triton.CompilerParams  # noqa: B018
    except (ImportError, AttributeError):
        return None
    return pallas, triton
