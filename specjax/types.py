"""The contracts of specjax: what a model, a drafter and a verification rule are.

Shape suffixes follow the key in :mod:`specjax`: b rows, t query tokens, s cache slots, v vocabulary, g draft
tokens. This module imports nothing else of the package.

Rows come first: every array leaf of a model's cache and of a drafter's state has the rows as its first axis. The engine
relies on it to replace rows (``specjax.insert``) and to split rows over devices.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

Cache = Any
"""Whatever pytree a model's ``init_cache`` returns; rows first."""

SIBLINGS = ("chosen", "distinct", "independent", "paths")
"""How siblings of a tree come about; see ``Drafter``."""

Axis = str | tuple[str, int] | None
"""What a dimension of a parameter stands for, by which it may be split over devices (``specjax.sharding.RULES``):
"vocab"; ("heads", n), where it has n parts that stay whole; or None, never split."""


@struct.dataclass
class Feed:
    """The input of one pass: t places per row, of which the first ``count_b[i]`` are real.

    Place j of row i is written at slot ``start_b[i] + j``. In a chain the slot is also the position; in a tree the
    position follows the depth (``position_bt``). A model keeps nothing of a place that is not real: no later pass may
    depend on it. Such a place may still be computed, and its logits mean nothing.

    Attributes:
      tokens_bt: int32; past ``count_b``, any valid ids.
      start_b: int32, the first slot of each row. ``start_b + t`` is at most the number of slots.
      count_b: int32, 0 .. t, how many places are real; 0 is a row that rests.
      parents_bt: int32, for trees: the place that each place follows, an earlier one; below 0, it follows the slots
        before the feed. A place sees those slots, itself and what it follows, and no other place. None is a chain:
        place j follows place j - 1. Only models with ``gather`` are fed trees.
    """

    tokens_bt: Array
    start_b: Array
    count_b: Array
    parents_bt: Array | None = None

    @property
    def position_bt(self) -> Array:
        """int32, the position of each place. Siblings of a tree share theirs."""
        if self.parents_bt is not None:
            return self.start_b[:, None] + jnp.sum(ancestors(self.parents_bt), axis=-1, dtype=jnp.int32) - 1
        return self.start_b[:, None] + jnp.arange(self.tokens_bt.shape[1], dtype=jnp.int32)[None]

    @property
    def real_bt(self) -> Array:
        """bool, whether each place is real."""
        return jnp.arange(self.tokens_bt.shape[1], dtype=jnp.int32)[None] < self.count_b[:, None]


def ancestors(parents_bt: Array) -> Array:
    """Returns bool ``[b, t, t]``: whether place i of a tree is place j or follows it, directly or through others.

    Args:
      parents_bt: int32, as of ``Feed``.
    """
    t = parents_bt.shape[1]
    place_t = jnp.arange(t, dtype=jnp.int32)
    seen_btt = jnp.eye(t, dtype=bool)[None] | (parents_bt[:, :, None] == place_t[None, None])
    for _ in range((t - 1).bit_length()):  # each product doubles how far back the mask reaches
        steps_btt = seen_btt.astype(jnp.float32)
        seen_btt = jnp.einsum("bij,bjk->bik", steps_btt, steps_btt) > 0
    return seen_btt


def whole_feed(tokens_bt: Array, start_b: Array | None = None) -> Feed:
    """Returns a feed in which every place is real, by default from the first slot on."""
    rows, width = tokens_bt.shape
    start_b = jnp.zeros((rows,), jnp.int32) if start_b is None else start_b
    return Feed(tokens_bt, start_b, jnp.full((rows,), width, jnp.int32))


class Output(NamedTuple):
    """What one forward pass returns.

    Attributes:
      logits_btv: next-token logits for each of the t places, of any floating dtype; sampled in float32.
      features: one ``[b, t, d]`` hidden state per captured index, in the order asked for.
      cache: the cache with the real places written. If the model has ``commit``, this may be another pytree than
        ``init_cache`` returns, such as one with a state per place; ``commit`` returns the cache proper.
    """

    logits_btv: Array
    features: tuple[Array, ...]
    cache: Cache


class InitCache(Protocol):
    """Makes an empty cache for ``rows`` rows of ``slots`` tokens."""

    def __call__(self, rows: int, slots: int) -> Cache: ...


class Forward(Protocol):
    """Feeds tokens through the model; see ``LanguageModel.forward``."""

    def __call__(self, params: Any, feed: Feed, cache: Cache, capture: tuple[int, ...] = ()) -> Output: ...


