"""The law of whole texts: what ``generate`` emits over several rounds, through the loop and the caches.

Thousands of rows, each with a seed of its own, continue three prompts with a target of known law. Counts of the joint
outcomes of all five emitted tokens are compared with the exact law by Pearson's chi-square. Two drafts a round, so
that a text takes two to five rounds. Faulty drafters, rules and caches go through the same test, and must fail it.
"""

import dataclasses
import itertools

import hybrid
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent
import reference
from by_row import ByRow
from flax import struct
from jax.scipy.special import gammaincc
from jitted import jit
from stateless import Stateless

import specjax
from specjax import (
    BlockDrafter,
    Cascade,
    EarlyExitDrafter,
    FeatureDrafter,
    MedusaDrafter,
    ModelDrafter,
    MTPDrafter,
    NGramDrafter,
    Proposal,
    Sampling,
    SuffixDrafter,
    Verdict,
    verify,
)
from specjax import sampling as sampling_lib
from specjax.drafters.assistant import AssistantDrafter, AssistantHead
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.drafters.pard import PardDrafter
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.testing import table_logits, table_model
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import EXTERNAL, DecoderConfig, LayerConfig, plain_rope
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import Output, whole_feed

VOCAB, TOKENS, DRAFTS, SLOTS = 3, 5, 2, 16
PROMPTS = ((0,), (1, 2, 1), (2, 0, 1, 2, 0))
ROWS_PER_PROMPT, BATCH = 4000, 24
IMPOSSIBLE = -1e9  # a logit whose probability is 0 in float32


def random_table(seed):
    """Logits of the next token after each two."""
    return np.random.default_rng(seed).normal(scale=1.5, size=(VOCAB,) * 3).astype(np.float32)


TABLE = random_table(0)
TABLE[0, 1, 2] = TABLE[2, 2, 0] = TABLE[1, 0, :2] = IMPOSSIBLE


def leave_early(params, feed, cache, depth):
    """Another law than the whole target's."""
    return table_model(TABLE).forward(jnp.roll(params, 1, axis=-1), feed, cache)


def embed(params, tokens_bt):
    return jnp.asarray([[1.0], [-0.5], [0.3]])[tokens_bt]


def unembed(params, x_btd):
    return x_btd @ jnp.asarray([[1.0, -0.5, 0.5]])


TARGET = table_model(TABLE).replace(embed=embed, unembed=unembed, early_exit=leave_early, num_layers=1)
# Likes what the target does not, the impossible above all.
AGAINST = np.where(TABLE == IMPOSSIBLE, 3, -2 * TABLE).astype(np.float32)


@struct.dataclass
class RaggedDrafter(Stateless):
    """Draws from one fixed distribution; a row proposes 0, 1 or 2 tokens, as its last token and its first draft say."""

    logits_v: jax.Array
    num_draft: int = struct.field(pytree_node=False, default=DRAFTS)

    def propose(self, state, context, draw):
        rows = context.length_b.shape[0]
        logits_bv = jnp.broadcast_to(self.logits_v[None], (rows, VOCAB))
        first_b, first_bv = draw(logits_bv, jnp.zeros((rows, DRAFTS), jnp.int32), 0)
        second_b, second_bv = draw(logits_bv, jnp.stack([first_b, first_b], 1), 1)
        last_b = jnp.take_along_axis(context.tokens_bs, context.length_b[:, None] - 1, axis=1)[:, 0]
        length_b = jnp.where(last_b == 0, 0, jnp.where(first_b == 1, 1, 2)).astype(jnp.int32)
        return Proposal(jnp.stack([first_b, second_b], 1), jnp.stack([first_bv, second_bv], 1), length_b), state


def other_vocabulary():
    """A drafter whose model has four tokens: the target's 0 and 2 are two of them, and 1 is spelled by two others."""
    table = np.random.default_rng(2).normal(scale=1.5, size=(4,) * 3)
    arrays = ([2, -1, 1], [[2, 0], [0, 3], [1, 0]], [1, 2, 1])
    shared = VocabularyMap(*(np.asarray(array, np.int32) for array in arrays))
    return shared_vocabulary_drafter(table_model(table), shared, DRAFTS)


def medusa_head(*logits):
    """The target's states are zero and one wide; a block makes something of them."""
    block = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones((1,))}
    return {"blocks": {0: block}, "lm_head": {"kernel": jnp.asarray([logits], jnp.float32)}}


