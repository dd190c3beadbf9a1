"""Models whose distribution is known, for tests of loops and drafters; and acceptance that is given, for timings.

A table model looks up its next-token logits in a table, through a real cache. Each pass writes its tokens at their
slots and reads them back. So a wrong offset, a stale slot or a token that was never fed changes the distribution.

``ForcedAcceptance`` and ``AlwaysDrafting`` time rounds of models without trained weights, whose drafts would never be
accepted.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.types import (
    Context,
    Drafter,
    Draw,
    Draws,
    Event,
    Feed,
    LanguageModel,
    Output,
    Proposal,
    Verdict,
    VerifyRule,
)


# Cached, so that all models of one order have the same static functions and share compilations.
@functools.cache
def _functions(order: int):
    def init_cache(rows: int, slots: int) -> Array:
        return jnp.zeros((rows, slots), jnp.int32)

    def forward(params, feed, cache, capture=()):
        write = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))
        cache = write(cache, feed.tokens_bt, feed.start_b)
        if feed.parents_bt is None:
            logits_btv = table_logits(params, cache, feed.position_bt, order)
        else:
            logits_btv = _tree_logits(params, cache, feed, order)
        # Hidden states carry nothing here; drafters that capture them get the right shape.
        features = tuple(jnp.zeros((*feed.tokens_bt.shape, 1), jnp.float32) for _ in capture)
        return Output(logits_btv, features, cache)

    def gather(cache, feed, path_bt):
        kept_bt = jnp.take_along_axis(cache, feed.start_b[:, None] + path_bt, axis=1)
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(cache, kept_bt, feed.start_b)

    return init_cache, forward, gather


def table_logits(table: Array, cache: Array, position_bt: Array, order: int) -> Array:
    """Returns the logits after each position i, ``table[token at i - order + 1, .., token at i]``.

    Slots before the first token count as token 0. Example, order 2: the logits after position 0 are
    ``table[0, token at 0]``.

    Args:
      table: float32, of shape ``[v] * (order + 1)``.
      cache: int32 ``[b, s]``, the tokens of the rows.
      position_bt: int32, the positions.
      order: how many tokens decide, at least 1.

    Returns:
      float32 ``[b, t, v]``.
    """
    index = []
    for back in reversed(range(order)):
        slot_bt = position_bt - back
        token_bt = jnp.take_along_axis(cache, jnp.maximum(slot_bt, 0), axis=1)
        index.append(jnp.where(slot_bt >= 0, token_bt, 0))
    return table[tuple(index)]


def _tree_logits(table: Array, cache: Array, feed: Feed, order: int) -> Array:
    """Returns as ``table_logits`` does the logits after each place of a tree, ``[b, t, v]``."""
    assert feed.parents_bt is not None
    start_b1, t = feed.start_b[:, None], feed.tokens_bt.shape[1]
    slot_bt = start_b1 + jnp.arange(t, dtype=jnp.int32)[None]
    index = []
    for _ in range(order):
        index.insert(0, jnp.where(slot_bt >= 0, jnp.take_along_axis(cache, jnp.maximum(slot_bt, 0), axis=1), 0))
        parent_bt = jnp.take_along_axis(feed.parents_bt, jnp.clip(slot_bt - start_b1, 0, t - 1), axis=1)
        # The slot before a place is its parent's; before the feed, the text is a chain.
        slot_bt = jnp.where(slot_bt >= start_b1, start_b1 + jnp.maximum(parent_bt, -1), slot_bt - 1)
    return table[tuple(index)]


def table_model(logits: Array) -> LanguageModel:
    """Returns a model whose next token depends on the last k tokens by ``logits``.

    Args:
      logits: floats of shape ``[v] * (k + 1)``, with k at least 1. ``logits[a, b]`` are the logits of the token after
        tokens a and b, for k = 2.
    """
    logits = jnp.asarray(logits, jnp.float32)
    init_cache, forward, gather = _functions(logits.ndim - 1)
    return LanguageModel(
        params=logits, forward=forward, init_cache=init_cache, vocab_size=logits.shape[-1], gather=gather
    )


@dataclasses.dataclass(frozen=True)
class ForcedAcceptance:
    """A verification rule that accepts drafts at given rates, for timings. The text has no meaning.

    vLLM calls this synthetic acceptance. The wrapped rule runs in full, and its next token is emitted, so XLA cannot
    drop any of its work. Drafter, target and caches do what they do for real drafts. Example, acceptance (0.8, 0.5): a
    round keeps the first draft with probability 0.8 and both drafts with probability 0.4, 1.2 drafts in the mean.

    A drafter of given acceptance is the other way, and the worse one: such a drafter must know the target's next tokens
    beforehand. In bfloat16 a pass over one token and a pass over several sometimes choose different tokens, and from
    there on nothing would be accepted. It would also serve greedy decoding alone.

    Attributes:
      rule: the rule that runs.
      acceptance: the probability that each draft is accepted, given that the drafts before it were. One number for
        each draft of a round.

    Raises:
      ValueError: a number of ``acceptance`` is not from 0 to 1, or, in a round, there are fewer numbers than drafts.
    """

    rule: VerifyRule
    acceptance: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "acceptance", tuple(map(float, self.acceptance)))  # hashable, whatever was given
        if not all(0 <= rate <= 1 for rate in self.acceptance):  # also false for NaN
            raise ValueError(f"acceptance is {self.acceptance}; give probabilities from 0 to 1, one for each draft")

    @property
    def shares_noise(self) -> bool:
        return self.rule.shares_noise

    @property
    def emitted_per_round(self) -> float:
        """The mean number of tokens that a round emits: 1 and, for each draft, the product of the rates up to it."""
        return 1 + sum(math.prod(self.acceptance[: i + 1]) for i in range(len(self.acceptance)))

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict:
        g = proposal.tokens_bg.shape[1]
        if len(self.acceptance) < g:
            raise ValueError(f"acceptance is {self.acceptance}; give {g} probabilities, one for each draft of a round")
        rate_1g = jnp.asarray(self.acceptance[:g], jnp.float32).reshape(1, g)
        proposed_bg = jnp.arange(g, dtype=jnp.int32)[None] < proposal.length_b[:, None]
        success_bg = (draws.uniforms(g) < rate_1g) & proposed_bg
        accepted_b = jnp.cumprod(success_bg.astype(jnp.int32), axis=-1).sum(-1, dtype=jnp.int32)
        return Verdict(accepted_b, self.rule(proposal, target_btv, draws).next_b)


@struct.dataclass
class AlwaysDrafting:
    """A drafter that proposes all g drafts in each round, also where the wrapped drafter has nothing to propose.

    With ``ForcedAcceptance``, an ``NGramDrafter`` inside reaches the given rates at its own cost, whatever the text is.
    The drafts of a row without a match are any tokens, and verification keeps the text exact as usual.

    Attributes:
      drafter: the drafter whose ``propose`` runs. Its tokens must be valid ids also past ``Proposal.length_b``.
    """

    drafter: Drafter

    @property
    def num_draft(self) -> int:
        return self.drafter.num_draft

    @property
    def capture(self) -> tuple[int, ...]:
        return self.drafter.capture

    @property
    def vocab_size(self) -> int | None:
        return self.drafter.vocab_size

    @property
    def max_positions(self) -> int | None:
        return self.drafter.max_positions

    def init(self, target: LanguageModel, rows: int, slots: int) -> Any:
        """Returns the wrapped drafter's state."""
        return self.drafter.init(target, rows, slots)

    def observe(self, state: Any, context: Context, event: Event) -> Any:
        """Tells the wrapped drafter."""
        return self.drafter.observe(state, context, event)

    def propose(self, state: Any, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Returns the wrapped drafter's drafts, all of which count."""
        proposal, state = self.drafter.propose(state, context, draw)
        return dataclasses.replace(proposal, length_b=jnp.full_like(proposal.length_b, self.num_draft)), state