class CommitCache(Protocol):
    """Keeps the first ``kept_b[i]`` places of the last pass; see ``LanguageModel.commit``."""

    def __call__(self, cache: Cache, feed: Feed, kept_b: Array) -> Cache: ...


class GatherCache(Protocol):
    """Keeps the places ``path_bt`` of a tree that was fed; see ``LanguageModel.gather``."""

    def __call__(self, cache: Cache, feed: Feed, path_bt: Array) -> Cache: ...


class EarlyExit(Protocol):
    """Feeds tokens through the first ``depth`` layers; see ``LanguageModel.early_exit``."""

    def __call__(self, params: Any, feed: Feed, cache: Cache, depth: int) -> Output: ...


@struct.dataclass
class LanguageModel:
    """A causal language model as pure functions over a pytree of parameters.

    Any JAX model fits by giving the functions. They are static: give the *same* function objects for the same
    architecture (module-level or cached functions), or each new model recompiles the loop.
    ``specjax.check_model`` tests whether a model keeps this contract.

    Attributes:
      params: the parameters, the only leaves.
      forward: ``forward(params, feed, cache, capture=()) -> Output``. Writes the places of ``feed`` into the cache.
        Each place attends to the slots up to its own. Slots past a row's end hold garbage: it is masked now and
        overwritten later. ``capture`` is a static tuple of hidden-state indices: 0 the embedding output, i the output
        of layer i, -1 the state after the final norm.
      init_cache: ``init_cache(rows, slots) -> cache`` of fixed shape, rows first.
      vocab_size: size v of the logits.
      commit: ``commit(cache, feed, kept_b) -> cache``, called after every pass with that pass's ``feed`` and
        ``Output.cache``: the first ``kept_b[i]`` places stay, 0 .. ``count_b[i]``, and the others are forgotten.
        None if there is nothing to forget, as in attention caches: what lies past a row's end is never seen. Only
        such a model may be fed the same slots several times.
      gather: ``gather(cache, feed, path_bt) -> cache``, called after each pass over a tree: what place
        ``path_bt[i, j]`` of the feed wrote moves to slot ``start_b[i] + j``. ``path_bt`` is int32 ``[b, d]``. Its first
        place is 0, and past the kept places it holds any places. Example: a row of n = 10 tokens is fed its last token
        and two drafts that follow it, at slots 9, 10 and 11. The path (0, 2) moves slot 11 to slot 10. None if the
        model cannot be fed trees; a model with ``commit`` has none.
      max_positions: the longest sequence the model can represent, or None.
      embed: ``embed(params, tokens_bt) -> [b, t, d]``, the tokens' embeddings as the first layer gets them, for draft
        heads that share them; None if the model does not say.
      unembed: ``unembed(params, x_btd) -> logits_btv`` of states after the final norm; None as for ``embed``.
      early_exit: ``early_exit(params, feed, cache, depth) -> Output``, a forward pass that leaves out the layers past
        the first ``depth``. Their part of the cache stays as it is. None as for ``embed``; a model with ``commit`` has
        none.
      num_layers: how many layers there are for ``capture`` and ``early_exit``; None as for ``embed``.
      windows: for each layer, how many tokens a query sees, or None for all; for drafters that read the target's cache.
        None as for ``embed``.
      axes: ``axes()``, a tree like ``params`` with a tuple in place of each array, one ``Axis`` per dimension, for
        ``specjax.shard``; None as for ``embed``.
    """

    params: Any
    forward: Forward = struct.field(pytree_node=False)
    init_cache: InitCache = struct.field(pytree_node=False)
    vocab_size: int = struct.field(pytree_node=False)
    commit: CommitCache | None = struct.field(pytree_node=False, default=None)
    gather: GatherCache | None = struct.field(pytree_node=False, default=None)
    max_positions: int | None = struct.field(pytree_node=False, default=None)
    embed: Callable[[Any, Array], Array] | None = struct.field(pytree_node=False, default=None)
    unembed: Callable[[Any, Array], Array] | None = struct.field(pytree_node=False, default=None)
    early_exit: EarlyExit | None = struct.field(pytree_node=False, default=None)
    num_layers: int | None = struct.field(pytree_node=False, default=None)
    windows: tuple[int | None, ...] | None = struct.field(pytree_node=False, default=None)
    axes: Callable[[], Any] | None = struct.field(pytree_node=False, default=None)

    def read(self, feed: Feed, cache: Cache, capture: tuple[int, ...] = ()) -> Output:
        """Returns what ``forward`` does.

        Raises:
          ValueError: ``forward`` does not take four arguments, or returns no ``Output``.
        """
        try:
            inspect.signature(self.forward).bind(self.params, feed, cache, capture)
        except TypeError as error:
            raise ValueError(
                f"the model's forward cannot be called with (params, feed, cache, capture): {error}; define "
                "forward(params, feed, cache, capture=()), or use specjax.adapt"
            ) from None
        output = self.forward(self.params, feed, cache, capture)
        if not isinstance(output, Output):
            raise ValueError(
                f"the model's forward returned a {type(output).__name__}; return specjax.Output(logits_btv, features, "
                "cache), or use specjax.adapt for a model that returns (logits, cache)"
            )
        return output

    def run(self, feed: Feed, cache: Cache) -> tuple[Array, Cache]:
        """Runs a pass and keeps all its real places; returns the logits ``[b, t, v]`` and the cache."""
        output = self.read(feed, cache)
        return output.logits_btv, self.keep(output.cache, feed, feed.count_b)

    def keep(self, cache: Cache, feed: Feed, kept_b: Array) -> Cache:
        """Returns the cache after a pass of which the first ``kept_b[i]`` places stay."""
        return cache if self.commit is None else self.commit(cache, feed, kept_b)

    def with_params(self, params: Any) -> "LanguageModel":
        """Returns the model with other parameters, such as those after a step of training; nothing compiles anew.

        Raises:
          ValueError: ``params`` has other names, shapes or dtypes than the model's own.
        """
        own, tree = jax.tree_util.tree_flatten_with_path(self.params)
        leaves, given = jax.tree.flatten(params)
        if given != tree:
            raise ValueError(
                f"params is a tree {given} and the model's is {tree}; give the model's names, or make a new "
                "LanguageModel"
            )
        for (path, old), new in zip(own, leaves, strict=True):
            if (jnp.shape(new), jnp.result_type(new)) != (old.shape, old.dtype):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} is {jnp.shape(new)} {jnp.result_type(new)} and the model's is "
                    f"{old.shape} {old.dtype}; cast it, or make a new LanguageModel, which compiles once more"
                )
        return dataclasses.replace(self, params=params)

    def require(self, *names: str) -> None:
        """Raises ValueError unless the model says each of the optional fields ``names``, such as "embed"."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(
                    f"the target has no {name}, which the drafter needs; give LanguageModel({name}=...) or another "
                    "drafter"
                )

    def state_specs(self, capture: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shape ``[1, 1, d]`` and dtype of each captured hidden state; computes nothing."""

        def states(params: Any) -> tuple[Array, ...]:
            feed = whole_feed(jnp.zeros((1, 1), jnp.int32))
            return self.forward(params, feed, self.init_cache(1, 1), capture).features

        return jax.eval_shape(states, self.params)

    @property
    def embedding_spec(self) -> jax.ShapeDtypeStruct:
        """Shape ``[1, 1, d]`` and dtype of one embedded token; computes nothing.

        Raises:
          ValueError: the model does not say how it embeds.
        """
        self.require("embed")
        assert self.embed is not None
        return jax.eval_shape(self.embed, self.params, jax.ShapeDtypeStruct((1, 1), jnp.int32))


