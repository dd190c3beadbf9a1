"""Drafters: prompt lookup against its NumPy twin; a model's proposals, what they were drawn from, and its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from flax import struct
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jitted import jit

import specjax
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

# Prompt lookup.

ROWS, SLOTS = 4, 20
LOOKUPS = [(4, 2, 4), (5, 1, 3), (3, 3, 3), (6, 1, 1), (1, 1, 6)]  # num_draft, min_n, max_n


@jax.jit
def look_up(drafter, tokens_bs, length_b):
    context = specjax.Context(None, None, tokens_bs, length_b, length_b)  # the row's tokens are all it reads
    return drafter.propose(None, context, None)[0]


def assert_looks_up(sizes, rows, lengths):
    proposal = look_up(specjax.NGramDrafter(*sizes), jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32))
    assert proposal.probs_bgv is None, "a copy is certain: its distribution is one-hot"
    assert proposal.tokens_bg.shape == (len(rows), sizes[0])
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        wanted = reference_model.prompt_lookup(row[:length], *sizes)
        found = np.asarray(proposal.tokens_bg[i, : proposal.length_b[i]]).tolist()
        assert found == wanted, (row[:length], sizes)


@pytest.mark.parametrize("sizes", LOOKUPS, ids=str)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=SLOTS, max_size=SLOTS), min_size=ROWS, max_size=ROWS),
    lengths=st.lists(st.integers(1, SLOTS), min_size=ROWS, max_size=ROWS),
)
@example(rows=[[0] * SLOTS, [1] * SLOTS, [0, 1] * 10, [0, 1, 2, 2] * 5], lengths=[1, 2, SLOTS, SLOTS])
def test_lookup_equals_the_twin(sizes, rows, lengths):
    """Three tokens make matches of all lengths; what lies past a row's length is random and must not be read."""
    assert_looks_up(sizes, rows, lengths)


# tokens, (num_draft, min_n, max_n) -> drafts
LOOKED_UP = {
    "what followed": ([5, 6, 7, 8, 9, 5, 6], (3, 2, 4), [7, 8, 9]),
    "the longest match, though it is older": ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], (1, 2, 4), [4]),
    "the latest of two equal matches": ([2, 3, 4, 9, 2, 3, 5, 8, 2, 3], (1, 2, 4), [5]),
    "the latest, when longer matches are not looked for": ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], (1, 2, 2), [5]),
    "no match": ([1, 2, 3, 4], (3, 1, 4), []),
    "a match that is too short": ([7, 1, 8, 7], (3, 2, 4), []),
    "one token": ([7], (3, 1, 4), []),
    "two different tokens": ([7, 8], (3, 1, 4), []),
    "two equal tokens": ([7, 7], (3, 1, 4), [7, 7, 7]),
    "a repeated token": ([1, 7, 7, 7], (4, 2, 4), [7, 7, 7, 7]),
    "a period of two goes on": ([4, 5, 4, 5, 4], (5, 2, 4), [5, 4, 5, 4, 5]),
    "a period of three goes on": ([1, 2, 3, 1, 2, 3, 1], (5, 2, 4), [2, 3, 1, 2, 3]),
}


@pytest.mark.parametrize(("tokens", "sizes", "drafts"), LOOKED_UP.values(), ids=LOOKED_UP.keys())
def test_lookup_by_hand(tokens, sizes, drafts):
    assert reference_model.prompt_lookup(tokens, *sizes) == drafts
    rows = [tokens + [tokens[-1]] * (SLOTS - len(tokens))]
    assert_looks_up(sizes, rows, [len(tokens)])


@pytest.mark.parametrize(("min_n", "max_n"), [(0, 4), (-1, 4), (5, 4)])
def test_lookup_sizes_are_checked(min_n, max_n):
    with pytest.raises(ValueError, match=rf"min_n is {min_n} and max_n {max_n}.*1 <= min_n <= max_n"):
        specjax.NGramDrafter(4, min_n, max_n)


# A model as drafter.

VOCAB, DRAFTS = 6, 4


