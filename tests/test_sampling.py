"""Sampling: warp and penalties against slow twins, draws against their laws, keys against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import chdtrc
from test_platforms import known

from specjax import sampling, search
from specjax.sampling import RoundDraws, Sampling, exponential_race

# One shape for all comparisons with the twin, so that they share one compilation.
ROWS, TOKENS, VOCAB = 4, 2, 12

warp = jax.jit(sampling.warp)
emit, draft = jax.jit(RoundDraws.emit), jax.jit(RoundDraws.draft)
uniforms = jax.jit(RoundDraws.uniforms, static_argnames="count")


def fill(**fields):
    """Returns ``ROWS`` rows of parameters."""
    return Sampling(**fields).per_row(ROWS)


def random_logits(seed, spread=8.0):
    """Returns logits ``[ROWS, TOKENS, VOCAB]`` on a coarse grid: ties are many, and what is no tie is far from one."""
    rng = np.random.default_rng(seed)
    return (np.round(rng.normal(size=(ROWS, TOKENS, VOCAB)) * spread) / 4).astype(np.float32)


def rows_of(logits_btv):
    """Returns the logits as one row each, ``[ROWS * TOKENS]`` of ``[VOCAB]``."""
    return logits_btv.reshape(-1, logits_btv.shape[-1])


# Warp.


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.lists(st.sampled_from([0.0, 0.05, 0.3, 1.0, 1.7, 20.0]), min_size=ROWS, max_size=ROWS),
    top_k=st.lists(st.integers(0, VOCAB + 2), min_size=ROWS, max_size=ROWS),
    top_p=st.lists(st.floats(0.01, 1.0) | st.just(1.0), min_size=ROWS, max_size=ROWS),
    min_p=st.lists(st.floats(0.0, 1.0) | st.just(0.0), min_size=ROWS, max_size=ROWS),
)
def test_warp_agrees_with_twin(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed)
    seen = np.asarray(warp(logits, fill(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)))
    for row in range(ROWS):
        for at in range(TOKENS):
            twin = functools.partial(reference.warp, logits[row, at], temperature[row], top_k[row])
            wanted = twin(top_p[row], min_p[row])
            # Where a cut lies within float32's rounding of a token, either side is right.
            for side in (1 - 1e-5, 1 + 1e-5):
                beside = twin(top_p[row] if top_p[row] == 1 else min(top_p[row] * side, 1), min(min_p[row] * side, 1))
                assume(min_p[row] == 1 or ((beside > 0) == (wanted > 0)).all())
            np.testing.assert_allclose(seen[row, at], wanted, atol=3e-6, rtol=0)
            kept = wanted > 1e-30  # below, float32 may have run out of exponents
            assert (seen[row, at][kept] > 0).all()
            assert (seen[row, at][wanted == 0] == 0).all()


def test_warp_sums_to_one_and_leaves_the_default_alone():
    logits = random_logits(1)
    probs = np.asarray(warp(logits, fill()))
    np.testing.assert_allclose(probs, jax.nn.softmax(logits, axis=-1), rtol=1e-6)
    filtered = np.asarray(warp(logits, fill(top_k=[1, 3, 0, 0], top_p=[1.0, 0.9, 0.4, 1.0], min_p=[0, 0, 0, 0.2])))
    np.testing.assert_allclose(filtered.sum(-1), 1, rtol=1e-6)


def test_order_of_the_filters():
    """Temperature, top-k, top-p, min-p: each other order gives something else on this row."""
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.log(probs).astype(np.float32)[None, None]
    # Of the top three, renormalised to 0.47, 0.35 and 0.18, two reach 0.75. Of all five it would take three.
    seen = np.asarray(warp(logits, Sampling(top_k=3, top_p=0.75).per_row(1)))[0, 0]
    np.testing.assert_allclose(seen, [4 / 7, 3 / 7, 0, 0, 0], rtol=1e-5)
    # At temperature 2 the row is 0.29, 0.25, 0.18, 0.15, 0.13, and three are needed to reach 0.6. Untempered, two.
    seen = np.asarray(warp(logits, Sampling(temperature=2.0, top_p=0.6).per_row(1)))[0, 0]
    np.testing.assert_allclose(seen > 0, [True, True, True, False, False])
    # A tempered ratio of 0.5 keeps tokens of an untempered 0.25.
    seen = np.asarray(warp(logits, Sampling(temperature=2.0, min_p=0.495).per_row(1)))[0, 0]
    np.testing.assert_allclose(seen > 0, [True, True, True, True, False])


def test_ties_with_the_last_token_kept_stay():
    logits = np.log(np.array([[[0.1, 0.3, 0.1, 0.1, 0.3, 0.1]]], np.float32))
    for fields, wanted in (
        ({"top_k": 1}, [0, 1, 0, 0, 1, 0]),
        ({"top_k": 3}, [1, 1, 1, 1, 1, 1]),
        ({"top_p": 0.2}, [0, 1, 0, 0, 1, 0]),
        ({"top_p": 0.7}, [1, 1, 1, 1, 1, 1]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 1, 0]),
        ({"top_k": 100}, [1, 1, 1, 1, 1, 1]),
        ({"top_p": 1e-30}, [0, 1, 0, 0, 1, 0]),
    ):
        seen = np.asarray(warp(logits, Sampling(**fields).per_row(1)))[0, 0]
        np.testing.assert_array_equal(seen > 0, np.array(wanted, bool), err_msg=str(fields))


def test_top_p_of_one_drops_nothing():
    """Even where a neighbour's filter is on, and the float32 sum of a long tail falls short of 1."""
    logits = np.random.default_rng(2).normal(size=(2, 1, 4096)).astype(np.float32) * 3
    probs = np.asarray(warp(logits, Sampling(top_k=np.array([0, 5])).per_row(2)))
    assert (probs[0] > 0).all()
    assert (probs[1] > 0).sum() == 5


