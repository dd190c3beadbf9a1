"""The contracts of specjax: what a model, a drafter and a verification rule are.

Shape suffixes follow the key in :mod:`specjax`: b rows, t query tokens, s cache slots, v vocabulary, g draft
tokens. This module imports nothing else of the package.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

Cache = Any
"""Whatever pytree a model's ``init_cache`` returns."""

Axis = str | tuple[str, int] | None
"""What a dimension of a parameter stands for, by which it may be split over devices (``specjax.sharding.RULES``):
"vocab"; ("heads", n), where it has n parts that stay whole; or None, never split."""


class Output(NamedTuple):
    """What one forward pass returns.

    Attributes:
      logits_btv: next-token logits for each of the t input tokens, of any floating dtype; sampled in float32.
      features: one ``[b, t, d]`` hidden state per captured index, in the order asked for.
      cache: the cache with the t tokens written.
    """

    logits_btv: Array
    features: tuple[Array, ...]
    cache: Cache


class InitCache(Protocol):
    """Makes an empty cache for ``rows`` rows of ``slots`` tokens."""

    def __call__(self, rows: int, slots: int) -> Cache: ...


class Forward(Protocol):
    """Feeds tokens through the model; see ``LanguageModel.forward``."""

    def __call__(
        self, params: Any, tokens_bt: Array, cache: Cache, start_b: Array, capture: tuple[int, ...] = ()
    ) -> Output: ...


class CommitCache(Protocol):
    """Keeps the first ``kept_b[i]`` of the tokens that were written at ``start_b``."""

    def __call__(self, cache: Cache, start_b: Array, kept_b: Array) -> Cache: ...


class EarlyExit(Protocol):
    """Feeds tokens through the first ``depth`` layers; see ``LanguageModel.early_exit``."""

    def __call__(self, params: Any, tokens_bt: Array, cache: Cache, start_b: Array, depth: int) -> Output: ...


class Resume(Protocol):
    """Feeds states behind the first ``depth`` layers through the others; see ``LanguageModel.resume``."""

    def __call__(
        self, params: Any, x_btd: Array, cache: Cache, start_b: Array, depth: int, capture: tuple[int, ...] = ()
    ) -> Output: ...


def keep_cache(cache: Cache, start_b: Array, kept_b: Array) -> Cache:
    """The ``commit`` of attention caches: slots past a row's length are masked, so there is nothing to undo."""
    del start_b, kept_b
    return cache


@struct.dataclass
class LanguageModel:
    """A causal language model as pure functions over a pytree of parameters.

    Any JAX model fits by giving the functions. They are static: give the *same* function objects for the same
    architecture (module-level or cached functions), or each new model recompiles the loop.

    Attributes:
      params: the parameters, the only leaves.
      forward: ``forward(params, tokens_bt, cache, start_b, capture=()) -> Output``. Writes the t tokens of row i
        at slots ``start_b[i] .. start_b[i] + t - 1`` and lets each attend to all slots up to its own. Slot equals
        position. Slots past a row's length hold garbage that is masked now and overwritten later. ``capture`` is a
        static tuple of hidden-state indices: 0 the embedding output, i the output of layer i, -1 the state after
        the final norm.
      init_cache: ``init_cache(rows, slots) -> cache`` of fixed shape.
      vocab_size: size v of the logits.
      commit: ``commit(cache, start_b, kept_b) -> cache``, called after verification: of the tokens written at
        ``start_b``, the first ``kept_b[i]`` stay; in layers that a drafter ran, it wrote them one by one. Identity for
        attention caches.
      max_positions: the longest sequence the model can represent, or None.
      embed: ``embed(params, tokens_bt) -> [b, t, d]``, the tokens' embeddings as the first layer gets them, for draft
        heads that share them; None if the model does not say.
      unembed: ``unembed(params, x_btd) -> logits_btv`` of states behind the final norm; None as for ``embed``.
      early_exit: ``early_exit(params, tokens_bt, cache, start_b, depth) -> Output``, a forward pass that leaves out
        the layers past the first ``depth`` and leaves their part of the cache as it is. Its one feature is the state
        behind these layers. None as for ``embed``.
      resume: ``resume(params, x_btd, cache, start_b, depth, capture=()) -> Output``, the rest of a forward pass whose
        first ``depth`` layers are done, their states being ``x_btd`` and their part of the cache written; an index in
        ``capture`` is -1 or at least ``depth``. With None, a target pass runs all layers.
      num_layers: how many layers there are for ``capture``, ``early_exit`` and ``resume``; None as for ``embed``.
      axes: ``axes()``, a tree like ``params`` with a tuple in place of each array, one ``Axis`` per dimension, for
        ``specjax.shard``; None as for ``embed``.
    """

    params: Any
    forward: Forward = struct.field(pytree_node=False)
    init_cache: InitCache = struct.field(pytree_node=False)
    vocab_size: int = struct.field(pytree_node=False)
    commit: CommitCache = struct.field(pytree_node=False, default=keep_cache)
    max_positions: int | None = struct.field(pytree_node=False, default=None)
    embed: Callable[[Any, Array], Array] | None = struct.field(pytree_node=False, default=None)
    unembed: Callable[[Any, Array], Array] | None = struct.field(pytree_node=False, default=None)
    early_exit: EarlyExit | None = struct.field(pytree_node=False, default=None)
    resume: Resume | None = struct.field(pytree_node=False, default=None)
    num_layers: int | None = struct.field(pytree_node=False, default=None)
    axes: Callable[[], Any] | None = struct.field(pytree_node=False, default=None)

    @property
    def embedded(self) -> jax.ShapeDtypeStruct:
        """Shape ``[1, 1, d]`` and dtype of one embedded token, for models that say how they embed; computes nothing."""
        assert self.embed is not None
        return jax.eval_shape(self.embed, self.params, jax.ShapeDtypeStruct((1, 1), jnp.int32))


