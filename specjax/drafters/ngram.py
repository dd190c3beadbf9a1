"""Prompt lookup: drafts are copied from an earlier place in the same row."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.checks import check_integer
from specjax.search import largest
from specjax.types import Context, Draw, Event, LanguageModel, Proposal


class Copies:
    """What drafters that copy have in common: rounds often propose nothing, and rows have no state."""

    max_positions = None
    sparse = True

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    def init(self, target: LanguageModel, rows: int, slots: int) -> None:
        """Returns None: the drafter reads the row's tokens, and perhaps a memory of its own."""
        del target, rows, slots

    def observe(self, state: None, context: Context, event: Event) -> None:
        """Returns None: there is no state."""
        del state, context, event


@struct.dataclass
class NGramDrafter(Copies):
    """Finds an earlier occurrence of the row's last tokens and proposes the tokens after it.

    This is prompt lookup decoding (Saxena 2023). The longest match wins, and the most recent of equally long matches. A
    row without a match proposes nothing. A copy that reaches the row's end continues from its own beginning, so a
    repeating pattern is drafted in full. Example, g = 4: the row "x a b x a b" ends with "x a b" twice, and the
    drafts are "x a b x".

    A tree has the tokens after several matches, up to ``tree_depth`` after each. The best match gives a whole path, and
    each further match what differs from the paths so far, until there are ``num_draft`` drafts. Example, depth 2: the
    row "x a b x a c x a" has the matches "x a c x" and "x a b x", and the tree is c, then x, and beside c is b, then x.

    Attributes:
      num_draft: g, the most tokens proposed per round.
      min_n: tokens of the shortest match that counts.
      max_n: tokens of the longest match that is looked for.
      tree_depth: for trees: the most drafts on a path. None drafts a chain.
      matches: for trees: how many of the best matches are looked at.

    Raises:
      ValueError: ``min_n`` and ``max_n`` are not integers with 1 <= ``min_n`` <= ``max_n``; ``matches`` is below 1, or
        they have fewer than ``num_draft`` drafts.
    """

    num_draft: int = struct.field(pytree_node=False, default=4)
    min_n: int = struct.field(pytree_node=False, default=2)
    max_n: int = struct.field(pytree_node=False, default=4)
    tree_depth: int | None = struct.field(pytree_node=False, default=None)
    matches: int = struct.field(pytree_node=False, default=8)

    vocab_size = None
    siblings = "chosen"

    def __post_init__(self):
        integers = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.min_n, self.max_n))
        if not integers or not 1 <= self.min_n <= self.max_n:
            raise ValueError(
                f"min_n is {self.min_n!r} and max_n {self.max_n!r}; they must be integers, 1 <= min_n <= max_n"
            )
        check_integer("matches", self.matches, 1)
        if self.tree_depth is not None and self.num_draft > self.matches * self.tree_depth:
            raise ValueError(
                f"num_draft is {self.num_draft}, and {self.matches} matches of {self.tree_depth} tokens have fewer; "
                "give more matches, or draft fewer tokens"
            )

    def propose(self, state: None, context: Context, draw: Draw) -> tuple[Proposal, None]:
        """Returns what follows the best matches. The row's tokens decide it, so there are no probabilities."""
        del draw
        tokens_bs, last_b = context.tokens_bs, context.length_b - 1
        if self.tree_depth is not None:
            slots = tokens_bs.shape[1]
            score_bs = _scores(tokens_bs, last_b, self.max_n)
            slot_bm = largest(score_bs, min(self.matches, slots))
            score_bm = jnp.take_along_axis(score_bs, slot_bm, axis=1)
            copy = functools.partial(_copy, tokens_bs, last_b, count=self.tree_depth)
            path_bmd = jax.vmap(copy, in_axes=1, out_axes=1)(slot_bm % slots)
            return _merged(path_bmd, score_bm >= self.min_n * slots, self.num_draft), state
        g = context.drafts(self.num_draft)
        drafts_bg, matched_b = copied_from_row(context, self.max_n, g)
        return Proposal(drafts_bg, None, jnp.where(matched_b >= self.min_n, g, 0).astype(jnp.int32)), state