def test_greedy_rows_are_one_hot_at_the_lowest_of_ties():
    logits = random_logits(3)
    logits[0, 0, :] = 1.5
    logits[1, 0, [3, 7]] = 30
    logits[2, 1, [0, 11]] = 30
    greedy = fill(temperature=0.0, top_k=[0, 3, 1, 0], top_p=[1, 0.5, 1, 0.1])
    mixed = fill(temperature=[0.0, 0.0, 0.0, 1.0])
    for seen in (np.asarray(warp(logits, greedy)), np.asarray(warp(logits, mixed))[:3]):
        for row, expected in zip(rows_of(seen), rows_of(logits), strict=False):
            np.testing.assert_array_equal(row, np.eye(VOCAB)[list(expected).index(expected.max())])
    assert seen[0, 0, 0] == seen[1, 0, 3] == seen[2, 1, 0] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-30, 1e-37])
def test_tiny_temperature_is_no_nan_and_not_greedy(temperature):
    """As T goes to 0 the law goes to a fair choice among the ties; only T = 0 itself breaks them by id."""
    logits = np.array([[[10.0, 9.0, -50.0, 10.0], [-30.0, -30.1, -40.0, -99.0]]], np.float32)
    probs = np.asarray(warp(logits, Sampling(temperature=temperature).per_row(1)))
    np.testing.assert_allclose(probs[0], [[0.5, 0, 0, 0.5], [1, 0, 0, 0]], atol=1e-6)
    greedy = np.asarray(warp(logits, Sampling(temperature=0.0).per_row(1)))
    np.testing.assert_array_equal(greedy[0], [[1, 0, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-5])
def test_low_temperature_keeps_the_ratios(temperature):
    """Logits that are a few T apart under an offset that dwarfs T: p follows their difference, not their rounding."""
    offset, step = 64.0, 2.0**-16  # both exact in float32, and so is their sum
    logits = np.array([[[offset, offset + step, offset - step]]], np.float32)
    probs = np.asarray(warp(logits, Sampling(temperature=temperature).per_row(1)))[0, 0]
    np.testing.assert_allclose(probs, reference.warp(logits[0, 0], temperature), rtol=1e-4)


def test_banned_tokens_stay_banned():
    """A bias of -inf gives probability 0 under every filter and penalty."""
    logits = random_logits(4)
    bias = np.zeros(VOCAB, np.float32)
    bias[[0, 5]] = -np.inf
    params = fill(
        temperature=[0.0, 1.0, 0.5, 2.0],
        top_k=[0, 4, 0, 0],
        top_p=[1, 1, 0.9, 1],
        min_p=[0, 0, 0, 0.1],
        repetition_penalty=[1, 1.5, 0.5, 1],
        presence_penalty=[0, 1, -1, 0],
        logit_bias=bias,
    )
    one = np.ones(ROWS, np.int32)
    penalized = window(logits, np.zeros((ROWS, 4), np.int32), one, 2 * one, np.full((ROWS, 1), 5, np.int32), params)
    probs = np.asarray(warp(penalized, params))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    assert (probs[..., [0, 5]] == 0).all()


def test_rows_are_warped_alone():
    """Row 0 is the same to the last bit, whatever its neighbours ask for."""
    logits = np.random.default_rng(5).normal(size=(ROWS, TOKENS, VOCAB)).astype(np.float32)
    for own in ({}, {"temperature": 0.7}, {"top_k": 5, "temperature": 1.3}, {"top_p": 0.8}, {"temperature": 0.0}):
        alone = fill(**own)
        expected = np.asarray(warp(logits, alone))[0]
        for other in ({"top_k": 3}, {"temperature": 0.0}, {"min_p": 0.3, "top_p": 0.5}, {"temperature": 3.0}):
            fields = {
                name: jnp.array([getattr(alone, name)[0], *getattr(fill(**other), name)[1:]])
                for name in ("temperature", "top_k", "top_p", "min_p")
            }
            np.testing.assert_array_equal(
                np.asarray(warp(logits, fill(**fields)))[0], expected, err_msg=f"{own} {other}"
            )


# Penalties.


@jax.jit
def window(logits_btv, tokens_bs, prompt_length_b, length_b, drafts_bg, params, first=0):
    """The logits of t positions of a round, penalised."""
    counts = sampling.count_tokens(tokens_bs, prompt_length_b, length_b, VOCAB) if params.penalized else None
    return sampling.penalize(logits_btv, params, counts, drafts_bg, first)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    repetition=st.lists(st.sampled_from([1.0, 1.3, 0.7, 4.0]), min_size=ROWS, max_size=ROWS),
    presence=st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=ROWS, max_size=ROWS),
    frequency=st.lists(st.sampled_from([0.0, 0.25, -0.5]), min_size=ROWS, max_size=ROWS),
)
def test_penalties_follow_each_draft_prefix(seed, repetition, presence, frequency):
    """Position j of a round is penalised for the prompt, the output and the first j drafts; padding does not count."""
    rng = np.random.default_rng(seed)
    g, slots = 3, 10
    logits = rng.normal(size=(ROWS, g + 1, VOCAB)).astype(np.float32) * 3
    tokens = rng.integers(VOCAB, size=(ROWS, slots)).astype(np.int32)
    prompt_length = rng.integers(1, slots, size=ROWS).astype(np.int32)
    length = np.array([rng.integers(n, slots + 1) for n in prompt_length], np.int32)
    drafts = rng.integers(VOCAB, size=(ROWS, g)).astype(np.int32)
    bias = rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    params = fill(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    seen = np.asarray(window(logits, tokens, prompt_length, length, drafts, params))
    for row in range(ROWS):
        prompt = tokens[row, : prompt_length[row]].tolist()
        output = tokens[row, prompt_length[row] : length[row]].tolist()
        for j in range(g + 1):
            wanted = reference.penalize(
                logits[row, j],
                prompt,
                output + drafts[row, :j].tolist(),
                bias[row],
                repetition[row],
                presence[row],
                frequency[row],
            )
            np.testing.assert_allclose(seen[row, j], wanted, atol=1e-5, rtol=1e-6)


def test_a_draft_is_not_penalised_for_itself():
    """The position that proposes a token is not penalised for it; the next one is."""
    logits = random_logits(6)
    drafts = np.full((ROWS, 1), 2, np.int32)
    tokens, one = np.zeros((ROWS, 4), np.int32), np.ones(ROWS, np.int32)
    seen = np.asarray(window(logits, tokens, one, one, drafts, fill(presence_penalty=1.5)))
    np.testing.assert_array_equal(seen[:, 0], logits[:, 0])
    np.testing.assert_array_equal(seen[:, 1], logits[:, 1] - 1.5 * np.eye(VOCAB, dtype=np.float32)[2])


def test_drafting_and_verification_penalise_alike():
    """Position j gets the same logits, to the last bit, when it is drafted and when the window is verified."""
    rng = np.random.default_rng(9)
    logits = rng.normal(size=(ROWS, 3, VOCAB)).astype(np.float32)
    drafts = rng.integers(3, size=(ROWS, 2)).astype(np.int32)
    tokens, one = rng.integers(3, size=(ROWS, 4)).astype(np.int32), np.ones(ROWS, np.int32)
    params = fill(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7)
    whole = np.asarray(window(logits, tokens, one, 3 * one, drafts, params))
    for j in range(3):
        known = np.where(np.arange(2) < j, drafts, 0)  # later drafts are not there yet as a draft is drawn
        alone = window(logits[:, j : j + 1], tokens, one, 3 * one, known, params, jnp.int32(j))
        np.testing.assert_array_equal(alone[:, 0], whole[:, j])


def test_rows_are_penalised_alone():
    """A row without penalties keeps its logits to the last bit beside one that has them."""
    logits = np.random.default_rng(7).normal(size=(ROWS, TOKENS, VOCAB)).astype(np.float32)
    drafts, tokens, one = np.ones((ROWS, 1), np.int32), np.zeros((ROWS, 4), np.int32), np.ones(ROWS, np.int32)
    params = fill(repetition_penalty=[1, 2, 1, 1], presence_penalty=[0, 0, 1, 0], frequency_penalty=[0, 1, 0, 0])
    seen = np.asarray(window(logits, tokens, one, one, drafts, params))
    np.testing.assert_array_equal(seen[[0, 3]], logits[[0, 3]])
    assert (seen[1:3] != logits[1:3]).any((1, 2)).all()


def test_counts_of_prompt_and_output():
    tokens, length = np.ones((ROWS, 5), np.int32), np.full(ROWS, 4, np.int32)
    counts = sampling.count_tokens(tokens, length - 2, length, VOCAB)
    np.testing.assert_array_equal(counts.prompt_bv[:, 1], 2)
    np.testing.assert_array_equal(counts.output_bv[:, 1], 2)
    assert counts.prompt_bv.sum() == counts.output_bv.sum() == 2 * ROWS


def test_penalties_are_all_given_or_none():
    """So there are two programs; a penalty that is not given changes nothing."""
    assert not fill().penalized and fill().presence_penalty is None
    params = fill(frequency_penalty=0.5)
    assert params.penalized
    np.testing.assert_array_equal(params.repetition_penalty, np.ones(ROWS))
    np.testing.assert_array_equal(params.presence_penalty, np.zeros(ROWS))


# The race.


def chi_square(seen, expected):
    """Returns the probability of a larger chi-square statistic; outcomes of expectation 0 must not occur."""
    seen, expected = np.ravel(seen), np.ravel(expected)
    assert (seen[expected == 0] == 0).all()
    seen, expected = seen[expected > 0], expected[expected > 0]
    return chdtrc(len(seen) - 1, ((seen - expected) ** 2 / expected).sum())


def make_draws(rows, length=0, seed=0, sampled=True):
    keys_b = sampling.row_keys(Sampling(seed=seed).per_row(rows))
    return RoundDraws(keys_b, jnp.full((rows,), length, jnp.int32), jnp.array(sampled))


def spread(weights, rows):
    return jnp.tile(jnp.asarray(weights, jnp.float32), (rows, 1))


@pytest.mark.parametrize(
    "weights",
    [
        [0.1, 0.2, 0.3, 0.4],
        [0.0, 5.0, 0.0, 1.0, 0.0],
        [1e-9, 3e-9, 0.0, 2e-9],
        [2.0**-i for i in range(1, 14)],
        [0.999] + [0.001 / 50] * 50,
    ],
)
def test_race_follows_the_weights(weights):
    rows = 1 << 18
    draws = make_draws(rows, seed=100)
    token_b = np.asarray(emit(draws, spread(weights, rows), jnp.int32(0)))
    assert token_b.dtype == np.int32
    chance = chi_square(np.bincount(token_b, minlength=len(weights)), rows * np.array(weights) / np.sum(weights))
    print(f"\nrace over {len(weights)} weights, {rows} draws: p = {chance:.3f}")
    assert chance > 1e-3


@pytest.mark.parametrize("count", [1, 2, 37, 4096])
def test_random_bits_are_those_of_jax(count):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3, impl="threefry2x32"), jnp.arange(5))
    wanted = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)
    np.testing.assert_array_equal(jax.jit(sampling.random_bits, static_argnums=1)(keys, count), wanted)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind_serve(impl):
    """One key gives each row a key of its own, and another key gives other keys, whatever the implementation."""
    keys = [jax.random.key(seed, impl=impl) for seed in (1, 2)]
    made = [jax.random.key_data(sampling.row_keys(Sampling(seed=key).per_row(3))) for key in keys]
    assert made[0].shape == (3, 2)
    assert len(np.unique(np.concatenate(made), axis=0)) == 6
    folded = jnp.stack([jax.random.fold_in(keys[0], row) for row in range(3)])
    np.testing.assert_array_equal(jax.random.key_data(sampling.row_keys(Sampling(seed=folded).per_row(3))), made[0])


