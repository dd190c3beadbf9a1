"""Drafters: prompt lookup against its NumPy twin; a model's proposals, what they were drawn from, and its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import specjax
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

# Prompt lookup.

ROWS, SLOTS = 4, 20
LOOKUPS = [(4, 2, 4), (5, 1, 3), (3, 3, 3), (6, 1, 1), (1, 1, 6)]  # num_draft, min_n, max_n


@jax.jit
def look_up(drafter, tokens_bs, length_b):
    context = specjax.Context(None, None, tokens_bs, length_b)  # the row's tokens are all it reads
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


def logits_behind(model, tokens):
    padded = [0, 0, *tokens]
    return np.asarray(model.params)[padded[-2], padded[-1]]


def prefilled(target, drafter, prompts, sampling):
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    return specjax.prefill(
        target, prompt_bt, length_b, drafter=drafter, sampling=sampling, max_new_tokens=20, slots=SLOTS + 20
    )


@dataclasses.dataclass(frozen=True)
class Recording:
    """The rule ``token`` that also keeps the proposal it is given."""

    seen: list = dataclasses.field(compare=False)
    shares_noise: bool = False

    def __call__(self, proposal, target_bsv, draws):
        self.seen.append(proposal)
        return specjax.verify.token(proposal, target_bsv, draws)


@jax.jit
def step(target, state, drafter):
    """Returns the next state and the round's proposal."""
    seen = []
    state = specjax.step(target, state, drafter=drafter, verify=Recording(seen))
    return state, seen[0]


@jax.jit
def fed(target, state, drafter):
    """Returns the draft's cache after it proposes, for which it must have been fed every token of the row."""
    context = specjax.Context(target, state.cache, state.tokens_bs, state.length_b)
    draw = lambda logits_bv, prefix_bi: (jnp.argmax(logits_bv, -1).astype(jnp.int32), jax.nn.softmax(logits_bv))
    return drafter.propose(state.draft, context, draw)[1]


PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2]]


def test_a_proposal_holds_what_draw_returned():
    """Token i is drawn from the logits behind the row and the i drafts before it, also for a row of one token."""
    drafter = specjax.ModelDrafter(table(1), DRAFTS)
    state = prefilled(table(0), drafter, PROMPTS, specjax.Sampling())
    calls = []

    def draw(logits_bv, prefix_bi):
        token_b = (jnp.argmin(logits_bv, -1).astype(jnp.int32) + len(calls)) % VOCAB
        probs_bv = jnp.full((3, VOCAB), len(calls) + 0.25)
        calls.append((logits_bv, prefix_bi, token_b, probs_bv))
        return token_b, probs_bv

    proposal, _ = drafter.propose(
        state.draft, specjax.Context(table(0), state.cache, state.tokens_bs, state.length_b), draw
    )
    assert proposal.length_b.tolist() == [DRAFTS] * 3
    assert len(calls) == DRAFTS
    for i, (logits_bv, prefix_bi, token_b, probs_bv) in enumerate(calls):
        np.testing.assert_array_equal(prefix_bi, proposal.tokens_bg[:, :i])
        np.testing.assert_array_equal(token_b, proposal.tokens_bg[:, i])
        np.testing.assert_array_equal(probs_bv, proposal.probs_bgv[:, i])
        for row, prompt in enumerate(PROMPTS):
            wanted = logits_behind(drafter.model, [*prompt, *np.asarray(prefix_bi[row]).tolist()])
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
        scaled = logits_behind(drafter.model, tokens) / 1.3
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
    fresh = jax.jit(lambda model, tokens: model.forward(
        model.params, tokens, model.init_cache(3, tokens.shape[1]), jnp.zeros(3, jnp.int32)
    ).cache)(decoder, state.tokens_bs)  # fmt: skip
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


@pytest.mark.parametrize("drafts", [1, 3])
def test_following_leaves_what_drafting_the_same_tokens_would(decoder, drafts):
    """Up to the last draft, which drafting does not feed; rows of one token have no second to feed again."""
    drafter = specjax.ModelDrafter(decoder, drafts)
    state = prefilled(decoder, drafter, [[3], [3, 1], [2, 4, 3, 1]], specjax.Sampling(temperature=0.0))
    context = specjax.Context(decoder, state.cache, state.tokens_bs, state.length_b)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, drafts)), jnp.int32)

    def draw(logits_bv, prefix_bi):
        return tokens[:, prefix_bi.shape[1]], jax.nn.softmax(logits_bv)

    _, drafted = drafter.propose(state.draft, context, draw)
    followed = drafter.follow(state.draft, context, tokens)
    for one, other in zip(jax.tree.leaves(drafted), jax.tree.leaves(followed), strict=True):
        for row, length in enumerate(np.asarray(state.length_b)):
            end = length + drafts - 1
            np.testing.assert_allclose(one[row, :, :end], other[row, :, :end], atol=1e-5, rtol=0)
            assert np.any(one[row, :, end - 1])


def test_commit_names_the_tokens_that_stay():
    """A recurrent draft model would roll back to them: every token fed before the row's end, then the accepted ones
    that were fed. The last draft of a round is not fed."""
    model = table(0).replace(commit=lambda cache, start_b, kept_b: (start_b, kept_b))
    drafter = specjax.ModelDrafter(model, DRAFTS)
    length = jnp.asarray([1, 2, 9, 9, 9], jnp.int32)
    accepted = jnp.asarray([0, 4, 0, 3, 4], jnp.int32)
    context = specjax.Context(model, None, jnp.zeros((5, SLOTS), jnp.int32), length)
    start, kept = drafter.commit(None, context, specjax.Verdict(accepted, accepted), ())
    assert start.tolist() == [0, 0, 7, 7, 7]
    assert (start + kept).tolist() == [1, 2 + 3, 9, 9 + 3, 9 + 3]


def test_drafters_are_pytrees_of_parameters_alone():
    """Their sizes are static; two drafters of one architecture compile one loop."""
    one, other = (specjax.ModelDrafter(table(seed), DRAFTS) for seed in (0, 1))
    assert [x.shape for x in jax.tree.leaves(one)] == [(VOCAB,) * 3]
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(specjax.ModelDrafter(table(0), DRAFTS + 1))
    assert jax.tree.leaves(specjax.NGramDrafter()) == []
    assert jax.tree.structure(specjax.NGramDrafter(4)) != jax.tree.structure(specjax.NGramDrafter(5))