@struct.dataclass
class Context:
    """What a drafter may read between two target passes.

    Attributes:
      target: the target model.
      cache: the target's cache; row i holds its first ``length_b[i] - 1`` tokens.
      tokens_bs: int32, prompt and emitted tokens; past a row's length, padding.
      length_b: int32, tokens of each row, at least 1.
      room_b: int32, how many drafts a row can still use: it may emit ``room_b + 1`` tokens more. -1 is a row that is
        done; a drafter lets it rest.
      width: static, how many drafts this round takes at most; None for the drafter's ``num_draft``. A drafter that
        proposes more works in vain: what is past the width is dropped.
      price_bg: for drafters with ``cuts``: float32, how many tokens must be expected of draft j and those after it,
        given all before it, to be worth the time that they take. 0 where the target's pass has room for draft j anyway.
        Example: a pass has room for 0, 2 or 4 drafts, so places 0 and 2 have prices, and 1 and 3 have none. None:
        nothing is gained by proposing fewer drafts.
    """

    target: LanguageModel
    cache: Cache
    tokens_bs: Array
    length_b: Array
    room_b: Array
    width: int | None = struct.field(pytree_node=False, default=None)
    price_bg: Array | None = None

    def drafts(self, num_draft: int) -> int:
        """Returns how many of a drafter's ``num_draft`` tokens this round takes at most."""
        return num_draft if self.width is None else min(num_draft, self.width)

    @property
    def running_b(self) -> Array:
        """bool, whether a row is not done."""
        return self.room_b >= 0