def lively(params, scale):
    """Parameters whose drafts depend much on the tokens before them."""
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


MTP = MTPConfig(DecoderConfig(VOCAB, 1, 2, 1, 1, 1, head_dim=2), own_embedding=True, own_head=True)
TWO_MTP = dataclasses.replace(MTP, decoder=DecoderConfig(VOCAB, 1, 2, 2, 1, 1, head_dim=2))
EAGLE = EagleHead(
    DecoderConfig(VOCAB, 8, 8, 1, 2, 1), (0, 1), target_hidden_size=1, draft_vocab_size=2, own_embedding=True
)
DSPARK = DFlashHead(
    *(DecoderConfig(VOCAB, 8, 8, 1, 2, 1), (0,), DRAFTS, 1, True),
    target_hidden_size=1,
    own_embedding=True,
    own_head=True,
    markov="vanilla",
    markov_rank=2,
)
EAGLE_1 = EagleHead(DecoderConfig(VOCAB, 1, 8, 1, 1, 1, head_dim=2), (-1,), version=1)
RULES = {"token": verify.token, "block": verify.block, "coupled": verify.coupled}


def token_and_block(proposal, target_btv, draws):
    """Two rules in one program: after each row for each prompt the other rule is next."""
    verdicts = [rule(proposal, target_btv, draws) for rule in (verify.token, verify.block)]
    rule_b = jnp.arange(len(proposal.length_b)) // len(PROMPTS) % 2
    return jax.tree.map(lambda token_b, block_b: jnp.where(rule_b == 0, token_b, block_b), *verdicts)


token_and_block.shares_noise = False
SUFFIX = specjax.remember(SuffixDrafter.empty(VOCAB, 32, DRAFTS, min_n=1), [[0, 1, 2, 1, 0, 0, 2], [2, 2, 1, 1]])
DRAFTERS = {
    "another model": ModelDrafter(table_model(random_table(1)), DRAFTS),
    "the target itself": ModelDrafter(table_model(TABLE), DRAFTS),
    "a bad model": ModelDrafter(table_model(AGAINST), DRAFTS),
    "another vocabulary": other_vocabulary(),
    "n-gram": NGramDrafter(DRAFTS, min_n=1, max_n=2),
    "suffix": SUFFIX,
    "suffix, else a model": Cascade(SUFFIX.replace(min_n=2), ModelDrafter(table_model(random_table(1)), DRAFTS)),
    "ragged": RaggedDrafter(jnp.asarray([0.5, -0.5, 1.0])),
    "medusa": MedusaDrafter({0: medusa_head(0.5, -0.5, 1.0), 1: medusa_head(-1.0, 1.0, 0.0)}, DRAFTS),
    "mtp": FeatureDrafter(lively(init_mtp_params(MTP, jax.random.key(0)), 50), MTPHead(MTP), DRAFTS),
    "eagle, two tokens of three": FeatureDrafter(lively(EAGLE.init_params(jax.random.key(0)), 30), EAGLE, DRAFTS),
    "early exit": EarlyExitDrafter(1, DRAFTS),
    "n-gram, else a model": Cascade(NGramDrafter(DRAFTS, 1, 2), ModelDrafter(table_model(random_table(1)), DRAFTS)),
    "n-gram, else early exit": Cascade(NGramDrafter(DRAFTS, 2, 2), EarlyExitDrafter(1, DRAFTS)),
}
TRUSTED = dataclasses.replace(DSPARK, confidence=True, confidence_with_markov=True)
BLOCK = BlockDrafter(lively(DSPARK.init_params(jax.random.key(2)), 30), DSPARK, DRAFTS)
SLOW = {
    "dspark": BLOCK,
    "dspark, likeliest drafts": dataclasses.replace(BLOCK, argmax=True),
    "dspark, cut": BlockDrafter(lively(TRUSTED.init_params(jax.random.key(2)), 30), TRUSTED, DRAFTS, cuts=True),
    "pard": PardDrafter(table_model(random_table(1)), DRAFTS, mask_token=1),
    "two mtp modules": MTPDrafter(lively(init_mtp_params(TWO_MTP, jax.random.key(1)), 50), TWO_MTP, DRAFTS),
    "eagle-1": FeatureDrafter(lively(EAGLE_1.init_params(jax.random.key(1)), 30), EAGLE_1, DRAFTS),
}
MAMBA = hybrid.model("mamba", VOCAB, 6, 64)


