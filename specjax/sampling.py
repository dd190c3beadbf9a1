"""Sampling parameters, the one function that turns logits into probabilities, and the keys of every draw.

Draft, verification and bonus all go through :func:`warp`, so that what is scored is what is sampled. The order:
logit bias; repetition, presence and frequency penalties; temperature; top-k; top-p; min-p.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike


@struct.dataclass
class Sampling:
    """How to sample: each field one number for all rows, or one per row ``[b]``.

    All are traced: changing them compiles nothing. The defaults leave the model's distribution as it is.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding, where ties go to the lowest token id.
      top_k: keep the k most likely tokens, and those that tie with the last of them; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probabilities reach top_p, and ties (Holtzman et al. 2020).
      min_p: keep tokens of at least min_p times the highest probability (Nguyen et al. 2024).
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the prompt or
        the output (Keskar et al. 2019).
      presence_penalty: subtracted from the logits of tokens that occur in the output.
      frequency_penalty: subtracted once for each time a token occurs in the output.
      seed: integers, or JAX keys, which are consumed. A row's text depends on its own seed alone. One integer s gives
        row i the seed s + i; one key gives it that key folded with i.
      logit_bias: added to the logits, ``[v]`` or ``[b, v]``. None adds nothing; going from None to an array
        compiles anew.
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0
    repetition_penalty: ArrayLike = 1.0
    presence_penalty: ArrayLike = 0.0
    frequency_penalty: ArrayLike = 0.0
    seed: ArrayLike = 0
    logit_bias: ArrayLike | None = None

    def per_row(self, rows: int) -> "Sampling":
        """Returns the parameters as float32 and int32 arrays ``[rows]``, the bias as ``[rows, v]``."""

        def spread(value: ArrayLike, dtype: Any) -> Array:
            return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

        bias = self.logit_bias
        if bias is not None:
            bias = jnp.asarray(bias, jnp.float32)
            bias = jnp.broadcast_to(jnp.atleast_2d(bias), (rows, bias.shape[-1]))
        return Sampling(
            temperature=spread(self.temperature, jnp.float32),
            top_k=spread(self.top_k, jnp.int32),
            top_p=spread(self.top_p, jnp.float32),
            min_p=spread(self.min_p, jnp.float32),
            repetition_penalty=spread(self.repetition_penalty, jnp.float32),
            presence_penalty=spread(self.presence_penalty, jnp.float32),
            frequency_penalty=spread(self.frequency_penalty, jnp.float32),
            seed=_seeds(self.seed, rows),
            logit_bias=bias,
        )


def is_key(seed: Any) -> bool:
    """Returns whether a seed is made of JAX keys of the new kind (``jax.random.key``)."""
    return jnp.issubdtype(getattr(seed, "dtype", np.dtype(int)), jax.dtypes.prng_key)


def _seeds(seed: Any, rows: int) -> Array:
    """Returns one seed per row: uint32 ``[rows]``, or keys ``[rows]``."""
    if is_key(seed):
        row_b = jnp.arange(rows, dtype=jnp.uint32)
        return seed if seed.ndim else jax.vmap(jax.random.fold_in, (None, 0))(seed, row_b)
    # By way of NumPy, since a Python int above 2**31 does not fit JAX's default integer.
    seed = seed if isinstance(seed, jax.Array) else np.asarray(seed)
    seed = jnp.asarray(seed.astype(jnp.uint32))
    return seed if seed.ndim else seed + jnp.arange(rows, dtype=jnp.uint32)


def _column(value_b: ArrayLike) -> Array:
    """``[b]`` as ``[b, 1, 1]``, to meet ``[b, t, v]``."""
    return jnp.reshape(jnp.asarray(value_b), (-1, 1, 1))


@struct.dataclass
class Counts:
    """How often each token occurs; zeros while no row has a penalty.

    Attributes:
      prompt_bv: int32, in the prompt.
      output_bv: int32, among the tokens emitted so far.
    """

    prompt_bv: Array
    output_bv: Array


def _penalized(sampling: Sampling) -> Array:
    return jnp.any(
        (jnp.asarray(sampling.repetition_penalty) != 1)
        | (jnp.asarray(sampling.presence_penalty) != 0)
        | (jnp.asarray(sampling.frequency_penalty) != 0)
    )


def count_tokens(tokens_bs: Array, prompt_length_b: Array, length_b: Array, vocab: int, sampling: Sampling) -> Counts:
    """Counts the tokens of each row."""
    rows, slots = tokens_bs.shape
    slot_s = jnp.arange(slots, dtype=jnp.int32)[None]

    def histogram(inside_bs: Array) -> Array:
        row_b = jnp.arange(rows)[:, None]
        return jnp.zeros((rows, vocab), jnp.int32).at[row_b, tokens_bs].add(inside_bs.astype(jnp.int32))

    def counted() -> Counts:
        prompt_bs = slot_s < prompt_length_b[:, None]
        return Counts(histogram(prompt_bs), histogram((slot_s < length_b[:, None]) & ~prompt_bs))

    empty = jnp.zeros((rows, vocab), jnp.int32)
    return lax.cond(_penalized(sampling), counted, lambda: Counts(empty, empty))


