"""Log-probabilities of emitted tokens: those of a teacher-forced pass, under every rule, whatever was drafted.

Engines have had these wrong under speculation: at the token after a rejection, past a stop token, or by giving the
draft's. Here each is compared with one pass over the finished text, and, under the warped law, with the sampling
parameters applied to that pass position by position.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jitted import jit

import specjax
from specjax import Cascade, EarlyExitDrafter, ModelDrafter, NGramDrafter, Sampling, verify
from specjax.testing import table_model
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

VOCAB, NEW = 13, 18
PROMPTS = [[3], [1, 5, 9], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
CONFIG = DecoderConfig(VOCAB, 16, 24, 2, 2, 1, head_dim=8, max_position_embeddings=256)
TARGET = decoder_model(CONFIG, jax.tree.map(lambda x: 5 * x, init_params(CONFIG, jax.random.key(0))))
NEAR = TARGET.replace(params=jax.tree.map(lambda x: x + 0.05 * jnp.sin(99 * x), TARGET.params))
DRAFTERS = {
    "none": None,
    "model": ModelDrafter(NEAR, 3),
    "n-gram": NGramDrafter(3, 1, 2),
    "early exit": EarlyExitDrafter(1, 3),
    "cascade": Cascade(NGramDrafter(3, 1, 2), ModelDrafter(NEAR, 3)),
}
RULES = {"token": verify.token, "block": verify.block, "coupled": verify.coupled}
SAMPLING = Sampling(
    temperature=np.array([1.0, 0.0, 0.7, 1.4]),
    top_k=np.array([0, 0, 6, 0]),
    top_p=np.array([1, 1, 1, 0.9]),
    repetition_penalty=np.array([1, 1.3, 1, 1.2]),
    presence_penalty=np.array([0, 0, 0.4, 0]),
    frequency_penalty=np.array([0, 0.2, 0, 0.1]),
    seed=np.array([5, 6, 7, 8]),
)


def generate(drafter=None, rule=verify.block, **settings):
    options = {"sampling": SAMPLING, "max_new_tokens": NEW, "logprobs": True} | settings
    return specjax.generate(TARGET, PROMPTS, drafter=drafter, fixed=True, verify=rule, **options).to_host()


@jit
def one_pass(target, tokens_bt):
    return target.forward(target.params, whole_feed(tokens_bt), None).logits_btv


def teacher_forced(tokens):
    """Returns float64 logits ``[length, v]`` of one pass over a row's text; all are padded to one length."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(one_pass(TARGET, padded), np.float64)[0, : len(tokens)]


def log_softmax(logits):
    below = logits - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def check(out, sampling=SAMPLING):
    """Compares all that ``logprobs`` asks for with the finished text."""
    rows = len(out.lengths)
    sampling = jax.device_get(sampling.per_row(rows))
    for row in range(rows):
        start, end = out.prompt_lengths[row], out.lengths[row]
        text = out.tokens[row, :end]
        logits = teacher_forced(text)
        own = log_softmax(logits)
        for at in range(start, end):
            np.testing.assert_allclose(out.logprobs[row, at], own[at - 1, text[at]], atol=1e-4)
            wanted = warped(logits[at - 1], text[:start], text[start:at], sampling, row)[text[at]]
            np.testing.assert_allclose(np.exp(out.warped_logprobs[row, at]), wanted, atol=1e-4)
            assert wanted > 0
        outside = np.ones(out.tokens.shape[1], bool)
        outside[start:end] = False
        assert (out.logprobs[row, outside] == 0).all()
        assert (out.warped_logprobs[row, outside] == 0).all()


def warped(logits, prompt, output, sampling, row):
    """Returns the distribution that is sampled after a text."""
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    names = ("repetition", "presence", "frequency")
    given = {name: float(getattr(sampling, long)[row]) for name, long in zip(names, penalties, strict=True)}
    logits = reference.penalize(logits, list(prompt), list(output), None, **given)
    filters = {name: getattr(sampling, name)[row] for name in ("temperature", "top_k", "top_p", "min_p")}
    return reference.warp(logits, **filters)


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [("none", "block"), ("n-gram", "token"), ("early exit", "block"), ("cascade", "coupled")]
    + [("model", rule) for rule in RULES],
)
def test_they_are_those_of_a_teacher_forced_pass(drafter, rule):
    """Every drafter, and every rule with drafts of a model."""
    out = generate(DRAFTERS[drafter], RULES[rule])
    check(out)
    if drafter != "none":
        assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum(), "some drafts stay and some are rejected"