@pytest.fixture
def given_bits(monkeypatch):
    """Makes a row's key its random bits, uint32 ``[v]``."""
    monkeypatch.setattr(sampling, "random_bits", lambda keys, count: keys)
    return lambda weights, bits: np.asarray(exponential_race(jnp.asarray(weights, jnp.float32), jnp.asarray(bits)))


def test_race_is_sure_where_one_token_is(given_bits):
    """One-hot weights give their token, and weight 0 never wins, under the most extreme bits of all."""
    extreme = np.array([0, 1, 2**31, 2**32 - 2**8, 2**32 - 1], np.uint32)
    bits = np.stack(np.meshgrid(extreme, extreme, extreme, indexing="ij"), axis=-1).reshape(-1, 3)
    for only in range(3):
        for weight in (1.0, 1e-30, 1e30):
            np.testing.assert_array_equal(given_bits(np.tile(np.eye(3)[only] * weight, (len(bits), 1)), bits), only)
    assert (given_bits(np.tile([1.0, 0.0, 1e-6], (len(bits), 1)), bits) != 1).all()


@pytest.mark.parametrize("weight", [1e-3, 1e-6, 1e-8])
def test_rare_tokens_keep_their_probability(given_bits, weight):
    """Against a rival's arrival at its median e, a token of weight w wins for a share 1 - exp(-w e) of all 2**32
    bits. Those are the smallest; the count is found from the largest that wins."""
    low, high = 0, 2**32 - 1  # low wins, high does not
    while high - low > 1:
        tried = np.linspace(low, high, 65).astype(np.uint32)[1:-1]
        bits = np.stack([np.full(63, 2**31, np.uint32), tried], axis=1)
        wins = given_bits(np.tile([1.0, weight], (63, 1)), bits) == 1
        assert (wins[:-1] >= wins[1:]).all()
        low = max([low, *(int(t) for t in tried[wins])])
        high = min([high, *(int(t) for t in tried[~wins])])
    wanted = -np.expm1(-weight * np.log(2)) * 2.0**32
    print(f"\nweight {weight}: wins {low + 1} of 2**32, wanted {wanted:.1f}")
    assert abs(low + 1 - wanted) <= 1 + 1e-6 * wanted