def chained_mtp():
    config = MTPConfig(DecoderConfig(VOCAB, hybrid.WIDTH, 8, 1, 2, 1, head_dim=4), own_embedding=True, own_head=True)
    return FeatureDrafter(lively(init_mtp_params(config, jax.random.key(0)), 30), MTPHead(config), DRAFTS)


def assisted():
    """A target whose first layer has a window, and an assistant with logits for two of three tokens."""
    layers = (LayerConfig(plain_rope(4), window=3), LayerConfig(plain_rope(4)))
    config = DecoderConfig(VOCAB, 8, 8, 2, 2, 1, head_dim=4, layers=layers)
    shared = tuple(dataclasses.replace(layer, shares=EXTERNAL) for layer in layers)
    head = AssistantHead(dataclasses.replace(config, layers=shared), 8, centroids=3, chosen=2)
    target = decoder_model(config, lively(init_params(config, jax.random.key(0)), 20))
    return target, AssistantDrafter(lively(head.init_params(jax.random.key(1)), 20), head, DRAFTS)


DECODERS = {
    "delta rule": (
        hybrid.model("delta rule", VOCAB, 5, 64),
        ByRow((Cascade(NGramDrafter(DRAFTS, 1, 2), ModelDrafter(MAMBA, DRAFTS)), chained_mtp())),
    ),
    "mamba": (MAMBA, ModelDrafter(hybrid.model("delta rule", VOCAB, 5, 64), DRAFTS)),
    "assistant": assisted(),
}
DECODER_ROWS = 1000  # for each prompt, half of them under each rule
PENALTIES = ("repetition", "presence", "frequency")
PLAIN, FILTERED, PENALIZED = {}, {"temperature": 0.7, "top_k": 2, "top_p": 0.9}, {"repetition": 1.5, "frequency": 0.7}
UNPENALIZED = {"T=1": PLAIN, "filtered": FILTERED}
WITH_PENALTIES = {
    "penalized": PENALIZED,
    "all": {"temperature": 1.3, "top_p": 0.95, "min_p": 0.05, "presence": 0.5, "frequency": -0.4},
}
SAMPLINGS = UNPENALIZED | WITH_PENALTIES


def all_at_once(target, drafter, prompt_bt, length_b, sampling, *, rule, slots):
    return specjax.generate(
        target,
        prompt_bt,
        length_b,
        drafter=drafter,
        fixed=True,
        verify=rule,
        sampling=sampling,
        max_new_tokens=TOKENS,
        slots=slots,
    )


@jit(static_argnames=("rule", "slots"))
def in_batches(target, drafter, prompt_bt, length_b, sampling, *, rule, slots):
    """A few rows at a time, for drafters with a decoder: the program writes its cache row by row."""

    def one(rows):
        prompt_bt, length_b, seed_b = rows
        seeded = sampling.replace(seed=seed_b)
        return all_at_once(target, drafter, prompt_bt, length_b, seeded, rule=rule, slots=slots)

    rows = jax.tree.map(lambda x: x.reshape(-1, BATCH, *x.shape[1:]), (prompt_bt, length_b, sampling.seed))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one, rows))


def emitted(target, drafter, rule, settings, slots=SLOTS, rows_per_prompt=ROWS_PER_PROMPT):
    """Returns the texts ``[prompt, row, token]``."""
    named = {f"{name}_penalty" if name in PENALTIES else name: value for name, value in settings.items()}
    prompt_bt, length_b = specjax.pad_prompts(PROMPTS * rows_per_prompt)
    sampling = Sampling(seed=1000 + np.arange(len(length_b), dtype=np.uint32), **named)
    run = in_batches if isinstance(drafter, BlockDrafter | FeatureDrafter | MTPDrafter) else all_at_once
    out = run(target, drafter, prompt_bt, length_b, sampling, rule=rule, slots=slots)
    assert (np.asarray(out.lengths) == length_b + TOKENS).all()
    assert (np.asarray(out.stats.rounds) >= 2).all()
    new_bt = np.take_along_axis(np.asarray(out.tokens), length_b[:, None] + np.arange(TOKENS), axis=1)
    return new_bt.reshape(rows_per_prompt, len(PROMPTS), TOKENS).swapaxes(0, 1)


