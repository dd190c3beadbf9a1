"""Drafting with a model of another vocabulary: what it reads, what it proposes, and that no text depends on it.

The slow twin spells a row in draft tokens from its beginning, one token at a time, and asks the draft's table for the
logits after them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import jit
from test_drafters import observed_alone, proposed, recurrent_model, step, texts_of

import specjax
from specjax import Sampling
from specjax.drafters import shared_vocabulary
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.engine import programs
from specjax.testing import table_model
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

VOCAB, DRAFT_VOCAB, DRAFTS, SLOTS = 8, 6, 4, 40

# The target's token -> draft tokens that spell it; one is a shared token. The draft's token 3 is no token of the
# target's, tokens 4 and 6 are spelled by several, and token 7 by none.
SPELLED = [[2], [0], [5], [1], [3, 3], [4], [1, 3, 2], []]


def mapped(spelled, unshared=()):
    """Returns the map of hand-written spellings; a token of one piece is shared unless named."""
    width = max(len(pieces) for pieces in spelled)
    shared = [len(pieces) == 1 and i not in unshared for i, pieces in enumerate(spelled)]
    return VocabularyMap(
        np.asarray([pieces[0] if yes else -1 for pieces, yes in zip(spelled, shared, strict=True)], np.int32),
        np.asarray([pieces + [0] * (width - len(pieces)) for pieces in spelled], np.int32),
        np.asarray([len(pieces) for pieces in spelled], np.int32),
    )


MAP = mapped(SPELLED)


def random_table(seed, vocab=VOCAB, order=2):
    return np.random.default_rng(seed).normal(scale=1.5, size=(vocab,) * (order + 1)).astype(np.float32)


TARGET = table_model(random_table(0))
DRAFT = table_model(random_table(1, DRAFT_VOCAB, order=3))
PROMPTS = [[3], [1, 6], [2, 4, 1, 7, 5, 6, 2], [7, 7], [7]]


def prefilled(target, drafter, prompts, sampling, max_new_tokens=24, slots=SLOTS):
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    return specjax.prefill(
        target,
        prompt_bt,
        length_b,
        drafter=drafter,
        fixed=True,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        slots=slots,
    )


@pytest.fixture
def short_chunks(monkeypatch):
    """A prompt's draft tokens are fed 16 at a time, and the cache has room for 16 past the text."""
    monkeypatch.setattr(shared_vocabulary, "_CHUNK", 16)


def spelled(tokens, pieces=SPELLED):
    return [piece for token in tokens for piece in pieces[token]]


def draft_law(table, tokens):
    """Returns the draft's distribution after the target's tokens, over the shared ones: the twin."""
    text = [0] * (table.ndim - 1) + spelled(tokens)
    logits = table[tuple(text[len(text) - table.ndim + 1 :])]
    weights = [np.exp(np.float64(logits[pieces[0]])) if len(pieces) == 1 else 0 for pieces in SPELLED]
    return np.asarray(weights) / np.sum(weights)


