"""A smaller language model as drafter."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.drafters.chain import Chain, place, repeat
from specjax.drafters.drawn import DrawnTree, check_drawn_tree
from specjax.drafters.trees import Path
from specjax.rows import text_at
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal


@struct.dataclass
class ModelState:
    """What the draft model has read.

    Attributes:
      cache: the draft model's.
      fed_b: int32, how many of the row's tokens the cache holds. All but the last few: see ``ModelDrafter._window``.
        After ``propose`` the drafts that were fed count, too, until ``observe`` cuts them.
    """

    cache: Cache
    fed_b: Array


@struct.dataclass
class ModelDrafter:
    """Drafts with another language model of the same vocabulary (Leviathan et al. 2023; Chen et al. 2023): a chain, or
    a static tree of drawn tokens, such as several independent chains (Miao et al. 2024, arXiv 2305.09781).

    A tree takes one pass for each depth, over all drafts so far that others follow. What was kept of it is fed again.

    Attributes:
      model: the draft model.
      num_draft: g, tokens proposed per round.
      unrolled: compile g passes one after another, in place of one pass in a loop on the device. A long loop compiles
        faster and runs a little slower (docs/performance.md). Trees are always unrolled.
      tree: for trees: drafts by their ranks among siblings in the order of drawing, of which the first ``num_draft``
        are proposed, the most valuable ones first: rounds that adapt take the first ones. ``drafters.trees`` makes
        some. None drafts a chain.
      siblings: for trees: how siblings are drawn, see ``types.Drafter``.
    """

    model: LanguageModel
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)
    tree: tuple[Path, ...] | None = struct.field(pytree_node=False, default=None)
    siblings: str = struct.field(pytree_node=False, default="distinct")

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    @property
    def tree_depth(self) -> int | None:
        return None if self.tree is None else max(map(len, self.tree[: self.num_draft]))

    @property
    def _rolls_back(self) -> bool:
        """Whether drafts that were kept are fed again: a tree's are at other slots, recurrent layers forget them."""
        return self.model.commit is not None or self.tree is not None

    @property
    def _window(self) -> int:
        """The most tokens of a row that are fed before the first draft.

        An attention cache keeps the drafts that were fed and accepted. Only the last draft is never fed, so two tokens
        are missing where all were accepted: that draft and the token after it. A cache that must be rolled back is
        kept as it was before the drafts, so all g + 1 tokens of a round may be missing; after a tree, those of a path.
        """
        return (self.tree_depth or self.num_draft) + 1 if self._rolls_back else 2

    def init(self, target: LanguageModel, rows: int, slots: int) -> ModelState:
        """Returns an empty cache.

        Raises:
          ValueError: the tree is none that can be drawn, or the draft model cannot be fed trees.
        """
        if self.tree is not None:
            check_drawn_tree(self.tree, self.num_draft, self.siblings, target.vocab_size)
            if self.model.gather is None:
                raise ValueError(
                    "the draft model has no gather and cannot be fed trees, as models with recurrent layers; draft a "
                    "chain with it"
                )
        return ModelState(self.model.init_cache(rows, slots), jnp.zeros((rows,), jnp.int32))

    def observe(self, state: ModelState, context: Context, event: Event) -> ModelState:
        """Feeds a prompt. Of a round, it only notes which drafts stay: ``propose`` feeds the rest."""
        if event.drafted:
            fed_b = jnp.where(event.kept_b > 0, jnp.minimum(state.fed_b, event.end_b), state.fed_b)
            return ModelState(state.cache, fed_b)
        # Tokens that were missing before come first, and as many are missing afterwards.
        width = event.feed.tokens_bt.shape[1]
        missing_b = jnp.where(event.kept_b > 0, event.end_b - state.fed_b, 0)
        feed = Feed(text_at(context.tokens_bs, state.fed_b, width), state.fed_b, jnp.clip(missing_b, 0, width))
        _, cache = self.model.run(feed, state.cache)
        return ModelState(cache, state.fed_b + feed.count_b)

    def propose(self, state: ModelState, context: Context, draw: Draw) -> tuple[Proposal, ModelState]:
        """Samples a chain of ``num_draft`` tokens, or a tree."""
        if self.tree is not None:
            return self._draw_tree(self.tree[: context.drafts(self.num_draft)], state, context, draw)
        length_b, running_b = context.length_b, context.running_b.astype(jnp.int32)
        # 1. Feed what the cache lacks of the row, which gives the first draft's logits.
        feed = self._missing(state, context, self._window)
        logits_btv, cache = self.model.run(feed, state.cache)
        rows, g, vocab = length_b.shape[0], context.drafts(self.num_draft), logits_btv.shape[-1]
        logits_bv = place(logits_btv, jnp.maximum(feed.count_b - 1, 0))
        chain, token_b = Chain.empty(rows, g, vocab).add(draw, logits_bv, 0)
        read = ModelState(cache, jnp.where(context.running_b, length_b, state.fed_b))

        # 2. Feed each draft for the next.
        def advance(i: int | Array, carry: tuple[Chain, Array, Cache]) -> tuple[Chain, Array, Cache]:
            chain, token_b, cache = carry
            logits_btv, cache = self.model.run(Feed(token_b[:, None], length_b + (i - 1), running_b), cache)
            return *chain.add(draw, logits_btv[:, 0], i), cache

        chain, _, cache = repeat(1, g, advance, (chain, token_b, cache), self.unrolled)
        # 3. Keep the drafts in the cache if those that are rejected do no harm there.
        ahead = ModelState(cache, read.fed_b + running_b * (g - 1))
        return chain.propose(jnp.full_like(length_b, g)), read if self._rolls_back else ahead

    def _draw_tree(
        self, tree: tuple[Path, ...], state: ModelState, context: Context, draw: Draw
    ) -> tuple[Proposal, ModelState]:
        """Samples the drafts of a static tree."""
        length_b = context.length_b
        feed = self._missing(state, context, self._window)
        logits_btv, cache = self.model.run(feed, state.cache)
        logits_bv = place(logits_btv, jnp.maximum(feed.count_b - 1, 0))
        drawn = DrawnTree.of(tree, self.siblings, length_b.shape[0]).add(draw, logits_bv[:, None])
        for depth in range(1, drawn.shape.depth):
            tokens_bm, parents_bm = drawn.fed(depth)
            count_b = jnp.where(context.running_b, jnp.int32(tokens_bm.shape[1]), 0)
            logits_bmv, cache = self.model.run(Feed(tokens_bm, length_b, count_b, parents_bm), cache)
            drawn = drawn.add(draw, logits_bmv[:, -len(drawn.shape.last_fed(depth)) :])
        # The tree stays in the cache past the row's end, where the next round writes what was kept.
        read = ModelState(cache, jnp.where(context.running_b, length_b, state.fed_b))
        return drawn.propose(jnp.ones_like(context.running_b)), read

    def follow(self, state: ModelState, context: Context, tokens_bg: Array) -> ModelState:
        """Feeds in one pass what ``propose`` would have, had it drafted these tokens."""
        running_b = context.running_b
        if self._rolls_back:
            feed = self._missing(state, context, self._window)
            _, cache = self.model.run(feed, state.cache)
            return ModelState(cache, jnp.where(running_b, context.length_b, state.fed_b))
        g = tokens_bg.shape[1]
        feed = self._missing(state, context, g + 1)
        place_t = jnp.arange(g + 1, dtype=jnp.int32)[None]
        # Where one token was missing, the last place is not real: the last draft is not fed.
        draft_bt = jnp.clip(place_t - feed.count_b[:, None], 0, g - 1)
        drafts_bt = jnp.take_along_axis(tokens_bg, draft_bt, axis=1)
        tokens_bt = jnp.where(feed.real_bt, feed.tokens_bt, drafts_bt)
        count_b = jnp.where(running_b, feed.count_b + (g - 1), 0)
        _, cache = self.model.run(Feed(tokens_bt, feed.start_b, count_b), state.cache)
        return ModelState(cache, state.fed_b + count_b)

    def _missing(self, state: ModelState, context: Context, width: int) -> Feed:
        """Returns the tokens of running rows that the cache lacks."""
        count_b = jnp.where(context.running_b, context.length_b - state.fed_b, 0)
        return Feed(text_at(context.tokens_bs, state.fed_b, width), state.fed_b, count_b)
