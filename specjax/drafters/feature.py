"""Drafting with a draft head that reads the target's hidden states: what MTP and EAGLE heads share."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.drafters.chain import Chain, place, repeat
from specjax.drafters.drawn import DrawnTree, check_drawn_tree
from specjax.drafters.trees import Candidates, Path
from specjax.rows import text_at
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal


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
        """Raises ValueError unless the draft head reads states of that width, and the target has what it uses of it."""
        ...

    def init_cache(self, params: Any, rows: int, slots: int) -> Cache:
        """Makes an empty cache."""
        ...

    def at_draft(self, index: int | Array) -> "Head":
        """Returns the head that draft ``index`` of a chain, from 0, is computed with; mostly this one."""
        ...

    def fuse(self, params: Any, features: tuple[Array, ...]) -> Array:
        """Returns ``[b, t, d]``, the states of ``run``, from one ``[b, t, target's d]`` for each of ``capture``."""
        ...

    def run(
        self, params: Any, target: LanguageModel, feed: Feed, states_btd: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Runs one pass over t slots of each row.

        Args:
          params: the head's parameters.
          target: has what the head shares with it.
          feed: at slot i, token i + 1.
          states_btd: at slot i, the target's state at position i, as ``fuse`` returns it, or the head's own.
          cache: the head's; the feed's places are written.

        Returns:
          The head's states ``[b, t, d]`` and the cache. From the states ``logits`` predicts token i + 2, and they can
          be fed in turn in place of ``fuse``'s.
        """
        ...

    def logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, v]`` logits from states that ``run`` returned, -inf for tokens that are never drafted."""
        ...

    def draft_logits(self, params: Any, target: LanguageModel, states_bd: Array) -> Array:
        """Returns ``[b, u]``, the logits of the draft vocabulary's u tokens, in its own order; for training."""
        ...

    def draft_of_v(self, params: Any) -> Array | None:
        """Returns int32 ``[v]``, the draft's id of each of the target's tokens, -1 for tokens that are never drafted.

        None: all tokens are drafted, by the target's ids.
        """
        ...


@struct.dataclass
class FeatureState:
    """What a head remembers between rounds. In a row of n tokens, its last slot with a known state is n - 2.

    Attributes:
      cache: the head's, right up to that slot.
      state_bd: ``[b, d]``, the head's state at that slot, from which the first draft is drawn.
    """

    cache: Cache
    state_bd: Array


@struct.dataclass
class FeatureDrafter:
    """Drafts a chain with a head: after the first draft, the head goes on from its own states (Li et al. 2024, EAGLE,
    arXiv 2401.15077, section 4.1; with MTP modules, DeepSeek-V3, section 2.2, of which one is reused). Or a tree that
    grows where the head is sure (Li et al. 2024, EAGLE-2, arXiv 2406.16858, section 4).

    After each round, ``observe`` overwrites what the chain wrote into the head's cache, from the target's true states.
    Example, a row of n = 10 tokens: the target's states are known up to position 8. Slot 8 takes token 9 and state 8,
    and predicts token 10, the first draft. Slot 9 takes that draft and the head's own state of slot 8. A row of one
    token drafts nothing: no state of the target is known yet.

    A tree grows by one depth at a time. The score of a draft is the sum of log-probabilities along its path, at
    temperature 1 without penalties or bias. After the ``top_k`` likeliest first drafts, the ``top_k`` drafts of the
    highest scores at each depth get ``top_k`` children each. Of all drafts, the ``num_draft`` of the highest scores are
    proposed. Each step feeds the head all drafts with children again, so a tree of depth 6 and ``top_k`` 10 takes
    passes over 10, 20, .., 50 places. Such drafts are chosen. A static tree (``tree``) is drawn instead.

    Attributes:
      params: the head's parameters.
      head: the head.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``; trees are always unrolled.
      tree_depth: for trees: the most drafts on a path. None drafts a chain.
      top_k: for trees that grow: see above.
      tree, siblings: for trees that are drawn: as for ``ModelDrafter``. The drafts are at most ``tree_depth`` deep.
    """

    params: Any
    head: Head = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)
    tree_depth: int | None = struct.field(pytree_node=False, default=None)
    top_k: int = struct.field(pytree_node=False, default=10)
    tree: tuple[Path, ...] | None = struct.field(pytree_node=False, default=None)
    siblings: str = struct.field(pytree_node=False, default="chosen")

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

    def init(self, target: LanguageModel, rows: int, slots: int) -> FeatureState:
        """Returns an empty cache.

        Raises:
          ValueError: the head was made for a target of another width, or needs more of the target; or it cannot draft
            such a tree.
        """
        specs = target.state_specs(self.capture)
        self.head.check_fit(target, specs[0].shape[-1])
        spec = jax.eval_shape(self.head.fuse, self.params, specs)
        if self.tree_depth is not None:
            self._check_tree(self.tree_depth)
            # A tree that grows is fed more drafts than are proposed.
            slots += 0 if self.tree else max((self.tree_depth - 1) * self.top_k - self.num_draft, 0)
        cache = self.head.init_cache(self.params, rows, slots)
        return FeatureState(cache, jnp.zeros((rows, spec.shape[-1]), spec.dtype))

    def observe(self, state: FeatureState, context: Context, event: Event) -> FeatureState:
        """Writes the head's cache from the target's true states."""
        given, width = event.feed, event.feed.tokens_bt.shape[1]
        feed = Feed(text_at(context.tokens_bs, given.start_b + 1, width), given.start_b, event.kept_b)
        fused_btd = self.head.fuse(self.params, event.features)
        states_btd, cache = self.head.run(self.params, context.target, feed, fused_btd, state.cache)
        last_bd = place(states_btd, jnp.maximum(event.kept_b - 1, 0))
        return FeatureState(cache, jnp.where(event.kept_b[:, None] > 0, last_bd, state.state_bd))

    def propose(self, state: FeatureState, context: Context, draw: Draw) -> tuple[Proposal, FeatureState]:
        """Samples a chain of ``num_draft`` tokens or a tree, or grows one; the head goes on from its own states."""
        if self.tree is not None:
            return self._draw_tree(self.tree[: context.drafts(self.num_draft)], state, context, draw)
        if self.tree_depth is not None:
            return self._grow(state, context, self.tree_depth)
        target, length_b, g = context.target, context.length_b, context.drafts(self.num_draft)
        running_b = context.running_b.astype(jnp.int32)

        # A row proposes no more where a bias bans all tokens that the head can draft.
        def add(i: int | Array, chain: Chain, drafting_b: Array, state_bd: Array) -> tuple[Chain, Array, Array]:
            chain, token_b = chain.add(draw, self.head.logits(self.params, target, state_bd), i)
            return chain, drafting_b & chain.lawful(i), token_b

        def advance(i: int | Array, carry: Any) -> Any:
            chain, drafting_b, drafted_b, token_b, state_bd, cache = carry
            feed = Feed(token_b[:, None], length_b + (i - 2), running_b)
            states_btd, cache = self.head.at_draft(i).run(self.params, target, feed, state_bd[:, None], cache)
            state_bd = states_btd[:, 0]
            chain, drafting_b, token_b = add(i, chain, drafting_b, state_bd)
            return chain, drafting_b, drafted_b + drafting_b.astype(jnp.int32), token_b, state_bd, cache

        chain = Chain.empty(length_b.shape[0], g, target.vocab_size)
        chain, drafting_b, token_b = add(0, chain, length_b >= 2, state.state_bd)
        carry = (chain, drafting_b, drafting_b.astype(jnp.int32), token_b, state.state_bd, state.cache)
        chain, _, drafted_b, _, _, cache = repeat(1, g, advance, carry, self.unrolled)
        return chain.propose(drafted_b), FeatureState(cache, state.state_bd)

    def _check_tree(self, depth: int) -> None:
        if self.head.at_draft(1) != self.head:
            raise ValueError(
                "the head's windows stay where they are for the first draft, which it computes for chains alone; give "
                "window=slides or drop the tree"
            )
        if self.tree is not None:
            check_drawn_tree(self.tree, self.num_draft, self.siblings, self.vocab_size)
            if depth != max(map(len, self.tree[: self.num_draft])):
                raise ValueError(f"tree_depth is {depth} and the tree has another depth; give the tree's")
            return
        if self.siblings != "chosen":
            raise ValueError(f"siblings is {self.siblings!r} and a tree that grows is chosen; give a static tree")
        k, most = self.top_k, self.top_k + (depth - 1) * self.top_k**2
        if not 1 <= k <= self.vocab_size:
            raise ValueError(f"top_k is {k!r}; give an integer from 1 to {self.vocab_size}, the size of the vocabulary")
        if self.num_draft > most:
            raise ValueError(
                f"num_draft is {self.num_draft} and a tree of depth {depth} with top_k {k} has {most} drafts; draft at "
                "most that many"
            )

    def _draw_tree(
        self, tree: tuple[Path, ...], state: FeatureState, context: Context, draw: Draw
    ) -> tuple[Proposal, FeatureState]:
        """Samples the drafts of a static tree. Fed are those with children, each with the head's state before it."""
        target, length_b, cache = context.target, context.length_b, state.cache
        drawn = DrawnTree.of(tree, self.siblings, length_b.shape[0])

        def logits(states_bkd: Array) -> Array:
            flat = self.head.logits(self.params, target, states_bkd.reshape(-1, states_bkd.shape[-1]))
            return flat.reshape(*states_bkd.shape[:2], -1)

        drawn, out_bmd = drawn.add(draw, logits(state.state_bd[:, None])), state.state_bd[:, None]
        for depth in range(1, drawn.shape.depth):
            tokens_bm, parents_bm = drawn.fed(depth)
            # Of the states, the root's comes first.
            state_bmd = jnp.take_along_axis(out_bmd, parents_bm[..., None] + 1, axis=1)
            count_b = jnp.where(context.running_b, jnp.int32(tokens_bm.shape[1]), 0)
            feed = Feed(tokens_bm, length_b - 1, count_b, parents_bm)
            fed_bmd, cache = self.head.run(self.params, target, feed, state_bmd, cache)
            out_bmd = jnp.concatenate([state.state_bd[:, None], fed_bmd], axis=1)
            drawn = drawn.add(draw, logits(fed_bmd[:, -len(drawn.shape.last_fed(depth)) :]))
        return drawn.propose(length_b >= 2), FeatureState(cache, state.state_bd)

    def _grow(self, state: FeatureState, context: Context, depth: int) -> tuple[Proposal, FeatureState]:
        """Returns the likeliest drafts of a tree (EAGLE-2, section 4.1 expansion, 4.2 reranking)."""
        target, length_b, k, cache = context.target, context.length_b, self.top_k, state.cache
        rows = length_b.shape[0]

        def log_probs(states_bkd: Array) -> Array:
            logits = self.head.logits(self.params, target, states_bkd.reshape(-1, states_bkd.shape[-1]))
            return jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, -1, logits.shape[-1])

        def pick(x: Array, index_bk: Array) -> Array:
            return jnp.take_along_axis(x, index_bk.reshape(rows, k, *(1 for _ in x.shape[2:])), axis=1)

        # 1. The first drafts. All of them get children.
        root = jnp.full((rows, 1), -1, jnp.int32)
        found = Candidates.after(log_probs(state.state_bd[:, None]), jnp.zeros((rows, 1), jnp.float32), root, k)
        index_bk = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (rows, k))
        score_bk, parent_bm = found.scores_bc, jnp.full((rows, k), -1, jnp.int32)
        token_bm, state_bmd = found.tokens_bc, jnp.repeat(state.state_bd[:, None], k, axis=1)

        # 2. A depth more in each step. Fed are the m drafts with children, each with its parent's state.
        for _ in range(depth - 1):
            m = token_bm.shape[1]
            feed = Feed(token_bm, length_b - 1, jnp.where(context.running_b, jnp.int32(m), 0), parent_bm)
            out_bmd, cache = self.head.run(self.params, target, feed, state_bmd, cache)
            out_bkd = out_bmd[:, m - k :]
            grown = Candidates.after(log_probs(out_bkd), score_bk, index_bk, k)
            score_bk, best_bk = lax.top_k(grown.scores_bc, k)
            index_bk = found.tokens_bc.shape[1] + best_bk
            token_bm = jnp.concatenate([token_bm, pick(grown.tokens_bc, best_bk)], axis=1)
            parent_bm = jnp.concatenate([parent_bm, m - k + best_bk // k], axis=1)
            state_bmd = jnp.concatenate([state_bmd, pick(out_bkd, best_bk // k)], axis=1)
            found = found + grown

        # 3. The drafts of the highest scores, whoever got children.
        g = context.drafts(self.num_draft)
        index_bg, parents_bg = found.best(g)
        tokens_bg = jnp.take_along_axis(found.tokens_bc, index_bg, axis=1)
        drafted_b = jnp.where(length_b >= 2, jnp.int32(g), 0)
        proposal = Proposal(tokens_bg, None, drafted_b, parents_bg=parents_bg)
        return proposal, FeatureState(cache, state.state_bd)

    def follow(self, state: FeatureState, context: Context, tokens_bg: Array) -> FeatureState:
        """Nothing to do: ``observe`` writes the true states, whoever drafted."""
        del context, tokens_bg
        return state