# What it proposes.


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_proposals_follow_the_twin(drafts):
    """Round after round, each q is the draft's law after the row's text and the drafts before it.

    The draft reads three tokens back, so one that is missing, doubled or stale in its cache changes its law. The
    target is mixed with the draft's law, that rounds of all lengths occur, and unshared tokens after them.
    """
    drafter = shared_vocabulary_drafter(DRAFT, MAP, drafts)
    draft_table, shared = np.asarray(DRAFT.params), np.flatnonzero(MAP.draft_of_v >= 0)
    table = 0.5 * random_table(0)
    table[..., shared] += np.broadcast_to(draft_table.mean((0, 1, 2))[MAP.draft_of_v[shared]], (5,))
    target = table_model(table)
    state = prefilled(target, drafter, PROMPTS * 30, Sampling(seed=5), max_new_tokens=20)
    seen, emitted_after_all = set(), set()
    for _ in range(7):
        before, before_b = np.asarray(state.tokens_bs), np.asarray(state.length_b)
        kept_b = np.asarray(state.stats.accepted)
        running_b = ~np.asarray(state.done_b)
        state, proposal = step(target, state, drafter)
        proposal = jax.tree.map(np.asarray, proposal)
        kept_b = np.asarray(state.stats.accepted) - kept_b
        for row in np.flatnonzero(running_b):
            text = before[row, : before_b[row]].tolist()
            room = 20 + len(PROMPTS[row % len(PROMPTS)]) - len(text) - 1
            drafted = proposal.tokens_bg[row].tolist()
            assert proposal.length_b[row] == (min(drafts, room) if spelled(text) else 0)
            for i in range(proposal.length_b[row]):
                wanted = draft_law(draft_table, text + drafted[:i])
                np.testing.assert_allclose(proposal.probs_bgv[row, i], wanted, atol=1e-6)
                assert drafted[i] in shared
        after, after_b = np.asarray(state.tokens_bs), np.asarray(state.length_b)
        full_b = running_b & (kept_b == drafts)
        seen |= set(kept_b[running_b].tolist())
        emitted_after_all |= {len(SPELLED[after[row, after_b[row] - 1]]) for row in np.flatnonzero(full_b)}
    assert seen == set(range(drafts + 1)), "rounds should differ in what they keep"
    assert emitted_after_all == {0, 1, 2, 3}, "the widest gap to feed is after a full round"


def permuted_model(model, new):
    """The same decoder with other token ids: what was i is ``new[i]``."""
    old = np.argsort(new)
    params = dict(model.params)
    params["embed_tokens"] = {"weight": model.params["embed_tokens"]["weight"][old]}
    return model.replace(params=params)


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(37, 16, 24, 2, 4, 2, tie_word_embeddings=True)
    params = init_params(config, jax.random.key(0))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_the_target_under_other_ids_is_accepted_in_full(decoder, drafts):
    new = np.random.default_rng(0).permutation(37)
    drafter = shared_vocabulary_drafter(permuted_model(decoder, new), mapped([[int(i)] for i in new]), drafts)
    prompt_bt = np.random.default_rng(1).integers(0, 37, (4, 40))
    lengths = np.asarray([1, 2, 17, 40])
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 31}
    out = specjax.generate(decoder, prompt_bt, lengths, drafter=drafter, fixed=True, **settings)
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)
    rounds = -(-31 // (drafts + 1))
    assert out.stats.rounds.tolist() == [rounds] * 4
    assert (np.asarray(out.stats.drafted_at[:, 0]) >= rounds - 1).all()
    plain = specjax.generate(decoder, prompt_bt, lengths, **settings)
    for row, length in enumerate(np.asarray(plain.lengths)):
        np.testing.assert_array_equal(out.tokens[row, :length], plain.tokens[row, :length])


@jit
def fresh_cache(model, tokens_bt):
    return model.run(whole_feed(tokens_bt), model.init_cache(*tokens_bt.shape))[1]


def assert_cache_holds(model, cache, row, text):
    fresh = fresh_cache(model, jnp.asarray([text + [0] * (-len(text) % 512)]))
    for held, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(fresh), strict=True):
        held, wanted = np.asarray(held)[row, :, : len(text)], np.asarray(wanted)[0, :, : len(text)]
        np.testing.assert_allclose(held, wanted, atol=1e-5, rtol=0)


def test_the_draft_cache_equals_a_fresh_prefill_of_the_spelled_text(decoder):
    """With a decoder that keeps keys and values, and a prompt whose spelling takes two chunks of the prefill."""
    rng = np.random.default_rng(2)
    shared = [[int(i)] for i in rng.permutation(37)[:30]]
    pieces = shared + [rng.integers(0, 37, n).tolist() for n in (2, 3, 4, 4, 2, 3, 0)]
    drafter = shared_vocabulary_drafter(decoder, mapped(pieces), 3)
    prompts = [rng.integers(0, 37, 16).tolist(), rng.integers(30, 36, 100).tolist(), [4]]
    state = prefilled(decoder, drafter, prompts, Sampling(seed=2, temperature=2.0), slots=256)
    assert 256 < int(state.draft.length_b[1]) < 512, "more than one chunk"
    for _ in range(5):
        draft = proposed(decoder, state, drafter)[2]
        for row, length in enumerate(np.asarray(state.length_b)):
            text = spelled(np.asarray(state.tokens_bs[row, :length]), pieces)
            assert draft.length_b[row] == len(text)
            assert draft.tokens_bs[row, : len(text)].tolist() == text
            assert_cache_holds(decoder, draft.cache, row, text)
        state, _ = step(decoder, state, drafter)