def penalize(logits_btv: Array, sampling: Sampling, counts: Counts, drafts_bg: Array, first: int | Array = 0) -> Array:
    """Adds the bias and applies the penalties.

    Position j of a round counts drafts 0 .. j - 1 as emitted. If position j is used at all, they were accepted.

    Args:
      logits_btv: float32, of t positions of the round from ``first`` on.
      sampling: per-row parameters.
      counts: of the tokens emitted before this round.
      drafts_bg: int32, the round's drafts; those from the last position on are ignored.
      first: position of the first of the logits, 0 .. g + 1 - t.
    """
    t, vocab = logits_btv.shape[1:]
    if sampling.logit_bias is not None:
        logits_btv = logits_btv + jnp.asarray(sampling.logit_bias)[:, None]

    def penalized() -> Array:
        drafted_btv = lax.dynamic_slice_in_dim(_prefix_counts(drafts_bg, vocab), first, t, axis=1)
        output_btv = counts.output_bv[:, None] + drafted_btv
        occurs_btv = (output_btv > 0).astype(jnp.float32)
        seen_btv = (counts.prompt_bv[:, None] + output_btv) > 0
        factor = _column(sampling.repetition_penalty)
        repeated = jnp.where(logits_btv > 0, logits_btv / factor, logits_btv * factor)
        logits = jnp.where(seen_btv, repeated, logits_btv)
        logits = logits - _column(sampling.presence_penalty) * occurs_btv
        return logits - _column(sampling.frequency_penalty) * output_btv.astype(jnp.float32)

    return lax.cond(_penalized(sampling), penalized, lambda: logits_btv)


def _prefix_counts(drafts_bg: Array, vocab: int) -> Array:
    """Returns int32 ``[b, g+1, v]``: at j, how often each token occurs among the first j drafts."""
    one_hot = jax.nn.one_hot(drafts_bg, vocab, dtype=jnp.int32)
    return jnp.pad(jnp.cumsum(one_hot, axis=1), ((0, 0), (1, 0), (0, 0)))


def most_likely(scores_xv: Array) -> Array:
    """Returns int32 ``[..]``, the lowest id of the highest score.

    That is ``jnp.argmax``, as two reductions that XLA vectorises: on a CPU 5 times faster.
    """
    vocab = scores_xv.shape[-1]
    highest_x1 = jnp.max(scores_xv, axis=-1, keepdims=True)
    id_xv = lax.broadcasted_iota(jnp.int32, scores_xv.shape, scores_xv.ndim - 1)
    return jnp.min(jnp.where(scores_xv == highest_x1, id_xv, vocab - 1), axis=-1)


def warp(logits_btv: Array, sampling: Sampling) -> Array:
    """Returns the distribution that is sampled: temperature, top-k, top-p, min-p, in this order.

    Rows at temperature 0 get a one-hot at the lowest id of the highest logit. At one-hot distributions every
    verification rule is the greedy rule.

    Args:
      logits_btv: float32, penalties applied.
      sampling: per-row parameters.

    Returns:
      float32 ``[b, t, v]``, each summing to 1.
    """
    greedy_b11 = _column(sampling.temperature) == 0
    greedy = jax.nn.one_hot(most_likely(logits_btv), logits_btv.shape[-1], dtype=jnp.float32)

    def sampled() -> Array:
        # The highest logit becomes 0, or a tiny temperature would divide it to infinity.
        below_btv = logits_btv - jnp.max(logits_btv, axis=-1, keepdims=True)
        probs = jax.nn.softmax(below_btv / jnp.where(greedy_b11, 1.0, _column(sampling.temperature)), axis=-1)
        filters = (
            (jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1) | (jnp.asarray(sampling.min_p) > 0)
        )
        probs = lax.cond(jnp.any(filters), lambda: _filter(probs, sampling), lambda: probs)
        return jnp.where(greedy_b11, greedy, probs)

    return lax.cond(jnp.all(greedy_b11), lambda: greedy, sampled)


def _filter(probs_btv: Array, sampling: Sampling) -> Array:
    top_k, top_p, min_p = _column(sampling.top_k), _column(sampling.top_p), _column(sampling.min_p)
    kth = _largest(probs_btv, lambda at_least: jnp.sum(at_least, axis=-1, keepdims=True) >= top_k)
    probs = jnp.where((top_k == 0) | (probs_btv >= kth), probs_btv, 0.0)

    wanted = top_p * jnp.sum(probs, axis=-1, keepdims=True)
    last = _largest(probs, lambda at_least: jnp.sum(jnp.where(at_least, probs, 0.0), axis=-1, keepdims=True) >= wanted)
    # At top_p = 1 rounding of the sum would drop the tail.
    probs = jnp.where((top_p == 1) | (probs >= last), probs, 0.0)

    probs = jnp.where(probs >= min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0.0)
    probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    # A row without filters keeps its bits, whatever its neighbours ask for.
    return jnp.where((top_k == 0) & (top_p == 1) & (min_p == 0), probs_btv, probs)


