"""Whether a drafter keeps the contract of ``specjax.Drafter``.

The checks run a few rounds by hand, with a ``draw`` whose tokens and probabilities are known.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from specjax.checking.shapes import check_rows_first, check_same_tree
from specjax.checking.tolerances import default_tolerance
from specjax.checking.trees import check_parents, deepest_path
from specjax.checks import check_integer, check_positive
from specjax.types import Cache, Context, Drafter, Draw, Event, Feed, LanguageModel, Proposal

PROMPT = 16
"""The most tokens of a prompt, and so the widest chunk."""


def check_drafter(
    drafter: Drafter, target: LanguageModel, *, rows: int = 3, seed: int = 0, tolerance: float | None = None
) -> None:
    """Runs a drafter for a few rounds, and raises unless it keeps its contract.

    Args:
      drafter: the drafter.
      target: a model that it drafts for, which ``check_model`` passes.
      rows: rows of a batch, at least 3.
      seed: of tokens and draws.
      tolerance: the most that two probabilities may differ that should be equal. None fits the narrowest dtype of
        parameters and states: 1e-4 for float32, 0.02 for float16, 0.1 for bfloat16.

    Raises:
      ValueError: the drafter breaks its contract; the message says how. Or it does not fit the target.
    """
    check_integer("rows", rows, 3)
    check_positive("tolerance", tolerance, optional=True)
    _check_statics(drafter, target)
    with jax.default_matmul_precision("float32"):
        state = jax.eval_shape(lambda: drafter.init(target, rows, PROMPT))
        check_rows_first(f"init(target, {rows}, {PROMPT})", state, rows, _broken)
        state = jax.eval_shape(lambda: drafter.init(target, rows + 1, PROMPT))
        check_rows_first(f"init(target, {rows + 1}, {PROMPT})", state, rows + 1, _broken)
        if tolerance is None:
            tolerance = default_tolerance((target.params, drafter, state, jnp.zeros((), jnp.float32)))
        checker = _Checker(drafter, target, rows, seed, tolerance)
        checker.check_proposal()
        checker.check_reading()
        checker.check_rounds()


def _broken(clause: str) -> ValueError:
    return ValueError(f"the drafter breaks the contract of specjax.Drafter: {clause}")


def _check_statics(drafter: Drafter, target: LanguageModel) -> None:
    """Checks the drafter's sizes, and that it is a pytree whose leaves are arrays."""
    needed = ("num_draft", "capture", "vocab_size", "max_positions", "init", "observe", "propose")
    missing = [name for name in needed if not hasattr(drafter, name)]
    if isinstance(drafter, type) or missing:
        raise _broken(f"{drafter!r} is no drafter (it lacks {', '.join(missing) or 'an instance'}); give an instance")
    leaves = jax.tree.leaves(drafter)
    if any(not isinstance(leaf, (Array, np.ndarray)) for leaf in leaves):
        odd = next(leaf for leaf in leaves if not isinstance(leaf, (Array, np.ndarray)))
        raise _broken(
            f"it is no registered pytree of arrays: {odd!r} is one of its leaves. Decorate the class with "
            "flax.struct.dataclass, and make fields that are no arrays static (pytree_node=False)"
        )
    try:
        hash(jax.tree.structure(drafter))
    except TypeError as error:
        raise _broken(f"its static fields must be hashable: {error}") from error
    rebuilt = jax.tree.map(lambda x: x, drafter)
    for name in needed[:4]:
        if getattr(rebuilt, name) != getattr(drafter, name):
            raise _broken(
                f"{name} is {getattr(drafter, name)!r}, and {getattr(rebuilt, name)!r} after jax.tree.map; make it "
                "static"
            )
    _check_sizes(drafter, target)