def test_without_temperature_no_noise():
    draws = make_draws(3, sampled=False)
    weights = jnp.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]])
    for token_b in (emit(draws, weights, jnp.int32(0)), draft(draws, weights, jnp.int32(0))):
        np.testing.assert_array_equal(token_b, [1, 0, 2])


# Keys.

MANY, FACES = 1 << 14, 64
EVEN = np.ones(FACES)


def emit_faces(length, offset):
    """Returns a fingerprint of each row's noise: what it draws from equal weights."""
    return np.asarray(emit(make_draws(MANY, length), spread(EVEN, MANY), jnp.int32(offset)))


def draft_faces(length, index):
    return np.asarray(draft(make_draws(MANY, length), spread(EVEN, MANY), jnp.int32(index)))


def independence(first, second, second_range=(0, FACES)):
    """Returns the p-value of a chi-square test that two evenly spread variables are independent."""
    table = np.histogram2d(first, second, bins=[8, 8], range=[(0, FACES), second_range])[0]
    return chi_square(table, np.full((8, 8), len(first) / 64))


def assert_unrelated(first, second):
    """Fingerprints are equal as often as independent ones, within 5 standard errors, and independent jointly."""
    share = 1 / FACES
    assert abs(np.mean(first == second) - share) < 5 * np.sqrt(share / len(first))
    assert independence(first, second) > 1e-4


