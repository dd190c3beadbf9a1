"""Recurrent layers, as target and as draft: what is rejected, padded or at rest must leave their states alone.

``recurrent.py`` has the model. Attention layers beside the recurrent ones are in half of the tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent
import reference
from jax.scipy.special import gammaincc
from jitted import jit

import specjax
from specjax import Cascade, EarlyExitDrafter, FeatureDrafter, MedusaDrafter, ModelDrafter, NGramDrafter, verify
from specjax.drafters.eagle import EagleHead
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, MTPDrafter, MTPHead, init_mtp_params
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import DecoderConfig
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


def lively(params):
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def decoder_config(layers):
    return DecoderConfig(VOCAB, WIDTH, 8, layers, 2, 1, head_dim=4, max_position_embeddings=64)


def mtp(layers, make):
    config = MTPConfig(decoder_config(layers))
    return make(lively(init_mtp_params(config, jax.random.key(0))), config)


def eagle(**options):
    head = EagleHead(decoder_config(1), **options)
    return FeatureDrafter(lively(head.init_params(jax.random.key(0))), head, DRAFTS)


def other_vocabulary():
    """A recurrent draft model of five tokens: three are the target's, whose others are spelled by two."""
    draft_of_v = np.int32([-1, 2, 0, -1, 4, -1, -1])
    first_v = np.where(draft_of_v >= 0, draft_of_v, np.arange(VOCAB) % 5)
    pieces_vp = np.stack([first_v, (first_v + 3) % 5], axis=1).astype(np.int32)
    num_pieces_v = np.where(draft_of_v >= 0, 1, 2).astype(np.int32)
    return shared_vocabulary_drafter(target("r", 5, 4), VocabularyMap(draft_of_v, pieces_vp, num_pieces_v), DRAFTS)


NGRAM = NGramDrafter(DRAFTS, 1, 2)
DRAFTERS = {
    "n-gram": NGRAM,
    "recurrent model": DRAFT,
    "recurrent and attention": ModelDrafter(near(HYBRID), DRAFTS),
    "recurrent model of another vocabulary": other_vocabulary(),
    "mtp, chained": mtp(1, lambda params, config: FeatureDrafter(params, MTPHead(config), DRAFTS)),
    "mtp, three modules": mtp(DRAFTS, lambda params, config: MTPDrafter(params, config, DRAFTS)),
    "eagle-1": eagle(capture=(-1,), version=1),
    "eagle-3": eagle(capture=(0, 1, 2), norm_before_residual=True),
    "medusa": MedusaDrafter(init_medusa_params(HYBRID.params["head"], DRAFTS), DRAFTS),
    "cascade: n-gram, recurrent model": Cascade(NGRAM, DRAFT),
}


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


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_text_is_that_of_plain_decoding(drafter):
    """Under all three rules: greedy, and drawn under ``coupled``."""
    out = generate(HYBRID, drafter, slots=64)
    assert texts(out) == plain("ra")
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()


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


# The law.

LAW_VOCAB, TOKENS, ROWS = 3, 4, 3000
LAW_PROMPTS = ((0,), (1, 2, 1), (2, 0, 1, 2, 0))
LAW_TARGET = target("ra", LAW_VOCAB, 5)
LAW_DRAFTER = ModelDrafter(target("r", LAW_VOCAB, 6), 2)
FILTERED = {"temperature": 0.7, "top_k": 2}
LAW_CASES = {
    "token": (LAW_DRAFTER, verify.token, {}),
    "block, a cascade, filtered": (Cascade(NGramDrafter(2, 1, 2), LAW_DRAFTER), verify.block, FILTERED),
    "coupled": (LAW_DRAFTER, verify.coupled, {}),
}


def exact_law(model, prompt, **warping):
    """Returns the probability of each text of ``TOKENS`` tokens, flat, from one pass over each."""
    new = np.indices((LAW_VOCAB,) * TOKENS).reshape(TOKENS, -1).T
    texts_bt = np.concatenate([np.tile(prompt, (len(new), 1)), new], axis=1).astype(np.int32)
    cache = model.init_cache(*texts_bt.shape)
    logits_btv = jit(model.forward)(model.params, whole_feed(jnp.asarray(texts_bt)), cache).logits_btv
    logits_btv = np.asarray(logits_btv, np.float64)[:, len(prompt) - 1 : -1]
    law_bt = [
        [reference.warp(logits_v, **warping)[token] for logits_v, token in zip(*row, strict=True)]
        for row in zip(logits_btv, new, strict=True)
    ]
    return np.prod(law_bt, axis=1)


def p_value(model, drafter, rule, **warping):
    """Returns the probability of counts at least as far from the exact law (Pearson's chi-square)."""
    prompts = [list(prompt) for prompt in LAW_PROMPTS] * ROWS
    sampling = specjax.Sampling(seed=np.arange(len(prompts), dtype=np.uint32), **warping)
    out = specjax.generate(
        model, prompts, drafter=drafter, fixed=True, verify=rule, sampling=sampling, max_new_tokens=TOKENS, slots=16
    ).to_host()
    assert (out.stats.rounds >= 2).all()
    statistic, freedom = 0.0, 0
    for i, prompt in enumerate(LAW_PROMPTS):
        new_bt = out.tokens[i :: len(LAW_PROMPTS), len(prompt) : len(prompt) + TOKENS]
        expected = ROWS * exact_law(LAW_TARGET, prompt, **warping)
        assert abs(expected.sum() - ROWS) < 1e-2
        observed = np.bincount(np.ravel_multi_index(new_bt.T, (LAW_VOCAB,) * TOKENS), minlength=len(expected))
        if observed[expected == 0].any():
            return 0.0
        rare = expected < 5
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
        some = expected > 0
        statistic += ((observed[some] - expected[some]) ** 2 / expected[some]).sum()
        freedom += some.sum() - 1
    return float(gammaincc(jnp.float32(freedom / 2), jnp.float32(statistic / 2)))


@pytest.mark.parametrize("case", LAW_CASES.values(), ids=LAW_CASES)
def test_joint_law(case):
    drafter, rule, warping = case
    assert p_value(LAW_TARGET, drafter, rule, **warping) > 1e-3


def test_a_commit_that_keeps_all_has_another_law():
    def commit(cache, feed, kept_b):
        return LAW_TARGET.commit(cache, feed, jnp.full_like(kept_b, feed.tokens_bt.shape[1]))

    assert p_value(LAW_TARGET.replace(commit=commit), LAW_DRAFTER, verify.block) < 1e-6