def next_logits(target, prompt):
    """Returns a function: the logits of the token after the prompt and some output."""
    if not isinstance(target.params, dict):
        return lambda output: np.asarray(target.params)[(0, *prompt, *output)[-2:]]  # before its first token, token 0
    # A decoder: one pass over each text, without a cache that was written before.
    outputs = list(itertools.product(range(VOCAB), repeat=TOKENS - 1))
    feed = whole_feed(jnp.asarray([[*prompt, *output] for output in outputs], jnp.int32))
    logits_btv = np.asarray(jit(target.forward)(target.params, feed, target.init_cache(*feed.tokens_bt.shape))[0])
    of = {output[:i]: row[i - TOKENS] for output, row in zip(outputs, logits_btv, strict=True) for i in range(TOKENS)}
    return of.__getitem__


def exact_law(target, prompt, settings):
    """Returns the probability of each text of TOKENS tokens, ``[v, v, ..]``."""
    logits_after = next_logits(target, prompt)
    warping = {name: value for name, value in settings.items() if name not in PENALTIES}
    penalizing = {name: value for name, value in settings.items() if name in PENALTIES}

    def next_law(output):
        return reference.warp(reference.penalize(logits_after(output), prompt, output, **penalizing), **warping)

    law = np.ones(())
    for i in range(TOKENS):
        after = [next_law(text) for text in itertools.product(range(VOCAB), repeat=i)]
        law = law[..., None] * np.reshape(after, (VOCAB,) * (i + 1))
    return law


def p_value(texts, target, settings):
    """Returns the probability of counts at least as far from the exact law; 0 if an impossible text occurs.

    Texts with an expected count below 5 are one outcome together.
    """
    statistic, freedom = 0.0, 0
    for prompt, rows in zip(PROMPTS, texts, strict=True):
        expected = len(rows) * exact_law(target, prompt, settings).ravel()
        observed = np.bincount(np.ravel_multi_index(rows.T, (VOCAB,) * TOKENS), minlength=len(expected))
        assert abs(expected.sum() - len(rows)) < 1e-6
        if observed[expected == 0].any():
            return 0.0
        rare = expected < 5
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
        some = expected > 0
        statistic += ((observed[some] - expected[some]) ** 2 / expected[some]).sum()
        freedom += some.sum() - 1
    print(f"chi-square {statistic:.1f}, {freedom} degrees of freedom")
    return float(gammaincc(jnp.float32(freedom / 2), jnp.float32(statistic / 2)))


def assert_law(drafter, rule, settings):
    p = p_value(emitted(TARGET, drafter, rule, settings), TARGET, settings)
    print(f"p = {p:.4f}")
    assert p > 1e-3


@pytest.mark.parametrize("settings", UNPENALIZED.values(), ids=UNPENALIZED)
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_joint_law_under_token_and_block(drafter, settings):
    texts = emitted(TARGET, drafter, token_and_block, settings, rows_per_prompt=2 * ROWS_PER_PROMPT)
    for name, first in (("token", 0), ("block", 1)):
        p = p_value(texts[:, first::2], TARGET, settings)
        print(f"{name}: p = {p:.4f}")
        assert p > 1e-3, name


@pytest.mark.parametrize("settings", UNPENALIZED.values(), ids=UNPENALIZED)
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_joint_law_under_coupled(drafter, settings):
    assert_law(drafter, verify.coupled, settings)


@pytest.mark.parametrize("settings", WITH_PENALTIES.values(), ids=WITH_PENALTIES)
@pytest.mark.parametrize(
    ("drafter", "rule"), zip(DRAFTERS.values(), itertools.cycle(RULES.values()), strict=False), ids=DRAFTERS
)
def test_joint_law_with_penalties(drafter, rule, settings):
    """Each drafter under one rule, each rule with four drafters: a rule is given distributions, penalized or not."""
    assert_law(drafter, rule, settings)


@pytest.mark.parametrize("name", DECODERS)
def test_joint_law_of_decoders(name):
    """A recurrent layer takes back what is rejected; an assistant reads the target's cache."""
    target, drafter = DECODERS[name]
    texts = emitted(target, drafter, token_and_block, PLAIN, rows_per_prompt=DECODER_ROWS)
    for first in (0, 1):
        assert p_value(texts[:, first::2], target, PLAIN) > 1e-3