def test_they_end_at_a_stop_token():
    """Also where it lies before the end of what a round accepted."""
    free = generate(ModelDrafter(TARGET, 3))
    stops = [int(free.tokens[row, free.prompt_lengths[row] + 5]) for row in range(4)]
    out = generate(ModelDrafter(TARGET, 3), stop_tokens=np.asarray(stops)[:, None])
    check(out)
    assert (out.lengths - out.prompt_lengths <= 6).all()


def test_the_likeliest_tokens_of_each_place():
    out = generate(ModelDrafter(NEAR, 3), top_logprobs=3)
    for row in range(4):
        own = log_softmax(teacher_forced(out.tokens[row, : out.lengths[row]]))
        for at in range(out.prompt_lengths[row], out.lengths[row]):
            best = np.sort(own[at - 1])[::-1][:3]
            np.testing.assert_allclose(out.top_logprobs[row, at], best, atol=1e-4)
            np.testing.assert_allclose(own[at - 1, out.top_tokens[row, at]], best, atol=1e-4)
        assert (out.top_logprobs[row, : out.prompt_lengths[row]] == 0).all()


def test_the_text_is_the_same_without_them():
    out, plain = generate(ModelDrafter(NEAR, 3)), generate(ModelDrafter(NEAR, 3), logprobs=False)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert plain.logprobs is None and plain.warped_logprobs is None and plain.top_tokens is None


def test_they_go_on_over_turns():
    drafter = ModelDrafter(NEAR, 3)
    options = {
        "sampling": Sampling(temperature=1.0, seed=2),
        "drafter": drafter,
        "fixed": True,
        "slots": 128,
        "logprobs": True,
    }
    state = specjax.prefill(TARGET, PROMPTS, max_new_tokens=7, **options)
    state = specjax.run(TARGET, state, drafter=drafter)
    first = state.generation.to_host()
    more = [[1, 2], [4], [], [0, 1, 2, 3]]
    state = specjax.extend(TARGET, state, more, drafter=drafter, max_new_tokens=5)
    out = specjax.run(TARGET, state, drafter=drafter).generation.to_host()
    for row in range(4):
        own = log_softmax(teacher_forced(out.tokens[row, : out.lengths[row]]))
        emitted = [
            *range(first.prompt_lengths[row], first.lengths[row]),
            *range(out.prompt_lengths[row], out.lengths[row]),
        ]
        for at in range(out.lengths[row]):
            wanted = own[at - 1, out.tokens[row, at]] if at in emitted else 0
            np.testing.assert_allclose(out.logprobs[row, at], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rule", "filters"),
    [
        ("none", "block", {}),
        ("n-gram", "token", {"top_k": 4}),
        ("model", "block", {"top_p": 0.9}),
        ("model", "coupled", {"top_k": 4, "top_p": 0.9, "min_p": 0.01}),
    ],
)
def test_logits_that_are_nan_are_marked_and_touch_no_other_row(name, rule, filters):
    """Token 3 leads to NaN, as an overflow does: the last token follows, and its log-probability is NaN."""
    table = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    table[:, [3, 5]] = -np.inf  # only token 5 leads to token 3, and only a prompt has token 5
    table[5] = np.where(np.arange(9) == 3, 0, -np.inf)
    damaged = table.copy()
    damaged[3] = np.nan
    sampling = Sampling(temperature=np.array([0.0, 1.0, 0.0, 1.0]), **filters)
    prompts, settings = [[1, 5], [1, 5], [1, 2], [1, 2]], {"max_new_tokens": 8, "fixed": True, "logprobs": True}
    drafter = ModelDrafter(table_model(jnp.asarray(table)), 3) if name == "model" else DRAFTERS[name]
    settings |= {"drafter": drafter, "verify": RULES[rule]}
    found, wanted = (
        specjax.generate(table_model(x), prompts, sampling=sampling, **settings).to_host()
        for x in map(jnp.asarray, (damaged, table))
    )
    for row in (0, 1):
        assert found.tokens[row, 2:4].tolist() == [3, 8]
        assert np.flatnonzero(np.isnan(found.logprobs[row])).tolist() == [3]
        assert found.lengths[row] == 10
    np.testing.assert_array_equal(found.tokens[2:], wanted.tokens[2:])
    np.testing.assert_array_equal(found.logprobs[2:], wanted.logprobs[2:])
