"""One drafter, and a second one for the rows in which the first proposes nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.types import Cache, Context, Drafter, Draw, Event, LanguageModel, Proposal


@struct.dataclass
class CascadeState:
    """The states of the two drafters, a pytree each."""

    first: Any
    second: Any


@struct.dataclass
class Cascade:
    """Uses the first drafter's proposal in rows where it makes one, and the second drafter's in all other rows.

    The first drafter should be cheap and may often propose nothing, like ``NGramDrafter``. The second should always
    propose something. In rows that use the first drafter's tokens, the second drafter's ``draw`` returns these tokens,
    so the second writes them into its cache as if it had drafted them. If all rows use them and the second has
    ``follow``, then ``follow`` gets the tokens and the second does not draft. Nest more than two drafters on the left:
    ``Cascade(Cascade(a, b), c)``.

    Whether the first drafter proposes anything must not depend on its draws, since the second draws with the same
    noise.

    Attributes:
      first: the drafter that is asked first.
      second: the drafter for the other rows, with the same ``num_draft``.
    """

    first: Any
    second: Any

    @property
    def num_draft(self) -> int:
        """g.

        Raises:
          TypeError: one of the two is not a drafter.
          ValueError: the two draft different numbers of tokens, the second is a ``Cascade``, or one proposes trees or
            cuts its drafts.
        """
        for name, part in (("first", self.first), ("second", self.second)):
            if isinstance(part, type) or not hasattr(part, "propose"):
                raise TypeError(f"the cascade's {name} drafter is {part!r}; give two drafters")
            if getattr(part, "tree_depth", None) is not None:
                raise ValueError(f"the cascade's {name} drafter proposes trees; give two drafters of chains")
            if getattr(part, "cuts", False):
                raise ValueError(
                    f"the cascade's {name} drafter cuts its drafts, which it learns from its own alone; leave out cuts"
                )
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

    def remember(self, tokens_bt: Array, length_b: Array) -> "Cascade":
        """Returns the cascade after its parts that have a memory have remembered texts; see ``specjax.remember``.

        Raises:
          TypeError: no part has a memory.
        """
        names = [name for name in ("first", "second") if hasattr(getattr(self, name), "remember")]
        if not names:
            raise TypeError("no drafter of the cascade has a memory; give a Cascade with a SuffixDrafter")
        return dataclasses.replace(self, **{name: getattr(self, name).remember(tokens_bt, length_b) for name in names})

    def init(self, target: LanguageModel, rows: int, slots: int) -> CascadeState:
        """Returns both drafters' empty states."""
        return CascadeState(self.first.init(target, rows, slots), self.second.init(target, rows, slots))

    def observe(self, state: CascadeState, context: Context, event: Event) -> CascadeState:
        """Returns both drafters' states after the event."""
        return CascadeState(
            self.first.observe(state.first, context, self._event(self.first, event)),
            self.second.observe(state.second, context, self._event(self.second, event)),
        )

    def propose(self, state: CascadeState, context: Context, draw: Draw) -> tuple[Proposal, CascadeState]:
        """Returns the first drafter's proposal in rows where there is one, the second's in the other rows."""
        # The second drafter starts from whatever the first wrote into the target's cache.
        first, first_state = self.first.propose(state.first, context, draw)
        first = first.first(context.drafts(self.num_draft))
        if first.cache is not None:
            context = dataclasses.replace(context, cache=first.cache)
        taken_b = first.length_b > 0

        # The noise of `draw` is used in all rows, so other rows get the same drafts with and without a cascade.
        def draw_first(
            logits_bv: Array,
            drafts_bg: Array,
            index: int | Array,
            before_bg: Array | None = None,
            siblings: int | None = None,
        ) -> tuple[Array, Array]:
            del before_bg, siblings  # both draft chains
            token_b, probs_bv = draw(logits_bv, drafts_bg, index)
            first_b = lax.dynamic_index_in_dim(first.tokens_bg, index, axis=1, keepdims=False)
            return jnp.where(taken_b, first_b, token_b), probs_bv

        second, second_state = self._second(state.second, context, draw_first, first.tokens_bg, taken_b)
        second = second.first(context.drafts(self.num_draft))
        # One-hot probabilities are made only if the other drafter has real ones.
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
        """Returns the second's proposal and state. If no row needs a proposal, ``follow`` replaces ``propose``."""

        def propose(state: Any, cache: Cache) -> tuple[Proposal, Any]:
            return self.second.propose(state, dataclasses.replace(context, cache=cache), draw)

        if not hasattr(self.second, "follow"):
            return propose(state, context.cache)
        # Without a proposal of the second drafter a loop needs a value of the same shapes. It is never used, except for
        # the target's cache, which must stay as it is.
        shapes, _ = jax.eval_shape(propose, state, context.cache)
        writes = shapes.cache is not None
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataclasses.replace(shapes, cache=None))
        nothing = dataclasses.replace(nothing, cache=context.cache if writes else None)
        turns = jnp.any(~taken_b).astype(jnp.int32)
        # Two loops, one of no turn and one of one turn, since lax.cond would copy all caches in both of its branches.
        second, state = lax.fori_loop(
            jnp.int32(0), turns, lambda _, x: propose(x[1], x[0].cache if writes else context.cache), (nothing, state)
        )
        if writes:
            context = dataclasses.replace(context, cache=second.cache)
        state = lax.fori_loop(jnp.int32(0), 1 - turns, lambda _, x: self.second.follow(x, context, tokens_bg), state)
        return second, state

    def _event(self, part: Drafter, event: Event) -> Event:
        """Returns the event with the features that ``part`` asked for."""
        features = tuple(event.features[self.capture.index(index)] for index in part.capture)
        return dataclasses.replace(event, features=features)