@pytest.mark.parametrize("length", [1, 5, 6, 10, 11, 12])
def test_a_prompt_is_prefilled_in_chunks_that_fit(decoder, length, short_chunks):
    """Chunks of 16 in a cache for 40 tokens and a chunk past them. Of 31 tokens and more, the third chunk ends past 40.

    The prompt's last token is fed by the first round.
    """
    drafter = shared_vocabulary_drafter(decoder.replace(max_positions=40), mapped([[0], [3, 1, 4]]), 2)
    prompts = [[1] * length + [0], [0]]
    target = table_model(random_table(0, 2))
    state = prefilled(target, drafter, prompts, Sampling(), slots=64)
    text = [3, 1, 4] * length + [0]
    assert state.draft.fed_b.tolist() == [len(text) - 1, 0]
    draft = proposed(target, state, drafter)[2]
    assert draft.length_b.tolist() == [len(text), 1]
    assert_cache_holds(decoder, draft.cache, 0, text)
    assert_cache_holds(decoder, draft.cache, 1, [0])


def long_pieces():
    """Spellings of six tokens by one piece or two."""
    return [[2], [0], [5, 1], [1], [3, 3], [4]]


@pytest.fixture(scope="module")
def long_drafter():
    config = DecoderConfig(DRAFT_VOCAB, 16, 24, 1, 2, 1)
    params = init_params(config, jax.random.key(0))
    model = decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))
    return shared_vocabulary_drafter(model, mapped(long_pieces()), 3)


def test_a_prompt_read_in_chunks_is_drafted_from_as_after_one_pass(long_drafter):
    """300 tokens are two chunks for the target, and a chunk of 256 of its tokens is spelled by more than 256."""
    rng, target = np.random.default_rng(3), table_model(random_table(0, 6))
    prompts = [rng.integers(0, 6, length).tolist() for length in (300, 257, 256, 3, 1)]
    state = prefilled(target, long_drafter, prompts, Sampling(), slots=512)
    texts = [spelled(prompt, long_pieces()) for prompt in prompts]
    assert state.draft.fed_b.tolist() == [*(len(text) - 1 for text in texts[:-1]), 0]
    assert len(texts[0]) > 300 + 44, "the first chunk is longer than 256"
    tokens_bt = np.zeros((5, jax.tree.leaves(state.draft.cache)[0].shape[2]), np.int32)
    for row, text in enumerate(texts):
        tokens_bt[row, : len(text)] = text
    once = state.replace(draft=state.draft.replace(cache=fresh_cache(long_drafter.model, tokens_bt)))
    tokens_bg, probs_bgv, draft = proposed(target, state, long_drafter)
    assert draft.length_b.tolist() == [len(text) for text in texts]
    wanted_bg, wanted_bgv, _ = proposed(target, once, long_drafter)
    np.testing.assert_array_equal(tokens_bg, wanted_bg)
    np.testing.assert_allclose(probs_bgv, wanted_bgv, atol=1e-5)
    none = state.replace(draft=state.draft.replace(cache=jax.tree.map(jnp.zeros_like, state.draft.cache)))
    assert np.abs(proposed(target, none, long_drafter)[1] - wanted_bgv)[:4].max((1, 2)).min() > 1e-3


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_after_rounds_without_drafts_it_drafts_as_after_a_fresh_prefill(decoder, rounds):
    """Also where a row of no draft token gets its first, and where a token is spelled by several."""
    new = np.random.default_rng(0).permutation(37)
    pieces = [[int(i)] for i in new[:33]] + [[1, 2, 3], [4, 5], [6, 7], []]
    drafter = shared_vocabulary_drafter(permuted_model(decoder, new), mapped(pieces), 3)
    state = prefilled(decoder, drafter, [[3], [36], [2, 34, 1, 36, 5]], Sampling(temperature=0), slots=64)
    for _ in range(rounds):
        state, _ = step(decoder, state, drafter)
    more = [[33, 1, 36, 2], [-1, -1, 7, 34], [3, -1, 3, -1]]
    texts = [text + [t for t in tokens if t >= 0] for text, tokens in zip(texts_of(state), more, strict=True)]
    state = observed_alone(decoder, state, drafter, more)
    assert texts_of(state) == texts
    fresh = prefilled(decoder, drafter, texts, Sampling(temperature=0), slots=64)
    tokens_bg, probs_bgv, draft = proposed(decoder, state, drafter)
    wanted_bg, wanted_bgv, wanted = proposed(decoder, fresh, drafter)
    np.testing.assert_array_equal(tokens_bg, wanted_bg)
    np.testing.assert_allclose(probs_bgv, wanted_bgv, atol=1e-5)
    assert draft.fed_b.tolist() == wanted.fed_b.tolist()
    for row, text in enumerate(texts):
        text = spelled(text, pieces)
        assert draft.tokens_bs[row, : draft.length_b[row]].tolist() == text
        assert_cache_holds(drafter.model, draft.cache, row, text)