def test_emission_is_keyed_by_position():
    """Whichever round gets there, a position meets the same noise; other positions and other rows meet other noise."""
    here = emit_faces(5, 2)
    np.testing.assert_array_equal(here, emit_faces(6, 1))
    ragged = RoundDraws(make_draws(MANY).keys_b, jnp.arange(MANY, dtype=jnp.int32) % 7, jnp.array(True))
    np.testing.assert_array_equal(here, emit(ragged, spread(EVEN, MANY), 7 - ragged.length_b))
    assert_unrelated(here, emit_faces(5, 1))
    assert_unrelated(here, emit_faces(6, 2))
    assert_unrelated(here[1:], here[:-1])


def test_drafts_are_keyed_by_round_start():
    """Two rounds that reach the same position meet different noise there, as do two places of one round."""
    here = draft_faces(5, 2)
    np.testing.assert_array_equal(here, draft_faces(5, 2))
    for length, index in ((6, 1), (6, 2), (5, 1), (2, 5), (7, 0)):
        assert_unrelated(here, draft_faces(length, index))


def test_uniforms_are_keyed_by_round_start():
    first, second = (np.asarray(uniforms(make_draws(MANY, length), count=4)) for length in (5, 6))
    assert first.shape == (MANY, 4) and first.dtype == np.float32
    assert (first >= 0).all() and (first < 1).all()
    np.testing.assert_array_equal(first, uniforms(make_draws(MANY, 5), count=4))
    columns = np.concatenate([first, second], axis=1)
    assert len(np.unique(columns)) > 0.98 * columns.size  # 2**17 draws of 2**23 values: under 1% repeat
    correlation = np.corrcoef(columns.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY)
    for column in columns.T:
        assert chi_square(np.histogram(column, 32, (0, 1))[0], np.full(32, MANY / 32)) > 1e-4


