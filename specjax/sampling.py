"""Sampling parameters, the one function that turns logits into probabilities, and the keys of every draw.

Drafting, verification and the emitted token all use :func:`warp`, so the scored distribution is the sampled one. The
order: logit bias; repetition, presence and frequency penalties; temperature; top-k; top-p; min-p.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike

from specjax import filters
from specjax.search import largest, most_likely

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""The penalties, and the values at which they change nothing."""


@struct.dataclass
class Sampling:
    """How to sample. Each field is one number for all rows, or one number per row ``[b]``.

    All fields are traced, so a change of a number compiles nothing. The defaults leave the model's distribution as it
    is. The three penalties and the bias are None by default, which compiles nothing for them. A change of the penalties
    from None to numbers compiles once: if one penalty is a number, all three are computed. A change of the bias from
    None to an array compiles once, too.

    Attributes:
      temperature: divides the logits. 0 is greedy decoding, where ties go to the lowest token id.
      top_k: keep the k most likely tokens, and tokens that tie with the last of these; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probabilities reach top_p, and ties (Holtzman et al. 2020,
        arXiv 1904.09751); 1 keeps all.
      min_p: keep tokens of at least min_p times the highest probability (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps
        all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the prompt or
        the output (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing, and None is not used.
      presence_penalty: subtracted from the logits of tokens that occur in the output; 0 changes nothing, and None is
        not used.
      frequency_penalty: subtracted once for each time a token occurs in the output; 0 changes nothing, and None is not
        used.
      seed: integers, or JAX keys, which are consumed. A row's text depends on its own seed alone. One integer s gives
        row i the seed s + i. One key gives row i the key ``jax.random.fold_in(key, i)``.
      logit_bias: floats added to the logits, ``[v]`` or ``[b, v]``; None adds nothing.
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0
    repetition_penalty: ArrayLike | None = None
    presence_penalty: ArrayLike | None = None
    frequency_penalty: ArrayLike | None = None
    seed: ArrayLike = 0
    logit_bias: ArrayLike | None = None

    def per_row(self, rows: int) -> "Sampling":
        """Returns the parameters with one entry per row.

        Arrays are ``[rows]``: ``top_k`` int32, ``seed`` uint32 or keys, all others float32. The penalties are None if
        none of them is used. The bias is float32 ``[rows, v]``, or None.
        """

        def spread(value: ArrayLike, dtype: Any) -> Array:
            if isinstance(value, jax.Array):
                return jnp.broadcast_to(value.astype(dtype), (rows,))
            # By NumPy, since each operation outside jit is a program of its own.
            return jax.device_put(np.broadcast_to(np.asarray(value).astype(dtype), (rows,)))

        penalties: dict[str, Any] = {name: getattr(self, name) for name in PENALTIES}
        if self.penalized:  # all three or none, so that there are two programs and not eight
            penalties = {
                name: spread(PENALTIES[name] if value is None else value, jnp.float32)
                for name, value in penalties.items()
            }
        bias = self.logit_bias
        if bias is not None:
            bias = jnp.asarray(bias, jnp.float32)
            bias = jnp.broadcast_to(jnp.atleast_2d(bias), (rows, bias.shape[-1]))
        return Sampling(
            temperature=spread(self.temperature, jnp.float32),
            top_k=spread(self.top_k, jnp.int32),
            top_p=spread(self.top_p, jnp.float32),
            min_p=spread(self.min_p, jnp.float32),
            seed=_seeds(self.seed, rows),
            logit_bias=bias,
            **penalties,
        )

    @property
    def penalized(self) -> bool:
        """Whether a penalty is given. A number that changes nothing counts, too: its value may be traced."""
        return any(getattr(self, name) is not None for name in PENALTIES)


def is_key(seed: Any) -> bool:
    """Returns whether a seed consists of typed JAX keys (``jax.random.key``)."""
    return jnp.issubdtype(getattr(seed, "dtype", np.dtype(int)), jax.dtypes.prng_key)


def _seeds(seed: Any, rows: int) -> Array:
    """Returns one seed per row: uint32 ``[rows]``, or keys ``[rows]``."""
    if is_key(seed):
        row_b = jnp.arange(rows, dtype=jnp.uint32)
        return seed if seed.ndim else jax.vmap(jax.random.fold_in, (None, 0))(seed, row_b)
    # Converted by NumPy first: a Python int of 2**31 or more does not fit JAX's default integer.
    known = not isinstance(seed, jax.Array)
    seed = (np.asarray(seed) if known else seed).astype(np.uint32)
    if not seed.ndim:
        seed = seed + (np if known else jnp).arange(rows, dtype=np.uint32)
    return jax.device_put(seed) if known else seed


def _column(value_b: ArrayLike) -> Array:
    """Returns ``[b]`` as ``[b, 1, 1]``, to be combined with ``[b, t, v]``."""
    return jnp.reshape(jnp.asarray(value_b), (-1, 1, 1))


@struct.dataclass
class Counts:
    """How often each token occurs.

    Attributes:
      prompt_bv: int32, occurrences in the prompt.
      output_bv: int32, occurrences among the tokens emitted so far.
    """

    prompt_bv: Array
    output_bv: Array


def count_tokens(tokens_bs: Array, prompt_length_b: Array, length_b: Array, vocab: int) -> Counts:
    """Counts the tokens of each row.

    Args:
      tokens_bs: int32, prompt and output; padding past a row's length.
      prompt_length_b: int32, tokens of each prompt.
      length_b: int32, tokens of prompt and output.
      vocab: v.
    """
    rows, slots = tokens_bs.shape
    slot_s = jnp.arange(slots, dtype=jnp.int32)[None]

    def histogram(inside_bs: Array) -> Array:
        row_b = jnp.arange(rows)[:, None]
        return jnp.zeros((rows, vocab), jnp.int32).at[row_b, tokens_bs].add(inside_bs.astype(jnp.int32))

    prompt_bs = slot_s < prompt_length_b[:, None]
    return Counts(histogram(prompt_bs), histogram((slot_s < length_b[:, None]) & ~prompt_bs))


def penalize(
    logits_btv: Array,
    sampling: Sampling,
    counts: Counts | None,
    drafts_bg: Array,
    first: int | Array = 0,
    before_btg: Array | None = None,
) -> Array:
    """Returns float32 logits ``[b, t, v]`` with the bias added and the penalties applied.

    Position j of a round counts drafts 0 .. j - 1 as emitted. If position j is used at all, they were accepted.

    Args:
      logits_btv: float32, for t positions of the round from position ``first`` on.
      sampling: per-row parameters.
      counts: counts of the tokens emitted before this round; None if the penalties are None.
      drafts_bg: int32, the round's drafts. Position j ignores drafts j and later.
      first: position of the first logits, 0 .. g + 1 - t. Example, g = 3: verification has t = 4 and ``first`` 0.
      before_btg: bool, for trees: which drafts count as emitted at each of the t places; ``first`` is ignored. None is
        a chain.
    """
    t, vocab = logits_btv.shape[1:]
    if sampling.logit_bias is not None:
        logits_btv = logits_btv + jnp.asarray(sampling.logit_bias)[:, None]
    if counts is None:
        return logits_btv
    repetition, presence, frequency = (_column(getattr(sampling, name)) for name in PENALTIES)
    # Drafts before a position count as output there.
    if before_btg is None:
        drafted_btv = lax.dynamic_slice_in_dim(_prefix_counts(drafts_bg, vocab), first, t, axis=1)
    else:
        one_hot_bgv = jax.nn.one_hot(drafts_bg, vocab, dtype=jnp.float32)
        drafted_btv = jnp.einsum("btg,bgv->btv", before_btg.astype(jnp.float32), one_hot_bgv).astype(jnp.int32)
    output_btv = counts.output_bv[:, None] + drafted_btv
    occurs_btv = (output_btv > 0).astype(jnp.float32)
    seen_btv = (counts.prompt_bv[:, None] + output_btv) > 0
    # The repetition penalty looks at the prompt as well, the two others at the output alone.
    repeated_btv = jnp.where(logits_btv > 0, logits_btv / repetition, logits_btv * repetition)
    logits_btv = jnp.where(seen_btv, repeated_btv, logits_btv)
    return logits_btv - presence * occurs_btv - frequency * output_btv.astype(jnp.float32)


def _prefix_counts(drafts_bg: Array, vocab: int) -> Array:
    """Returns int32 ``[b, g+1, v]``: entry j holds how often each token occurs among the first j drafts."""
    one_hot = jax.nn.one_hot(drafts_bg, vocab, dtype=jnp.int32)
    return jnp.pad(jnp.cumsum(one_hot, axis=1), ((0, 0), (1, 0), (0, 0)))


def warp(logits_btv: Array, sampling: Sampling) -> Array:
    """Returns the distribution that is sampled: temperature, top-k, top-p, min-p, in this order.

    Rows at temperature 0 get a one-hot distribution at the lowest id of the highest logit. With one-hot distributions
    every verification rule is the greedy rule.

    Args:
      logits_btv: float32, with penalties applied. They must not be NaN, or the distributions are.
      sampling: per-row parameters.

    Returns:
      float32 ``[b, t, v]``; each distribution sums to 1.
    """
    chex.assert_rank(logits_btv, 3)
    rows, places, vocab = logits_btv.shape

    def of_place(value_b: ArrayLike) -> Array:
        return jnp.repeat(jnp.asarray(value_b), places)[:, None]

    # Rows and places are one axis: on a TPU, few places of many rows would leave most of each tile empty.
    logits_xv = logits_btv.reshape(rows * places, vocab)
    temperature_x1, top_k_x1 = of_place(sampling.temperature), of_place(sampling.top_k)
    top_p_x1, min_p_x1 = of_place(sampling.top_p), of_place(sampling.min_p)
    greedy_x1 = temperature_x1 == 0

    def greedy() -> Array:
        return jax.nn.one_hot(most_likely(logits_xv), vocab, dtype=jnp.float32)

    def sampled() -> Array:
        # The highest logit becomes 0. Otherwise a tiny temperature would divide it to infinity.
        below_xv = logits_xv - jnp.max(logits_xv, axis=-1, keepdims=True)
        weights_xv = jnp.exp(below_xv / jnp.where(greedy_x1, 1.0, temperature_x1))
        total_x1 = jnp.sum(weights_xv, axis=-1, keepdims=True)
        # Filters search the vocabulary for a threshold, so they run only if some row asks for one.
        unfiltered_x1 = (top_k_x1 == 0) & (top_p_x1 == 1) & (min_p_x1 == 0)

        def filtered() -> Array:
            asked = filters.Filters(top_k_x1, top_p_x1, min_p_x1, unfiltered_x1 | greedy_x1)
            kept = filters.keep(weights_xv, total_x1, asked)
            kept_xv = jnp.where(weights_xv >= kept.least, weights_xv, 0.0)
            # A row without filters keeps its exact bits, whatever the other rows ask for.
            kept_x1 = jnp.where(unfiltered_x1, total_x1, kept.total)
            return jnp.where(unfiltered_x1, weights_xv, kept_xv) / kept_x1

        probs_xv = lax.cond(jnp.all(unfiltered_x1), lambda: weights_xv / total_x1, filtered)
        return lax.cond(jnp.any(greedy_x1), lambda: jnp.where(greedy_x1, greedy(), probs_xv), lambda: probs_xv)

    return lax.cond(jnp.all(greedy_x1), greedy, sampled).reshape(rows, places, vocab)


# The purposes of a draw. Two draws of one row have the same noise only if purpose and place are the same.
_EMIT, _DRAFT, _ACCEPT = 0, 1, 2


def row_keys(sampling: Sampling) -> Array:
    """Returns one Threefry key per row, made from the rows' seeds. ``random_bits`` takes Threefry keys only."""
    seed_b: Any = sampling.seed
    if not is_key(seed_b):
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0, impl="threefry2x32"), seed_b)
    if str(jax.random.key_impl(seed_b)) == "threefry2x32":
        return seed_b
    # A key of another kind gives the bits of a Threefry key.
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(seed_b)
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


