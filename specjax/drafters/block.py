"""Drafting with a draft head that computes a whole block of drafts in one pass."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.drafters.chain import Chain, repeat
from specjax.rows import text_at
from specjax.sampling import most_likely
from specjax.types import Context, Draw, Event, LanguageModel, Proposal


class Block(NamedTuple):
    """What one pass of a draft head computes for g drafts.

    Attributes:
      states_bgd: the draft head's state at the place of each draft.
      logits_bgu: float32, the logits of each draft over the draft head's own vocabulary, before ``step``.
      ready_b: bool, whether the row can draft.
    """

    states_bgd: Array
    logits_bgu: Array
    ready_b: Array


class Head(Protocol):
    """A draft head of blocks: a hashable description of it, with pure functions over its parameters.

    Attributes:
      capture: hidden-state indices of the target that ``observe`` receives.
      vocab_size: size v of the target's vocabulary, in which ``step`` answers.
      most_drafts: the most drafts of one block; None: there is no limit.
    """

    @property
    def capture(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def most_drafts(self) -> int | None: ...

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params`` with a tuple of one ``types.Axis`` per dimension in place of each array."""
        ...

    def init(self, params: Any, target: LanguageModel, rows: int, slots: int) -> Any:
        """Returns the state of rows without text; raises ValueError if the draft head does not fit the target."""
        ...

    def observe(self, params: Any, state: Any, context: Context, event: Event) -> Any:
        """Returns the state after an event; see ``types.Drafter.observe``."""
        ...

    def block(self, params: Any, state: Any, context: Context, count: int) -> tuple[Block, Any]:
        """Runs the one pass for ``count`` drafts; returns what it computed, and the state."""
        ...

    def start(self, params: Any, rows: int) -> Any:
        """Returns what ``step`` carries from draft to draft, before the first draft."""
        ...

    def step(self, params: Any, carry: Any, logits_bu: Array, state_bd: Array, token_b: Array) -> tuple[Array, Any]:
        """Returns float32 logits ``[b, v]`` of one draft, -inf for tokens that are never drafted, and the next carry.

        Args:
          params: the draft head's parameters.
          carry: from ``start`` or from the draft before.
          logits_bu: the draft's part of ``Block.logits_bgu``.
          state_bd: the draft's part of ``Block.states_bgd``.
          token_b: int32, the token before the draft: the row's last token, or the draft before it.
        """
        ...


def likeliest(draw: Draw) -> Draw:
    """Returns a ``Draw`` that takes the likeliest token of the distribution, the lowest id among equals."""

    def likeliest_of(
        logits_bv: Array, drafts_bg: Array, index: int | Array, before_bg: Array | None = None
    ) -> tuple[Array, Array]:
        del before_bg  # blocks draft chains
        _, probs_bv = draw(logits_bv, drafts_bg, index)
        return most_likely(probs_bv), probs_bv

    return likeliest_of


@struct.dataclass
class BlockDrafter:
    """Drafts a block of tokens in one pass (Chen et al. 2026, DFlash, arXiv 2602.06036; P-EAGLE, arXiv 2602.01469).

    The pass gives each draft's logits from the text alone. Then the drafts are drawn one after the other. A draft head
    may correct the logits of each draft by the draft before it (``Head.step``), which is a small product. So the
    distribution of a draft is always the one that it was really drawn from.

    Attributes:
      params: the draft head's parameters.
      head: the draft head.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``, for the loop over the drafts.
      argmax: each draft is the likeliest token of its distribution, in place of a drawn one. Then drafts are certain:
        their q is one-hot. Independent draws of one block contradict each other more often than likeliest tokens do.

    Raises:
      ValueError: ``num_draft`` is more than the draft head can draft in one block.
    """

    params: Any
    head: Head = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)
    argmax: bool = struct.field(pytree_node=False, default=False)

    max_positions = None

    def __post_init__(self):
        most = self.head.most_drafts
        if most is not None and self.num_draft > most:
            raise ValueError(f"num_draft is {self.num_draft} and a block has {most} drafts; draft at most that many")

    @property
    def capture(self) -> tuple[int, ...]:
        return self.head.capture

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def axes(self) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return self.head.axes(self.params)

    def init(self, target: LanguageModel, rows: int, slots: int) -> Any:
        """Returns the draft head's state of rows without text.

        Raises:
          ValueError: the draft head was made for another target.
        """
        return self.head.init(self.params, target, rows, slots)

    def observe(self, state: Any, context: Context, event: Event) -> Any:
        """Gives the draft head the target's true states."""
        return self.head.observe(self.params, state, context, event)

    def propose(self, state: Any, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Draws up to ``num_draft`` tokens from one pass."""
        length_b, g = context.length_b, context.drafts(self.num_draft)
        block, state = self.head.block(self.params, state, context, g)
        draw = likeliest(draw) if self.argmax else draw

        # A row proposes no more where a bias bans all tokens that the draft head can draft.
        def add(i: int | Array, carry: Any) -> Any:
            chain, drafting_b, drafted_b, token_b, own = carry
            logits_bu, state_bd = (
                lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False) for x in (block.logits_bgu, block.states_bgd)
            )
            logits_bv, own = self.head.step(self.params, own, logits_bu, state_bd, token_b)
            chain, token_b = chain.add(draw, logits_bv, i)
            drafting_b = drafting_b & chain.lawful(i)
            return chain, drafting_b, drafted_b + drafting_b.astype(jnp.int32), token_b, own

        chain = Chain.empty(length_b.shape[0], g, context.target.vocab_size)
        last_b = text_at(context.tokens_bs, length_b - 1, 1)[:, 0]
        own = self.head.start(self.params, length_b.shape[0])
        carry = (chain, block.ready_b, jnp.zeros_like(length_b), last_b, own)
        chain, _, drafted_b, _, _ = repeat(0, g, add, carry, self.unrolled)
        proposal = chain.propose(drafted_b)
        return (dataclasses.replace(proposal, probs_bgv=None) if self.argmax else proposal), state

    def follow(self, state: Any, context: Context, tokens_bg: Array) -> Any:
        """Nothing to do: no draft leaves a trace in the state, whoever drafted."""
        del context, tokens_bg
        return state