def table(seed, order=2):
    """A model that reads the last two tokens, so that one missing from its cache changes its law."""
    return specjax.testing.table_model(np.random.default_rng(seed).normal(size=(VOCAB,) * (order + 1)) * 1.5)


def logits_after(model, tokens):
    padded = [0, 0, *tokens]
    return np.asarray(model.params)[padded[-2], padded[-1]]


def prefilled(target, drafter, prompts, sampling, slots=SLOTS + 20):
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    return specjax.prefill(
        target, prompt_bt, length_b, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=20, slots=slots
    )


@dataclasses.dataclass(frozen=True)
class Recording:
    """The rule ``token`` that also keeps the proposal it is given."""

    seen: list = dataclasses.field(compare=False)
    shares_noise: bool = False

    def __call__(self, proposal, target_btv, draws):
        self.seen.append(proposal)
        return specjax.verify.token(proposal, target_btv, draws)


@jit
def step(target, state, drafter):
    """Returns the next state and the round's proposal."""
    seen = []
    state = specjax.step(target, state, drafter=drafter, verify=Recording(seen))
    return state, seen[0]


def context_of(target, state):
    """Returns what the drafter may read before the next round of a state whose rows all run."""
    room_b = state.request.limit_b - state.length_b - 1
    return specjax.Context(target, state.cache, state.tokens_bs, state.length_b, room_b)


def likeliest(logits_bv, drafts_bg, index):
    return jnp.argmax(logits_bv, -1).astype(jnp.int32), jax.nn.softmax(logits_bv)


@jit
def fed(target, state, drafter):
    """Returns the draft's cache after it proposes, for which it must have been fed every token of the row."""
    return drafter.propose(state.draft, context_of(target, state), likeliest)[1].cache


PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2]]


def test_a_proposal_holds_what_draw_returned():
    """Token i is drawn from the logits after the row and the i drafts before it, also for a row of one token."""
    drafter = specjax.ModelDrafter(table(1), DRAFTS)
    state = prefilled(table(0), drafter, PROMPTS, specjax.Sampling())
    calls = []

    def draw(logits_bv, drafts_bg, index):
        assert index == len(calls)
        token_b = (jnp.argmin(logits_bv, -1).astype(jnp.int32) + len(calls)) % VOCAB
        probs_bv = jnp.full((3, VOCAB), len(calls) + 0.25)
        calls.append((logits_bv, drafts_bg, token_b, probs_bv))
        return token_b, probs_bv

    proposal, _ = drafter.propose(state.draft, context_of(table(0), state), draw)
    assert proposal.length_b.tolist() == [DRAFTS] * 3
    assert len(calls) == DRAFTS
    for i, (logits_bv, drafts_bg, token_b, probs_bv) in enumerate(calls):
        assert drafts_bg.shape == (3, DRAFTS)
        np.testing.assert_array_equal(drafts_bg[:, :i], proposal.tokens_bg[:, :i])
        np.testing.assert_array_equal(token_b, proposal.tokens_bg[:, i])
        np.testing.assert_array_equal(probs_bv, proposal.probs_bgv[:, i])
        for row, prompt in enumerate(PROMPTS):
            wanted = logits_after(drafter.model, [*prompt, *np.asarray(drafts_bg[row, :i]).tolist()])
            np.testing.assert_array_equal(logits_bv[row], wanted)