def test_purposes_share_no_noise():
    """Emission, drafts and acceptance of the same row and place are independent of each other.

    Guards against the shared stream with which an intended acceptance of 60% came out as 63%.
    """
    emitted, drafted = emit_faces(5, 0), draft_faces(5, 0)
    assert_unrelated(emitted, drafted)
    for uniform in np.asarray(uniforms(make_draws(MANY, 5), count=4)).T:
        for token in (emitted, drafted):
            assert independence(token, uniform, (0, 1)) > 1e-4
        # Whether a draft is accepted says nothing of the draft nor of what is emitted in its stead.
        accepted = uniform < 0.6
        table = [
            np.sum((drafted % 2 == x) & (emitted % 2 == y) & (accepted == a))
            for x in range(2)
            for y in range(2)
            for a in (True, False)
        ]
        assert chi_square(table, np.array([0.15, 0.1] * 4) * MANY) > 1e-4


def test_control_shared_noise_is_seen():
    """Negative control: noise that two purposes share fails the test of independence, even between other weights."""
    draws = make_draws(MANY, 5)
    tilted = np.asarray(emit(draws, spread(np.linspace(1, 2, FACES), MANY), jnp.int32(0)))
    with pytest.raises(AssertionError):
        assert_unrelated(emit_faces(5, 0), tilted)
    assert independence(emit_faces(5, 0), tilted) < 1e-9