@struct.dataclass
class Context:
    """What a drafter may read between two target passes.

    Attributes:
      target: the target model.
      cache: the target's cache; row i holds its first ``length_b[i] - 1`` tokens.
      tokens_bs: int32, prompt and emitted tokens; past a row's length, padding. In ``start``, the prompt's slots
        only.
      length_b: int32, tokens of each row, at least 1.
    """

    target: LanguageModel
    cache: Cache
    tokens_bs: Array
    length_b: Array


@struct.dataclass
class Proposal:
    """What a drafter proposes for the next g positions.

    Attributes:
      tokens_bg: int32 draft tokens.
      probs_bgv: the distribution each token was really drawn from (as returned by ``draw``), or None when the
        tokens are a deterministic function of the context: then q is one-hot.
      length_b: int32, how many of the g tokens row i proposes; the rest are ignored.
      cache: the target's cache, if the drafter wrote into it behind the rows' last tokens; the target's pass goes on
        from it and overwrites that, but for what ``states_btd`` stand for. None leaves it as it is.
      states_btd: ``[b, g+1, d]``, the target's states behind its first ``depth`` layers over [last token, g drafts]
        in every row, if the drafter ran these layers and they wrote ``cache``: the target's pass then runs only the
        others. The text is exact only if they are right. The tokens are those that ``draw`` returned.
      depth: of ``states_btd``, at least 1; 0 without.
    """

    tokens_bg: Array
    probs_bgv: Array | None
    length_b: Array
    cache: Cache = None
    states_btd: Array | None = None
    depth: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Verdict:
    """What verification decided.

    Attributes:
      num_accepted_b: int32, draft tokens kept, 0 .. length_b.
      next_b: int32, the token emitted after them.
    """

    num_accepted_b: Array
    next_b: Array


class Draws(Protocol):
    """The random choices of one round, keyed per row; made by the engine."""

    def uniforms(self, count: int) -> Array:
        """Returns ``[b, count]`` in [0, 1), one for each draft position."""
        ...

    def emit(self, weights_bv: Array, offset_b: Array) -> Array:
        """Draws the token to emit ``offset_b`` places behind the row's end, with probability proportional to
        the weights. The same noise serves each row and absolute position, whatever the weights."""
        ...


class VerifyRule(Protocol):
    """Decides which draft tokens stay: ``rule(proposal, target_bsv, draws) -> Verdict``.

    ``target_bsv`` holds the target's g+1 warped distributions. A rule is hashable, being a static argument.

    Attributes:
      shares_noise: whether drafts are drawn with the noise that ``emit`` uses at their position.
    """

    @property
    def shares_noise(self) -> bool: ...

    def __call__(self, proposal: Proposal, target_bsv: Array, draws: Draws) -> Verdict: ...


Draw = Callable[[Array, Array], tuple[Array, Array]]
"""``draw(logits_bv, prefix_bi) -> (token_b, probs_bv)``: warps the logits with the rows' sampling parameters and
draws the next draft token. ``prefix_bi`` are the tokens drafted before it in this round (i = 0 .. g-1), from which
position and penalties follow. ``probs_bv`` is the very distribution that was sampled."""


class Drafter(Protocol):
    """A source of draft tokens: a registered pytree with these static fields and pure methods.

    A drafter with a cache of its own writes behind the rows' ends the tokens that ``draw`` returned, whatever they
    are: in a cascade they may be another drafter's. It may also have ``follow(state, context, tokens_bg) -> state``,
    which is called in place of ``propose`` in a round for which another drafted ``tokens_bg`` in all rows, and leaves
    what ``propose`` would have left if its draws had been these; ``commit`` comes as always.

    Attributes:
      num_draft: g, the tokens proposed per round.
      capture: hidden-state indices of the target that ``start`` and ``commit`` receive as ``features``.
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

    def start(self, context: Context, features: tuple[Array, ...], slots: int) -> Any:
        """Builds the draft state from the prompt. ``features`` are ``[b, s', d]``, valid before ``length_b - 1``."""
        ...

    def propose(self, state: Any, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Proposes up to ``num_draft`` tokens to follow each row."""
        ...

    def commit(self, state: Any, context: Context, verdict: Verdict, features: tuple[Array, ...]) -> Any:
        """Takes note of the verdict. ``context`` is that of ``propose``; ``features`` are the target's states
        ``[b, g+1, d]`` over [last token, g drafts]."""
        ...


@struct.dataclass
class Stats:
    """What happened, per row; all int32.

    Attributes:
      rounds_b: target passes in which the row was still running.
      drafted_b: draft tokens proposed.
      accepted_b: draft tokens that verification kept, those behind a stop token included.
      emitted_b: tokens emitted, the token after the accepted drafts included: ``emitted / rounds`` is the
        figure to compare with 1 for plain decoding.
      drafted_at_bg: rounds that proposed a token at draft position j.
      accepted_at_bg: rounds that kept it.
    """

    rounds_b: Array
    drafted_b: Array
    accepted_b: Array
    emitted_b: Array
    drafted_at_bg: Array
    accepted_at_bg: Array


@struct.dataclass
class Generation:
    """The result of ``generate``.

    Attributes:
      tokens_bs: int32; ``tokens_bs[i, :length_b[i]]`` is prompt i followed by what was emitted, a stop token
        included; zeros past it.
      length_b: int32, tokens of each row, the prompt's included.
      prompt_length_b: int32.
      stats: per-row counts.
    """

    tokens_bs: Array
    length_b: Array
    prompt_length_b: Array
    stats: Stats