def test_the_engine_scores_the_distribution_it_samples_from():
    """Each q is the draft's law warped by the row's own parameters, and the drafts follow it.

    2000 rows with one prompt and their own seeds; the first two drafts have 3 * 3 possible outcomes after top-k.
    """
    rows = 2000
    drafter = specjax.ModelDrafter(table(1), 2)
    sampling = specjax.Sampling(temperature=1.3, top_k=3)
    _, proposal = step(table(0), prefilled(table(0), drafter, [[2, 4]] * rows, sampling), drafter)

    def law(tokens):
        scaled = logits_after(drafter.model, tokens) / 1.3
        weights = np.where(scaled >= np.sort(scaled)[-3], np.exp(scaled), 0)
        return weights / weights.sum()

    drafts = np.asarray(proposal.tokens_bg)
    np.testing.assert_allclose(proposal.probs_bgv[:, 0], np.tile(law([2, 4]), (rows, 1)), atol=1e-6)
    for row in range(0, rows, 100):
        np.testing.assert_allclose(proposal.probs_bgv[row, 1], law([2, 4, drafts[row, 0]]), atol=1e-6)

    expected = np.array([law([2, 4])[x] * law([2, 4, x]) for x in range(VOCAB)]) * rows
    counted = np.zeros((VOCAB, VOCAB))
    np.add.at(counted, (drafts[:, 0], drafts[:, 1]), 1)
    assert not counted[expected == 0].any()
    possible = expected > 0
    assert possible.sum() == 9
    chi_square = ((counted - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 26.1, "8 degrees of freedom: exceeded by chance once in 1000"


@pytest.mark.parametrize("own_draft", [True, False], ids=["every draft accepted", "some drafts rejected"])
def test_the_draft_cache_holds_every_token_of_the_row(own_draft):
    """A table model's cache is the tokens themselves, so equality is exact after each round."""
    target = table(0)
    model = target if own_draft else specjax.testing.table_model(0.7 * target.params + 0.7 * table(1).params)
    drafter = specjax.ModelDrafter(model, DRAFTS)
    state = prefilled(target, drafter, PROMPTS, specjax.Sampling(seed=3))
    accepted = []
    for _ in range(3):
        cache = np.asarray(fed(target, state, drafter))
        for row, length in enumerate(np.asarray(state.length_b)):
            np.testing.assert_array_equal(cache[row, :length], state.tokens_bs[row, :length])
        before = np.asarray(state.stats.accepted)
        state, _ = step(target, state, drafter)
        accepted.append(np.asarray(state.stats.accepted) - before)
    if own_draft:
        assert (np.asarray(accepted) == DRAFTS).all()
    else:
        assert {0, DRAFTS} < set(np.ravel(accepted).tolist()), "the rounds should differ in what they accept"


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(VOCAB, 16, 24, 2, 4, 2, max_position_embeddings=64)
    params = init_params(config, jax.random.key(0))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


def test_after_full_acceptance_a_decoders_cache_equals_a_fresh_prefill(decoder):
    drafter = specjax.ModelDrafter(decoder, 2)
    state = prefilled(decoder, drafter, PROMPTS, specjax.Sampling(temperature=0.0))
    for _ in range(3):
        state, _ = step(decoder, state, drafter)
    assert state.stats.accepted.tolist() == [3 * 2] * 3
    cache = fed(decoder, state, drafter)
    fresh = jit(lambda model, tokens: model.run(
        whole_feed(tokens), model.init_cache(*tokens.shape)
    )[1])(decoder, state.tokens_bs)  # fmt: skip
    for drafted, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(fresh), strict=True):
        for row, length in enumerate(np.asarray(state.length_b)):
            np.testing.assert_allclose(drafted[row, :, :length], wanted[row, :, :length], atol=1e-5, rtol=0)


def test_drafts_of_a_row_do_not_depend_on_its_neighbours(decoder):
    """Row 0 keeps prompt and seed; the others change prompts, lengths, seeds and temperatures."""
    drafter = specjax.ModelDrafter(decoder, 2)
    proposals = []
    for others, temperature, seeds in (
        (PROMPTS[1:], [1.0, 1.0, 0.0], [7, 8, 9]),
        ([[5, 5, 5, 0, 1], [4]], [1.0, 0.3, 2.0], [7, 1, 2]),
    ):
        sampling = specjax.Sampling(temperature=temperature, seed=seeds)
        state = prefilled(decoder, drafter, [[2, 4, 3], *others], sampling)
        rounds = []
        for _ in range(2):
            state, proposal = step(decoder, state, drafter)
            rounds.append((proposal.tokens_bg, proposal.probs_bgv))
        proposals.append(rounds)
    for one, other in zip(*proposals, strict=True):
        np.testing.assert_array_equal(one[0][0], other[0][0])
        np.testing.assert_array_equal(one[1][0], other[1][0])
        assert not np.array_equal(one[1][1:], other[1][1:])


@jit
def drafted_and_followed(target, state, drafter, tokens_bg):
    """Returns the draft's state after it drafted the tokens, and after it followed another that did."""

    def draw(logits_bv, drafts_bg, index):
        return tokens_bg[:, index], jax.nn.softmax(logits_bv)

    context = context_of(target, state)
    return drafter.propose(state.draft, context, draw)[1], drafter.follow(state.draft, context, tokens_bg)


@pytest.mark.parametrize("drafts", [1, 3])
def test_following_leaves_what_drafting_the_same_tokens_would(decoder, drafts):
    """Up to the last draft, which drafting does not feed. Nothing of a row was fed after its prompt but for the last
    token, so all rows lack one token; after a full round they lack two."""
    drafter = specjax.ModelDrafter(decoder, drafts)
    state = prefilled(decoder, drafter, [[3], [3, 1], [2, 4, 3, 1]], specjax.Sampling(temperature=0.0))
    rng = np.random.default_rng(0)
    for missing in (1, 2):
        assert (state.length_b - state.draft.fed_b).tolist() == [missing] * 3
        tokens_bg = jnp.asarray(rng.integers(0, VOCAB, (3, drafts)), jnp.int32)
        drafted, followed = drafted_and_followed(decoder, state, drafter, tokens_bg)
        assert drafted.fed_b.tolist() == followed.fed_b.tolist()
        for one, other in zip(jax.tree.leaves(drafted.cache), jax.tree.leaves(followed.cache), strict=True):
            for row, length in enumerate(np.asarray(state.length_b)):
                end = length + drafts - 1
                np.testing.assert_allclose(one[row, :, :end], other[row, :, :end], atol=1e-5, rtol=0)
                assert np.any(one[row, :, end - 1])
        state, _ = step(decoder, state, drafter)


def texts_of(state):
    return [row[:length].tolist() for row, length in zip(np.asarray(state.tokens_bs), state.length_b, strict=True)]


@jit
def proposed(target, state, drafter):
    """Returns the drafts of the likeliest tokens, what they were drawn from, and the draft's state."""
    proposal, draft = drafter.propose(state.draft, context_of(target, state), likeliest)
    return proposal.tokens_bg, proposal.probs_bgv, draft


@pytest.fixture(scope="module")
def long_decoder():
    config = DecoderConfig(VOCAB, 16, 24, 1, 2, 1, max_position_embeddings=1024)
    params = init_params(config, jax.random.key(0))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


def test_a_prompt_read_in_chunks_is_drafted_from_as_after_one_pass(long_decoder):
    """600 tokens are three chunks of 256; the other rows rest in some or in all of them."""
    drafter = specjax.ModelDrafter(long_decoder, 3)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (600, 300, 257, 256, 1)]
    settings = {"drafter": drafter, "fixed": True, "max_new_tokens": 20}
    state = specjax.prefill(long_decoder, prompts, slots=1024, **settings)
    assert state.draft.fed_b.tolist() == [599, 299, 256, 255, 0]
    prompt_bt, _ = specjax.pad_prompts(prompts)
    whole = jit(lambda tokens: long_decoder.run(whole_feed(tokens), long_decoder.init_cache(5, 1024))[1])(prompt_bt)
    for read, wanted in zip(jax.tree.leaves(state.draft.cache), jax.tree.leaves(whole), strict=True):
        for row, prompt in enumerate(prompts):
            end = len(prompt) - 1
            np.testing.assert_allclose(read[row, :, :end], wanted[row, :, :end], atol=1e-5, rtol=0)
    tokens_bg, probs_bgv, _ = proposed(long_decoder, state, drafter)
    once = dataclasses.replace(state, draft=dataclasses.replace(state.draft, cache=whole))
    wanted_bg, wanted_bgv, _ = proposed(long_decoder, once, drafter)
    np.testing.assert_array_equal(tokens_bg, wanted_bg)
    np.testing.assert_allclose(probs_bgv, wanted_bgv, atol=1e-5)
    # A target with the same layers agrees with what it drafts.
    out = specjax.generate(long_decoder, prompts, sampling=specjax.Sampling(temperature=0.0), **settings)
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)


