"""Drafts from remembered text: a corpus, or what was generated before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.checks import check_integer
from specjax.drafters.ngram import Copies, copied_from_row
from specjax.rows import text_at
from specjax.types import Context, Draw, Proposal

_BREAK = -1  # in the memory: between two texts, and where nothing is remembered yet
_STRETCHES = 5


@struct.dataclass
class SuffixDrafter(Copies):
    """Finds a row's last tokens in remembered text and in the row itself, and proposes what followed there.

    This is drafting from a suffix array (REST, He et al. 2023, arXiv 2311.08252), with drafts whose number depends on
    the match (SuffixDecoding, Oliaro et al. 2024, arXiv 2411.04975). ``specjax.remember`` returns a drafter that has
    remembered more; ``empty`` makes one without text. The memory has a fixed size, and the oldest text is forgotten.

    - **Which match.** The longest one counts, up to ``max_n`` tokens. The row's own text wins over the memory if its
      match is as long (as for ``NGramDrafter``).
    - **Which drafts.** All places in the memory with this match are one range of the sorted suffixes. The drafts are
      those of the suffix in the middle of the range: a continuation that more than half of the places share is there.
    - **How many.** A match of n tokens allows n drafts. Of those from the memory, the drafts count that at least
      ``min_share`` of the places share. Example: "a b" was followed by "c d" twice and by "c e" once, so the drafts
      after "a b" are "c d". With ``min_share`` 0.7 there is one draft, "c".

    Sorted suffixes rather than hashed n-grams: a range gives the count of every continuation of every match, and no
    length of match needs a table.

    Attributes:
      text_m: int32, remembered tokens, the newest last; -1 between texts and where there is nothing yet.
      order_m: int32, the places of ``text_m`` in the order of the tokens from there on, ``max_n + num_draft`` of them.
      vocab_size: v; all remembered tokens are below.
      num_draft: g, the most tokens proposed per round.
      min_n: tokens of the shortest match that counts.
      max_n: tokens of the longest match that is looked for.
      min_share: the least share of the matches that must agree on the drafts up to one, 0 to 1.

    Raises:
      ValueError: a number is out of its range.
    """

    text_m: Array
    order_m: Array
    vocab_size: int = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=8)
    min_n: int = struct.field(pytree_node=False, default=2)
    max_n: int = struct.field(pytree_node=False, default=16)
    min_share: float = struct.field(pytree_node=False, default=0.5)

    def __post_init__(self):
        check_integer("vocab_size", self.vocab_size, 1)
        check_integer("num_draft", self.num_draft, 1)
        check_integer("min_n", self.min_n, 1)
        check_integer("max_n", self.max_n, self.min_n)
        if isinstance(self.min_share, bool) or not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share is {self.min_share!r}; give a number from 0 to 1")

    @classmethod
    def empty(
        cls, vocab_size: int, capacity: int = 2**16, num_draft: int = 8, **options: int | float
    ) -> "SuffixDrafter":
        """Returns a drafter that has remembered nothing.

        Args:
          vocab_size: the size of the target's vocabulary.
          capacity: how many tokens are remembered, one between two texts included.
          num_draft: the most tokens proposed per round.
          **options: ``min_n``, ``max_n`` and ``min_share``.

        Raises:
          ValueError: a number is out of its range.
        """
        check_integer("capacity", capacity, 1, 2**30)
        place_m = jnp.arange(capacity, dtype=jnp.int32)
        return cls(jnp.full_like(place_m, _BREAK), place_m, vocab_size, num_draft, **options)  # pyright: ignore

    def remember(self, tokens_bt: Array, length_b: Array) -> "SuffixDrafter":
        """Returns a drafter that has also remembered texts; see ``specjax.remember``, which checks its arguments.

        The last row is the newest text. Tokens outside of the vocabulary end a text and begin another.
        """
        text_m, order_m = _remembered(self.text_m, tokens_bt, length_b, self.vocab_size, self.max_n + self.num_draft)
        return dataclasses.replace(self, text_m=text_m, order_m=order_m)

    def propose(self, state: None, context: Context, draw: Draw) -> tuple[Proposal, None]:
        """Returns what followed the longest match. It follows from known tokens, so there are no probabilities."""
        del draw
        g = context.drafts(self.num_draft)
        own_bg, own_b = copied_from_row(context, self.max_n, g)
        found_bg, matched_b, shared_b = self._found(context, g)
        from_row_b = (own_b >= matched_b) | (shared_b == 0)
        longest_b = jnp.where(from_row_b, own_b, matched_b)
        length_b = jnp.minimum(longest_b, jnp.where(from_row_b, g, shared_b))
        tokens_bg = jnp.where(from_row_b[:, None], own_bg, found_bg)
        return Proposal(tokens_bg, None, jnp.where(longest_b >= self.min_n, length_b, 0)), state

    def _found(self, context: Context, count: int) -> tuple[Array, Array, Array]:
        """Returns drafts from the memory ``[b, g]``, the tokens of the match, and how many drafts places share."""
        # 1. The places that match the last 1, 2, .. tokens; the longest match with any counts.
        sizes = jnp.arange(1, self.max_n + 1, dtype=jnp.int32)
        starts_bn = context.length_b[:, None] - sizes[None]
        tails = [text_at(context.tokens_bs, starts_bn[:, n], self.max_n) for n in range(self.max_n)]
        first_bn, end_bn = self._range(jnp.stack(tails, axis=1), jnp.broadcast_to(sizes[None], starts_bn.shape))
        matches_bn = (end_bn > first_bn) & (starts_bn >= 0)
        matched_b = jnp.max(jnp.where(matches_bn, sizes[None], 0), axis=1)
        at_b1 = jnp.maximum(matched_b - 1, 0)[:, None]
        first_b, end_b = (jnp.take_along_axis(x, at_b1, axis=1)[:, 0] for x in (first_bn, end_bn))

        # 2. The suffix in the middle, and how many places share its tokens up to each draft.
        middle_b = self.order_m[(first_b + end_b) // 2]
        text_bt = self._read(middle_b[:, None] + jnp.arange(self.max_n + count, dtype=jnp.int32)[None])
        place_bg = matched_b[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        drafts_bg = jnp.take_along_axis(text_bt, place_bg, axis=1)
        text_bgt = jnp.broadcast_to(text_bt[:, None], (*place_bg.shape, text_bt.shape[1]))
        first_bg, end_bg = self._range(text_bgt, place_bg + 1)
        least_b1 = self.min_share * (end_b - first_b).astype(jnp.float32)[:, None]
        good_bg = (drafts_bg != _BREAK) & ((end_bg - first_bg).astype(jnp.float32) >= least_b1)
        return jnp.maximum(drafts_bg, 0), matched_b, jnp.sum(jnp.cumprod(good_bg.astype(jnp.int32), axis=1), axis=1)

    def _range(self, wanted_bnt: Array, size_bn: Array) -> tuple[Array, Array]:
        """Returns first and end of the entries of ``order_m`` whose suffixes begin with ``size_bn`` of the tokens."""
        place_11t = jnp.arange(wanted_bnt.shape[-1], dtype=jnp.int32)[None, None]
        counts_1bnt, wanted_1bnt = (place_11t < size_bn[..., None])[None], wanted_bnt[None]
        after_2 = jnp.asarray([False, True])[:, None, None]  # the end comes after equal suffixes, the first before

        # Two binary searches at once: all entries below `low` are before the bound, and those from `high` on are not.
        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low_2bn, high_2bn = bounds
            open_2bn, middle_2bn = low_2bn < high_2bn, (low_2bn + high_2bn) // 2
            entry_2bn = self.order_m[jnp.minimum(middle_2bn, len(self.order_m) - 1)]
            read_2bnt = self._read(entry_2bn[..., None] + place_11t[None])
            ahead_2bnt = jnp.where(counts_1bnt, read_2bnt - wanted_1bnt, 0)
            # The first token that differs decides.
            first_2bn1 = jnp.argmax(ahead_2bnt != 0, axis=-1, keepdims=True)
            ahead_2bn = jnp.take_along_axis(ahead_2bnt, first_2bn1, axis=-1)[..., 0]
            before_2bn = (ahead_2bn < 0) | ((ahead_2bn == 0) & after_2)
            low_2bn = jnp.where(open_2bn & before_2bn, middle_2bn + 1, low_2bn)
            return low_2bn, jnp.where(open_2bn & ~before_2bn, middle_2bn, high_2bn)

        low_2bn = jnp.zeros((2, *size_bn.shape), jnp.int32)
        steps = len(self.order_m).bit_length()
        (first_bn, end_bn), _ = lax.fori_loop(0, steps, halve, (low_2bn, jnp.full_like(low_2bn, len(self.order_m))))
        return first_bn, end_bn

    def _read(self, place: Array) -> Array:
        """Returns the tokens at places of the memory, and breaks past its end."""
        size = len(self.text_m)
        return jnp.where(place < size, self.text_m[jnp.minimum(place, size - 1)], _BREAK)


@functools.partial(jax.jit, static_argnames=("vocab_size", "depth"))
def _remembered(text_m: Array, tokens_bt: Array, length_b: Array, vocab_size: int, depth: int) -> tuple[Array, Array]:
    """Returns the memory with further texts at its end, and its suffixes in the order of ``depth`` tokens."""
    # 1. A break before each text, since no match and no draft may pass from one text to the next.
    place_t = jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)
    real_bt = place_t[None] < length_b[:, None]
    known_bt = jnp.where((tokens_bt >= 0) & (tokens_bt < vocab_size), tokens_bt, _BREAK).astype(jnp.int32)
    known_bt = jnp.pad(known_bt, ((0, 0), (1, 0)), constant_values=_BREAK)
    real_bt = jnp.concatenate([(length_b > 0)[:, None], real_bt], axis=1)
    # 2. What is kept goes to the end of the memory; what is pushed past its beginning is forgotten.
    all_x = jnp.concatenate([text_m, known_bt.reshape(-1)])
    keep_x = jnp.concatenate([jnp.ones_like(text_m, bool), real_bt.reshape(-1)])
    size = len(text_m)
    place_x = size - jnp.cumsum(keep_x[::-1].astype(jnp.int32))[::-1]
    place_x = jnp.where(keep_x & (place_x >= 0), place_x, size)
    text_m = jnp.full_like(text_m, _BREAK).at[place_x].set(all_x, mode="drop")
    # 3. Ranks by 1 token, then by 5, 25, ..: the ranks of 5 stretches decide on all of them (after Manber and Myers
    # 1993, who take 2). Fewer sorts are faster here than smaller ones.
    place_m = jnp.arange(size, dtype=jnp.int32)
    rank_m, width = text_m, 1
    while True:
        padded_m = jnp.pad(rank_m, (0, _STRETCHES * width), constant_values=_BREAK)
        parts = [padded_m[i * width : i * width + size] for i in range(_STRETCHES)]
        *parts, order_m = lax.sort((*parts, place_m), num_keys=_STRETCHES)
        width *= _STRETCHES
        if width >= depth:
            return text_m, order_m
        new_m = jnp.any(jnp.stack([part[1:] != part[:-1] for part in parts]), axis=0)
        rank_m = jnp.zeros_like(order_m).at[order_m].set(jnp.pad(jnp.cumsum(new_m.astype(jnp.int32)), (1, 0)))