@struct.dataclass
class Event:
    """Tokens that became true: a chunk of a prompt, or what verification kept of a round.

    Attributes:
      feed: what the target was fed. In a round: [last token, g drafts]. After a tree it is a chain all the same: the
        last token and the path that was kept, ``tree_depth`` + 1 places.
      features: the target's states ``[b, t, d]`` over the feed, one per index of the drafter's ``capture``.
      kept_b: int32, how many of the feed's places are now true; 0 for a row that rests, whose state stays.
      drafted: static, whether ``propose`` or ``follow`` ran since the event before.
    """

    feed: Feed
    features: tuple[Array, ...]
    kept_b: Array
    drafted: bool = struct.field(pytree_node=False, default=False)

    @property
    def end_b(self) -> Array:
        """int32, the slot after the kept places. Its token is known, too: it is the row's last one so far."""
        return self.feed.start_b + self.kept_b


@struct.dataclass
class Proposal:
    """What a drafter proposes to follow each row: a chain of g tokens, or a tree of g tokens.

    In a tree every draft follows the row's last token, the root, or an earlier draft: ``parents_bg[i, j] < j``. Drafts
    with the same parent are siblings. Example: parents (-1, -1, 0, 0, 1) are drafts 0 and 1 after the root, drafts 2
    and 3 after draft 0, and draft 4 after draft 1. Siblings stand in the order in which they were drawn. Deterministic
    siblings are different tokens.

    Attributes:
      tokens_bg: int32 draft tokens.
      probs_bgv: the distribution each token was really drawn from (as returned by ``draw``), or None when the
        tokens are a deterministic function of the context: then q is one-hot. In a tree, for each draft the
        distribution that the first of its siblings was drawn from.
      length_b: int32, how many of the g tokens row i proposes; the rest are ignored.
      cache: only for drafters that run the target's own layers: the target's cache with what the drafter wrote past
        each row's end. The target's pass starts from it and overwrites those slots. None: the drafter did not touch
        the cache.
      parents_bg: int32, for trees: the draft that each draft follows, -1 for the root. None is a chain: draft j follows
        draft j - 1.
      replacement: static, for trees: whether siblings were drawn independently of each other. False: each was drawn
        from ``probs_bgv`` without its elder siblings' tokens, renormalised. Without meaning for chains and for
        deterministic drafts.
    """

    tokens_bg: Array
    probs_bgv: Array | None
    length_b: Array
    cache: Cache = None
    parents_bg: Array | None = None
    replacement: bool = struct.field(pytree_node=False, default=True)

    def first(self, width: int) -> "Proposal":
        """Returns the proposal without drafts past the first ``width``."""

        def cut(array: Array | None) -> Array | None:
            return None if array is None else array[:, :width]

        return dataclasses.replace(
            self,
            tokens_bg=self.tokens_bg[:, :width],
            probs_bgv=cut(self.probs_bgv),
            length_b=jnp.minimum(self.length_b, width),
            parents_bg=cut(self.parents_bg),
        )

    def q(self, vocab_size: int) -> Array:
        """Returns float32 ``[b, g, v]``, what the drafts were drawn from; one-hot for deterministic drafts."""
        if self.probs_bgv is not None:
            return self.probs_bgv
        return jax.nn.one_hot(self.tokens_bg, vocab_size, dtype=jnp.float32)


@struct.dataclass
class Verdict:
    """What verification decided.

    Attributes:
      num_accepted_b: int32, draft tokens kept, 0 .. length_b; of a tree at most its depth.
      next_b: int32, the token emitted after them.
      path_bd: int32 ``[b, depth]``, for trees: the drafts that were kept, from the root on. The first
        ``num_accepted_b[i]`` entries count, and the others are 0. None is a chain: entry j is draft j.
    """

    num_accepted_b: Array
    next_b: Array
    path_bd: Array | None = None


class Draws(Protocol):
    """The random choices of one round, keyed per row; made by the engine."""

    def uniforms(self, count: int) -> Array:
        """Returns ``[b, count]`` in [0, 1), one for each draft."""
        ...

    def emit(self, weights_bv: Array, offset_b: Array) -> Array:
        """Draws the token to emit ``offset_b`` places past the row's end, with probability proportional to
        the weights. The same noise serves each row and absolute position, whatever the weights."""
        ...