def observed_alone(target, state, drafter, tokens):
    """Returns the state after rounds in which no drafter proposed: one token more of each row at a time.

    A token of -1 lets the row rest.
    """
    observe = jit(type(drafter).observe)
    for token in np.asarray(tokens, np.int32).T:
        running_b = jnp.asarray(token >= 0)
        start_b = state.length_b - 1
        last_b1 = jnp.take_along_axis(state.tokens_bs, start_b[:, None], axis=1)
        feed = specjax.Feed(last_b1, start_b, running_b.astype(jnp.int32))
        row_b = jnp.arange(len(token))
        slot_b = jnp.where(running_b, state.length_b, state.tokens_bs.shape[1])
        tokens_bs = state.tokens_bs.at[row_b, slot_b].set(jnp.asarray(token), mode="drop")
        state = dataclasses.replace(state, tokens_bs=tokens_bs, length_b=state.length_b + feed.count_b)
        event = specjax.Event(feed, (), feed.count_b)
        state = dataclasses.replace(state, draft=observe(drafter, state.draft, context_of(target, state), event))
    return state


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_after_rounds_without_drafts_it_drafts_as_after_a_fresh_prefill(decoder, rounds):
    """After rounds with drafts, of which all were accepted, the cache lacks two tokens: of a round without, it reads
    as many as that round emits, and drafts as ever."""
    drafter = specjax.ModelDrafter(decoder, 3)
    state = prefilled(decoder, drafter, PROMPTS, specjax.Sampling(temperature=0.0))
    for _ in range(rounds):
        state, _ = step(decoder, state, drafter)
    texts = texts_of(state)
    more = [[5, 1, 0, 2], [-1, -1, -1, -1], [3, -1, 3, -1]]
    state = observed_alone(decoder, state, drafter, more)
    texts = [text + [token for token in tokens if token >= 0] for text, tokens in zip(texts, more, strict=True)]
    assert state.length_b.tolist() == [len(text) for text in texts]
    fresh = prefilled(decoder, drafter, texts, specjax.Sampling(temperature=0.0), slots=64)
    tokens_bg, probs_bgv, draft = proposed(decoder, state, drafter)
    wanted_bg, wanted_bgv, wanted = proposed(decoder, fresh, drafter)
    np.testing.assert_array_equal(tokens_bg, wanted_bg)
    np.testing.assert_allclose(probs_bgv, wanted_bgv, atol=1e-5)
    assert draft.fed_b.tolist() == wanted.fed_b.tolist()
    for one, other in zip(jax.tree.leaves(draft.cache), jax.tree.leaves(wanted.cache), strict=True):
        for row, end in enumerate(draft.fed_b.tolist()):
            np.testing.assert_allclose(one[row, :, :end], other[row, :, :end], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rolls_back", "rule"), [(False, specjax.verify.block), (True, specjax.verify.coupled)], ids=["keeps", "rolls back"]
)
def test_a_loop_on_the_device_drafts_as_unrolled_steps_do(decoder, rolls_back, rule):
    """The same noise for the same draft; under penalties a draft also depends on the drafts before it."""
    keep = (lambda cache, feed, kept_b: cache) if rolls_back else None
    drafter = specjax.ModelDrafter(decoder.replace(commit=keep), 3)
    sampling = specjax.Sampling(temperature=[0.0, 1.0, 1.3], repetition_penalty=1.4, frequency_penalty=0.3, seed=2)
    target = specjax.testing.table_model(0.5 * table(0).params)
    settings = {"verify": rule, "sampling": sampling, "max_new_tokens": 20}
    unrolled = specjax.generate(target, PROMPTS, drafter=drafter, fixed=True, **settings)
    looped = specjax.generate(target, PROMPTS, drafter=drafter.replace(unrolled=False), fixed=True, **settings)
    np.testing.assert_array_equal(looped.tokens, unrolled.tokens)
    np.testing.assert_array_equal(looped.stats.accepted_at, unrolled.stats.accepted_at)
    assert 0 < unrolled.stats.accepted.sum() < unrolled.stats.drafted.sum()


