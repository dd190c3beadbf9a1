"""Drafting with a model of another vocabulary: what it reads, what it proposes, and that no text depends on it.

The slow twin spells a row in draft tokens from its beginning, one token at a time, and asks the draft's table for the
logits behind them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_drafters import step

import specjax
from specjax import Sampling
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.engine import loop as engine
from specjax.testing import table_model
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

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
        target, prompt_bt, length_b, drafter=drafter, sampling=sampling, max_new_tokens=max_new_tokens, slots=slots
    )


def spelled(tokens):
    return [piece for token in tokens for piece in SPELLED[token]]


def draft_law(table, tokens):
    """Returns the draft's distribution behind the target's tokens, over the shared ones: the twin."""
    behind = [0] * (table.ndim - 1) + spelled(tokens)
    logits = table[tuple(behind[len(behind) - table.ndim + 1 :])]
    weights = [np.exp(np.float64(logits[pieces[0]])) if len(pieces) == 1 else 0 for pieces in SPELLED]
    return np.asarray(weights) / np.sum(weights)


# What it proposes.


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_proposals_follow_the_twin(drafts):
    """Round after round, each q is the draft's law behind the row's text and the drafts before it.

    The draft reads three tokens back, so one that is missing, doubled or stale in its cache changes its law. The
    target is mixed with the draft's law, that rounds of all lengths occur, and unshared tokens behind them.
    """
    drafter = shared_vocabulary_drafter(DRAFT, MAP, drafts)
    draft_table, shared = np.asarray(DRAFT.params), np.flatnonzero(MAP.draft_of_v >= 0)
    table = 0.5 * random_table(0)
    table[..., shared] += np.broadcast_to(draft_table.mean((0, 1, 2))[MAP.draft_of_v[shared]], (5,))
    target = table_model(table)
    state = prefilled(target, drafter, PROMPTS * 30, Sampling(seed=5), max_new_tokens=20)
    seen, emitted_behind_all = set(), set()
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
        emitted_behind_all |= {len(SPELLED[after[row, after_b[row] - 1]]) for row in np.flatnonzero(full_b)}
    assert seen == set(range(drafts + 1)), "rounds should differ in what they keep"
    assert emitted_behind_all == {0, 1, 2, 3}, "the widest gap to feed is behind a full round"


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


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_the_target_under_other_ids_is_accepted_in_full(decoder, drafts):
    new = np.random.default_rng(0).permutation(37)
    drafter = shared_vocabulary_drafter(permuted_model(decoder, new), mapped([[int(i)] for i in new]), drafts)
    prompt_bt = np.random.default_rng(1).integers(0, 37, (4, 40))
    lengths = np.asarray([1, 2, 17, 40])
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 31}
    out = specjax.generate(decoder, prompt_bt, lengths, drafter=drafter, **settings)
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)
    rounds = -(-31 // (drafts + 1))
    assert out.stats.rounds.tolist() == [rounds] * 4
    assert (np.asarray(out.stats.drafted_at[:, 0]) >= rounds - 1).all()
    plain = specjax.generate(decoder, prompt_bt, lengths, **settings)
    for row, length in enumerate(np.asarray(plain.lengths)):
        np.testing.assert_array_equal(out.tokens[row, :length], plain.tokens[row, :length])


@jax.jit
def fresh_cache(model, tokens_bt):
    cache = model.init_cache(*tokens_bt.shape)
    return model.forward(model.params, tokens_bt, cache, jnp.zeros(tokens_bt.shape[:1], jnp.int32)).cache


def assert_cache_holds(model, cache, row, text):
    fresh = fresh_cache(model, jnp.asarray([text + [0] * (128 - len(text))]))
    for held, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(fresh), strict=True):
        held, wanted = np.asarray(held)[row, :, : len(text)], np.asarray(wanted)[0, :, : len(text)]
        np.testing.assert_allclose(held, wanted, atol=1e-5, rtol=0)


def test_the_draft_cache_equals_a_fresh_prefill_of_the_spelled_text(decoder):
    """With a decoder that keeps keys and values, and a prompt whose spelling takes two chunks of the prefill."""
    rng = np.random.default_rng(2)
    shared = [[int(i)] for i in rng.permutation(37)[:30]]
    pieces = shared + [rng.integers(0, 37, n).tolist() for n in (2, 3, 4, 4, 2, 3, 0)]
    drafter = shared_vocabulary_drafter(decoder, mapped(pieces), 3)
    prompts = [rng.integers(0, 37, 16).tolist(), rng.integers(30, 36, 16).tolist(), [4]]
    state = prefilled(decoder, drafter, prompts, Sampling(seed=2, temperature=2.0), slots=64)

    @jax.jit
    def proposed(state):
        draw = lambda logits_bv, prefix_bi: (jnp.argmax(logits_bv, -1).astype(jnp.int32), jax.nn.softmax(logits_bv))
        context = specjax.Context(decoder, state.cache, state.tokens_bs, state.length_b)
        return drafter.propose(state.draft, context, draw)[1]

    for _ in range(5):
        draft = proposed(state)
        for row, length in enumerate(np.asarray(state.length_b)):
            text = [piece for token in np.asarray(state.tokens_bs[row, :length]) for piece in pieces[token]]
            assert draft.length_b[row] == len(text)
            assert draft.tokens_bs[row, : len(text)].tolist() == text
            assert_cache_holds(decoder, draft.cache, row, text)
        state, _ = step(decoder, state, drafter)
    assert int(state.draft.length_b[1]) > 32, "more than one chunk of the prompt's padded width"


@pytest.mark.parametrize("length", [1, 5, 6, 10, 11, 12])
def test_a_prompt_is_prefilled_in_chunks_that_fit(decoder, length):
    """Chunks of the prompt's width, 16, in a cache of 40: the third is moved so that it ends where the cache does."""
    drafter = shared_vocabulary_drafter(decoder.replace(max_positions=40), mapped([[0], [3, 1, 4]]), 2)
    prompts = [[1] * length + [0], [0]]
    state = prefilled(table_model(random_table(0, 2)), drafter, prompts, Sampling(), slots=64)
    text = [3, 1, 4] * length + [0]
    assert state.draft.length_b.tolist() == [len(text), 1]
    assert_cache_holds(decoder, state.draft.cache, 0, text)
    assert_cache_holds(decoder, state.draft.cache, 1, [0])


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
    plain = prefilled(TARGET, None, prompts, sampling, new)
    while not np.asarray(plain.done_b).all():
        plain = jax.jit(specjax.step)(TARGET, plain)
    np.testing.assert_array_equal(state.tokens_bs, plain.tokens)