@jax.jit
def everything(draws, weights_bv):
    return draws.uniforms(3), draws.emit(weights_bv, jnp.int32(1)), draws.draft(weights_bv, 1)


def test_rows_draw_alone():
    """A row's draws depend on its own seed and length: not on its place, its neighbours or their number."""
    seeds = np.array([7, 3, 9, 7], np.uint32)
    lengths = np.array([4, 4, 8, 4], np.int32)
    weights = np.random.default_rng(8).random((4, 500)).astype(np.float32)
    weights[3] = weights[0]

    def drawn(rows):
        keys_b = sampling.row_keys(Sampling(seed=seeds[rows]).per_row(len(rows)))
        uniforms_bg, *tokens = everything(
            RoundDraws(keys_b, jnp.asarray(lengths[rows]), jnp.array(True)), weights[rows]
        )
        return np.concatenate([uniforms_bg, np.stack(tokens, axis=1)], axis=1)

    together = drawn([0, 1, 2, 3])
    np.testing.assert_array_equal(drawn([2]), together[2:3])
    np.testing.assert_array_equal(drawn([3, 2, 1, 0]), together[::-1])
    np.testing.assert_array_equal(together[0], together[3])  # same seed, same length
    assert len({row.tobytes() for row in together}) == 3


def test_key_makes_another_sample():
    seeds = (3, jax.random.key(1), jax.random.key(2))
    keys = [jax.random.key_data(sampling.row_keys(Sampling(seed=seed).per_row(4))) for seed in seeds]
    assert len({row.tobytes() for row in np.concatenate(keys)}) == 12


# Parameters.


def test_per_row():
    bias = np.arange(3.0)
    params = Sampling(temperature=0.5, top_k=[1, 2, 3], seed=40, logit_bias=bias).per_row(3)
    np.testing.assert_array_equal(params.temperature, np.float32([0.5] * 3))
    np.testing.assert_array_equal(params.top_k, [1, 2, 3])
    np.testing.assert_array_equal(params.seed, [40, 41, 42])  # one number s gives row i the seed s + i
    np.testing.assert_array_equal(params.logit_bias, np.tile(bias, (3, 1)))
    assert [str(getattr(params, name).dtype) for name in ("temperature", "top_k", "top_p", "min_p", "seed")] == [
        "float32",
        "int32",
        "float32",
        "float32",
        "uint32",
    ]
    np.testing.assert_array_equal(Sampling(seed=[5, 5, 1]).per_row(3).seed, [5, 5, 1])
    assert Sampling().per_row(2).logit_bias is None
    np.testing.assert_array_equal(Sampling(logit_bias=np.ones((2, 4))).per_row(2).logit_bias, np.ones((2, 4)))


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**32 - 1])
def test_seeds_use_all_32_bits(seed):
    """One number or one per row, as Python integers or arrays; s + i wraps around."""
    wanted = np.array([seed, (seed + 1) % 2**32], np.uint32)
    np.testing.assert_array_equal(Sampling(seed=seed).per_row(2).seed, wanted)
    np.testing.assert_array_equal(Sampling(seed=np.uint32(seed)).per_row(2).seed, wanted)
    np.testing.assert_array_equal(Sampling(seed=[seed, 0]).per_row(2).seed, np.array([seed, 0], np.uint32))
    np.testing.assert_array_equal(Sampling(seed=np.array([seed, 0])).per_row(2).seed, np.array([seed, 0], np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_the_largest_are_the_same_searched_and_sorted(dtype):
    """As a TPU searches, and as other devices sort: with ties, and with scores of -inf, which are ids all the same."""
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, size=(50, 2, 9)).astype(dtype)
    if dtype == "float32":
        scores[scores == -3] = -np.inf
        scores[:5] = -np.inf
    wanted = jax.lax.top_k(jnp.asarray(scores), 7)[1]
    np.testing.assert_array_equal(search.largest(jnp.asarray(scores), 7), wanted)
    with known("tpu"):
        np.testing.assert_array_equal(search.largest(jnp.asarray(scores), 7), wanted)
