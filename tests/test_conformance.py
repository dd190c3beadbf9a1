"""What every drafter must keep, in one table: the text of plain decoding, each row by itself, one program.

The law of drawn text is in ``test_laws.py``. Here the target is a decoder, and rows are ragged in
prompt, room and sampling.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_rule import EveryRule
from test_compiled import compilations

import specjax
from specjax import Cascade, EarlyExitDrafter, FeatureDrafter, MedusaDrafter, ModelDrafter, NGramDrafter, verify
from specjax.drafters.eagle import EagleHead
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, MTPDrafter, MTPHead, init_mtp_params
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

VOCAB, WIDTH, LAYERS, DRAFTS = 11, 16, 3, 3
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
LIMITS = [24, 13, 24, 20]


def decoder_config(layers, vocab=VOCAB, width=WIDTH):
    return DecoderConfig(vocab, width, 24, layers, 2, 1, head_dim=8, max_position_embeddings=256)


def lively(params, seed=0):
    """Parameters under which drafts are accepted now and then, and depend on all that is read."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jax.random.normal(k, x.shape) * 1.5 / x.shape[0] ** 0.5 if x.ndim > 1 else x
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def model(layers, vocab=VOCAB, seed=0):
    config = decoder_config(layers, vocab)
    return decoder_model(config, lively(init_params(config, jax.random.key(0)), seed))


def mtp(layers, make):
    config = MTPConfig(decoder_config(layers))
    return make(lively(init_mtp_params(config, jax.random.key(0)), 2), config)


def eagle(**options):
    head = EagleHead(decoder_config(1, width=options.pop("width", WIDTH)), **options)
    return FeatureDrafter(lively(head.init_params(jax.random.key(0)), 3), head, DRAFTS)


def other_vocabulary():
    """A model of seven tokens: four are the target's, whose others are spelled by one or two."""
    draft_of_v = np.full(VOCAB, -1, np.int32)
    draft_of_v[[1, 2, 4, 7]] = 2, 0, 5, 4
    first_v = np.where(draft_of_v >= 0, draft_of_v, np.arange(VOCAB) % 7)
    pieces_vp = np.stack([first_v, (first_v + 3) % 7], axis=1).astype(np.int32)
    num_pieces_v = np.where(draft_of_v >= 0, 1, 2).astype(np.int32)
    return shared_vocabulary_drafter(model(1, 7, 4), VocabularyMap(draft_of_v, pieces_vp, num_pieces_v), DRAFTS)


TARGET = model(LAYERS)
COPY = TARGET.replace(params=jax.tree.map(lambda x: x + 0.1 * jnp.sin(99 * x), TARGET.params))
NGRAM, MODEL = NGramDrafter(DRAFTS, 1, 2), ModelDrafter(COPY, DRAFTS)
MTP = mtp(1, lambda params, config: FeatureDrafter(params, MTPHead(config), DRAFTS))
MEDUSA = MedusaDrafter(init_medusa_params(TARGET.params["lm_head"]["kernel"], DRAFTS), DRAFTS)
DRAFTERS = {
    "n-gram": NGRAM,
    "model": MODEL,
    "model of another vocabulary": other_vocabulary(),
    "mtp, chained": MTP,
    "mtp, three modules": mtp(DRAFTS, lambda params, config: MTPDrafter(params, config, DRAFTS)),
    "eagle-1": eagle(capture=(-1,), version=1),
    "eagle-3": eagle(capture=(0, 1, 3), norm_before_residual=True),
    "eagle-3, narrower, part of the vocabulary": eagle(
        capture=(1, 2, 3), width=8, target_hidden_size=WIDTH, own_embedding=True, draft_vocab_size=6
    ),
    "medusa": MEDUSA,
    "early exit": EarlyExitDrafter(2, DRAFTS),
    "cascade: n-gram, model": Cascade(NGRAM, MODEL),
    "cascade: n-gram, mtp": Cascade(NGRAM, MTP),
    "cascade: n-gram, early exit": Cascade(NGRAM, EarlyExitDrafter(1, DRAFTS)),
}
every_drafter = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)


def generate(drafter, rule=EveryRule(), order=(0, 1, 2, 3), temperature=(0.0, 1.0, 0.7, 1.3), **settings):
    """Continues the prompts in an order; temperature, room and seed go with the prompt."""
    order = np.asarray(order)
    prompt_bt, length_b = specjax.pad_prompts([PROMPTS[row] for row in order])
    sampling = specjax.Sampling(np.float32(temperature)[order], seed=order + 9)
    options = {"drafter": drafter, "verify": rule, "sampling": sampling, "max_new_tokens": np.int32(LIMITS)[order]}
    options["fixed"] = True
    options["stop_tokens"] = np.full((len(order), 1), -1)  # none, by the program that has one
    return specjax.generate(TARGET, prompt_bt, length_b, **options | settings)


def texts(out):
    return [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths.tolist(), strict=True)]


@every_drafter
def test_text_is_that_of_plain_decoding(drafter):
    """Greedy under every rule, and drawn under ``coupled``; rows end at their limits."""
    out = generate(drafter)
    assert texts(out) == texts(generate(None))
    assert out.lengths.tolist() == [len(p) + n for p, n in zip(PROMPTS, LIMITS, strict=True)]
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()


GREEDY = (0.0,) * 4


@functools.cache
def stop():
    """Returns the token that plain greedy decoding emits in the seventh place of row 2."""
    return (texts(generate(None, temperature=GREEDY))[2][len(PROMPTS[2]) + 6],)


@every_drafter
def test_greedy_text_ends_at_the_stop_token_of_plain_decoding(drafter):
    out = generate(drafter, temperature=GREEDY, stop_tokens=stop())
    assert texts(out) == texts(generate(None, temperature=GREEDY, stop_tokens=stop()))
    assert len(texts(out)[2]) <= len(PROMPTS[2]) + 7


@every_drafter
def test_a_row_does_not_depend_on_its_neighbours(drafter):
    """Nor on its place; and neither another request nor other parameters compile the loop again."""
    run = functools.partial(generate, rule=verify.block, stop_tokens=stop())
    together = run(drafter)
    with compilations() as names:
        others = jax.block_until_ready(run(drafter, order=(2, 3, 3, 0), temperature=(1.5, 0.0, 0.7, 0.9)))
        trained = jax.tree.map(lambda x: 2 * x if x.dtype == jnp.float32 else x, drafter)
        jax.block_until_ready(run(trained))
    assert [name for name in names if "generate" in str(name)] == []
    assert texts(others)[0] == texts(together)[2]
    np.testing.assert_array_equal(others.stats.accepted_at[0], together.stats.accepted_at[2])
    np.testing.assert_array_equal(others.stats.drafted_at[0], together.stats.drafted_at[2])
    assert texts(others)[3] != texts(together)[0]