def test_a_decoder_that_takes_nothing_back_is_seen():
    """The control, at the same number of rows: the states of recurrent layers hold rejected drafts."""
    target, drafter = DECODERS["mamba"]
    forgetless = target.replace(commit=lambda cache, feed, kept_b: target.commit(cache, feed, feed.count_b))
    texts = emitted(forgetless, drafter, token_and_block, PLAIN, rows_per_prompt=DECODER_ROWS)
    for first in (0, 1):
        assert p_value(texts[:, first::2], target, PLAIN) < 1e-6


@pytest.mark.parametrize("drafter", SLOW.values(), ids=SLOW)
def test_joint_law_of_drafters_that_compile_slowly(drafter):
    """Under one rule and sampling."""
    assert p_value(emitted(TARGET, drafter, verify.block, FILTERED), TARGET, FILTERED) > 1e-3


@pytest.mark.parametrize("settings", SAMPLINGS.values(), ids=SAMPLINGS)
def test_joint_law_without_drafter(settings):
    assert p_value(emitted(TARGET, None, verify.block, settings), TARGET, settings) > 1e-3


# Faults. Each is a known way to lose the law, and the test above must see it.


@struct.dataclass
class ScoresRaw(ModelDrafter):
    """Samples from the warped distribution, and reports the model's own."""

    def propose(self, state, context, draw):
        def faulty(logits_bv, drafts_bg, index):
            return draw(logits_bv, drafts_bg, index)[0], jax.nn.softmax(logits_bv)

        return super().propose(state, context, faulty)


@struct.dataclass
class ScoresArgmax(ModelDrafter):
    """Proposes the likeliest token, and reports the distribution as if it had been drawn."""

    def propose(self, state, context, draw):
        def faulty(logits_bv, drafts_bg, index):
            probs_bv = draw(logits_bv, drafts_bg, index)[1]
            return jnp.argmax(probs_bv, axis=-1).astype(jnp.int32), probs_bv

        return super().propose(state, context, faulty)


@struct.dataclass
class KeysByPosition(ModelDrafter):
    """Draws with noise keyed by row and absolute position; honest about the distribution."""

    def propose(self, state, context, draw):
        rows = context.length_b.shape[0]
        keys_b = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(rows))

        def faulty(logits_bv, drafts_bg, index):
            probs_bv = draw(logits_bv, drafts_bg, index)[1]
            position_b = context.length_b + index
            return sampling_lib.exponential_race(probs_bv, jax.vmap(jax.random.fold_in)(keys_b, position_b)), probs_bv

        return super().propose(state, context, faulty)


@dataclasses.dataclass
class OtherUniforms:
    """The engine's draws, but for the uniforms."""

    draws: sampling_lib.RoundDraws
    uniforms_bg: jax.Array

    def uniforms(self, count):
        return self.uniforms_bg

    def emit(self, weights_bv, offset_b):
        return self.draws.emit(weights_bv, offset_b)


def uniforms_by_row(proposal, target_bsv, draws):
    """Token verification whose uniforms are the same in each round."""
    uniforms_bg = jax.vmap(lambda key: jax.random.uniform(key, (DRAFTS,)))(draws._keys(7))
    return verify.token(proposal, target_bsv, OtherUniforms(draws, uniforms_bg))


def uniforms_by_position(proposal, target_bsv, draws):
    """Block verification whose uniforms are keyed by row and absolute position."""
    uniforms = [jax.vmap(jax.random.uniform)(draws._keys(7, draws.length_b + j)) for j in range(DRAFTS)]
    return verify.block(proposal, target_bsv, OtherUniforms(draws, jnp.stack(uniforms, axis=1)))


def uniforms_of_drafts(proposal, target_bsv, draws):
    """Token verification whose uniforms come from the keys that drew the drafts."""
    places = [jnp.full_like(draws.length_b, j) for j in range(DRAFTS)]
    keys = [draws._keys(sampling_lib._DRAFT, draws.length_b, place_b) for place_b in places]
    uniforms = [jax.vmap(jax.random.uniform)(keys_b) for keys_b in keys]
    return verify.token(proposal, target_bsv, OtherUniforms(draws, jnp.stack(uniforms, axis=1)))