@struct.dataclass
class Recurrent:
    """A cache that has to be rolled back: how many tokens it has read, and a sum of them in which each weighs by its
    place. Of a pass it keeps the sum after each number of places, until ``commit``."""

    count_b: jax.Array
    sum_b: jax.Array
    sums_bt: jax.Array | None = None


def recurrent_model(seed):
    """A model whose next token depends on the number of tokens so far and on their weighed sum."""
    table_cv = jnp.asarray(np.random.default_rng(seed).normal(size=(97, VOCAB)) * 1.5, jnp.float32)

    def init_cache(rows, slots):
        return Recurrent(jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.int32))

    def forward(params, feed, cache, capture=()):
        # A feed that does not go on where the last one ended leaves the law of every later token another.
        fits_b = cache.count_b == feed.start_b
        terms_bt = jnp.where(feed.real_bt, (feed.tokens_bt + 1) * (feed.position_bt + 1), 0)
        sums_bt = cache.sum_b[:, None] + jnp.cumsum(terms_bt, axis=1, dtype=jnp.int32)
        sums_bt = jnp.where(fits_b[:, None] | (feed.count_b == 0)[:, None], sums_bt, 10**6)
        return specjax.Output(params[sums_bt % 97], (), Recurrent(cache.count_b, cache.sum_b, sums_bt))

    def commit(cache, feed, kept_b):
        sums_bt = jnp.concatenate([cache.sum_b[:, None], cache.sums_bt], axis=1)
        sum_b = jnp.take_along_axis(sums_bt, kept_b[:, None], axis=1)[:, 0]
        return Recurrent(cache.count_b + kept_b, sum_b)

    return specjax.LanguageModel(table_cv, forward, init_cache, VOCAB, commit)


