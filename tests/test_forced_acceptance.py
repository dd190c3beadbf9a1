"""Acceptance that is given, for timings: ``ForcedAcceptance`` keeps its law, ``AlwaysDrafting`` the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import Sampling, verify
from specjax.testing import AlwaysDrafting, ForcedAcceptance, table_model

RULES = {"token": verify.token, "block": verify.block, "coupled": verify.coupled}
RATES = (0.8, 0.3, 0.6)


def model(seed, vocab=7):
    return table_model(jax.random.normal(jax.random.key(seed), (vocab, vocab)))


DRAFTERS = {
    "model": specjax.ModelDrafter(model(1), len(RATES)),
    "ngram": AlwaysDrafting(specjax.NGramDrafter(len(RATES))),
}


def stats_of(rule, drafter, temperature, rows=32, rounds=100):
    """Returns the statistics of rounds in which every row runs to the end, so that room never clips a draft."""
    state = specjax.prefill(
        model(0),
        np.ones((rows, 2), np.int32),
        drafter=drafter,
        fixed=True,
        sampling=Sampling(temperature=temperature),
        max_new_tokens=(rounds + 1) * (len(RATES) + 1),
        slots=512,
    )
    state = specjax.run(model(0), state, drafter=drafter, verify=rule, rounds=rounds)
    tokens = np.asarray(state.tokens_bs)
    assert tokens.min() >= 0 and tokens.max() < 7
    return jax.tree.map(lambda x: np.asarray(x).sum(0), state.stats)


def z_scores(stats, rates):
    """Returns by how many standard deviations each position's acceptance misses its rate."""
    reached = np.asarray([stats.rounds, *stats.accepted_at[:-1]])
    rate = np.asarray(rates)
    return (stats.accepted_at - reached * rate) / np.sqrt(reached * rate * (1 - rate))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("rule", "drafter"), [("token", "ngram"), ("block", "model"), ("coupled", "model")])
def test_acceptance_by_position_is_the_given_one(rule, drafter, temperature):
    forced = ForcedAcceptance(RULES[rule], RATES)
    stats = stats_of(forced, DRAFTERS[drafter], temperature)
    assert stats.rounds == 3200 and (stats.drafted_at == 3200).all()
    assert (np.abs(z_scores(stats, RATES)) < 4).all()
    np.testing.assert_allclose(stats.emitted / stats.rounds, forced.emitted_per_round, rtol=0.04)


def test_the_law_would_catch_a_rule_that_is_not_forced():
    stats = stats_of(verify.block, DRAFTERS["model"], 1.0)
    assert (np.abs(z_scores(stats, RATES)) > 4).any()


def test_the_mean_is_the_sum_of_products():
    assert ForcedAcceptance(verify.token, (0.8, 0.5)).emitted_per_round == pytest.approx(1 + 0.8 + 0.4)


def test_the_wrapped_rule_runs_and_chooses_the_next_token():
    def rule(proposal, target_btv, draws):
        ran.append(True)
        return verify.token(proposal, target_btv, draws).replace(next_b=jnp.full_like(proposal.length_b, 5))

    ran, rule.shares_noise = [], False
    forced = ForcedAcceptance(rule, (0.0,) * 3)
    text = specjax.generate(model(0), [[1]], drafter=DRAFTERS["model"], fixed=True, verify=forced, max_new_tokens=6)
    assert ran and np.asarray(text.tokens)[0, 1:7].tolist() == [5] * 6


def test_rules_are_values():
    """Equal rules share a compiled program, whatever sequence the rates came in."""
    one, other = ForcedAcceptance(verify.block, [0.5, 0.25]), ForcedAcceptance(verify.block, (0.5, 0.25))
    assert one == other and hash(one) == hash(other)
    assert ForcedAcceptance(verify.coupled, RATES).shares_noise
    assert not ForcedAcceptance(verify.token, RATES).shares_noise


@pytest.mark.parametrize("rates", [(1.1,), (-0.1, 0.5), (float("nan"),)])
def test_rates_that_are_no_probabilities_are_refused(rates):
    with pytest.raises(ValueError, match="give probabilities from 0 to 1"):
        ForcedAcceptance(verify.block, rates)


def test_fewer_rates_than_drafts_are_refused():
    forced = ForcedAcceptance(verify.block, (0.5,))
    with pytest.raises(ValueError, match="give 3 probabilities"):
        specjax.generate(model(0), [[1]], drafter=DRAFTERS["model"], fixed=True, verify=forced, max_new_tokens=2)


def test_always_drafting_keeps_the_contract_and_the_text():
    drafter, prompt = DRAFTERS["ngram"], np.asarray([[3, 1, 2]], np.int32)
    specjax.check_drafter(drafter, model(0))
    texts = {}
    for name, used in {"none": None, "always": drafter}.items():
        texts[name] = specjax.generate(
            model(0), prompt, drafter=used, fixed=True, sampling=Sampling(temperature=0.0), max_new_tokens=40, slots=128
        )
    np.testing.assert_array_equal(texts["none"].tokens, texts["always"].tokens)
    assert texts["always"].stats.drafted[0] > texts["always"].stats.rounds[0]