def test_a_loop_on_the_device_drafts_as_unrolled_steps_do():
    """The same noise for the same draft; under penalties a draft also depends on the drafts before it."""
    drafter = shared_vocabulary_drafter(DRAFT, MAP, 3)
    sampling = Sampling(temperature=[0.0, 1.0, 1.3, 0.7, 1.0], repetition_penalty=1.4, frequency_penalty=0.3, seed=2)
    settings = {"sampling": sampling, "max_new_tokens": 20}
    unrolled = specjax.generate(TARGET, PROMPTS, drafter=drafter, fixed=True, **settings)
    looped = specjax.generate(TARGET, PROMPTS, drafter=drafter.replace(unrolled=False), fixed=True, **settings)
    np.testing.assert_array_equal(looped.tokens, unrolled.tokens)
    np.testing.assert_array_equal(looped.stats.accepted_at, unrolled.stats.accepted_at)
    assert 0 < unrolled.stats.accepted.sum() < unrolled.stats.drafted.sum()


def test_in_a_cascade_its_cache_holds_the_text_and_nothing_else():
    """Drafts of n-grams may be tokens that the draft model has not, or that it spells by several of its own.

    Of a round with such a draft, only what was fed before it stays. A row that then lacks more than one pass holds
    catches up in the next rounds.
    """
    drafter = specjax.Cascade(specjax.NGramDrafter(3, 1, 2), shared_vocabulary_drafter(DRAFT, MAP, 3))
    bias = np.zeros(VOCAB, np.float32)
    bias[[4, 6]] = 3.0  # tokens of several pieces come often
    state = prefilled(TARGET, drafter, [[6, 4, 6, 4, 6], [3], [2, 6, 6]], Sampling(temperature=0, logit_bias=bias), 18)
    kept = 0
    for _ in range(10):
        before = np.asarray(state.length_b)
        state, proposal = step(TARGET, state, drafter)
        draft = state.draft.second
        for row in range(3):
            text = np.asarray(state.tokens_bs[row, : state.length_b[row]]).tolist()
            fed = int(draft.fed_b[row])
            assert np.asarray(draft.cache[row, :fed]).tolist() == spelled(text)[:fed]
            new = state.length_b[row] - before[row] - 1
            kept += sum(len(SPELLED[token]) > 1 for token in np.asarray(proposal.tokens_bg[row, :new]))
    assert kept > 5, "drafts of several pieces should be accepted"


# Where it proposes nothing.


