"""How many drafts the next round takes: chosen on the device from what was accepted, and from what rounds cost.

The choice looks at earlier rounds alone, never at the drafts that it admits. So the text keeps the target's law
(docs/exactness.md).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from specjax.engine.tree import depth_of, longest_path
from specjax.types import Drafter, Verdict

PRIOR = 0.8
"""The acceptance of a draft, given that the one before it was accepted, before anything is known."""

_WEIGHT = 2.0  # in drafts: of the prior in what all rows saw, and of that in what is expected of one row
_MEMORY = 0.97  # of evidence, per draft at a position, or per round without one there: the last 33 or so count
_SLOWEST = 8  # the norm of rows' times to come: the larger, the more the row counts that will be done last
_TRIAL = 2.5  # drafts, at the first position and in all rows together, before they are judged: three rounds of one row
_LEAST, _MOST = 3, 8  # rounds of a trial; the most count where rows propose too little to be judged
_PAUSE = 250.0  # plain rounds between two trials if no draft was accepted
_SHORTEST_PAUSE, _LONGEST_PAUSE = 8.0, 1024.0
_UNCUT = 16  # rounds: in one of so many, drafters that cut their drafts cut none

UNOBSERVED = 16
"""The most tokens of a row that plain rounds leave for the drafter to observe later, all in one pass."""


def places_past(num_draft: int, adapts: bool) -> int:
    """Returns how many slots past a row's end are written, by a round or by a late look at plain rounds' tokens."""
    return max(num_draft, UNOBSERVED) if adapts else num_draft


def widths_of(drafter: Drafter) -> tuple[int, ...]:
    """Returns the widths of rounds that are compiled: none, half and all of the drafts. Example: (0, 2, 4).

    A drafter that is ``sparse`` or ``cuts`` drafts all or none. Its rounds have further passes for where less is
    proposed, so each width compiles for several times as long. The smaller one of two trees has as many drafts as a
    path. Example: (0, 5, 32).
    """
    g, depth = drafter.num_draft, depth_of(drafter)
    if passes_of(drafter):
        return (0, g)
    return tuple(sorted({0, (g + 1) // 2 if depth is None else depth, g}))


def passes_of(drafter: Drafter) -> tuple[int, ...]:
    """Returns for how many drafts the target's pass may have room once the drafts are known.

    It is empty for drafters whose rounds have one pass, with room for all that the round drafts.
    """
    g = drafter.num_draft
    if getattr(drafter, "cuts", False):
        return tuple(sorted({0, (g + 1) // 2, g}))
    return (0, g) if getattr(drafter, "sparse", False) else ()


def drafts_of(drafter: Drafter) -> tuple[int, ...]:
    """Returns the most drafts of a round of each cost: of each width, or of each pass of a drafter that cuts.

    Example: (0, 0, 2, 4) is a plain round, and rounds of four drafts that propose none, up to two, and up to four.
    """
    return (0, *passes_of(drafter)) if getattr(drafter, "cuts", False) else widths_of(drafter)


def kept_by(drafter: Drafter) -> tuple[int, ...]:
    """Returns the most drafts that a round of each cost keeps: those of ``drafts_of``, or of a path of a tree."""
    return tuple(min(drafts, longest_path(drafter)) for drafts in drafts_of(drafter))


@struct.dataclass
class Adapt:
    """What is known of drafting. Rows first, as in all of the loop's state.

    Evidence is kept for each draft of a chain, since a round of fewer drafts has the first ones of a wider round. A
    smaller tree has other drafts than a larger one, so trees have evidence for each width, and in it for each depth.

    Attributes:
      tried_be: float32, how often draft j was verified after draft j - 1 was accepted; earlier rounds count less.
      kept_be: float32, how often it was accepted then.
      proposing_b: float32, the share of rounds in which the row proposed anything, among those that drafted.
      wide_b: float32, the mean share of the widest pass's further time that the passes of these rounds took; the same
        in all rows. Example: passes over all drafts in half of the rounds, and over none in the others: 0.5.
      looked_b: int32, the rounds of the trial so far; the same in all rows.
      width_b: int32, the number of the next round's width in ``widths``; the same in all rows.
      rest_b: float32, how many plain rounds are to come before drafting is tried again.
      pause_b: float32, how many there were last time.
      features: what plain rounds kept for the drafter: ``[b, UNOBSERVED, d]``, one per index of its ``capture``.
      unobserved_b: int32, how many tokens of plain rounds the drafter has not seen; at most ``UNOBSERVED`` if it
        captures features.
      widths: the most drafts that rounds of the widths that are compiled keep. Drafts of a tree count by depth, here
        and above.
      trees: whether the drafter proposes trees.
    """

    tried_be: Array
    kept_be: Array
    proposing_b: Array
    wide_b: Array
    looked_b: Array
    width_b: Array
    rest_b: Array
    pause_b: Array
    features: tuple[Array, ...]
    unobserved_b: Array
    widths: tuple[int, ...] = struct.field(pytree_node=False)
    trees: bool = struct.field(pytree_node=False)

    @classmethod
    def start(cls, cost_bw: Array, widths: tuple[int, ...], features: tuple[Any, ...], trees: bool = False) -> "Adapt":
        """Returns what is known before the first round.

        Args:
          cost_bw: float32, the time of a round of each width, over that of a plain one; the same in all rows. Costs of
            a drafter that cuts are those of ``kept_by``, here and below.
          widths: from ``kept_by``.
          features: shapes ``[1, 1, d]`` and dtypes of the states that the drafter captures.
          trees: whether the drafter proposes trees.
        """
        rows, widths = cost_bw.shape[0], widths if widths[1] else (0, widths[-1])
        zero_be = jnp.zeros((rows, sum(widths) if trees else widths[-1]), jnp.float32)
        zero_b = jnp.zeros((rows,), jnp.int32)
        return cls(
            tried_be=zero_be,
            kept_be=zero_be,
            proposing_b=jnp.ones((rows,), jnp.float32),
            wide_b=jnp.ones((rows,), jnp.float32),
            looked_b=zero_b,
            width_b=zero_b + _narrowest(_by_width(cost_bw[0], widths), widths),
            rest_b=jnp.zeros((rows,), jnp.float32),
            pause_b=jnp.zeros((rows,), jnp.float32),
            features=tuple(jnp.zeros((rows, UNOBSERVED, x.shape[-1]), x.dtype) for x in features),
            unobserved_b=zero_b,
            widths=widths,
            trees=trees,
        )

    @property
    def width(self) -> Array:
        """int32 scalar, the number of the next round's width. A row that was inserted waits while the others pause."""
        return jnp.min(self.width_b)

    def after_drafts(
        self, cost_bw: Array, running_b: Array, room_b: Array, length_b: Array, verdict: Verdict, wide: float | Array
    ) -> "Adapt":
        """Returns what is known after a round with drafts.

        Args:
          cost_bw: as for ``start``.
          running_b: bool, the rows that ran.
          room_b: int32, how many drafts each could use.
          length_b: int32, how many drafts each row proposed. Of a tree and of a drafter that cuts, how many a path
            could have had: a depth that a tree lacks, and a draft that was cut, count as rejected.
          verdict: what became of them.
          wide: the share of the widest pass's further time that the target's pass took: 0 without proposals.
        """
        # On a GPU, rounds of a block go on after the last row is done, or after drafting was given up.
        counted = jnp.any(running_b) & (self.width > 0)
        place_1e, accepted_b1 = self._places(), verdict.num_accepted_b[:, None]
        proposed_be = (place_1e >= 0) & (place_1e < length_b[:, None])
        counts_be = proposed_be & (place_1e <= accepted_b1) & running_b[:, None]
        kept_be = (place_1e < accepted_b1).astype(jnp.float32)
        # Bad luck at a position is forgotten though narrow rounds draft nothing there.
        memory_be = jnp.where(running_b[:, None] & (counts_be | ~proposed_be), _MEMORY, 1.0)
        free_b = running_b & (room_b > 0)
        share_b = _MEMORY * self.proposing_b + (1 - _MEMORY) * (length_b > 0).astype(jnp.float32)
        after = dataclasses.replace(
            self,
            tried_be=memory_be * self.tried_be + counts_be.astype(jnp.float32),
            kept_be=memory_be * self.kept_be + jnp.where(counts_be, kept_be, 0),
            proposing_b=jnp.where(free_b, share_b, self.proposing_b),
            wide_b=_MEMORY * self.wide_b + (1 - _MEMORY) * wide,
            looked_b=self.looked_b + 1,
        )._choose(cost_bw, running_b, room_b)
        return jax.tree.map(lambda new, old: jnp.where(counted, new, old), after, self)

    def after_plain(self, cost_bw: Array, running_b: Array, features: tuple[Array, ...]) -> "Adapt":
        """Returns what is known after a plain round, whose ``features`` ``[b, 1, d]`` the drafter has not seen."""
        here_bt1 = (jnp.arange(UNOBSERVED, dtype=jnp.int32)[None] == self.unobserved_b[:, None])[..., None]
        features = tuple(jnp.where(here_bt1, new, old) for old, new in zip(self.features, features, strict=True))
        rest_b = jnp.maximum(self.rest_b - 1, 0)
        over = ~jnp.any((rest_b > 0) & running_b)
        return dataclasses.replace(
            self,
            width_b=jnp.where(over, jnp.full_like(self.width_b, self._trial(cost_bw)), 0),
            rest_b=rest_b,
            features=features,
            unobserved_b=self.unobserved_b + running_b.astype(jnp.int32),
        )

    def observed(self, count_b: Array) -> "Adapt":
        """Returns the same after the drafter has seen ``count_b`` tokens more."""
        return dataclasses.replace(self, unobserved_b=self.unobserved_b - count_b)

    def forgotten(self, rows_b: Array) -> "Adapt":
        """Returns the same where the rows ``rows_b``, bool, have new texts. What all rows share stays."""
        new_b1 = rows_b[:, None]
        return dataclasses.replace(
            self,
            tried_be=jnp.where(new_b1, 0, self.tried_be),
            kept_be=jnp.where(new_b1, 0, self.kept_be),
            proposing_b=jnp.where(rows_b, 1, self.proposing_b),
            unobserved_b=jnp.where(rows_b, 0, self.unobserved_b),
        )

    def _entries(self) -> list[range]:
        """Returns the entries of the evidence for each width, by depth."""
        if not self.trees:
            return [range(width) for width in self.widths]
        ends = itertools.accumulate(self.widths)
        return [range(end - width, end) for width, end in zip(self.widths, ends, strict=True)]

    def _places(self) -> Array:
        """Returns int32 ``[1, e]``, the draft of this round's paths that each entry is about; -1 for none."""
        if not self.trees:
            return jnp.arange(self.widths[-1], dtype=jnp.int32)[None]
        entries = [(number, depth) for number, width in enumerate(self.widths) for depth in range(width)]
        number_e, depth_e = jnp.asarray(entries, jnp.int32).T
        return jnp.where(number_e == self.width, depth_e, -1)[None]

    def _first_tried(self) -> Array:
        """Returns float32 ``[b]``, how often first drafts were verified."""
        first = {entries.start for entries in self._entries() if entries}
        return jnp.sum(self.tried_be[:, np.asarray(sorted(first))], axis=1)

    def _trial(self, cost_bw: Array) -> Array:
        return _narrowest(_by_width(cost_bw[0], self.widths), self.widths)

    def price(self, cost_bw: Array, passes: tuple[int, ...], running_b: Array, room_b: Array) -> Array:
        """Returns ``Context.price_bg`` for a drafter whose pass has room for one of ``passes``.

        A round that takes more time than another should bring as many tokens more as rounds bring in that time on
        average. In a batch the rows that run share the price, since the pass is as wide as its longest row: so all rows
        that cut while one goes on lose less than one row's price together.

        No draft has a price in a trial and in each ``_UNCUT``-th round, so that drafts whose chances are
        underestimated are tried, too.
        """
        emitted_w, cost_w = self._expected(running_b, room_b), self._spent(cost_bw)
        rate = jnp.maximum(emitted_w[-1] / cost_w[-1], 1.0)
        step_p = jnp.diff(cost_bw[0, -len(passes) :])
        uncut = (self.looked_b[0] < _LEAST) | (self.looked_b[0] % _UNCUT == _UNCUT - 1)
        step_p = jnp.where(uncut | ~jnp.isfinite(step_p), 0.0, step_p)
        share = rate / jnp.maximum(jnp.sum(running_b.astype(jnp.float32)), 1)
        price_g = jnp.zeros((self.tried_be.shape[1],), jnp.float32).at[np.asarray(passes[:-1])].set(share * step_p)
        return jnp.broadcast_to(price_g[None], self.tried_be.shape)

    def _spent(self, cost_bw: Array) -> Array:
        """Returns the mean time of rounds of each width; one without proposals takes the time of a plain one."""
        cost_w = _by_width(cost_bw[0], self.widths)
        return 1 + self.wide_b[0] * (cost_w - 1)

    def _choose(self, cost_bw: Array, running_b: Array, room_b: Array) -> "Adapt":
        """Returns the same with the width that is soonest done, and a pause before a trial if that is none."""
        # 1. A trial takes the fewest drafts that might pay, since it may be in vain.
        cost_w, left_b = self._spent(cost_bw), self._left(running_b, room_b)
        best = jnp.argmax(self._expected(running_b, room_b) / cost_w)
        looked, tried = self.looked_b[0], jnp.sum(jnp.where(running_b, self._first_tried(), 0))
        trying = (looked < _LEAST) | ((tried < _TRIAL) & (looked < _MOST))
        width = jnp.where(trying, _narrowest(cost_w, self.widths), best)

        # 2. The pause. Without the prior, how much of what drafts cost was lost: all if none was accepted. It is little
        # where text that is now easy and now hard is the cause, so that drafts soon pay again: hence the third power.
        found_be = self.kept_be / jnp.maximum(self.tried_be, 1)
        kept_w = self._emitted(found_be, left_b) - 1
        lost = 1 - jnp.max(kept_w[1:] / jnp.maximum(cost_w[1:] - 1, 1e-3))
        pause_b = jnp.maximum(_PAUSE * lost**3, 2 * self.pause_b)
        pause_b = jnp.ceil(jnp.clip(pause_b, _SHORTEST_PAUSE, _LONGEST_PAUSE))
        stops, judged = width == 0, ~trying
        # Little of the evidence remains, so that a few drafts of the next trial count.
        few_b1 = jnp.where(stops, 1 / jnp.maximum(self._first_tried(), 1), 1.0)[:, None]
        return dataclasses.replace(
            self,
            tried_be=self.tried_be * few_b1,
            kept_be=self.kept_be * few_b1,
            looked_b=jnp.where(stops, 0, self.looked_b),
            width_b=jnp.full_like(self.width_b, width),
            rest_b=jnp.where(stops, pause_b, self.rest_b),
            pause_b=jnp.where(stops, pause_b, jnp.where(judged, 0.0, self.pause_b)),
        )

    def _left(self, running_b: Array, room_b: Array) -> Array:
        """Returns float32, the most tokens that each row may still emit."""
        return jnp.where(running_b, room_b + 1, 0).astype(jnp.float32)

    def _expected(self, running_b: Array, room_b: Array) -> Array:
        """Returns float32 ``[widths]``, the tokens that are expected of a round of each width."""
        prior_be, found = PRIOR, []
        for entries in self._entries()[1:] if self.trees else [range(self.widths[-1])]:
            tried_be, kept_be = (x[:, entries.start : entries.stop] for x in (self.tried_be, self.kept_be))
            others_tried_be = jnp.sum(tried_be, axis=0)[None] - tried_be
            others_kept_be = jnp.sum(kept_be, axis=0)[None] - kept_be
            prior_be = (_WEIGHT * prior_be + others_kept_be) / (_WEIGHT + others_tried_be)
            found.append((_WEIGHT * prior_be + kept_be) / (_WEIGHT + tried_be))
            prior_be = (1 + found[-1]) / 2  # a larger tree has more drafts at each depth
        return self._emitted(jnp.concatenate(found, axis=1), self._left(running_b, room_b))

    def _emitted(self, accept_be: Array, left_b: Array) -> Array:
        """Returns float32 ``[widths]``, the tokens of a round at these probabilities: a mean over rows.

        A batch is done when its last row is. So the mean is that which gives the norm of the rounds that rows still
        take, and rows count by the most tokens that they may still emit, ``left_b``.
        """
        accepts = [accept_be[:, entries.start : entries.stop] for entries in self._entries()]
        kept_bw = jnp.stack([jnp.sum(jnp.cumprod(each, axis=1), axis=1) for each in accepts], axis=1)
        emitted_bw = 1 + self.proposing_b[:, None] * kept_bw
        share_b1 = ((left_b / jnp.maximum(jnp.max(left_b), 1)) ** _SLOWEST)[:, None]
        rounds_w = jnp.sum(share_b1 / emitted_bw**_SLOWEST, axis=0) / jnp.maximum(jnp.sum(share_b1), 1e-6)
        return jnp.maximum(rounds_w, 1e-30) ** (-1 / _SLOWEST)


def share_of(cost_p: Array, number: int) -> Array:
    """Returns the share of the widest pass's further time that a pass takes, from the costs of all passes."""
    further = cost_p[-1] - 1
    known = jnp.isfinite(further) & (further > 0)
    return jnp.where(known, jnp.maximum(cost_p[number] - 1, 0) / jnp.where(known, further, 1.0), 1.0)


def _by_width(cost_w: Array, widths: tuple[int, ...]) -> Array:
    """Returns the costs of the widths that rounds have; of a drafter that cuts, a plain round's and the widest pass's.

    Costs that are infinite force one pass. Then the cost of a round with drafts is that of the pass.
    """
    if len(cost_w) == len(widths):
        return cost_w
    most = jnp.where(jnp.isinf(cost_w[-1]), jnp.min(cost_w[1:]), cost_w[-1])
    return jnp.stack([cost_w[0], most])


def _narrowest(cost_w: Array, widths: tuple[int, ...]) -> Array:
    """Returns the number of the narrowest width above 0 that would pay if all drafts were accepted; 0 if none would."""
    most_w = 1 + jnp.asarray(widths, jnp.float32)
    return jnp.argmax(most_w > cost_w).astype(jnp.int32)
