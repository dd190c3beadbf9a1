"""What drafters that draw one token after another have in common."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.types import Cache, Draw, Proposal

C = TypeVar("C")


@struct.dataclass
class Chain:
    """The drafts of one round while they are drawn: a carry for a loop on the device, or for an unrolled one.

    Attributes:
      tokens_bg: int32; places not drawn yet hold 0.
      probs_bgv: float32, what each was drawn from.
    """

    tokens_bg: Array
    probs_bgv: Array

    @classmethod
    def empty(cls, rows: int, num_draft: int, vocab_size: int) -> "Chain":
        """Returns a chain without drafts."""
        return cls(jnp.zeros((rows, num_draft), jnp.int32), jnp.zeros((rows, num_draft, vocab_size), jnp.float32))

    def add(self, draw: Draw, logits_bv: Array, index: int | Array) -> tuple["Chain", Array]:
        """Draws draft ``index``, and returns the chain with it and the token ``[b]``."""
        token_b, probs_bv = draw(logits_bv, self.tokens_bg, index)
        tokens_bg = lax.dynamic_update_index_in_dim(self.tokens_bg, token_b, index, axis=1)
        probs_bgv = lax.dynamic_update_index_in_dim(self.probs_bgv, probs_bv, index, axis=1)
        return Chain(tokens_bg, probs_bgv), token_b

    def lawful(self, index: int | Array) -> Array:
        """Returns bool ``[b]``, whether draft ``index`` had a probability.

        It has none where a bias bans every token that the drafter can draft.
        """
        token_b1 = lax.dynamic_index_in_dim(self.tokens_bg, index, axis=1)
        probs_bv = lax.dynamic_index_in_dim(self.probs_bgv, index, axis=1, keepdims=False)
        return jnp.take_along_axis(probs_bv, token_b1, axis=1)[:, 0] > 0

    def propose(self, length_b: Array, cache: Cache = None) -> Proposal:
        """Returns the proposal of the first ``length_b`` drafts; ``cache`` is ``Proposal.cache``."""
        return Proposal(self.tokens_bg, self.probs_bgv, length_b, cache)


def repeat(first: int, end: int, body: Callable[[int | Array, C], C], carry: C, unrolled: bool) -> C:
    """Returns ``carry`` after ``carry = body(i, carry)`` for i from ``first`` to ``end - 1``.

    Unrolled, each step is compiled by itself; otherwise one step is, in a loop on the device.
    """
    if not unrolled:
        return lax.fori_loop(first, end, body, carry)
    for i in range(first, end):
        carry = body(i, carry)
    return carry


def place(x_btd: Array, place_b: Array) -> Array:
    """Returns ``[b, d]``, the entry of each row at its place."""
    return jnp.take_along_axis(x_btd, place_b[:, None, None], axis=1)[:, 0]
