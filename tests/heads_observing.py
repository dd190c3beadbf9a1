"""What tests of draft heads share: prompts read in one pass, rounds without drafts, and faults of ``observe``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jitted import jit

import specjax
from specjax.drafters.chain import place
from specjax.drafters.feature import FeatureDrafter

_CHUNKED = (600, 513, 257, 256, 3, 1)
"""Lengths of prompts that are read in three chunks of 256, in two, and in one, while the others rest. 257 tokens are
one full chunk, since the last token waits for the round."""


def context_of(target, state):
    """Returns what the drafter may read before the next round of a state whose rows all run."""
    room_b = state.request.limit_b - state.length_b - 1
    return specjax.Context(target, state.cache, state.tokens_bs, state.length_b, room_b)


def assert_chunks_are_as_one_pass(target, drafter):
    """A prompt that the engine reads in several chunks is drafted from as after one pass."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, target.vocab_size, length).tolist() for length in _CHUNKED]
    state = specjax.prefill(target, prompts, drafter=drafter, fixed=True, max_new_tokens=20)
    assert_drafts_as_if_read_anew(target, state, drafter)


def assert_rounds_alone_are_as_one_pass(target, drafter):
    """So are rounds at which the drafter did not propose: right after the prompt, or between others.

    A row emits one token in each, or rests; more of them than drafts, so that all that was drafted lies before.
    """
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, target.vocab_size, length).tolist() for length in (1, 2, 4, 9, 12)]
    for rounds in (0, 2):
        state = specjax.prefill(
            target, prompts, drafter=drafter, fixed=True, sampling=specjax.Sampling(seed=2), max_new_tokens=60
        )
        if rounds:
            state = specjax.run(target, state, drafter=drafter, rounds=rounds)
        for number in range(drafter.num_draft + 2):
            next_b = rng.integers(0, target.vocab_size, len(prompts)).astype(np.int32)
            next_b[2], next_b[3 + number % 2] = -1, -1
            state = _round_alone(type(drafter), target, state, drafter, next_b)
            assert_drafts_as_if_read_anew(target, state, drafter)
        state = specjax.run(target, state, drafter=drafter, rounds=1)
        assert_drafts_as_if_read_anew(target, state, drafter)
        assert not state.done_b.any()


def assert_drafts_as_if_read_anew(target, state, drafter):
    """The likeliest drafts, and what each is drawn from, are those of a drafter that reads every row in one pass."""
    found, wanted = _proposed(type(drafter), target, state, drafter)
    np.testing.assert_array_equal(found.length_b, wanted.length_b)
    drafting = np.asarray(wanted.length_b) > 0
    np.testing.assert_array_equal(np.asarray(found.tokens_bg)[drafting], np.asarray(wanted.tokens_bg)[drafting])
    found_rgv, wanted_rgv = np.asarray(found.probs_bgv)[drafting], np.asarray(wanted.probs_bgv)[drafting]
    np.testing.assert_allclose(found_rgv, wanted_rgv, atol=1e-4, rtol=0)


def assert_rows_that_change_are_as_read_anew(target, drafter):
    """Rows that are extended, and a row that is put in, draft as if their text had been read at once."""
    rng, vocab = np.random.default_rng(2), target.vocab_size
    prompts = [rng.integers(vocab, size=n).tolist() for n in (1, 4, 9)]
    settings = {"drafter": drafter, "fixed": True, "sampling": specjax.Sampling(seed=2)}
    state = specjax.prefill(target, prompts, max_new_tokens=40, **settings)
    state = specjax.run(target, state, drafter=drafter, rounds=2)
    more = [rng.integers(vocab, size=n).tolist() for n in (3, 1, 2)]
    state = specjax.extend(target, state, more, drafter=drafter, max_new_tokens=30)
    assert_drafts_as_if_read_anew(target, state, drafter)
    other = specjax.prefill(target, [prompts[2][:6]], max_new_tokens=20, slots=state.tokens_bs.shape[1], **settings)
    state = specjax.insert(specjax.stop(state, [False, True, False]), [1], other)
    assert_drafts_as_if_read_anew(target, state, drafter)
    state = specjax.run(target, state, drafter=drafter, rounds=2)
    assert_drafts_as_if_read_anew(target, state, drafter)


# ``jit`` may confuse drafters of different classes with equal fields, so the class is an argument.


@jit(static_argnums=0)
def _proposed(kind, target, state, drafter):
    """Returns the drafter's proposal, and the one after it read all tokens of each row but the last in one pass."""
    del kind

    def likeliest(logits_bv, drafts_bg, index):
        return jnp.argmax(logits_bv, -1).astype(jnp.int32), jax.nn.softmax(logits_bv)

    context = context_of(target, state)
    found, _ = drafter.propose(state.draft, context, likeliest)
    rows, slots = state.tokens_bs.shape
    feed = specjax.Feed(state.tokens_bs, jnp.zeros((rows,), jnp.int32), state.length_b - 1)
    output = target.forward(target.params, feed, target.init_cache(rows, slots), drafter.capture)
    context = dataclasses.replace(context, cache=target.keep(output.cache, feed, feed.count_b))
    event = specjax.Event(feed, output.features, feed.count_b)
    draft = drafter.observe(drafter.init(target, rows, slots), context, event)
    wanted, _ = drafter.propose(draft, context, likeliest)
    return found, wanted


@jit(static_argnums=0)
def _round_alone(kind, target, state, drafter, next_b):
    """Returns the state after a round that emits ``next_b`` without any drafts; -1 lets a row rest."""
    del kind
    running_b = next_b >= 0
    start_b = state.length_b - 1
    last_b1 = jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1)
    feed = specjax.Feed(last_b1, start_b, running_b.astype(jnp.int32))
    output = target.forward(target.params, feed, state.cache, drafter.capture)
    slot_b = jnp.where(running_b, state.length_b, state.tokens_bs.shape[1])
    state = dataclasses.replace(
        state,
        tokens_bs=state.tokens_bs.at[jnp.arange(len(next_b)), slot_b].set(next_b, mode="drop"),
        length_b=state.length_b + feed.count_b,
        cache=target.keep(output.cache, feed, feed.count_b),
    )
    event = specjax.Event(feed, output.features, feed.count_b)
    return dataclasses.replace(state, draft=drafter.observe(state.draft, context_of(target, state), event))


# Faults.


@struct.dataclass
class NoPrefill(FeatureDrafter):
    """Slots of the prompt stay empty."""

    def observe(self, state, context, event):
        after = super().observe(state, context, event)
        return after if event.drafted else dataclasses.replace(after, cache=state.cache)


@struct.dataclass
class NoRewrite(FeatureDrafter):
    """Of a round, writes the last slot from the target's state, and leaves what the chain wrote at the others."""

    def observe(self, state, context, event):
        if event.drafted:
            last_b, kept_b = jnp.maximum(event.kept_b - 1, 0), jnp.minimum(event.kept_b, 1)
            feed = specjax.Feed(event.feed.tokens_bt[:, :1], event.feed.start_b + last_b, kept_b)
            features = tuple(place(states_btd, last_b)[:, None] for states_btd in event.features)
            event = dataclasses.replace(event, feed=feed, features=features, kept_b=kept_b)
        return super().observe(state, context, event)
