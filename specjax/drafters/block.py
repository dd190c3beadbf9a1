"""Drafting with a draft head that computes a whole block of drafts in one pass."""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from specjax.drafters.chain import Chain, repeat
from specjax.drafters.confidence import Calibration, Confident, pays
from specjax.drafters.drawn import DrawnTree, check_drawn_tree
from specjax.drafters.trees import Candidates, Path
from specjax.rows import text_at
from specjax.search import most_likely
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
      marginal: whether ``step`` returns the same logits whatever the token before the draft.
      confidence: whether there is a confidence head, so that ``confidence_of`` answers.
    """

    @property
    def capture(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def most_drafts(self) -> int | None: ...
    @property
    def marginal(self) -> bool: ...
    @property
    def confidence(self) -> bool: ...

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

    def confidence_of(self, params: Any, state_bd: Array, token_b: Array) -> Array:
        """Returns float32 ``[b]``, the estimated chance that a draft is accepted if all before it are; as for ``step``.

        Raises:
          ValueError: there is no confidence head.
        """
        ...


def likeliest(draw: Draw) -> Draw:
    """Returns a ``Draw`` that takes the likeliest token of the distribution, the lowest id among equals."""

    def likeliest_of(
        logits_bv: Array,
        drafts_bg: Array,
        index: int | Array,
        before_bg: Array | None = None,
        siblings: int | None = None,
    ) -> tuple[Array, Array]:
        del before_bg, siblings  # for chains
        _, probs_bv = draw(logits_bv, drafts_bg, index)
        return most_likely(probs_bv), probs_bv

    return likeliest_of


@struct.dataclass
class BlockDrafter:
    """Drafts a block of tokens in one pass (Chen et al. 2026, DFlash, arXiv 2602.06036; P-EAGLE, arXiv 2602.01469).

    The pass gives each draft's logits from the text alone. Then the drafts are drawn one after the other. A draft head
    may correct the logits of each draft by the draft before it (``Head.step``), which is a small product. So the
    distribution of a draft is always the one that it was really drawn from.

    A tree of the likeliest drafts has the ``num_draft`` drafts, at most ``tree_depth`` deep, whose paths have the
    highest probabilities, at temperature 1 without penalties or bias (DDTree, arXiv 2604.12989). If the draft head is
    right, no other tree of as many drafts keeps more. Its drafts are chosen. A static tree (``tree``) is drawn instead.

    Attributes:
      params: the draft head's parameters.
      head: the draft head.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``, for the loop over the drafts.
      argmax: each draft is the likeliest token of its distribution, in place of a drawn one. Then drafts are certain:
        their q is one-hot. Independent draws of one block contradict each other more often than likeliest tokens do.
      cuts: a row proposes fewer drafts where the confidence head says that more would not be worth the time of a wider
        pass of the target's (DSpark, arXiv 2607.05147, section 3.2). What confidences are worth is learnt from the
        row's earlier rounds (``drafters.confidence``). Without effect where rounds take all drafts (``fixed``), and
        on GPUs. Not in a ``Cascade``.
      tree_depth: for trees: the most drafts on a path. None drafts a chain.
      tree, siblings: for trees that are drawn: as for ``ModelDrafter``. The drafts are at most ``tree_depth`` deep.

    Raises:
      ValueError: a path has more drafts than the draft head can draft in one block; or ``cuts`` is true and there is no
        confidence head, or a tree.
    """

    params: Any
    head: Head = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)
    argmax: bool = struct.field(pytree_node=False, default=False)
    cuts: bool = struct.field(pytree_node=False, default=False)
    tree_depth: int | None = struct.field(pytree_node=False, default=None)
    tree: tuple[Path, ...] | None = struct.field(pytree_node=False, default=None)
    siblings: str = struct.field(pytree_node=False, default="chosen")

    max_positions = None

    def __post_init__(self):
        most, name = self.head.most_drafts, "num_draft" if self.tree_depth is None else "tree_depth"
        if most is not None and getattr(self, name) > most:
            raise ValueError(f"{name} is {getattr(self, name)} and a block has {most} drafts; draft at most that many")
        if self.cuts and not self.head.confidence:
            raise ValueError(
                "cuts is True and the draft head has no confidence head; give a DSpark head that has one, or leave out "
                "cuts"
            )
        if self.cuts and self.tree_depth is not None:
            raise ValueError("cuts is True and a tree is drafted; leave out cuts, which is for chains")

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
          ValueError: the draft head was made for another target, or cannot draft such a tree.
        """
        if self.tree_depth is not None:
            self._check_tree(self.tree_depth)
        own = self.head.init(self.params, target, rows, slots)
        return Confident(own, Calibration.start(rows, self.num_draft)) if self.cuts else own

    def observe(self, state: Any, context: Context, event: Event) -> Any:
        """Gives the draft head the target's true states."""
        if not self.cuts:
            return self.head.observe(self.params, state, context, event)
        calibration = state.calibration
        if event.drafted:
            calibration = calibration.after(event.kept_b - 1, event.kept_b > 0)
        return Confident(self.head.observe(self.params, state.own, context, event), calibration)

    def propose(self, state: Any, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Draws up to ``num_draft`` tokens from one pass."""
        if self.tree_depth is not None:
            block, state = self.head.block(self.params, state, context, self.tree_depth)
            return self._choose(block, context) if self.tree is None else self._draw_tree(block, context, draw), state
        own_state, calibration = (state.own, state.calibration) if self.cuts else (state, None)
        length_b, g = context.length_b, context.drafts(self.num_draft)
        block, own_state = self.head.block(self.params, own_state, context, g)
        draw = likeliest(draw) if self.argmax else draw

        # A row proposes no more where a bias bans all tokens that the draft head can draft, or where more does not pay.
        def add(i: int | Array, carry: Any) -> Any:
            chain, drafting_b, drafted_b, token_b, own, trust = carry
            logits_bu, state_bd = (
                lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False) for x in (block.logits_bgu, block.states_bgd)
            )
            if trust is not None:
                assert calibration is not None
                trust, goes_on_b = self._trust(calibration, context.price_bg, trust, i, state_bd, token_b)
                drafting_b = drafting_b & goes_on_b
            logits_bv, own = self.head.step(self.params, own, logits_bu, state_bd, token_b)
            chain, token_b = chain.add(draw, logits_bv, i)
            drafting_b = drafting_b & chain.lawful(i)
            return chain, drafting_b, drafted_b + drafting_b.astype(jnp.int32), token_b, own, trust

        chain = Chain.empty(length_b.shape[0], g, context.target.vocab_size)
        last_b = text_at(context.tokens_bs, length_b - 1, 1)[:, 0]
        own = self.head.start(self.params, length_b.shape[0])
        trust = None if calibration is None else (jnp.ones(length_b.shape, jnp.float32), calibration.bin_bg)
        carry = (chain, block.ready_b, jnp.zeros_like(length_b), last_b, own, trust)
        chain, _, drafted_b, _, _, trust = repeat(0, g, add, carry, self.unrolled)
        if calibration is not None and trust is not None:
            most_b = jnp.maximum(context.room_b, 0)
            calibration = calibration.proposed(trust[1], jnp.minimum(drafted_b, most_b))
        proposal = chain.propose(drafted_b)
        proposal = dataclasses.replace(proposal, probs_bgv=None) if self.argmax else proposal
        return proposal, own_state if calibration is None else Confident(own_state, calibration)

    def _trust(
        self,
        calibration: Calibration,
        price_bg: Array | None,
        trust: tuple[Array, Array],
        i: int | Array,
        state_bd: Array,
        token_b: Array,
    ) -> tuple[tuple[Array, Array], Array]:
        """Returns the chance that drafts up to draft ``i`` are accepted, with bins, and whether draft ``i`` pays.

        It is asked before draft ``i`` is drawn, and reads the token before it.
        """
        reached_b, bin_bg = trust
        confidence_b = self.head.confidence_of(self.params, state_bd, token_b)
        chance_b, bin_b = calibration.chance(confidence_b, i)
        reached_b = reached_b * chance_b
        bin_bg = lax.dynamic_update_index_in_dim(bin_bg, bin_b, i, axis=1)
        free_b = jnp.ones(token_b.shape, bool)
        return (reached_b, bin_bg), free_b if price_bg is None else pays(reached_b, i, calibration.rate_bg, price_bg)

    def _check_tree(self, depth: int) -> None:
        if self.argmax:
            raise ValueError("argmax is True and a tree is drafted; leave out argmax, which is for chains")
        if self.tree is not None:
            check_drawn_tree(self.tree, self.num_draft, self.siblings, self.vocab_size)
            if depth != max(map(len, self.tree[: self.num_draft])):
                raise ValueError(f"tree_depth is {depth} and the tree has another depth; give the tree's")
        elif self.siblings != "chosen":
            raise ValueError(f"siblings is {self.siblings!r} and a tree of the likeliest is chosen; give a static tree")
        most = sum(min(self.vocab_size**level, self.num_draft) for level in range(1, depth + 1))
        if self.num_draft > most:
            raise ValueError(
                f"num_draft is {self.num_draft} and a tree of depth {depth} has {most} drafts; draft fewer"
            )

    def _after(self, block: Block, depth: int, token_bk: Array, own: Any) -> tuple[Array, Any]:
        """Returns the logits of a depth, from 0: ``[b, k, v]`` after each of k tokens, or ``[b, 1, v]`` for all."""
        logits_bu, state_bd = block.logits_bgu[:, depth], block.states_bgd[:, depth]
        if self.head.marginal:
            return self.head.step(self.params, None, logits_bu, state_bd, token_bk[:, 0])[0][:, None], own

        def one(token_b: Array, own: Any) -> tuple[Array, Any]:
            return self.head.step(self.params, own, logits_bu, state_bd, token_b)

        return jax.vmap(one, in_axes=1, out_axes=1)(token_bk, own)

    def _root(self, context: Context) -> tuple[Array, Any]:
        """Returns the rows' last tokens ``[b, 1]``, and what ``step`` carries before the first draft."""
        token_b1 = text_at(context.tokens_bs, context.length_b - 1, 1)
        return token_b1, jax.tree.map(lambda x: x[:, None], self.head.start(self.params, token_b1.shape[0]))

    def _choose(self, block: Block, context: Context) -> Proposal:
        """Returns the likeliest g drafts of a tree. Those of a depth are among the g likeliest there."""
        g, (token_bk, own) = context.drafts(self.num_draft), self._root(context)
        score_bk, first, levels = jnp.zeros(token_bk.shape, jnp.float32), -1, []
        for depth in range(block.logits_bgu.shape[1]):
            logits_bkv, own = self._after(block, depth, token_bk, own)
            place_bk = lax.broadcasted_iota(jnp.int32, token_bk.shape, 1)
            log_probs_bkv = jax.nn.log_softmax(logits_bkv, axis=-1)
            grown = Candidates.after(log_probs_bkv, score_bk, place_bk, min(g, self.vocab_size))
            score_bk, best_bk = lax.top_k(grown.scores_bc, min(g, grown.scores_bc.shape[1]))
            token_bk, parent_bk = (jnp.take_along_axis(x, best_bk, axis=1) for x in (grown.tokens_bc, grown.parents_bc))
            own = _pick(own, parent_bk)
            levels.append(Candidates(token_bk, score_bk, first + parent_bk))
            first = sum(level.tokens_bc.shape[1] for level in levels[:-1])
        found = functools.reduce(Candidates.__add__, levels)
        index_bg, parents_bg = found.best(g)
        tokens_bg = jnp.take_along_axis(found.tokens_bc, index_bg, axis=1)
        return Proposal(tokens_bg, None, jnp.where(block.ready_b, jnp.int32(g), 0), parents_bg=parents_bg)

    def _draw_tree(self, block: Block, context: Context, draw: Draw) -> Proposal:
        """Draws the drafts of a static tree."""
        assert self.tree is not None
        token_bk, own = self._root(context)
        rows = token_bk.shape[0]
        drawn = DrawnTree.of(self.tree[: context.drafts(self.num_draft)], self.siblings, rows)
        for depth in range(drawn.shape.depth):
            logits_bkv, own = self._after(block, depth, token_bk, own)
            before = drawn.shape.last_fed(depth)
            drawn = drawn.add(draw, jnp.broadcast_to(logits_bkv, (rows, len(before), logits_bkv.shape[-1])))
            # The drafts with children go on from what their parents carry.
            after = drawn.shape.last_fed(depth + 1)
            token_bk = drawn.tokens_bg[:, np.asarray(after, np.int32)]
            parent_k = jnp.asarray([before.index(drawn.shape.parents[draft]) for draft in after], jnp.int32)
            own = _pick(own, jnp.broadcast_to(parent_k[None], token_bk.shape))
        return drawn.propose(block.ready_b)

    def follow(self, state: Any, context: Context, tokens_bg: Array) -> Any:
        """Nothing to do: no draft leaves a trace in the state, whoever drafted."""
        del context, tokens_bg
        return state


def _pick(own: Any, place_bk: Array) -> Any:
    """Returns ``[b, k, ..]``, the entries at some places of arrays ``[b, m, ..]``."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, place_bk[..., None], axis=1), own)
