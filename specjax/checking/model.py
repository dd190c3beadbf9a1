"""Whether a model keeps the contract of ``specjax.LanguageModel``.

Random texts are fed in many ways, and every logit is compared with one pass over the whole text. The checks go from
simple to hard, so that the first one that fails names the cause.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from specjax.checking.passes import Block, counts, mixed, prompt
from specjax.checking.shapes import BLOCK, broken_model, check_same_tree, check_shapes, states_to_compare
from specjax.checking.tolerances import default_tolerance, finite, spread
from specjax.checks import check_integer, check_positive
from specjax.types import Cache, Feed, LanguageModel, whole_feed

_MOST_LOGITS = 4096
"""Logits of a place that are compared: of a larger vocabulary every second, third or later one, to save memory."""


def check_model(
    target: LanguageModel,
    *,
    rows: int = 3,
    length: int = 512,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Feeds random tokens to a model in many ways, and raises unless each way gives what one pass from zero gives.

    The model may have any weights, but not such that its logits are all the same. It compiles for five widths.

    Args:
      target: the model.
      rows: rows of a batch, at least 2.
      length: tokens of each row, at least 16. Give more than the longest inner window or ring of the model: what a
        window loses only shows in a longer text. A model with fewer ``max_positions`` is fed that many.
      seed: of the tokens.
      tolerance: the most that a logit may differ, as a share of the logits' spread. None fits the narrowest dtype of
        parameters, cache and logits: 1e-4 for float32, 0.02 for float16, 0.1 for bfloat16.

    Raises:
      ValueError: the model breaks its contract. The message says which clause, and at which place it shows.
    """
    check_integer("rows", rows, 2)
    check_integer("length", length, 16)
    check_positive("tolerance", tolerance, optional=True)
    slots = length if target.max_positions is None else min(length, target.max_positions)
    # Accelerators round products of float32 to fewer bits unless told otherwise.
    with jax.default_matmul_precision("float32"):
        capture = states_to_compare(target)
        check_shapes(target, rows, slots, capture)
        checker = _Checker(target, rows, slots, seed, tolerance, capture)
        checker.check_one_pass()
        checker.check_passes()
        checker.check_extras()