@pytest.mark.parametrize("own_draft", [True, False], ids=["every draft accepted", "some drafts rejected"])
def test_a_recurrent_draft_is_rolled_back_to_the_tokens_that_stay(own_draft):
    """Before each round its state is that of the row's first tokens. It drafts as after a fresh prefill."""
    draft, other = recurrent_model(0), recurrent_model(1)
    target = draft if own_draft else draft.replace(params=0.7 * draft.params + 0.7 * other.params)
    drafter = specjax.ModelDrafter(draft, DRAFTS)
    state = prefilled(target, drafter, PROMPTS, specjax.Sampling(seed=3))
    accepted = []
    for _ in range(3):
        for row, end in enumerate(state.draft.fed_b.tolist()):
            text = np.asarray(state.tokens_bs[row, :end])
            assert state.draft.cache.count_b[row] == end <= state.length_b[row] - 1
            assert state.draft.cache.sum_b[row] == np.sum((text + 1) * np.arange(1, end + 1))
        before = np.asarray(state.stats.accepted)
        fresh = prefilled(target, drafter, texts_of(state), specjax.Sampling(), slots=64)
        drafted, wanted = (proposed(target, x, drafter)[:2] for x in (state, fresh))
        np.testing.assert_array_equal(drafted[0], wanted[0])
        np.testing.assert_allclose(drafted[1], wanted[1], atol=1e-6)
        state, _ = step(target, state, drafter)
        accepted.append(np.asarray(state.stats.accepted) - before)
    if own_draft:
        assert (np.asarray(accepted) == DRAFTS).all()
    else:
        assert len(set(np.ravel(accepted).tolist())) > 1, "the rounds should differ in what they accept"


def test_drafters_are_pytrees_of_parameters_alone():
    """Their sizes are static; two drafters of one architecture compile one loop."""
    one, other = (specjax.ModelDrafter(table(seed), DRAFTS) for seed in (0, 1))
    assert [x.shape for x in jax.tree.leaves(one)] == [(VOCAB,) * 3]
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(specjax.ModelDrafter(table(0), DRAFTS + 1))
    assert jax.tree.leaves(specjax.NGramDrafter()) == []
    assert jax.tree.structure(specjax.NGramDrafter(4)) != jax.tree.structure(specjax.NGramDrafter(5))
