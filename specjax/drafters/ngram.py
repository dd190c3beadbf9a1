"""Prompt lookup: drafts are copied from an earlier place in the same row."""

import jax.numpy as jnp
from flax import struct

from specjax.types import Context, Draw, Event, LanguageModel, Proposal


@struct.dataclass
class NGramDrafter:
    """Finds an earlier occurrence of the row's last tokens and proposes the tokens after it.

    This is prompt lookup decoding (Saxena 2023). The longest match wins, and the most recent of equally long matches. A
    row without a match proposes nothing. A copy that reaches the row's end continues from its own beginning, so a
    repeating pattern is drafted in full. Example, g = 4: the row "x a b x a b" ends with "x a b" twice, and the
    drafts are "x a b x".

    Attributes:
      num_draft: g, the most tokens proposed per round.
      min_n: tokens of the shortest match that counts.
      max_n: tokens of the longest match that is looked for.

    Raises:
      ValueError: ``min_n`` and ``max_n`` are not integers with 1 <= ``min_n`` <= ``max_n``.
    """

    num_draft: int = struct.field(pytree_node=False, default=4)
    min_n: int = struct.field(pytree_node=False, default=2)
    max_n: int = struct.field(pytree_node=False, default=4)

    vocab_size = None
    max_positions = None
    sparse = True

    def __post_init__(self):
        integers = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.min_n, self.max_n))
        if not integers or not 1 <= self.min_n <= self.max_n:
            raise ValueError(
                f"min_n is {self.min_n!r} and max_n {self.max_n!r}; they must be integers, 1 <= min_n <= max_n"
            )

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    def init(self, target: LanguageModel, rows: int, slots: int) -> None:
        """Returns None: the drafter needs nothing but the row's tokens."""
        del target, rows, slots

    def observe(self, state: None, context: Context, event: Event) -> None:
        """Returns None: there is no state."""
        del state, context, event

    def propose(self, state: None, context: Context, draw: Draw) -> tuple[Proposal, None]:
        """Returns the tokens after the best match. They follow from the row's tokens, so there are no probabilities."""
        del draw
        tokens_bs, length_b = context.tokens_bs, context.length_b
        rows, slots = tokens_bs.shape
        last_b = length_b - 1
        # matched_bs[i, j] is the length of the match that ends at slot j: how many tokens up to slot j equal the tokens
        # up to the row's last one.
        run_bs = jnp.ones((rows, slots), bool)
        matched_bs = jnp.zeros((rows, slots), jnp.int32)
        for back in range(self.max_n):
            wanted_b1 = jnp.take_along_axis(tokens_bs, jnp.maximum(last_b - back, 0)[:, None], axis=1)
            earlier_bs = jnp.pad(tokens_bs, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
            run_bs &= earlier_bs == wanted_b1
            matched_bs += run_bs.astype(jnp.int32)
        # One number orders matches by length first and then by slot. The row's own end is no match.
        slot_s = jnp.arange(slots, dtype=jnp.int32)[None]
        score_bs = jnp.where(slot_s < last_b[:, None], matched_bs * slots + slot_s, -1)
        best_score_b = jnp.max(score_bs, axis=1)
        best_b, found_b = best_score_b % slots, best_score_b >= self.min_n * slots
        # The tokens from the match to the row's end repeat, in case the copy is longer.
        period_b1 = jnp.maximum(last_b - best_b, 1)[:, None]
        g = context.drafts(self.num_draft)
        source_bg = best_b[:, None] + 1 + jnp.arange(g, dtype=jnp.int32)[None] % period_b1
        drafts_bg = jnp.take_along_axis(tokens_bs, jnp.clip(source_bg, 0, slots - 1), axis=1)
        return Proposal(drafts_bg, None, jnp.where(found_b, g, 0).astype(jnp.int32)), state