class _Checker:
    """A text, what one pass over it gives, and the ways to feed it that must give the same."""

    def __init__(
        self,
        target: LanguageModel,
        rows: int,
        slots: int,
        seed: int,
        tolerance: float | None,
        capture: tuple[int, ...],
    ):
        self.target, self.rows, self.slots, self.capture = target, rows, slots, capture
        self.stride = -(-target.vocab_size // _MOST_LOGITS)
        self.rng = np.random.default_rng(seed)
        self.tokens_bs = self._random(rows, slots)

        def run(params: Any, feed: Feed, cache: Cache, kept_b: Array) -> tuple[tuple[Array, ...], Cache]:
            output = target.forward(params, feed, cache, capture)
            return (self._compared(output.logits_btv), *output.features), target.keep(output.cache, feed, kept_b)

        self._pass = jax.jit(run)
        self.want = self._whole(self.tokens_bs)
        if not finite(self.want):
            reason = ""
            if finite(self._whole(self.tokens_bs[:, :BLOCK])):
                reason = f", and one over {BLOCK} does not: a ring may be too short for the pass (ring overwritten)"
            raise broken_model(f"a pass over {slots} places gives logits or states that are NaN or infinite{reason}")
        self.spreads = [spread(x) for x in self.want]
        tree = (target.params, target.init_cache(1, 1), jax.eval_shape(self._pass, *self._arguments(self.tokens_bs))[0])
        self.tolerance = default_tolerance(tree) if tolerance is None else tolerance

    def _compared(self, logits_btv: Array) -> Array:
        return logits_btv[..., :: self.stride]

    def _random(self, *shape: int) -> Any:
        return self.rng.integers(0, self.target.vocab_size, shape).astype(np.int32)

    def _arguments(self, tokens_bt: Any, params: Any = None) -> tuple[Any, ...]:
        """Returns the arguments of a pass over whole texts from zero."""
        rows, width = tokens_bt.shape
        feed = whole_feed(jnp.asarray(tokens_bt))
        params = self.target.params if params is None else params
        return params, feed, self.target.init_cache(rows, self.slots), jnp.full((rows,), width, jnp.int32)

    def _whole(self, tokens_bt: Any, params: Any = None) -> list[Any]:
        return _host(self._pass(*self._arguments(tokens_bt, params))[0])

    def _errors(self, got: Iterable[Any], want: Iterable[Any]) -> Any:
        """Returns the largest difference at each place, ``[..]`` of arrays ``[.., d]``, in units of the spread."""
        errors = []
        for x, y, scale in zip(got, want, self.spreads, strict=True):
            with np.errstate(invalid="ignore"):
                error = np.where(x == y, 0, np.abs(x - y)) / scale  # banned tokens may have -inf
            errors.append(np.where(np.isnan(error), np.inf, error).max(axis=-1))
        return np.max(errors, axis=0)

    def _wanted(self, place_bt: Any) -> list[Any]:
        """Returns logits and states of one pass over the whole text, at these places."""
        return [np.take_along_axis(x, place_bt[..., None], axis=1) for x in self.want]

    def _expect(self, clause: str, errors_bt: Any, place_bt: Any = None, lost: str = "") -> None:
        """Raises with the clause, and the first place that is wrong; with ``lost`` if all early places are right."""
        if not (errors_bt > self.tolerance).any():
            return
        place_bt = np.broadcast_to(np.arange(errors_bt.shape[1]), errors_bt.shape) if place_bt is None else place_bt
        place_bt = np.where(errors_bt > self.tolerance, place_bt, self.slots)
        row, at = np.unravel_index(np.argmin(place_bt), place_bt.shape)
        place = int(place_bt[row, at])
        if place > 2 * BLOCK and lost:
            clause = f"{lost}. It shows where {clause}"
        raise broken_model(
            f"{clause} (row {row}, place {place}: logits or states differ by {errors_bt[row, at]:.1e} of their spread, "
            f"{self.tolerance:.0e} is allowed)"
        )

    def check_one_pass(self) -> None:
        """Checks the reference itself: what no way of feeding could show."""
        target, rows, tokens_bs, want = self.target, self.rows, self.tokens_bs, self.want
        # The same program twice, and another trace: random choices are made in either.
        self._expect("the same pass gives other logits each time; draw nothing at random", self._again())
        # Later tokens change: in a short pass first, since a ring can fail in a long one alone.
        half, cut = BLOCK // 2, self.slots // 2
        short = self._whole(tokens_bs[:, :BLOCK])
        early = [x[:, :half] for x in self._whole(self._changed(half)[:, :BLOCK])]
        causal = "a place depends on later places of the same pass (a block that is not causal); mask later places"
        self._expect(causal, self._errors(early, [x[:, :half] for x in short]))
        long = (
            "the first places of a long pass depend on how long it is: it overwrites slots of a ring that its own "
            "early places need (ring overwritten), or computes by shape"
        )
        self._expect(long, self._errors(short, [x[:, :BLOCK] for x in want]))
        early = [x[:, :cut] for x in self._whole(self._changed(cut))]
        self._expect(f"{causal}. Or {long}", self._errors(early, [x[:, :cut] for x in want]))
        # Other rows change, and then there are none.
        others_bs = self._random(rows, self.slots)
        others_bs[0] = tokens_bs[0]
        got = [x[:1] for x in self._whole(others_bs)]
        first = [x[:1] for x in want]
        self._expect(
            "rows influence one another: other tokens in other rows change a row; compute each row by itself",
            self._errors(got, first),
        )
        self._expect(
            "a row alone in its batch gets other logits than among others; compute each row by itself",
            self._errors(self._whole(tokens_bs[:1]), first),
        )
        # Weights that are closed over would go stale in training, unseen. A model may have no weights at all.
        if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(target.params)):
            return
        moved = jax.tree.map(lambda x: 1.5 * x + 0.25 if jnp.issubdtype(x.dtype, jnp.floating) else x, target.params)
        moved = jax.tree.map(lambda x, y: x.astype(y.dtype), moved, target.params)
        if np.array_equal(self._whole(tokens_bs, moved)[0], want[0], equal_nan=True):
            raise broken_model("other params give the same logits: forward must use its argument params")

    def _again(self) -> Any:
        """Returns the errors of the same short pass, run twice in one program and once in a program of its own."""
        arguments = self._arguments(self.tokens_bs[:, :BLOCK])
        first = _host(self._pass(*arguments)[0])
        second = _host(self._pass(*arguments)[0])
        target, capture = self.target, self.capture
        lowered = [
            jax.jit(lambda params, feed, cache: target.forward(params, feed, cache, capture)[:2]).lower(*arguments[:3])
            for _ in range(2)
        ]
        errors_bt = self._errors(second, first)
        if lowered[0].as_text() != lowered[1].as_text():  # else another trace would compute the same
            logits, features = lowered[1].compile()(*arguments[:3])
            errors_bt = np.maximum(errors_bt, self._errors(_host((self._compared(logits), *features)), first))
        return errors_bt

    def _changed(self, start: int) -> Any:
        tokens_bs = self.tokens_bs.copy()
        tokens_bs[:, start:] = (tokens_bs[:, start:] + 1) % self.target.vocab_size
        return tokens_bs

    def check_passes(self) -> None:
        """Feeds the text in passes. Each check adds one thing to those before it."""
        rows, commits = self.rows, self.target.commit is not None
        ones, block = np.ones((rows,), np.int32), np.full((rows,), BLOCK, np.int32)
        self._check_reads()
        clause = (
            "passes of one place each give other logits than one pass over the whole text: earlier passes are read, "
            "but positions are ignored or wrong, or slots are (prefill by shape, if only longer passes are right)"
        )
        forgets = "commit forgets places that it was told to keep, or " if commits else ""
        self._replay(f"{forgets}{clause}", [(1, ones, ones)] * self.slots)
        self._replay(
            "passes of several places give other logits than passes of one (prefill by shape): a pass of several "
            "places must read what earlier passes wrote, too",
            [(BLOCK, block, block)] * (self.slots // BLOCK),
        )
        # Places that are not real, and places that are rejected. All rows do the same, so that no shared index shows.
        padding = (
            "places past count_b change later passes (padding swallowed): keep nothing of a place that is not real"
        )
        rejected = (
            "commit does not forget: places past kept_b change later passes"
            if commits
            else "rejected places change later passes, and the model has no commit to forget them; give "
            "LanguageModel(commit=...), or mask what lies past a row's end"
        )
        some = [int(x) for x in self.rng.integers(0, BLOCK, self.slots)]
        some = [3, 0, 2, *some]
        checks = [
            (padding, [(BLOCK, max(n, 1) * ones, max(n, 1) * ones) for n in some]),
            (rejected, [(BLOCK, block, n * ones) for n in some]),
        ]
        # A commit that keeps everything keeps padding, too; so commit is looked at first, if there is one.
        for clause, blocks in reversed(checks) if commits else checks:
            self._replay(clause, blocks)
        self._replay(
            "rows at different start_b give other logits than rows at the same (shared index): keep write index, "
            "position and mask per row",
            ((BLOCK, n_b, n_b) for n_b in counts(self.rng, rows, 1)),
        )
        self._replay(
            "a row that rests (count_b is 0) changes; its later passes must be as if there had been none",
            ((BLOCK, n_b, n_b) for n_b in counts(self.rng, rows, 0)),
        )
        self._replay(
            "a prompt that is right-padded, or read in several passes, gives other logits than one pass over it: keep "
            "nothing of places past count_b, and read what earlier passes wrote",
            prompt(self.rng, rows, self.slots),
        )
        self._replay(
            "uneven passes with padding, rejected places and resting rows give other logits", mixed(self.rng, rows)
        )

    def _check_reads(self) -> None:
        """Raises if a pass of one place does not depend on what earlier passes read, and one pass over all does."""
        at = self.slots // 2
        other_bs = self.tokens_bs.copy()
        other_bs[:, :at] = (other_bs[:, :at] + 1) % self.target.vocab_size
        start_b = np.full((self.rows,), at, np.int32)
        feed = whole_feed(jnp.asarray(self.tokens_bs[:, at : at + 1]), jnp.asarray(start_b))
        one, other = (
            _host(self._pass(self.target.params, feed, self._read(start_b, text), feed.count_b)[0])
            for text in (self.tokens_bs, other_bs)
        )
        whole = self._errors([x[:, at] for x in self._whole(other_bs)], [x[:, at] for x in self.want])
        if (whole > self.tolerance).all() and (self._errors(other, one) <= self.tolerance).all():
            raise broken_model(
                "a pass does not read what earlier passes wrote (the cache is not read): other tokens in earlier "
                f"passes give place {at} the same logits"
            )

    def _replay(self, clause: str, blocks: Iterable[Block]) -> None:
        """Feeds the text in blocks until one does not fit, and raises with the clause where logits are wrong.

        Places that are not real, and those that are rejected, hold other tokens than the text.
        """
        lost = (
            "slots are lost once the text is longer than an inner ring or window: an earlier slot that is still needed "
            "was overwritten (ring overwritten), or is masked (a window by slot, or by the shape of the pass)"
        )
        cache, start_b = self.target.init_cache(self.rows, self.slots), np.zeros((self.rows,), np.int32)
        for width, count_b, kept_b in blocks:
            if (start_b + width > self.slots).any():
                break
            # 1. The true tokens in the places that stay.
            place_bt = start_b[:, None] + np.arange(width)
            true_bt = np.take_along_axis(self.tokens_bs, place_bt, axis=1)
            stays_bt = np.arange(width) < kept_b[:, None]
            other_bt = (true_bt + self.rng.integers(1, max(self.target.vocab_size, 2), true_bt.shape)).astype(np.int32)
            tokens_bt = np.where(stays_bt, true_bt, other_bt % self.target.vocab_size)
            feed = Feed(jnp.asarray(tokens_bt), jnp.asarray(start_b), jnp.asarray(count_b))
            # 2. Their logits and states must be those of one pass over the text.
            values, cache = self._pass(self.target.params, feed, cache, jnp.asarray(kept_b))
            want = self._wanted(place_bt)
            self._expect(clause, np.where(stays_bt, self._errors(_host(values), want), 0), place_bt, lost)
            start_b = start_b + kept_b

    def check_extras(self) -> None:
        """Checks the optional fields that the model gives."""
        target, params = self.target, self.target.params
        if target.embed is not None:
            shape = jax.eval_shape(target.embed, params, jnp.zeros((self.rows, BLOCK), jnp.int32)).shape
            width = self.want[1].shape[-1] if target.num_layers is not None else shape[-1]
            if shape != (self.rows, BLOCK, width):
                raise broken_model(
                    f"embed returned the shape {shape}; return [b, t, d], here {(self.rows, BLOCK, width)}"
                )
        if target.unembed is not None:
            states_btd = self._pass(*self._arguments(self.tokens_bs))[0][-1]
            got = _host(self._compared(jax.jit(target.unembed)(params, states_btd)))
            self._expect(
                "unembed of the states after the final norm (capture -1) gives other logits than forward",
                self._logit_errors(got),
            )
        if target.early_exit is not None:
            self._check_early_exit()
        if target.gather is not None:
            self._check_gather()

    def _logit_errors(self, got_btv: Any) -> Any:
        """Returns the errors of logits alone."""
        return self._errors([got_btv, *self.want[1:]], self.want)

    def _check_early_exit(self) -> None:
        target, params = self.target, self.target.params
        assert target.early_exit is not None
        if target.commit is not None:
            raise broken_model("it has both commit and early_exit; give one of the two")
        exit_early = jax.jit(target.early_exit, static_argnums=3)
        if target.num_layers is not None:
            _, feed, cache, _ = self._arguments(self.tokens_bs)
            got = _host(self._compared(exit_early(params, feed, cache, target.num_layers).logits_btv))
            self._expect("early_exit at the last layer gives other logits than forward", self._logit_errors(got))
        # What it writes past a row's end is overwritten by the next pass.
        start = self.slots - 2 * BLOCK
        at_b = np.full((self.rows,), start, np.int32)
        cache = self._read(at_b)
        drafts = whole_feed(jnp.asarray(self._random(self.rows, BLOCK)), jnp.asarray(at_b))
        output = exit_early(params, drafts, cache, 1)
        check_same_tree("early_exit returned a cache", output.cache, "the one it was given", cache, broken_model)
        true_bt = self.tokens_bs[:, start : start + BLOCK]
        block = whole_feed(jnp.asarray(true_bt), jnp.asarray(at_b))
        got, _ = self._pass(params, block, output.cache, block.count_b)
        errors_bt = self._errors(_host(got), [x[:, start : start + BLOCK] for x in self.want])
        self._expect("what early_exit wrote past a row's end changes the next pass over these slots", errors_bt)

    def _read(self, at_b: Any, tokens_bs: Any = None) -> Cache:
        """Returns the cache after the first ``at_b[i]`` tokens of each row."""
        params, feed, cache, _ = self._arguments(self.tokens_bs if tokens_bs is None else tokens_bs)
        return self._pass(params, Feed(feed.tokens_bt, feed.start_b, jnp.asarray(at_b)), cache, jnp.asarray(at_b))[1]

    def _check_gather(self) -> None:
        """Feeds trees with the text on one path and other tokens beside it, and goes on after the path."""
        target, row_b = self.target, np.arange(self.rows, dtype=np.int32)
        assert target.gather is not None
        if target.commit is not None:
            raise broken_model("it has both commit and gather; give one of the two")
        # Place 1 is followed by place 4, and place 2 by place 3. Rows have different starts and paths.
        start_b = self.slots - 2 * BLOCK - row_b % 2
        path_bt = np.stack([np.asarray(((0, 2, 3), (0, 1, 4))[row % 2], np.int32) for row in row_b])
        true_bt = np.take_along_axis(self.tokens_bs, start_b[:, None] + np.arange(3), axis=1)
        tree_bt = (self.tokens_bs[:, :BLOCK] + 1) % target.vocab_size
        np.put_along_axis(tree_bt, path_bt, true_bt, axis=1)
        tree_bt[row_b, 3 - path_bt[:, 1]] = (true_bt[:, 1] + 1) % target.vocab_size
        parents_bt = jnp.broadcast_to(jnp.asarray((-1, 0, 0, 2, 1), jnp.int32), (self.rows, BLOCK))
        feed = dataclasses.replace(whole_feed(jnp.asarray(tree_bt), jnp.asarray(start_b)), parents_bt=parents_bt)
        output = jax.jit(target.forward, static_argnums=3)(target.params, feed, self._read(start_b), self.capture)
        got = [
            np.take_along_axis(x, path_bt[..., None], axis=1)
            for x in _host((self._compared(output.logits_btv), *output.features))
        ]
        place_bt = start_b[:, None] + np.arange(BLOCK)
        want = self._wanted(place_bt)
        self._expect(
            "a tree (Feed.parents_bt) gives other logits than its path alone: a place sees itself, the places that it "
            "follows and the slots before the feed, and its position is Feed.position_bt",
            self._errors(got, [x[:, :3] for x in want]),
            place_bt[:, :3],
        )
        cache = target.gather(output.cache, feed, jnp.asarray(path_bt))
        check_same_tree("gather returned a cache", cache, "forward's", output.cache, broken_model)
        # What follows the path is fed at the slots after it.
        after_b = start_b + 3
        place_bt = after_b[:, None] + np.arange(BLOCK)
        block = whole_feed(jnp.asarray(np.take_along_axis(self.tokens_bs, place_bt, axis=1)), jnp.asarray(after_b))
        values, _ = self._pass(target.params, block, cache, block.count_b)
        want = self._wanted(place_bt)
        self._expect(
            "after a tree, gather must move what place path_bt[i, j] wrote to slot start_b[i] + j: the next pass gives "
            "other logits",
            self._errors(_host(values), want),
            place_bt,
        )


def _host(tree: Any) -> Any:
    """Returns the arrays as float32 NumPy arrays, in a list or alone."""
    if isinstance(tree, Array):
        return np.asarray(tree, np.float32)
    return [np.asarray(x, np.float32) for x in tree]