def test_a_row_that_outgrows_the_draft_goes_on_without_drafts():
    """Row 1 is written in tokens of three pieces; it stops drafting when 2 * SLOTS hold no more, its neighbours do
    not, and the text is that of plain decoding. Right up to there the proposals are the twin's."""
    bias = np.zeros((3, VOCAB), np.float32)
    bias[1, 6] = 1e4
    drafter = shared_vocabulary_drafter(DRAFT, MAP, 2)
    sampling = Sampling(temperature=0, logit_bias=bias)
    prompts, new = [[3], [2, 6], [5, 1, 4]], 34
    length_b = np.asarray([1, 2, 3])
    state = prefilled(TARGET, drafter, prompts, sampling, new)
    drafted_at = []
    while not np.asarray(state.done_b).all():
        text = np.asarray(state.tokens_bs[1, : state.length_b[1]]).tolist()
        room_b = np.where(state.done_b, 0, length_b + new - np.asarray(state.length_b) - 1)
        state, proposal = step(TARGET, state, drafter)
        fits = len(spelled(text)) + 1 <= 2 * SLOTS
        assert proposal.length_b.tolist() == np.where([True, fits, True], np.minimum(room_b, 2), 0).tolist()
        if fits:
            drafted_at.append(len(spelled(text)))
            assert proposal.tokens_bg[1, 0] == np.argmax(draft_law(np.asarray(DRAFT.params), text))
    assert len(text) > 2 + len(drafted_at), "there should be rounds without drafts"
    assert 2 * SLOTS - 3 < max(drafted_at) + 1 <= 2 * SLOTS
    plain, plainly = prefilled(TARGET, None, prompts, sampling, new), jit(specjax.step)
    while not np.asarray(plain.done_b).all():
        plain = plainly(TARGET, plain)
    np.testing.assert_array_equal(state.tokens_bs, plain.tokens_bs)


@pytest.mark.parametrize("positions", [7, 100])
def test_the_draft_models_positions_are_kept(positions):
    """A draft model that is shorter than the text is never fed past its end, and the text it is given is no longer.

    Its cache has room for a chunk of a prompt past that text, of which no place is real.
    """
    fed = []

    def forward(params, feed, cache, capture=()):
        last = jnp.max(jnp.where(feed.real_bt, feed.position_bt, -1))
        jax.debug.callback(lambda last: fed.append(int(last)), last)
        return DRAFT.forward(params, feed, cache, capture)

    model = DRAFT.replace(max_positions=positions, forward=forward)
    drafter = shared_vocabulary_drafter(model, MAP, 3)
    assert drafter.max_positions is None
    prompts = [[3], [1, 6, 6, 6, 6, 6]]
    state = prefilled(TARGET, drafter, prompts, Sampling(temperature=0))
    slots = min(positions, 2 * SLOTS)
    assert state.draft.tokens_bs.shape == (2, slots)
    assert state.draft.cache.shape == (2, slots + 256)
    for _ in range(12):
        text = [np.asarray(state.tokens_bs[row, : state.length_b[row]]).tolist() for row in range(2)]
        done_b = np.asarray(state.done_b)
        state, proposal = step(TARGET, state, drafter)
        for row in np.flatnonzero(~done_b):
            fits = len(spelled(text[row])) + 2 <= slots
            room = 24 + len(prompts[row]) - len(text[row]) - 1
            assert proposal.length_b[row] == (min(3, room) if fits else 0)
            if fits:
                assert proposal.tokens_bg[row, 0] == np.argmax(draft_law(np.asarray(DRAFT.params), text[row]))
    assert (state.stats.drafted[1] > 0) == (positions == 100)
    jax.effects_barrier()
    assert 0 <= max(fed) < positions


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("only", [(4, 6), (0, 4, 6), (6,)], ids=str)
def test_a_bias_may_ban_all_shared_tokens(only, temperature):
    """Then there is nothing to draft. Coupled draws give one seed one text, with any drafter or none."""
    bias = np.full((VOCAB,), -np.inf, np.float32)
    bias[list(only)] = 0
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS)
    settings = {
        "sampling": Sampling(temperature=temperature, logit_bias=bias, repetition_penalty=1.3, top_k=3, top_p=0.9),
        "max_new_tokens": 12,
    }
    plain = specjax.generate(TARGET, prompt_bt, length_b, **settings)
    drafter = shared_vocabulary_drafter(DRAFT, MAP, 2)
    for rule in (specjax.verify.coupled, specjax.verify.block):
        out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, verify=rule, **settings)
        for row, length in enumerate(length_b):
            new = np.asarray(out.tokens[row, length : length + 12]).tolist()
            assert set(new) <= set(only)
        if rule == specjax.verify.coupled or not temperature:
            np.testing.assert_array_equal(out.tokens, plain.tokens)
        if temperature:
            assert (out.stats.drafted[0] > 0) == (0 in only)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_not_proposed(temperature):
    """Of banned tokens alone, the first is the most likely and the last is what a race without a law ends at: here
    one of two pieces, and a shared one."""
    drafter = shared_vocabulary_drafter(DRAFT, mapped([[3, 3], *SPELLED[1:-1], [2]]), 2)
    bias = np.full((VOCAB,), -np.inf, np.float32)
    bias[0] = 0
    settings = {"sampling": Sampling(temperature=temperature, logit_bias=bias), "max_new_tokens": 6}
    out = specjax.generate(TARGET, [[1, 2]], drafter=drafter, fixed=True, **settings)
    assert out.tokens[0, 2:8].tolist() == [0] * 6
    assert out.stats.drafted.tolist() == [0]