def _largest(probs_btv: Array, enough: Any) -> Array:
    """Returns ``[b, t, 1]``, the largest float32 x in [0, 1] for which ``enough(probs >= x)``, exactly.

    Non-negative floats are ordered as their bit patterns, so 30 halvings find x to the last bit. On a CPU this is
    7 to 14 times faster than a sort of 4096 entries, and it needs only sums over the vocabulary.
    """

    def set_bit(i: Array, bits: Array) -> Array:
        tried = bits | (jnp.int32(1) << (29 - i))
        threshold = lax.bitcast_convert_type(tried, jnp.float32)
        return jnp.where(enough(probs_btv >= threshold), tried, bits)

    bits = lax.fori_loop(0, 30, set_bit, jnp.zeros((*probs_btv.shape[:-1], 1), jnp.int32))
    return lax.bitcast_convert_type(bits, jnp.float32)


# The purposes of a draw. Two draws of one row share noise only if purpose and place are the same.
_EMIT, _DRAFT, _ACCEPT = 0, 1, 2


def row_keys(sampling: Sampling) -> Array:
    """Returns one Threefry key per row, for which ``random_bits`` is written, from the rows' seeds."""
    seed_b: Any = sampling.seed
    if not is_key(seed_b):
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0, impl="threefry2x32"), seed_b)
    if str(jax.random.key_impl(seed_b)) == "threefry2x32":
        return seed_b
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(seed_b)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


@struct.dataclass
class RoundDraws:
    """The draws of one round (a ``types.Draws``).

    Noise for the emitted token is keyed by (row, absolute position): a position is emitted once. Noise for drafts
    and acceptance is keyed by (row, where the round starts, place in the round). The absolute position would not
    do: block verification decides from *all* of a round's drafts and uniforms, so those after the cut are no
    longer independent of what was kept, and the next round would visit their positions again.

    Attributes:
      keys_b: one key per row.
      length_b: int32, the rows' lengths as the round starts.
      sampled: bool scalar, whether any row has a temperature; without, no noise is computed.
    """

    keys_b: Array
    length_b: Array
    sampled: Array

    def _keys(self, purpose: int, *places_b: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys_b, purpose)
        for place_b in places_b:
            keys = jax.vmap(jax.random.fold_in)(keys, place_b)
        return keys

    def uniforms(self, count: int) -> Array:
        """Returns ``[b, count]`` in [0, 1)."""
        keys = self._keys(_ACCEPT, self.length_b)
        return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)

    def emit(self, weights_bv: Array, offset_b: Array) -> Array:
        """Draws the token to emit ``offset_b`` places past the row's end."""
        return self._race(weights_bv, lambda: self._keys(_EMIT, self.length_b + offset_b))

    def draft(self, weights_bv: Array, index: int | Array) -> Array:
        """Draws the draft token ``index``, with noise of its own."""
        index_b = jnp.full_like(self.length_b, index)
        return self._race(weights_bv, lambda: self._keys(_DRAFT, self.length_b, index_b))

    def _race(self, weights_bv: Array, keys: Any) -> Array:
        return lax.cond(self.sampled, lambda: exponential_race(weights_bv, keys()), lambda: most_likely(weights_bv))


def exponential_race(weights_bv: Array, keys_b: Array) -> Array:
    """Draws one token per row with probability proportional to its weight: the first of independent exponential
    arrivals with these rates, argmax(w / E). The same as Gumbel-max, argmax(log w + G) with G = -log E, for one
    logarithm less. Keys are consumed.

    Arrival times are exact to 2**-32, so that rare tokens keep their probabilities.

    Returns:
      int32 ``[b]``; a token of weight 0 is never drawn unless all are 0.
    """
    uniform_bv = (random_bits(keys_b, weights_bv.shape[-1]).astype(jnp.float32) + 0.5) * 2.0**-32
    arrival_bv = -jnp.log1p(-jnp.minimum(uniform_bv, 1 - 2.0**-24))  # finite, or the only possible token could lose
    return most_likely(weights_bv / arrival_bv)


def random_bits(keys_b: Array, count: int) -> Array:
    """Returns uint32 ``[b, count]``: ``jax.random.bits`` of each Threefry key (Salmon et al. 2011), bit for bit.

    Unrolled, so that XLA fuses the 20 rounds with what uses them. JAX's own is a loop over memory on a CPU, which
    makes a race over 4096 tokens 3 times slower.
    """
    key_b2 = jax.random.key_data(keys_b)
    first, second = key_b2[:, :1], key_b2[:, 1:]
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    index_1c = lax.iota(jnp.uint32, count)[None]
    x, y = schedule[0], index_1c + schedule[1]  # the counter's upper word is 0
    for group in range(5):
        for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ ((y << shift) | (y >> (32 - shift)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y