def residual_from_p(proposal, target_bsv, draws):
    accepted_b = verify.token(proposal, target_bsv, draws).num_accepted_b
    return Verdict(accepted_b, draws.emit(target_bsv[jnp.arange(len(accepted_b)), accepted_b], accepted_b))


def bonus_from_last_draft(proposal, target_bsv, draws):
    verdict = verify.token(proposal, target_bsv, draws)
    early = draws.emit(target_bsv[:, DRAFTS - 1], verdict.num_accepted_b)
    return verdict.replace(next_b=jnp.where(verdict.num_accepted_b == DRAFTS, early, verdict.next_b))


for rule in (uniforms_by_row, uniforms_by_position, uniforms_of_drafts, residual_from_p, bonus_from_last_draft):
    rule.shares_noise = False

breaks_in_block = verify.ChainRule(verify.block_thresholds, verify.leading_successes)


def _write_once(params, feed, cache, capture=()):
    """A table model's forward pass, but slots that hold a token keep it: rejected drafts stay in the cache."""
    row_b1 = jnp.arange(cache.shape[0])[:, None]
    kept_bt = cache[row_b1, feed.position_bt]
    written_bt = feed.real_bt & (kept_bt < 0)
    cache = cache.at[row_b1, feed.position_bt].set(jnp.where(written_bt, feed.tokens_bt, kept_bt))
    return Output(table_logits(params, jnp.maximum(cache, 0), feed.position_bt, 2), (), cache)


def _empty(rows, slots):
    return jnp.full((rows, slots), -1, jnp.int32)


# Without context: block verification accepts from both drafts together here, where rejecting tells most about them.
LOPSIDED = table_model(np.broadcast_to(np.log(np.float32([0.3, 0.6, 0.1])), (VOCAB,) * 3))
REVERSED = table_model(np.broadcast_to(np.log(np.float32([0.6, 0.3, 0.1])), (VOCAB,) * 3))
STALE = TARGET.replace(forward=_write_once, init_cache=_empty)
RECURRENT = [recurrent.recurrent_model("r", recurrent.init_params("r", VOCAB, 8, seed)) for seed in (5, 6)]
KEEPS_ALL = RECURRENT[0].replace(commit=recurrent.keeps_all)
MODEL = DRAFTERS["another model"]
FAULTS = {
    "raw q is scored, warped q sampled": (TARGET, ScoresRaw(MODEL.model, DRAFTS), verify.token, FILTERED),
    "argmax drafts scored by softmax": (TARGET, ScoresArgmax(MODEL.model, DRAFTS), verify.token, PLAIN),
    "residual drawn from p": (TARGET, MODEL, residual_from_p, PLAIN),
    "bonus drawn one place early": (TARGET, MODEL, bonus_from_last_draft, PLAIN),
    "a break inside block verification": (TARGET, MODEL, breaks_in_block, PLAIN),
    "each round has the same uniforms": (TARGET, MODEL, uniforms_by_row, PLAIN),
    "drafts and acceptance share their noise": (TARGET, MODEL, uniforms_of_drafts, PLAIN),
    "block with noise by absolute position": (
        LOPSIDED,
        KeysByPosition(REVERSED, DRAFTS),
        uniforms_by_position,
        PLAIN,
    ),
    "rejected drafts stay in the cache": (STALE, MODEL, verify.token, PLAIN),
    "rejected drafts stay in a state": (KEEPS_ALL, ModelDrafter(RECURRENT[1], DRAFTS), verify.block, PLAIN),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_seen(fault):
    target, drafter, rule, settings = fault
    p = p_value(emitted(target, drafter, rule, settings), target, settings)
    print(f"p = {p:.2e}")
    assert p < 1e-6


def test_penalties_without_the_drafts_before_are_seen(monkeypatch):
    honest = sampling_lib._prefix_counts
    monkeypatch.setattr(sampling_lib, "_prefix_counts", lambda drafts, vocab: 0 * honest(drafts, vocab))
    # One slot more is another static argument, so that the loop is traced with the fault in it.
    texts = emitted(TARGET, MODEL, verify.token, PENALIZED, slots=SLOTS + 1)
    assert p_value(texts, TARGET, PENALIZED) < 1e-6