@struct.dataclass
class RoundDraws:
    """The draws of one round (a ``types.Draws``).

    The emitted token's noise is keyed by (row, absolute position), since a position is emitted once. Noise for drafts
    and acceptance is keyed by (row, length at the round's start, place in the round), not by absolute position. The
    reason: block verification decides from *all* drafts and uniforms of a round. So rejected drafts are not independent
    of the accepted length, and the next round visits their positions again. Example: a round starts at length 10 with
    g = 3 and accepts one draft. The next round starts at length 12 and drafts position 12 again, with other noise.

    Attributes:
      keys_b: one Threefry key per row.
      length_b: int32, the rows' lengths as the round starts.
      sampled: bool scalar, whether any row has a temperature above 0. If none has, no noise is computed.
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
        """Returns float32 ``[b, count]`` in [0, 1), one for each draft position."""
        keys = self._keys(_ACCEPT, self.length_b)
        return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)

    def emit(self, weights_bv: Array, offset_b: Array, distinct: tuple[int, Array] | None = None) -> Array:
        """Returns int32 ``[b]``, the token to emit ``offset_b`` places past the row's end; ``distinct`` as below."""
        return self._race(weights_bv, lambda: self._keys(_EMIT, self.length_b + offset_b), distinct)

    def draft(self, weights_bv: Array, index: int | Array, distinct: tuple[int, Array] | None = None) -> Array:
        """Returns int32 ``[b]``, the draft token ``index``. Its noise is used for no other draw.

        ``distinct``, a number n and float32 ``[b, v]``, asks for int32 ``[b, n]``: that token, and n - 1 others, drawn
        without replacement. Where all tokens of weight above 0 are drawn, the highest entry that is left is next.
        """
        index_b = jnp.full_like(self.length_b, index)
        return self._race(weights_bv, lambda: self._keys(_DRAFT, self.length_b, index_b), distinct)

    def _race(self, weights_bv: Array, keys: Any, distinct: tuple[int, Array] | None = None) -> Array:
        if distinct is None:
            return lax.cond(self.sampled, lambda: exponential_race(weights_bv, keys()), lambda: most_likely(weights_bv))
        count, else_bv = distinct
        # The first arrivals of one race are draws without replacement (Efraimidis and Spirakis 2006).
        rate_bv = lax.cond(self.sampled, lambda: arrivals(weights_bv, keys()), lambda: weights_bv)
        last_bv = else_bv - jnp.max(else_bv, axis=-1, keepdims=True) - 1  # below 0
        return largest(jnp.where(weights_bv > 0, rate_bv, last_bv), count)


