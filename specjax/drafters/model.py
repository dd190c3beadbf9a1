"""A smaller language model as drafter."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.types import Cache, Context, Draw, LanguageModel, Proposal, Verdict


@struct.dataclass
class ModelDrafter:
    """Drafts with another language model of the same vocabulary (Leviathan et al. 2023; Chen et al. 2023).

    Attributes:
      model: the draft model.
      num_draft: g, tokens proposed per round.
    """

    model: LanguageModel
    num_draft: int = struct.field(pytree_node=False, default=4)

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    def start(self, context: Context, features: Any, slots: int) -> Cache:
        """Returns the draft model's cache, filled with the prompt."""
        del features
        rows = context.tokens_bs.shape[0]
        cache = self.model.init_cache(rows, slots)
        return self.model.forward(self.model.params, context.tokens_bs, cache, jnp.zeros((rows,), jnp.int32)).cache

    def propose(self, state: Cache, context: Context, draw: Draw) -> tuple[Proposal, Cache]:
        """Samples a chain of ``num_draft`` tokens.

        The first pass feeds the last *two* tokens: after a round whose drafts were all accepted, the last of these
        was never fed. Feeding a token again writes what is there already.
        """
        length_b = context.length_b
        start_b, two_b2 = _last_two(context)
        output = self.model.forward(self.model.params, two_b2, state, start_b)
        at_b11 = (length_b - 1 - start_b)[:, None, None]
        logits_bv = jnp.take_along_axis(output.logits_btv, at_b11, axis=1)[:, 0]
        tokens, probs = [], []
        for i in range(self.num_draft):
            if i:
                output = self.model.forward(self.model.params, tokens[-1][:, None], output.cache, length_b + (i - 1))
                logits_bv = output.logits_btv[:, 0]
            prefix_bi = jnp.stack(tokens, axis=1) if tokens else jnp.zeros((length_b.shape[0], 0), jnp.int32)
            token_b, probs_bv = draw(logits_bv, prefix_bi)
            tokens.append(token_b)
            probs.append(probs_bv)
        length = jnp.full_like(length_b, self.num_draft)
        return Proposal(jnp.stack(tokens, axis=1), jnp.stack(probs, axis=1), length), output.cache

    def follow(self, state: Cache, context: Context, tokens_bg: Array) -> Cache:
        """Feeds in one pass what ``propose`` would have, had it drafted these tokens."""
        start_b, two_b2 = _last_two(context)
        known_b1 = (context.length_b - start_b)[:, None]  # a row of one token has no second, and drafts come sooner
        place_t = jnp.arange(self.num_draft + 1, dtype=jnp.int32)[None]
        drafts_bt = jnp.take_along_axis(tokens_bg, jnp.clip(place_t - known_b1, 0, self.num_draft - 1), axis=1)
        two_bt = jnp.pad(two_b2, ((0, 0), (0, self.num_draft - 1)))
        fed_bt = jnp.where(place_t < known_b1, two_bt, drafts_bt)
        return self.model.forward(self.model.params, fed_bt, state, start_b).cache

    def commit(self, state: Cache, context: Context, verdict: Verdict, features: Any) -> Cache:
        """Tells the draft model which of the tokens it was fed stay: all before the row's end, then the accepted."""
        del features
        start_b = jnp.maximum(context.length_b - 2, 0)
        fed_drafts_b = jnp.minimum(verdict.num_accepted_b, self.num_draft - 1)
        return self.model.commit(state, start_b, context.length_b - start_b + fed_drafts_b)


def _last_two(context: Context) -> tuple[Array, Array]:
    """Returns the first slot to feed, and the last two tokens; of a row of one token, it and the padding behind it."""
    start_b = jnp.maximum(context.length_b - 2, 0)
    slot_b2 = start_b[:, None] + jnp.arange(2, dtype=jnp.int32)[None]
    return start_b, jnp.take_along_axis(context.tokens_bs, slot_b2, axis=1)