@pytest.mark.parametrize("positions", [7, 12, 100])
def test_the_draft_models_positions_are_kept(positions):
    """A draft model that is shorter than the text is never fed past its end, and its cache is no longer than it."""
    model = DRAFT.replace(max_positions=positions)
    drafter = shared_vocabulary_drafter(model, MAP, 3)
    assert drafter.max_positions is None
    prompts = [[3], [1, 6, 6, 6, 6, 6]]
    state = prefilled(TARGET, drafter, prompts, Sampling(temperature=0))
    slots = min(positions, 2 * SLOTS)
    assert state.draft.cache.shape == state.draft.tokens_bs.shape == (2, slots)
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
        out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, verify=rule, **settings)
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
    out = specjax.generate(TARGET, [[1, 2]], drafter=drafter, **settings)
    assert out.tokens[0, 2:8].tolist() == [0] * 6
    assert out.stats.drafted.tolist() == [0]


def test_a_token_of_many_pieces_fits_a_short_cache():
    """Five slots of the target's; a window of 13 and a draft behind it."""
    drafter = shared_vocabulary_drafter(DRAFT, mapped([*SPELLED[:-1], [3, 4] * 6]), 1)
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 2, "slots": 5}
    out = specjax.generate(TARGET, [[7]], drafter=drafter, **settings)
    np.testing.assert_array_equal(out.tokens, specjax.generate(TARGET, [[7]], **settings).tokens)
    assert out.stats.drafted.tolist() == [1]