class VerifyRule(Protocol):
    """Decides which draft tokens stay: ``rule(proposal, target_btv, draws) -> Verdict``.

    ``target_btv`` holds the target's g+1 warped distributions: place 0 is the law after the row's last token, place
    j + 1 the law after draft j. A rule is hashable, being a static argument.

    Optional: ``trees``, static, true where the rule takes proposals with ``parents_bg``. Other rules take chains only.

    Optional: ``paths``, static, true where drafts of a tree that were drawn must be independent paths from the root:
    see ``Drafter`` on ``siblings``.

    Attributes:
      shares_noise: whether drafts are drawn with the noise that ``emit`` uses at their position.
    """

    @property
    def shares_noise(self) -> bool: ...

    def __call__(self, proposal: Proposal, target_btv: Array, draws: Draws) -> Verdict: ...


class Draw(Protocol):
    """Draws a draft token; made by the engine, which holds the rows' sampling parameters and keys.

    ``draw(logits_bv, drafts_bg, index) -> (token_b, probs_bv)`` warps the logits and draws draft ``index`` of the
    round, a Python integer or a traced int32 scalar from 0. So a drafter may draw in a loop on the device.
    ``drafts_bg`` holds the drafts before it in its first ``index`` places, for penalties; the other places are ignored.
    ``probs_bv`` is the very distribution that was sampled.

    In a tree, ``draw(logits_bv, drafts_bg, index, before_bg)`` draws draft ``index``, whatever its place in the tree.
    ``before_bg`` is bool and says which drafts it follows; without it they are those of a chain. Siblings have
    different indices, and so noise of their own.

    ``draw(.., siblings=n)``, static, draws n siblings without replacement, with the noise of draft ``index`` alone, and
    returns ``token_bn`` in the order of drawing. ``probs_bv`` is the distribution of the first, as ``Proposal`` asks
    for. Siblings past the tokens that it can draw are the likeliest others, for which verification takes a one-hot q.

    ``draw`` may be batched over drafts with ``jax.vmap``, each with its own index.
    """

    def __call__(
        self,
        logits_bv: Array,
        drafts_bg: Array,
        index: int | Array,
        before_bg: Array | None = None,
        siblings: int | None = None,
    ) -> tuple[Array, Array]: ...


