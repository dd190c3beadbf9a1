"""How far a row drafts where a draft head tells the chance of each draft before the draft is drawn."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

BINS = 5
"""Bins of confidence at each position, of equal width."""

_WEIGHT = 8.0  # in drafts: of the confidence itself in what is expected of its bin
_RATE, _RATE_WEIGHT = 0.8, 2.0  # the acceptance of a position before anything is known, and its weight in drafts
_MEMORY = 0.99  # of evidence, per draft at a position: the last 100 or so count


@struct.dataclass
class Calibration:
    """What confidences are worth: of drafts with such a confidence, how many were accepted. Rows first.

    Each position of a draft has ``BINS`` bins of confidence (histogram binning, Zadrozny and Elkan 2001). A bin's
    evidence is weighed against the confidence itself, so a row without evidence believes the draft head. Only earlier
    rounds count: nothing of a round's own drafts does.

    Attributes:
      tried_bgk: float32, how often draft j had a confidence in bin k and was verified after draft j - 1 was accepted.
      kept_bgk: float32, how often it was accepted then.
      bin_bg: int32, the bins of the last round's drafts.
      length_b: int32, how many drafts the row proposed in the last round.
    """

    tried_bgk: Array
    kept_bgk: Array
    bin_bg: Array
    length_b: Array

    @classmethod
    def start(cls, rows: int, num_draft: int) -> "Calibration":
        """Returns what is known before the first round: nothing."""
        zero_bgk = jnp.zeros((rows, num_draft, BINS), jnp.float32)
        return cls(zero_bgk, zero_bgk, jnp.zeros((rows, num_draft), jnp.int32), jnp.zeros((rows,), jnp.int32))

    def chance(self, confidence_b: Array, index: int | Array) -> tuple[Array, Array]:
        """Returns the chance of draft ``index`` after the drafts before it, float32 ``[b]``, and the bin, int32."""
        bin_b = jnp.clip((confidence_b * BINS).astype(jnp.int32), 0, BINS - 1)

        def of_bin(counts_bgk: Array) -> Array:
            counts_bk = jax.lax.dynamic_index_in_dim(counts_bgk, index, axis=1, keepdims=False)
            return jnp.take_along_axis(counts_bk, bin_b[:, None], axis=1)[:, 0]

        kept_b, tried_b = of_bin(self.kept_bgk), of_bin(self.tried_bgk)
        return (_WEIGHT * confidence_b + kept_b) / (_WEIGHT + tried_b), bin_b

    @property
    def rate_bg(self) -> Array:
        """float32, the chance of each draft after the one before it was accepted, whatever its confidence."""
        kept_bg, tried_bg = self.kept_bgk.sum(-1), self.tried_bgk.sum(-1)
        return (_RATE_WEIGHT * _RATE + kept_bg) / (_RATE_WEIGHT + tried_bg)

    def proposed(self, bin_bg: Array, length_b: Array) -> "Calibration":
        """Returns the same after a proposal of ``length_b`` drafts with confidences in these bins."""
        return dataclasses.replace(self, bin_bg=bin_bg, length_b=length_b)

    def after(self, accepted_b: Array, ran_b: Array) -> "Calibration":
        """Returns what is known after the last proposal was verified, in rows that ran."""
        place_g = jnp.arange(self.bin_bg.shape[1], dtype=jnp.int32)[None]
        tried_bg = (place_g < self.length_b[:, None]) & (place_g <= accepted_b[:, None])
        bins_bgk = jax.nn.one_hot(self.bin_bg, BINS, dtype=jnp.float32)
        tried_bg = tried_bg & ran_b[:, None]
        # Evidence fades as more comes, so that rounds that cut nothing add up, however seldom they are.
        memory_bg1 = jnp.where(tried_bg, _MEMORY, 1.0)[..., None]

        def counted(counts_bgk: Array, true_bg: Array) -> Array:
            return memory_bg1 * counts_bgk + jnp.where(true_bg[..., None], bins_bgk, 0.0)

        kept_bg = tried_bg & (place_g < accepted_b[:, None])
        tried_bgk, kept_bgk = counted(self.tried_bgk, tried_bg), counted(self.kept_bgk, kept_bg)
        return dataclasses.replace(self, tried_bgk=tried_bgk, kept_bgk=kept_bgk)


@struct.dataclass
class Confident:
    """The state of a drafter that cuts its drafts: the draft head's own state, and what its confidences are worth."""

    own: Any
    calibration: Calibration


def pays(reached_b: Array, index: int | Array, rate_bg: Array, price_bg: Array) -> Array:
    """Returns bool ``[b]``, whether a row should go on and propose draft ``index``.

    It should if, for some number of further drafts, the tokens that these are expected to bring are worth their price.
    The decision reads the drafts before draft ``index`` (by ``reached_b``) and earlier rounds, never draft ``index`` or
    anything after it. So it is exact (docs/exactness.md).

    Args:
      reached_b: float32, the chance that draft ``index`` and all before it are accepted.
      index: the draft, from 0; it may be traced.
      rate_bg: float32, the chance of each later draft after the one before it was accepted.
      price_bg: float32, ``Context.price_bg``.
    """
    place_g = jnp.arange(price_bg.shape[1], dtype=jnp.int32)[None]
    after_bg = jnp.cumprod(jnp.where(place_g > index, rate_bg, 1.0), axis=1)
    gain_bg = jnp.where(place_g >= index, reached_b[:, None] * after_bg - price_bg, 0.0)
    return jnp.max(jnp.where(place_g >= index, jnp.cumsum(gain_bg, axis=1), -jnp.inf), axis=1) >= 0