# No text depends on it.


@pytest.mark.parametrize("rule", [specjax.verify.token, specjax.verify.block], ids=["token", "block"])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_greedy_text_is_that_of_plain_decoding(drafts, rule):
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS)
    settings = {"sampling": Sampling(temperature=0), "max_new_tokens": 30, "stop_tokens": (5,)}
    plain = specjax.generate(TARGET, prompt_bt, length_b, **settings)
    drafter = shared_vocabulary_drafter(DRAFT, MAP, drafts)
    out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, verify=rule, **settings)
    np.testing.assert_array_equal(out.lengths, plain.lengths)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert len(set(np.asarray(plain.lengths - length_b).tolist())) > 1, "some rows should meet the stop token"


def test_a_seed_gives_one_text_under_coupled_draws():
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS * 4)
    settings = {"sampling": Sampling(temperature=0.9, top_p=0.9, frequency_penalty=0.3), "max_new_tokens": 30}
    plain = specjax.generate(TARGET, prompt_bt, length_b, **settings)
    drafter = shared_vocabulary_drafter(DRAFT, MAP, DRAFTS)
    out = specjax.generate(TARGET, prompt_bt, length_b, drafter=drafter, verify=specjax.verify.coupled, **settings)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.accepted.sum() > 0


def test_a_row_does_not_depend_on_its_neighbours(decoder):
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
            TARGET, prompt_bt, length_b, drafter=drafter, sampling=Sampling(**sampling), max_new_tokens=9
        )

    ask([[1, 2, 3], [4, 4]], shared_vocabulary_drafter(DRAFT, MAP, 2))
    compiled = engine._generate_jit._cache_size()
    other = mapped([[3], [3, 4], [5], [], [1, 2, 0], [0], [2], [4]])  # another map of the same sizes
    ask([[6] * 9, [7]], shared_vocabulary_drafter(table_model(random_table(9, DRAFT_VOCAB, 3)), other, 2), top_k=2)
    assert engine._generate_jit._cache_size() == compiled


def test_it_is_a_pytree_whose_maps_are_leaves():
    drafter = shared_vocabulary_drafter(DRAFT, MAP, 2)
    shapes = [leaf.shape for leaf in jax.tree.leaves(drafter)]
    assert shapes == [(DRAFT_VOCAB,) * 4, (VOCAB,), (VOCAB, 3), (VOCAB,)]
    assert (drafter.num_draft, drafter.capture, drafter.vocab_size) == (2, (), VOCAB)


def test_commit_names_the_tokens_that_stay():
    """A recurrent draft model would roll back to them: those fed before the row's end, then the accepted ones that
    were fed. The last draft of a round is not fed; the window is four tokens."""
    model = DRAFT.replace(commit=lambda cache, start_b, kept_b: (start_b, kept_b))
    drafter = shared_vocabulary_drafter(model, MAP, 3)
    tokens_bs, length_b = jnp.asarray([[6, 6, 1], [0, 0, 0], [6, 6, 1]], jnp.int32), jnp.asarray([3, 1, 3])
    state = drafter.start(specjax.Context(TARGET, None, tokens_bs, length_b), (), SLOTS)
    accepted = jnp.asarray([0, 2, 3], jnp.int32)
    start, kept = drafter.commit(state, None, specjax.Verdict(accepted, accepted), ()).cache
    assert start.tolist() == [3, 0, 3]
    assert (start + kept).tolist() == [7, 1 + 2, 7 + 2]


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
            table_model(random_table(0, 5)), [[1]], drafter=shared_vocabulary_drafter(DRAFT, MAP), max_new_tokens=3
        )