def copied_from_row(context: Context, max_n: int, count: int) -> tuple[Array, Array]:
    """Returns what followed the best earlier match of each row's last tokens, as ``NGramDrafter`` finds it.

    Args:
      context: the rows.
      max_n: tokens of the longest match that is looked for.
      count: g, how many tokens to return.

    Returns:
      int32 tokens ``[b, g]``, and int32 ``[b]``, how many tokens the match has; 0 or less if not even the last one
      occurs earlier, and then the tokens have no meaning.
    """
    tokens_bs, last_b = context.tokens_bs, context.length_b - 1
    slots = tokens_bs.shape[1]
    best_score_b = jnp.max(_scores(tokens_bs, last_b, max_n), axis=1)
    return _copy(tokens_bs, last_b, best_score_b % slots, count), best_score_b // slots


def _scores(tokens_bs: Array, last_b: Array, max_n: int) -> Array:
    """Returns int32 ``[b, s]``: n s + slot for a match of n tokens that ends at the slot, below 0 past the text.

    So matches are ordered by length first and then by slot. The row's own end is no match.
    """
    slots = tokens_bs.shape[1]
    # matched_bs[i, j] is the length of the match that ends at slot j: how many tokens up to slot j equal the tokens
    # up to the row's last one.
    run_bs = jnp.ones(tokens_bs.shape, bool)
    matched_bs = jnp.zeros(tokens_bs.shape, jnp.int32)
    for back in range(max_n):
        wanted_b1 = jnp.take_along_axis(tokens_bs, jnp.maximum(last_b - back, 0)[:, None], axis=1)
        earlier_bs = jnp.pad(tokens_bs, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
        run_bs &= earlier_bs == wanted_b1
        matched_bs += run_bs.astype(jnp.int32)
    slot_s = jnp.arange(slots, dtype=jnp.int32)[None]
    return jnp.where(slot_s < last_b[:, None], matched_bs * slots + slot_s, -1)


def _copy(tokens_bs: Array, last_b: Array, slot_b: Array, count: int) -> Array:
    """Returns int32 ``[b, count]``, the tokens after a slot of each row, as if the text went on like that."""
    # The tokens from the match to the row's end repeat, in case the copy is longer.
    period_b1 = jnp.maximum(last_b - slot_b, 1)[:, None]
    source_bg = slot_b[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)[None] % period_b1
    return jnp.take_along_axis(tokens_bs, jnp.clip(source_bg, 0, tokens_bs.shape[1] - 1), axis=1)


def _merged(path_bmd: Array, found_bm: Array, num_draft: int) -> Proposal:
    """Returns the first ``num_draft`` drafts of paths as a tree, in which paths share what they begin with.

    Args:
      path_bmd: int32 tokens of m paths of d drafts.
      found_bm: bool, which of them count; those come first.
      num_draft: g, at most m d.
    """
    rows, m = path_bmd.shape[:2]
    # Draft (i, j) is that of the first path that has the same tokens up to depth j.
    same_bmmd = jnp.cumprod((path_bmd[:, :, None] == path_bmd[:, None]).astype(jnp.int32), axis=-1)
    owner_bmd = jnp.argmax(same_bmmd, axis=2).astype(jnp.int32)
    own_bmd = (owner_bmd == jnp.arange(m, dtype=jnp.int32)[None, :, None]) & found_bm[..., None]
    place_bmd = (jnp.cumsum(own_bmd.reshape(rows, -1), axis=1, dtype=jnp.int32) - 1).reshape(own_bmd.shape)
    at_bmd = jnp.take_along_axis(place_bmd, owner_bmd, axis=1)
    parent_bmd = jnp.pad(at_bmd[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    # Drafts that count are moved to their places. Others, and those past the last place, are dropped.
    place_bc = jnp.where(own_bmd, place_bmd, num_draft).reshape(rows, -1)
    row_b1 = jnp.arange(rows)[:, None]
    tokens_bg, parents_bg = (
        jnp.full((rows, num_draft), empty, jnp.int32).at[row_b1, place_bc].set(x.reshape(rows, -1), mode="drop")
        for x, empty in ((path_bmd, 0), (parent_bmd, -1))
    )
    count_b = own_bmd.reshape(rows, -1).sum(1, dtype=jnp.int32)
    return Proposal(tokens_bg, None, jnp.minimum(count_b, num_draft), parents_bg=parents_bg)