def test_a_token_of_many_pieces_fits_a_short_cache():
    """Five slots of the target's; a window of 13 and a draft after it."""
    drafter = shared_vocabulary_drafter(DRAFT, mapped([*SPELLED[:-1], [3, 4] * 6]), 1)
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 2, "slots": 5}
    out = specjax.generate(TARGET, [[7]], drafter=drafter, fixed=True, **settings)
    np.testing.assert_array_equal(out.tokens, specjax.generate(TARGET, [[7]], **settings).tokens)
    assert out.stats.drafted.tolist() == [1]


# No text depends on it.


@pytest.mark.parametrize("rule", [specjax.verify.token, specjax.verify.block], ids=["token", "block"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_greedy_text_is_that_of_plain_decoding(drafts, rule):
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS)
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 30, "stop_tokens": (5,)}
    plain = specjax.generate(TARGET, prompt_bt, length_b, **settings)
    drafter = shared_vocabulary_drafter(DRAFT, MAP, drafts)
    out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, verify=rule, **settings)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert len(set(np.asarray(plain.lengths - length_b).tolist())) > 1, "some rows should meet the stop token"


def test_a_seed_gives_one_text_under_coupled_draws():
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS * 4)
    settings = {"sampling": Sampling(temperature=0.9, top_p=0.9, frequency_penalty=0.3), "max_new_tokens": 30}
    plain = specjax.generate(TARGET, prompt_bt, length_b, **settings)
    drafter = shared_vocabulary_drafter(DRAFT, MAP, DRAFTS)
    out = specjax.generate(
        TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, verify=specjax.verify.coupled, **settings
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.accepted.sum() > 0


def test_a_row_does_not_depend_on_its_neighbours(decoder, short_chunks):
    """Row 0 keeps prompt and seed; the others change, and one of them makes the prefill take more chunks."""
    rng = np.random.default_rng(4)
    pieces = [[int(i)] for i in rng.permutation(37)[:33]] + [[1, 2, 3, 4]] * 4
    drafter = shared_vocabulary_drafter(decoder, mapped(pieces), 3)
    seen = []
    for others, temperature in (([[5, 5, 5, 0, 1], [4]], 1.0), ([[36] * 16, [7, 35]], 0.3)):
        sampling = Sampling(temperature=[1.0, temperature, 0.0], seed=[7, 1, 2])
        state = prefilled(decoder, drafter, [[2, 34, 3], *others], sampling, slots=64)
        proposals = []
        for _ in range(4):
            state, proposal = step(decoder, state, drafter)
            proposals.append((np.asarray(proposal.tokens_bg), np.asarray(proposal.probs_bgv)))
        seen.append((np.asarray(state.tokens_bs), proposals))
    np.testing.assert_array_equal(seen[0][0][0], seen[1][0][0])
    assert not np.array_equal(seen[0][0][1], seen[1][0][1])
    for (tokens, probs), (other_tokens, other_probs) in zip(seen[0][1], seen[1][1], strict=True):
        np.testing.assert_array_equal(tokens[0], other_tokens[0])
        np.testing.assert_allclose(probs[0], other_probs[0], atol=1e-6)  # attention's window is the longest row's


# The contract.


def test_another_request_compiles_nothing():
    def ask(prompts, drafter, **sampling):
        prompt_bt, length_b = specjax.pad_prompts(prompts)
        return specjax.generate(
            TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, sampling=Sampling(**sampling), max_new_tokens=9
        )

    ask([[1, 2, 3], [4, 4]], shared_vocabulary_drafter(DRAFT, MAP, 2))
    compiled = programs.generate_program._cache_size()
    other = mapped([[3], [3, 4], [5], [], [1, 2, 0], [0], [2], [4]])  # another map of the same sizes
    ask([[6] * 9, [7]], shared_vocabulary_drafter(table_model(random_table(9, DRAFT_VOCAB, 3)), other, 2), top_k=2)
    assert programs.generate_program._cache_size() == compiled


def test_it_is_a_pytree_whose_maps_are_leaves():
    drafter = shared_vocabulary_drafter(DRAFT, MAP, 2)
    shapes = [leaf.shape for leaf in jax.tree.leaves(drafter)]
    assert shapes == [(DRAFT_VOCAB,) * 4, (VOCAB,), (VOCAB, 3), (VOCAB,)]
    assert (drafter.num_draft, drafter.capture, drafter.vocab_size) == (2, (), VOCAB)


def test_a_recurrent_draft_is_rolled_back_to_the_tokens_that_stay():
    """Before each round its state is that of the text's first draft tokens. It drafts as after a fresh prefill."""
    drafter = shared_vocabulary_drafter(recurrent_model(0), MAP, 3)
    table = 0.5 * random_table(0)
    table[..., np.flatnonzero(MAP.draft_of_v >= 0)] += 1.0
    target = table_model(table)
    state = prefilled(target, drafter, PROMPTS, Sampling(seed=3), slots=64)
    accepted = set()
    for _ in range(4):
        for row, end in enumerate(state.draft.fed_b.tolist()):
            text = spelled(texts_of(state)[row])
            assert state.draft.cache.count_b[row] == end <= max(len(text) - 1, 0)
            assert state.draft.cache.sum_b[row] == sum((piece + 1) * (i + 1) for i, piece in enumerate(text[:end]))
        fresh = prefilled(target, drafter, texts_of(state), Sampling(), slots=64)
        drafted, wanted = (proposed(target, x, drafter)[:2] for x in (state, fresh))
        spells_b = np.asarray(state.draft.length_b) > 0
        np.testing.assert_array_equal(drafted[0][spells_b], wanted[0][spells_b])
        np.testing.assert_allclose(drafted[1][spells_b], wanted[1][spells_b], atol=1e-6)
        before = np.asarray(state.stats.accepted)
        state, _ = step(target, state, drafter)
        accepted |= set((np.asarray(state.stats.accepted) - before).tolist())
    assert len(accepted) > 1, "the rounds should differ in what they accept"


def test_a_map_for_another_model_is_refused():
    with pytest.raises(ValueError, match=r"draft token 5 .* ids are 0 to 4; match the"):
        shared_vocabulary_drafter(table_model(random_table(0, 5)), MAP)


def test_a_map_that_shares_nothing_is_refused():
    with pytest.raises(ValueError, match="shares no token"):
        shared_vocabulary_drafter(DRAFT, mapped([[0], [1, 2]], unshared=(0,)))


def test_a_draft_model_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"has 7 positions and drafting 4 tokens needs 8"):
        shared_vocabulary_drafter(DRAFT.replace(max_positions=7), MAP, 4)


def test_a_map_for_another_target_is_refused():
    with pytest.raises(ValueError, match=f"vocabulary has {VOCAB} tokens and the target's 5"):
        specjax.generate(
            table_model(random_table(0, 5)),
            [[1]],
            drafter=shared_vocabulary_drafter(DRAFT, MAP),
            fixed=True,
            max_new_tokens=3,
        )