class Drafter(Protocol):
    """A source of draft tokens: a registered pytree with these static fields and pure methods.

    The order of events: ``init`` once; then ``observe`` for each chunk of the prompt; then each round ``propose`` and
    ``observe``. More prompt may come later, and a round may come without ``propose``.

    A drafter with its own cache must write the tokens that ``draw`` returned, even if it would have chosen others:
    inside a ``Cascade``, ``draw`` may return another drafter's tokens.

    A round may take fewer drafts than ``num_draft``: ``context.width``. The state is the same for all widths. A
    drafter of trees then proposes its tree of so many drafts.

    Optional: ``sparse``, static, true where whole rounds come without a proposal, as of n-grams. Such a round then
    costs what a plain one does, and rounds take all drafts or none.

    Optional: ``cuts``, static, true where the drafter may propose fewer drafts in a row because their chances are not
    worth ``context.price_bg``. Rounds then draft all or none, and once the drafts are known the target's pass has room
    for none, half or all of them. Whether draft j is proposed must not depend on draft j or on any draft after it.

    Optional: ``tree_depth``, static, for drafters of trees: the most drafts on one path from the root. All their
    proposals have ``parents_bg``, and ``num_draft`` counts the drafts of the whole tree. None is a drafter of chains.

    Optional: ``siblings``, static, for drafters of trees: how siblings come about, one of ``SIBLINGS``. "chosen": they
    follow from the context, and ``probs_bgv`` is None. "distinct": they are drawn without replacement. "independent":
    each is drawn from the same distribution. "paths": likewise, and only the root has siblings. A rule with ``paths``
    refuses all but "chosen" and "paths", and drafters that do not say.

    Optional: ``follow(state, context, tokens_bg) -> state``. It replaces ``propose`` in rounds where every row uses
    another drafter's ``tokens_bg``, and must return the state that ``propose`` would have returned had it drawn those
    tokens. ``observe`` comes next as usual.

    Optional: ``remember(tokens_bt, length_b) -> drafter``, for drafters with a memory: the drafter with ``length_b``
    tokens of each row in its memory, too. Its arrays keep their shapes (``specjax.remember``).

    Attributes:
      num_draft: g, the tokens proposed per round.
      capture: hidden-state indices of the target that ``observe`` receives as ``features``.
      vocab_size: the vocabulary drafted from, or None when it is the target's by construction.
      max_positions: the longest sequence it can draft for, or None.
    """

    @property
    def num_draft(self) -> int: ...
    @property
    def capture(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def max_positions(self) -> int | None: ...

    def init(self, target: LanguageModel, rows: int, slots: int) -> Any:
        """Returns the state of rows without text, rows first. ``slots`` is the most tokens that a row will have.

        Raises:
          ValueError: the drafter does not fit the target.
        """
        ...

    def observe(self, state: Any, context: Context, event: Event) -> Any:
        """Returns the state after ``event``, of one row or more.

        ``context`` is that after the event: ``tokens_bs`` holds the kept tokens and the one after them, and the
        target's cache holds the kept ones. Of a prompt, ``tokens_bs`` holds all from the start.
        """
        ...

    def propose(self, state: Any, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Proposes up to ``context.width`` or ``num_draft`` tokens to follow each row."""
        ...


@struct.dataclass
class Stats:
    """What happened, per row; all int32.

    Attributes:
      rounds: ``[rows]``, target passes in which the row was still running.
      drafted: ``[rows]``, draft tokens proposed; of a tree, all of them.
      accepted: ``[rows]``, draft tokens that verification kept, those after a stop token included.
      emitted: ``[rows]``, tokens emitted, the token after the accepted drafts included.
      drafted_at: ``[rows, g]``, rounds that proposed a token at draft position j; of trees ``[rows, depth]``, rounds
        whose tree had a draft at depth j + 1.
      accepted_at: ``[rows, g]``, rounds that kept it, or a draft at this depth.
    """

    rounds: Array
    drafted: Array
    accepted: Array
    emitted: Array
    drafted_at: Array
    accepted_at: Array

    @property
    def tokens_per_round(self) -> Array:
        """float32 scalar, tokens emitted per target pass over all rows; plain decoding has 1."""
        return self.emitted.sum() / jnp.maximum(self.rounds.sum(), 1)

    @property
    def acceptance_rate(self) -> Array:
        """float32 scalar, the share of drafts that verification kept, over all rows; 0 without drafts."""
        return self.accepted.sum() / jnp.maximum(self.drafted.sum(), 1)


@struct.dataclass
class Generation:
    """The result of ``generate``, as JAX arrays; of ``stream``, as NumPy arrays.

    Attributes:
      tokens: int32 ``[rows, slots]``; ``tokens[i, :lengths[i]]`` is prompt i followed by what was emitted, a stop
        token included; zeros past it.
      lengths: int32 ``[rows]``, tokens of each row, the prompt's included.
      prompt_lengths: int32 ``[rows]``.
      stats: per-row counts.
      logprobs: float32 ``[rows, slots]``, the natural logarithm of each emitted token's probability under the target's
        own distribution: temperature 1, no filter, penalty or bias. 0 at the prompt's places and past the end; what
        was emitted before ``extend`` keeps its own. None unless asked for, and so the next three.
      warped_logprobs: the same under the distribution that was sampled, after ``Sampling``. A greedy token has 0.
      top_tokens: int32 ``[rows, slots, n]``, the n likeliest tokens of each place under the target's own distribution.
      top_logprobs: float32 ``[rows, slots, n]``, their logarithms.
    """

    tokens: Array
    lengths: Array
    prompt_lengths: Array
    stats: Stats
    logprobs: Array | None = None
    warped_logprobs: Array | None = None
    top_tokens: Array | None = None
    top_logprobs: Array | None = None

    def to_host(self) -> "Generation":
        """Returns the generation as NumPy arrays. Over several hosts, ``specjax.sharding.gathered`` does."""
        return jax.device_get(self)

    def rows(self) -> list[Any]:
        """Returns each row's tokens, prompt and emitted, as NumPy arrays ``[length]``."""
        host = self.to_host()
        return [row[:length] for row, length in zip(host.tokens, host.lengths, strict=True)]

    def new_tokens(self) -> list[Any]:
        """Returns each row's emitted tokens as NumPy arrays, a stop token included."""
        host = self.to_host()
        return [row[start:] for row, start in zip(host.rows(), host.prompt_lengths, strict=True)]
