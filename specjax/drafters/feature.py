"""Drafting with a head that reads the target's hidden states: what MTP and EAGLE heads share."""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.types import Cache, Context, Draw, LanguageModel, Proposal, Verdict


class Head(Protocol):
    """A draft head: a hashable description of it, with pure functions over its parameters.

    Slot i takes the embedding of token i + 1 and the target's state at position i, and predicts token i + 2.

    Attributes:
      capture: hidden-state indices of the target that ``fuse`` takes.
      vocab_size: size v of the target's vocabulary, in which ``logits`` answers.
    """

    @property
    def capture(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params`` with a tuple of one ``types.Axis`` per dimension in place of each array."""
        ...

    def check_fit(self, target: LanguageModel, width: int) -> None:
        """Raises ValueError unless the head reads states of that width, and the target lends what it does without."""
        ...

    def init_cache(self, params: Any, rows: int, slots: int) -> Cache:
        """Makes an empty cache."""
        ...

    def fuse(self, params: Any, features: tuple[Array, ...]) -> Array:
        """Returns ``[b, t, d]``, the states of ``run``, from one ``[b, t, target's d]`` for each of ``capture``."""
        ...

    def run(
        self, params: Any, target: LanguageModel, tokens_bt: Array, states_btd: Array, cache: Cache, start_b: Array
    ) -> tuple[Array, Cache]:
        """Feeds t slots of each row.

        Args:
          params: the head's parameters.
          target: lends what the head shares with it.
          tokens_bt: int32, at slot i token i + 1.
          states_btd: at slot i the target's state at position i, as ``fuse`` returns it, or the head's own.
          cache: the head's; slots from ``start_b`` on are written, and those before them are seen.
          start_b: int32, the first slot of each row.

        Returns:
          The head's states ``[b, t, d]``, from which ``logits`` predicts token i + 2 and which can be fed in turn in
          place of ``fuse``'s, and the cache.
        """
        ...

    def logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits from states that ``run`` returned, -inf for tokens that are never drafted."""
        ...


@struct.dataclass
class FeatureState:
    """What a head remembers between rounds.

    Attributes:
      cache: the head's.
      states_btd: ``[b, g + 1, d]``, fused states of the target at the slots from ``start_b`` on.
      start_b: int32 ``[b]``.
    """

    cache: Cache
    states_btd: Array
    start_b: Array


@struct.dataclass
class FeatureDrafter:
    """Drafts a chain with a head: after the first draft, the head goes on from its own states (Li et al. 2024, EAGLE,
    arXiv 2401.15077, section 4.1; with MTP modules, DeepSeek-V3, section 2.2, of which one is reused).

    What the chain wrote into the head's cache is overwritten from the target's true states in the next round. A row
    of one token drafts nothing: no state of the target is known yet.

    Attributes:
      params: the head's parameters.
      head: the head.
      num_draft: g, tokens proposed per round.
    """

    params: Any
    head: Head = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)

    max_positions = None

    @property
    def capture(self) -> tuple[int, ...]:
        return self.head.capture

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def axes(self) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return self.head.axes(self.params)

    def start(self, context: Context, features: tuple[Array, ...], slots: int) -> FeatureState:
        """Fills the head's cache from the prompt.

        Raises:
          ValueError: the head was made for a target of another width, or for one that lends more.
        """
        self.head.check_fit(context.target, features[0].shape[-1])
        rows, width = context.tokens_bs.shape
        states_btd = self.head.fuse(self.params, features)
        shifted_bt = jnp.pad(context.tokens_bs[:, 1:], ((0, 0), (0, 1)))
        zero_b = jnp.zeros((rows,), jnp.int32)
        cache = self.head.init_cache(self.params, rows, slots)
        _, cache = self.head.run(self.params, context.target, shifted_bt, states_btd, cache, zero_b)
        start_b = jnp.maximum(context.length_b - 2 - self.num_draft, 0)
        place_t = jnp.arange(self.num_draft + 1, dtype=jnp.int32)[None]
        at_bt1 = jnp.minimum(start_b[:, None] + place_t, width - 1)[:, :, None]
        return FeatureState(cache, jnp.take_along_axis(states_btd, at_bt1, axis=1), start_b)

    def propose(self, state: FeatureState, context: Context, draw: Draw) -> tuple[Proposal, FeatureState]:
        """Samples a chain of ``num_draft`` tokens."""
        length_b = context.length_b
        states_btd, cache = self._rewritten(state, context)
        last_b11 = jnp.maximum(length_b - 2 - state.start_b, 0)[:, None, None]
        state_bd = jnp.take_along_axis(states_btd, last_b11, axis=1)[:, 0]
        tokens, probs = [], []
        drafting_b, drafted_b = length_b >= 2, jnp.zeros_like(length_b)
        for i in range(self.num_draft):
            prefix_bi = jnp.stack(tokens, axis=1) if tokens else jnp.zeros((length_b.shape[0], 0), jnp.int32)
            token_b, probs_bv = draw(self.head.logits(self.params, context.target, state_bd), prefix_bi)
            # Where a bias bans all tokens that the head drafts, what is drawn has no law.
            drafting_b &= jnp.take_along_axis(probs_bv, token_b[:, None], axis=1)[:, 0] > 0
            drafted_b += drafting_b.astype(jnp.int32)
            tokens.append(token_b)
            probs.append(probs_bv)
            if i + 1 < self.num_draft:
                states_btd, cache = self.head.run(
                    self.params, context.target, token_b[:, None], state_bd[:, None], cache, length_b + (i - 1)
                )
                state_bd = states_btd[:, 0]
        proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(probs, axis=1), drafted_b)
        return proposal, dataclasses.replace(state, cache=cache)

    def follow(self, state: FeatureState, context: Context, tokens_bg: Array) -> FeatureState:
        """Writes the true states. Those of the tokens drafted elsewhere will be true when they are written."""
        del tokens_bg
        return dataclasses.replace(state, cache=self._rewritten(state, context)[1])

    def _rewritten(self, state: FeatureState, context: Context) -> tuple[Array, Cache]:
        """Feeds the true states of the last round; returns the head's, and its cache."""
        place_t = jnp.arange(self.num_draft + 1, dtype=jnp.int32)[None]
        at_bt = jnp.minimum(state.start_b[:, None] + 1 + place_t, context.tokens_bs.shape[1] - 1)
        # What lies past the row's last token fills slots behind the last good one, which are written before they count.
        fed_bt = jnp.take_along_axis(context.tokens_bs, at_bt, axis=1)
        return self.head.run(self.params, context.target, fed_bt, state.states_btd, state.cache, state.start_b)

    def commit(
        self, state: FeatureState, context: Context, verdict: Verdict, features: tuple[Array, ...]
    ) -> FeatureState:
        """Keeps the target's states for the next round to write; those of rejected drafts will lie past the end."""
        del verdict
        return FeatureState(state.cache, self.head.fuse(self.params, features), context.length_b - 1)