def exponential_race(weights_bv: Array, keys_b: Array) -> Array:
    """Draws one token per row with probability proportional to its weight.

    The token is the first of independent exponential arrivals with the weights as rates: argmax(w / E). This equals the
    Gumbel-max trick, argmax(log w + G) with G = -log E, and needs one logarithm less. Keys are consumed.

    Args:
      weights_bv: float32, at least 0 and not NaN, for which the last token is drawn.
      keys_b: one Threefry key per row.

    Returns:
      int32 ``[b]``. A token of weight 0 is never drawn unless all weights are 0.
    """
    return most_likely(arrivals(weights_bv, keys_b))


def arrivals(weights_bv: Array, keys_b: Array) -> Array:
    """Returns float32 ``[b, v]``, w / E for each token, with E of an exponential law; see ``exponential_race``."""
    # 32 random bits per token, where jax.random.uniform has 23: rare tokens keep their probabilities.
    uniform_bv = (random_bits(keys_b, weights_bv.shape[-1]).astype(jnp.float32) + 0.5) * 2.0**-32
    arrival_bv = -jnp.log1p(-jnp.minimum(uniform_bv, 1 - 2.0**-24))  # finite, so that the only possible token wins
    return weights_bv / arrival_bv


def random_bits(keys_b: Array, count: int) -> Array:
    """Returns uint32 ``[b, count]``: ``jax.random.bits`` of each Threefry key (Salmon et al. 2011), bit for bit.

    The 20 rounds are unrolled, so XLA fuses them with the code that uses the bits. On a CPU JAX's own function is a
    loop over memory, with which a race over 4096 tokens takes 3 times as long.
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
