"""One drafter, and another for the rows where it proposes nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.types import Cache, Context, Drafter, Draw, Event, LanguageModel, Proposal


@struct.dataclass
class CascadeState:
    """What the two drafters remember between rounds, a pytree each."""

    first: Any
    second: Any


@struct.dataclass
class Cascade:
    """Takes the first drafter's proposal for each row in which it makes one, and the second's for the others.

    The first should cost nothing and may often have nothing, such as ``NGramDrafter``; the second should always have
    something. Where the first's drafts are taken, the second's ``draw`` returns them, so the second writes them into
    its cache as if it had drafted them. If they are taken in all rows, a second with ``follow`` gets them by that and
    drafts nothing. More than two nest on the left: ``Cascade(Cascade(a, b), c)``.

    Whether the first proposes anything must not depend on what it draws, since the second draws with the same noise.

    Attributes:
      first: asked first.
      second: of the same ``num_draft``.
    """

    first: Any
    second: Any

    @property
    def num_draft(self) -> int:
        """g.

        Raises:
          TypeError, ValueError: the two are no drafters, draft different numbers of tokens, or nest on the right.
        """
        for name, part in (("first", self.first), ("second", self.second)):
            if isinstance(part, type) or not hasattr(part, "propose"):
                raise TypeError(f"the cascade's {name} drafter is {part!r}; give two drafters")
        if isinstance(self.second, Cascade):
            raise ValueError("the cascade's second drafter is a Cascade; nest on the left: Cascade(Cascade(a, b), c)")
        first, second = self.first.num_draft, self.second.num_draft
        if first != second:
            raise ValueError(f"the cascade's first drafter proposes {first} tokens and its second {second}; give one")
        return first

    @property
    def capture(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.first.capture, *self.second.capture)))

    @property
    def vocab_size(self) -> int | None:
        """v.

        Raises:
          ValueError: the two have vocabularies of different sizes.
        """
        sizes = {part.vocab_size for part in (self.first, self.second)} - {None}
        if len(sizes) > 1:
            raise ValueError(f"the cascade's drafters have vocabularies of {sorted(sizes)} tokens; give the target's")
        return next(iter(sizes), None)

    @property
    def max_positions(self) -> int | None:
        limits = {part.max_positions for part in (self.first, self.second)} - {None}
        return min(limits, default=None)

    def init(self, target: LanguageModel, rows: int, slots: int) -> CascadeState:
        """Returns both drafters' empty states."""
        return CascadeState(self.first.init(target, rows, slots), self.second.init(target, rows, slots))

    def observe(self, state: CascadeState, context: Context, event: Event) -> CascadeState:
        """Lets both take note."""
        return CascadeState(
            self.first.observe(state.first, context, self._event(self.first, event)),
            self.second.observe(state.second, context, self._event(self.second, event)),
        )

    def propose(self, state: CascadeState, context: Context, draw: Draw) -> tuple[Proposal, CascadeState]:
        """Returns the first's proposal in rows where there is one, the second's in others."""
        first, first_state = self.first.propose(state.first, context, draw)
        if first.cache is not None:
            context = dataclasses.replace(context, cache=first.cache)
        taken_b = first.length_b > 0

        def draw_first(logits_bv: Array, drafts_bg: Array, index: int | Array) -> tuple[Array, Array]:
            token_b, probs_bv = draw(logits_bv, drafts_bg, index)
            first_b = lax.dynamic_index_in_dim(first.tokens_bg, index, axis=1, keepdims=False)
            return jnp.where(taken_b, first_b, token_b), probs_bv

        second, second_state = self._second(state.second, context, draw_first, first.tokens_bg, taken_b)
        probs_bgv = None
        if first.probs_bgv is not None or second.probs_bgv is not None:
            vocab = context.target.vocab_size
            first_bgv, second_bgv = first.q(vocab), second.q(vocab)
            probs_bgv = jnp.where(taken_b[:, None, None], first_bgv, second_bgv)
        proposal = Proposal(
            tokens_bg=jnp.where(taken_b[:, None], first.tokens_bg, second.tokens_bg),
            probs_bgv=probs_bgv,
            length_b=jnp.where(taken_b, first.length_b, second.length_b),
            cache=first.cache if second.cache is None else second.cache,
        )
        return proposal, CascadeState(first_state, second_state)

    def _second(
        self, state: Any, context: Context, draw: Draw, tokens_bg: Array, taken_b: Array
    ) -> tuple[Proposal, Any]:
        """Lets the second propose, unless no row needs it and it can follow without."""

        def propose(state: Any, cache: Cache) -> tuple[Proposal, Any]:
            return self.second.propose(state, dataclasses.replace(context, cache=cache), draw)

        if not hasattr(self.second, "follow"):
            return propose(state, context.cache)
        shapes, _ = jax.eval_shape(propose, state, context.cache)
        writes = shapes.cache is not None
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataclasses.replace(shapes, cache=None))
        nothing = dataclasses.replace(nothing, cache=context.cache if writes else None)
        turns = jnp.any(~taken_b).astype(jnp.int32)
        # Loops of no turn or one: lax.cond would copy all caches in both of its branches.
        second, state = lax.fori_loop(
            jnp.int32(0), turns, lambda _, x: propose(x[1], x[0].cache if writes else context.cache), (nothing, state)
        )
        if writes:
            context = dataclasses.replace(context, cache=second.cache)
        state = lax.fori_loop(jnp.int32(0), 1 - turns, lambda _, x: self.second.follow(x, context, tokens_bg), state)
        return second, state

    def _event(self, part: Drafter, event: Event) -> Event:
        """Returns the event with the features that one of the two asked for."""
        features = tuple(event.features[self.capture.index(index)] for index in part.capture)
        return dataclasses.replace(event, features=features)