def _check_sizes(drafter: Drafter, target: LanguageModel) -> None:
    check_integer("the drafter's num_draft", drafter.num_draft, 1)
    depth = getattr(drafter, "tree_depth", None)
    if depth is not None:
        check_integer("the drafter's tree_depth", depth, 1, drafter.num_draft)
        if target.gather is None:
            raise ValueError("the drafter proposes trees and the target has no gather; check it with a target that has")
    capture, vocab, positions = drafter.capture, drafter.vocab_size, drafter.max_positions
    if not isinstance(capture, tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in capture):
        raise _broken(f"capture is {capture!r}; give a tuple of integers")
    if vocab is not None and vocab != target.vocab_size:
        raise _broken(f"vocab_size is {vocab!r} and the target's is {target.vocab_size}; draft its tokens")
    if positions is not None and (not isinstance(positions, int) or positions < 1):
        raise _broken(f"max_positions is {positions!r}; give an integer of at least 1, or None")


@struct.dataclass
class _State:
    """The part of the engine's state that a drafter meets."""

    tokens_bs: Array
    length_b: Array
    cache: Cache
    draft: Any


class _Checker:
    """A few rows of text, and the events that an engine would make of them."""

    def __init__(self, drafter: Drafter, target: LanguageModel, rows: int, seed: int, tolerance: float):
        self.drafter, self.target, self.rows, self.tolerance = drafter, target, rows, tolerance
        self.rng, self.g = np.random.default_rng(seed), drafter.num_draft
        self.depth = getattr(drafter, "tree_depth", None)
        self.slots = PROMPT + 4 * (self.g + 1) + 1
        # Few tokens, so that a drafter that looks for repeats finds some.
        self.ids = self.rng.permutation(target.vocab_size)[:4].astype(np.int32)
        self.tokens_bs = self.rng.choice(self.ids, (rows, self.slots)).astype(np.int32)
        self.tokens_bs[:, 4:PROMPT] = self.tokens_bs[:, : PROMPT - 4]
        # The last row but one has a single token, of which no state of the target is known.
        self.length_b = (9 + np.arange(rows) % (PROMPT - 9)).astype(np.int32)
        self.length_b[-2] = 1
        self.run_b = np.full((rows,), 2 * self.g + 2, np.int32)
        self.noises = self.rng.random((3, rows, self.g, target.vocab_size)).astype(np.float32)
        self._read = jax.jit(self._read)
        self._propose = jax.jit(self._propose, static_argnames="known")
        self._follow = jax.jit(self._follow)
        self._round = jax.jit(self._round)
        self.state = self._prompt()

    # What an engine does.

    def _read(self, state: _State, feed: Feed) -> _State:
        """Feeds part of a prompt."""
        output = self.target.forward(self.target.params, feed, state.cache, self.drafter.capture)
        cache = self.target.keep(output.cache, feed, feed.count_b)
        context = self._context(dataclasses.replace(state, cache=cache), jnp.asarray(self.run_b))
        event = Event(feed, output.features, feed.count_b)
        draft = self._observe(state.draft, context, event)
        return dataclasses.replace(state, cache=cache, draft=draft)

    def _observe(self, draft: Any, context: Context, event: Event) -> Any:
        after = self.drafter.observe(draft, context, event)
        check_same_tree("observe returned a state", after, "the one it was given", draft, _broken)
        return after

    def _context(self, state: _State, room_b: Any) -> Context:
        return Context(self.target, state.cache, state.tokens_bs, state.length_b, room_b)

    def _propose(self, state: _State, noise_bgv: Any, room_b: Any, known: bool = False) -> tuple[Proposal, Any]:
        draw = _make_draw(noise_bgv, known)
        proposal, draft = self.drafter.propose(state.draft, self._context(state, room_b), draw)
        check_same_tree("propose returned a state", draft, "the one it was given", state.draft, _broken)
        rows, g, vocab = self.rows, self.g, self.target.vocab_size
        arrays = [("tokens_bg", (rows, g), jnp.int32), ("length_b", (rows,), jnp.int32)]
        if proposal.probs_bgv is not None:
            arrays.append(("probs_bgv", (rows, g, vocab), jnp.float32))
        if (proposal.parents_bg is None) != (self.depth is None):
            raise _broken(
                "a drafter of trees has tree_depth, and all its proposals have parents_bg; give both or neither"
            )
        if proposal.parents_bg is not None:
            arrays.append(("parents_bg", (rows, g), jnp.int32))
        for name, shape, dtype in arrays:
            array = getattr(proposal, name)
            if (array.shape, array.dtype) != (shape, dtype):
                raise _broken(
                    f"the proposal's {name} is {array.shape} and {array.dtype}; return {shape} and {jnp.dtype(dtype)}"
                )
        if proposal.cache is not None:
            check_same_tree("the proposal has a cache", proposal.cache, "the target's", state.cache, _broken)
        return proposal, draft

    def _follow(self, state: _State, tokens_bg: Array) -> Any:
        follow = getattr(self.drafter, "follow")  # noqa: B009, it is optional
        draft = follow(state.draft, self._context(state, jnp.asarray(self.run_b)), tokens_bg)
        check_same_tree("follow returned a state", draft, "the one it was given", state.draft, _broken)
        return draft

    def _round(self, state: _State, proposal: Proposal, draft: Any, kept_b: Any, next_b: Any, running_b: Any) -> _State:
        """Feeds the target [last token, drafts] and keeps ``kept_b`` places, of which the first is the last token.

        Of a tree these are places of the path to its deepest draft.
        """
        start_b = state.length_b - 1
        last_b1 = jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1)
        count_b = jnp.where(running_b, proposal.length_b + 1, 0)
        feed = Feed(jnp.concatenate([last_b1, proposal.tokens_bg], axis=1), start_b, count_b)
        cache = state.cache if proposal.cache is None else proposal.cache
        parents_bg = proposal.parents_bg
        if parents_bg is not None:
            feed = dataclasses.replace(feed, parents_bt=jnp.pad(parents_bg + 1, ((0, 0), (1, 0)), constant_values=-1))
        output = self.target.forward(self.target.params, feed, cache, self.drafter.capture)
        drafts_bg, features, cache = proposal.tokens_bg, output.features, output.cache
        if parents_bg is not None and self.target.gather is not None:
            path_bt = jnp.minimum(jnp.pad(deepest_path(proposal)[:, : self.depth] + 1, ((0, 0), (1, 0))), self.g)
            cache = self.target.gather(cache, feed, path_bt)
            features = tuple(jnp.take_along_axis(x, path_bt[..., None], axis=1) for x in features)
            feed = Feed(jnp.take_along_axis(feed.tokens_bt, path_bt, axis=1), start_b, kept_b)
            drafts_bg = feed.tokens_bt[:, 1:]
        # Emitted are the drafts that stay, and the next token after them.
        place_bs = jnp.arange(self.slots, dtype=jnp.int32)[None] - state.length_b[:, None]
        drafts_bs = jnp.take_along_axis(drafts_bg, jnp.clip(place_bs, 0, drafts_bg.shape[1] - 1), axis=1)
        drafts_bs = jnp.where(place_bs == kept_b[:, None] - 1, next_b[:, None], drafts_bs)
        tokens_bs = jnp.where((place_bs >= 0) & (place_bs < kept_b[:, None]), drafts_bs, state.tokens_bs)
        cache = self.target.keep(cache, feed, kept_b)
        state = _State(tokens_bs, state.length_b + kept_b, cache, draft)
        context = self._context(state, jnp.where(running_b, jnp.int32(self.g + 1), jnp.int32(-1)))
        after = self._observe(draft, context, Event(feed, features, kept_b, drafted=True))
        return dataclasses.replace(state, draft=after)

    def _prompt(self, tokens_bs: Any = None, width: int = PROMPT) -> _State:
        """Returns the state after prompts, read in chunks of a width."""
        tokens_bs = self.tokens_bs if tokens_bs is None else tokens_bs
        length_b = self.length_b
        written_bs = np.where(np.arange(self.slots) < length_b[:, None], tokens_bs, 0)
        state = _State(
            jnp.asarray(written_bs),
            jnp.asarray(length_b),
            self.target.init_cache(self.rows, self.slots),
            self.drafter.init(self.target, self.rows, self.slots),
        )
        chunks = -(-int(length_b.max() - 1) // width)
        for i in range(chunks):  # as the engine does: a row's first chunk is the one that is not full
            first_b = np.maximum(length_b - 1 - (chunks - i) * width, 0)
            end_b = np.maximum(length_b - 1 - (chunks - i - 1) * width, 0)
            fed_bt = np.take_along_axis(written_bs, first_b[:, None] + np.arange(width), axis=1)
            feed = Feed(jnp.asarray(fed_bt), jnp.asarray(first_b), jnp.asarray(end_b - first_b))
            state = self._read(state, feed)
        return state

    # The checks.

    def check_proposal(self) -> None:
        """Checks ranges, and that probabilities are those that ``draw`` returned."""
        proposal = jax.device_get(self._propose(self.state, self.noises[0], self.run_b, known=True)[0])
        vocab = self.target.vocab_size
        if (proposal.length_b < 0).any() or (proposal.length_b > self.g).any():
            raise _broken(f"the proposal's length_b is {proposal.length_b}; it must be from 0 to num_draft, {self.g}")
        real_bg = np.arange(self.g) < proposal.length_b[:, None]
        if ((proposal.tokens_bg < 0) | (proposal.tokens_bg >= vocab))[real_bg].any():
            raise _broken(f"the proposal has the tokens {proposal.tokens_bg}; the target's ids are 0 to {vocab - 1}")
        if proposal.parents_bg is not None:
            check_parents(self.drafter, proposal, real_bg, _broken)
        if proposal.probs_bgv is None or proposal.parents_bg is not None:
            return  # of a tree, siblings may be drawn from what is left of the distribution
        for row, place in np.argwhere(real_bg):
            token, probs_v = proposal.tokens_bg[row, place], proposal.probs_bgv[row, place]
            if probs_v[token] == 1:
                continue  # a certain draft is none that was drawn
            support_v = probs_v > 0
            known_v = np.where(support_v, self.noises[0][row, place], 0)
            if np.abs(probs_v - known_v / known_v.sum()).max() > 1e-5:
                raise _broken(
                    f"probs_bgv at row {row}, draft {place} is not what draw returned with the token; return the "
                    "probabilities of draw, since verification divides by them"
                )
            shift = int(proposal.tokens_bg[row, :place].sum())
            drawn = np.argmax(np.where(support_v, np.roll(self.noises[0][row, place], -shift), -1))
            if token != drawn:
                raise _broken(
                    f"tokens_bg at row {row}, draft {place} is {token} and draw returned {drawn}: return its tokens, "
                    "and give it the drafts before as drafts_bg and the number of the draft as index"
                )

    def check_reading(self) -> None:
        """Checks that a row's proposal depends on its own text alone, however that was read."""
        want = self._proposal(self.state)
        others_bs = self.rng.choice(self.ids, self.tokens_bs.shape).astype(np.int32)
        others_bs[0] = self.tokens_bs[0]
        self._expect(
            "rows influence one another: other tokens in other rows change a row's proposal",
            self._proposal(self._prompt(others_bs)),
            want,
            row=0,
        )
        self._expect(
            "a prompt that is read in several chunks gives another proposal than in one: observe must go on from its "
            "state, and keep nothing of places past kept_b",
            self._proposal(self._prompt(width=4)),
            want,
        )

    def check_rounds(self) -> None:
        """Checks what a round leaves: of rejected drafts nothing, of rows that rest everything."""
        state, last = self.state, jnp.asarray(self.rng.choice(self.ids, self.rows).astype(np.int32))
        every_b = np.ones((self.rows,), bool)
        # 1. Two rounds whose first drafts are the same. These stay, and the others are rejected.
        same_b = np.arange(self.rows) % self.g
        same_bg1 = np.arange(self.g)[None, :, None] < same_b[:, None, None]
        noises = self.noises[0], np.where(same_bg1, self.noises[0], self.noises[1])
        proposed = [self._propose(state, noise_bgv, self.run_b) for noise_bgv in noises]
        short_b = np.minimum(*(np.asarray(proposal.length_b) for proposal, _ in proposed))
        kept_b = np.minimum(same_b, short_b)
        if self.depth is not None:
            kept_b = np.asarray(deepest_path(proposed[0][0]) < kept_b[:, None]).sum(1)
        kept_b = jnp.asarray(1 + kept_b, jnp.int32)
        after = [self._round(state, *pair, kept_b, last, every_b) for pair in proposed]
        want = self._proposal(after[0])
        self._expect(
            "rejected drafts change later proposals: observe must forget what lies past kept_b",
            self._proposal(after[1]),
            want,
        )
        # 2. The same round through follow.
        if hasattr(self.drafter, "follow"):
            proposal = proposed[0][0]
            followed = self._round(state, proposal, self._follow(state, proposal.tokens_bg), kept_b, last, every_b)
            self._expect(
                "follow leaves another state than propose does with the same tokens: the next proposal differs",
                self._proposal(followed),
                want,
            )
        # 3. A round in which one row rests.
        rests_b = np.arange(self.rows) == 0
        room_b = np.where(rests_b, -1, self.run_b).astype(np.int32)
        proposal, draft = self._propose(state, self.noises[0], room_b)
        kept_b = jnp.where(rests_b, 0, kept_b)
        rested = self._round(state, proposal, draft, kept_b, last, ~rests_b)
        self._expect(
            "a row that rests changes: with room_b -1 and kept_b 0, its state must stay",
            self._proposal(rested),
            self._proposal(state),
            row=0,
        )

    def _proposal(self, state: _State) -> Proposal:
        return jax.device_get(self._propose(state, self.noises[2], self.run_b)[0])

    def _expect(self, clause: str, got: Proposal, want: Proposal, row: int | None = None) -> None:
        """Raises with the clause unless two proposals are the same, in one row or in all."""
        rows = range(self.rows) if row is None else [row]
        for i in rows:
            length = want.length_b[i]
            same = got.length_b[i] == length and (got.tokens_bg[i, :length] == want.tokens_bg[i, :length]).all()
            if same and got.probs_bgv is not None and want.probs_bgv is not None:
                same = np.abs(got.probs_bgv[i, :length] - want.probs_bgv[i, :length]).max(initial=0) <= self.tolerance
            if not same:
                raise _broken(f"{clause} (row {i})")


def _make_draw(noise_bgv: Any, known: bool) -> Draw:
    """Returns a ``draw`` whose tokens depend on noise, on the drafts before, and on which tokens are banned.

    So rounding does not change a token. The probabilities are the noise itself if ``known``, else those of the logits.
    """

    def draw(
        logits_bv: Array,
        drafts_bg: Array,
        index: int | Array,
        before_bg: Array | None = None,
        siblings: int | None = None,
    ) -> tuple[Array, Array]:
        noise_bv = lax.dynamic_index_in_dim(jnp.asarray(noise_bgv), index, axis=1, keepdims=False)
        allowed_bv = logits_bv > -jnp.inf
        if before_bg is None:
            before_bg = jnp.arange(drafts_bg.shape[1], dtype=jnp.int32)[None] < index
        shift_b = jnp.where(before_bg, drafts_bg, 0).sum(axis=1)
        id_bv = (jnp.arange(noise_bv.shape[1], dtype=jnp.int32)[None] + shift_b[:, None]) % noise_bv.shape[1]
        turned_bv = jnp.take_along_axis(noise_bv, id_bv, axis=1)
        score_bv = jnp.where(allowed_bv, turned_bv, -1)
        if siblings is None:
            token_b = jnp.argmax(score_bv, axis=1).astype(jnp.int32)
        else:
            token_b = lax.top_k(score_bv, siblings)[1].astype(jnp.int32)
        if not known:
            return token_b, jax.nn.softmax(logits_bv.astype(jnp.float32), axis=-1)
        weights_bv = jnp.where(allowed_bv, noise_bv, 0)
        return token_b, weights_bv / weights_bv.sum(axis=1, keepdims=True)

    return draw
