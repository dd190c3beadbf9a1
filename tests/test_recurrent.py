"""Recurrent layers, as target and as draft: what is rejected, padded or at rest must leave their states alone.

``recurrent.py`` has the model, which is no decoder of specjax. ``test_conformance.py`` has all drafters,
``test_laws.py`` the law, and ``test_hybrid.py`` the decoder's recurrent layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent
from jitted import jit

import specjax
from specjax import EarlyExitDrafter, ModelDrafter, verify
from specjax.types import Verdict, whole_feed

VOCAB, WIDTH, DRAFTS = 7, 8, 3
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [6, 6, 1, 6, 6, 1, 6, 6]]
NEW = np.int32([14, 9, 14, 11])


def target(kinds, vocab=VOCAB, seed=0):
    return recurrent.recurrent_model(kinds, recurrent.init_params(kinds, vocab, WIDTH, seed))


def near(model):
    """Another model that often agrees."""
    return model.replace(params=jax.tree.map(lambda x: x + 0.1 * jnp.sin(99 * x), model.params))


HYBRID, PURE = target("ra"), target("r")
DRAFT = ModelDrafter(near(PURE), DRAFTS)


def each_by_its_own_rule(proposal, target_btv, draws):
    """Row 0 by the rule ``token``, row 1 by ``block``, and so on; the last two by ``coupled``, whose text is that of
    plain decoding where it is drawn, too."""
    verdicts = [rule(proposal, target_btv, draws) for rule in (verify.token, verify.block, verify.coupled)]
    rule_b = jnp.minimum(jnp.arange(len(proposal.length_b)), 2)
    picked = [jnp.stack(field)[rule_b, jnp.arange(len(rule_b))] for field in zip(*map(fields, verdicts), strict=True)]
    return Verdict(*picked)


def fields(verdict):
    return verdict.num_accepted_b, verdict.next_b


each_by_its_own_rule.shares_noise = True


def generate(model, drafter, rule=each_by_its_own_rule, prompts=PROMPTS, new=NEW, temperature=(0, 0, 0, 1), **options):
    sampling = specjax.Sampling(np.float32(temperature), seed=np.arange(9, 9 + len(prompts)))
    return specjax.generate(
        model, prompts, drafter=drafter, fixed=True, verify=rule, sampling=sampling, max_new_tokens=new, **options
    )


def texts(out):
    return [row.tolist() for row in out.rows()]


@functools.cache
def plain(kinds):
    return texts(generate(target(kinds), None, slots=64))


def test_text_of_recurrent_layers_alone():
    out = generate(PURE, DRAFT, slots=64)
    assert texts(out) == plain("r")
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()


def test_plain_decoding_is_the_likeliest_token_of_one_pass():
    """A pass over the whole text, without a cache that was written before."""
    for kinds in ("r", "ra"):
        text = plain(kinds)[2]
        model = target(kinds)
        tokens_bt = jnp.asarray([text[:-1]], jnp.int32)
        cache = model.init_cache(1, len(text))
        logits_btv = jit(model.forward)(model.params, whole_feed(tokens_bt), cache).logits_btv
        start = len(PROMPTS[2])
        assert np.asarray(logits_btv)[0, start - 1 :].argmax(-1).tolist() == text[start:]


def test_a_recurrent_target_leaves_no_early():
    with pytest.raises(ValueError, match="no early_exit"):
        generate(HYBRID, EarlyExitDrafter(1, DRAFTS))


@pytest.mark.parametrize(("kinds", "num_draft"), [("r", 1), ("ra", 2), ("r", 3), ("ra", 5)])
def test_a_draft_that_is_the_target_is_always_right(kinds, num_draft):
    """Of ragged prompts, greedy and drawn. A state that is one token off would cost acceptance."""
    model = target(kinds)
    drafter = ModelDrafter(model, num_draft, unrolled=num_draft < 4)
    out = generate(model, drafter, verify.coupled, temperature=(0, 1, 0, 1), slots=64)
    np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
    rounds = -(-NEW // (num_draft + 1))
    np.testing.assert_array_equal(out.stats.rounds, rounds)


def test_long_prompts_are_read_in_chunks():
    """Of 256 tokens; then the rows go on after more prompt, which not all get."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (300, 5, 600, 257)]
    drafter, new = ModelDrafter(HYBRID, 2), 7
    sampling = specjax.Sampling(np.float32([0, 1, 0, 1]), seed=np.arange(4))
    options = {"drafter": drafter, "fixed": True, "sampling": sampling, "max_new_tokens": new, "slots": 700}
    state = specjax.run(HYBRID, specjax.prefill(HYBRID, prompts, **options), drafter=drafter, verify=verify.coupled)
    out = state.generation.to_host()
    np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
    first = texts(out)
    # What follows must be that of a state that read the whole text at once.
    more = [[1, 2, 3], [], [4], [0] * 5]
    state = specjax.extend(HYBRID, state, more, drafter=drafter, max_new_tokens=new)
    state = specjax.run(HYBRID, state, drafter=drafter, verify=verify.coupled)
    out = state.generation.to_host()
    np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
    assert texts(out)[1] == first[1]
    whole = [text + added for text, added in zip(first, more, strict=True)]
    state = specjax.prefill(HYBRID, whole, **options)
    at_once = specjax.run(HYBRID, state, drafter=drafter, verify=verify.coupled).generation
    for row in (0, 2, 3):
        assert texts(out)[row] == texts(at_once)[row]


# Faults that these tests must see.


def test_a_target_whose_commit_keeps_all_is_seen():
    wrong = PURE.replace(commit=recurrent.keeps_all)
    assert texts(generate(wrong, DRAFT, slots=64)) != plain("r")


def test_a_target_that_swallows_padding_is_seen():
    """Its prompts are read with padding; those that fill the pass alone are right."""
    out = generate(PURE.replace(commit=recurrent.keeps_all), None, slots=64)
    assert texts(out) != plain("r")


def test_a_draft_whose_commit_keeps_all_is_seen():
    """The text is right, whatever is drafted; but not all drafts are."""
    draft = ModelDrafter(PURE.replace(commit=recurrent.keeps_all), DRAFTS)
    out = generate(PURE, draft, slots=64)
    assert texts(out) == plain("r")
    assert out.stats.acceptance_rate < 0.9
