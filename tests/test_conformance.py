"""What every drafter must keep, in one table: the text of plain decoding, each row by itself, one program.

The law of drawn text is in ``test_laws.py``. Here the targets are decoders, and rows are ragged in prompt, room and
sampling. Most drafters have a target with attention alone. A target with recurrent layers must take back what is
rejected: one of gated DeltaNet with all drafters in one program, and one of Mamba-2, whose rows share their drafter.
"""

import dataclasses
import functools

import hybrid
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_row import ByRow
from every_rule import EveryRule
from test_compiled import compilations

import specjax
from specjax import (
    BlockDrafter,
    Cascade,
    EarlyExitDrafter,
    FeatureDrafter,
    MedusaDrafter,
    ModelDrafter,
    NGramDrafter,
    SuffixDrafter,
    verify,
)
from specjax.drafters.assistant import AssistantDrafter, AssistantHead
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.eagle import EagleHead
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, MTPDrafter, MTPHead, init_mtp_params
from specjax.drafters.pard import PardDrafter
from specjax.drafters.peagle import PEagleHead
from specjax.drafters.shared_vocabulary import shared_vocabulary_drafter
from specjax.text.vocabulary import VocabularyMap
from specjax.transformer.config import EXTERNAL, DecoderConfig, LayerConfig, plain_rope
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


def block(head):
    return BlockDrafter(lively(head.init_params(jax.random.key(0)), 4), head, DRAFTS)


def windowed(layers):
    """A decoder whose first layer has a window."""
    config = decoder_config(layers)
    first = dataclasses.replace(config.each_layer[0], window=5)
    return dataclasses.replace(config, layers=(first, *config.each_layer[1:]))


def other_vocabulary(draft=None):
    """A model of seven tokens: four are the target's, whose others are spelled by one or two."""
    draft_of_v = np.full(VOCAB, -1, np.int32)
    draft_of_v[[1, 2, 4, 7]] = 2, 0, 5, 4
    first_v = np.where(draft_of_v >= 0, draft_of_v, np.arange(VOCAB) % 7)
    pieces_vp = np.stack([first_v, (first_v + 3) % 7], axis=1).astype(np.int32)
    num_pieces_v = np.where(draft_of_v >= 0, 1, 2).astype(np.int32)
    draft = model(1, 7, 4) if draft is None else draft
    return shared_vocabulary_drafter(draft, VocabularyMap(draft_of_v, pieces_vp, num_pieces_v), DRAFTS)


def assisted():
    """A target with a window in its first layer, and an assistant that reads the keys and values of both layers."""
    layers = (LayerConfig(plain_rope(8), window=5), LayerConfig(plain_rope(8)))
    config = dataclasses.replace(decoder_config(2), layers=layers)
    shared = tuple(dataclasses.replace(layer, shares=EXTERNAL) for layer in layers)
    head = AssistantHead(dataclasses.replace(config, hidden_size=8, layers=shared), WIDTH)
    target = decoder_model(config, lively(init_params(config, jax.random.key(0))))
    return target, AssistantDrafter(lively(head.init_params(jax.random.key(0)), 6), head, DRAFTS)


def near(target, noise=0.1):
    """Another model that often agrees."""
    return target.replace(params=jax.tree.map(lambda x: x + noise * jnp.sin(99 * x), target.params))


TARGET = model(LAYERS)
NGRAM, MODEL = NGramDrafter(DRAFTS, 1, 2), ModelDrafter(near(TARGET), DRAFTS)
SUFFIX = specjax.remember(SuffixDrafter.empty(VOCAB, 64, DRAFTS, min_n=1), [[2, 4, 1, 0, 5, 3, 2], [1, 5, 9, 8, 1, 5]])
MTP = mtp(1, lambda params, config: FeatureDrafter(params, MTPHead(config), DRAFTS))
MTP_MODULES = mtp(DRAFTS, lambda params, config: MTPDrafter(params, config, DRAFTS))
MEDUSA = MedusaDrafter(init_medusa_params(TARGET.params["lm_head"]["kernel"], DRAFTS), DRAFTS)
EAGLE_1 = eagle(capture=(-1,), version=1)
EAGLE_3 = eagle(capture=(0, 1, 3), norm_before_residual=True)
DFLASH = block(DFlashHead(windowed(2), (0, 2), DRAFTS + 1, 9, causal=(True, False)))
DSPARK = block(DFlashHead(decoder_config(1), (1,), DRAFTS, 9, True, markov="rnn", markov_rank=4))
P_EAGLE = block(PEagleHead(EagleHead(decoder_config(2), (0, 1, 2)), 9))
DELTA, MAMBA = hybrid.model("delta rule"), hybrid.model("mamba")
OF_DELTA = ModelDrafter(near(DELTA, 0.03), DRAFTS)
CASES = {
    "n-gram": (TARGET, NGRAM),
    "suffix": (TARGET, SUFFIX),
    "cascade: suffix, model": (TARGET, Cascade(SUFFIX, MODEL)),
    "model": (TARGET, MODEL),
    "model of another vocabulary": (TARGET, other_vocabulary()),
    "mtp, chained": (TARGET, MTP),
    "mtp, three modules": (TARGET, MTP_MODULES),
    "eagle-1": (TARGET, EAGLE_1),
    "eagle-3": (TARGET, EAGLE_3),
    "eagle-3, narrower, part of the vocabulary": (
        TARGET,
        eagle(capture=(1, 2, 3), width=8, target_hidden_size=WIDTH, own_embedding=True, draft_vocab_size=6),
    ),
    "medusa": (TARGET, MEDUSA),
    "dflash": (TARGET, DFLASH),
    "dflash2": (
        TARGET,
        block(
            DFlashHead(
                *(windowed(2), (0, 2), DRAFTS + 1, 9),
                conv_taps=2,
                conv_group=4,
                selector_rank=4,
                selector_top_k=5,
            )
        ),
    ),
    "dspark, a smaller vocabulary": (
        TARGET,
        block(
            DFlashHead(
                *(decoder_config(1), (0, 2), DRAFTS, 9, True),
                own_head=True,
                draft_vocab_size=6,
                markov="gated",
                markov_rank=4,
            )
        ),
    ),
    "dspark, likeliest drafts": (TARGET, dataclasses.replace(DSPARK, argmax=True)),
    "p-eagle": (TARGET, P_EAGLE),
    "pard": (TARGET, PardDrafter(near(TARGET), DRAFTS, mask_token=9)),
    "cascade: n-gram, dspark": (TARGET, Cascade(NGRAM, DSPARK)),
    "cascade: n-gram, pard": (TARGET, Cascade(NGRAM, PardDrafter(near(TARGET), DRAFTS, mask_token=9))),
    "early exit": (TARGET, EarlyExitDrafter(2, DRAFTS)),
    "cascade: n-gram, model": (TARGET, Cascade(NGRAM, MODEL)),
    "cascade: n-gram, mtp": (TARGET, Cascade(NGRAM, MTP)),
    "cascade: n-gram, early exit": (TARGET, Cascade(NGRAM, EarlyExitDrafter(1, DRAFTS))),
    "assistant": assisted(),
    # Heads see a hybrid target through its states and tokens alone, so all are beside each other in one program.
    "delta rule": (
        DELTA,
        ByRow(
            (
                NGRAM,
                ModelDrafter(model(1), DRAFTS),
                OF_DELTA,
                other_vocabulary(hybrid.model("mamba", 7)),
                MTP,
                MTP_MODULES,
                EAGLE_1,
                EAGLE_3,
                MEDUSA,
                DSPARK,
                PardDrafter(hybrid.model("mamba"), DRAFTS, mask_token=9),
            )
        ),
    ),
    "mamba, cascade: n-gram, mamba": (MAMBA, Cascade(NGRAM, ModelDrafter(near(MAMBA, 0.03), DRAFTS))),
}
every_case = pytest.mark.parametrize("case", CASES)


def generate(case, plain=False, rule=EveryRule(), order=(0, 1, 2, 3), temperature=(0.0, 1.0, 0.7, 1.3), **settings):
    """Continues the prompts in an order; temperature, room and seed go with the prompt.

    The rows of a case's other drafters (``ByRow``) follow, in the same order; their prompts begin with another token.
    """
    target, drafter = CASES[case]
    turns = range(len(drafter.parts)) if isinstance(drafter, ByRow) else (None,)
    rows = [(turn, row) for turn in turns for row in order]
    prompt_bt, length_b = specjax.pad_prompts(
        [PROMPTS[row] if turn is None else [turn, *PROMPTS[row]] for turn, row in rows]
    )
    order = np.asarray([row for _, row in rows])
    sampling = specjax.Sampling(np.float32(temperature)[order], seed=order + 9)
    options = {"drafter": None if plain else drafter, "verify": rule, "sampling": sampling}
    options |= {"max_new_tokens": np.int32(LIMITS)[order], "fixed": True}
    options["stop_tokens"] = np.full((len(order), 1), -1)  # none, by the program that has one
    return specjax.generate(target, prompt_bt, length_b, **options | settings)


def texts(out):
    return [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths.tolist(), strict=True)]


@every_case
def test_text_is_that_of_plain_decoding(case):
    """Greedy under every rule, and drawn under ``coupled``; rows end at their limits."""
    out, plain = generate(case), generate(case, plain=True)
    assert texts(out) == texts(plain)
    assert out.stats.emitted.reshape(-1, len(PROMPTS)).tolist() == [LIMITS] * (len(out.lengths) // len(PROMPTS))
    accepted, drafted = (x.reshape(-1, len(PROMPTS)).sum(1) for x in (out.stats.accepted, out.stats.drafted))
    assert ((0 < accepted) & (accepted < drafted)).all(), (accepted, drafted)


GREEDY = (0.0,) * 4


@functools.cache
def stop(case):
    """Returns the token that plain greedy decoding emits in the seventh place of row 2."""
    return (generate(case, plain=True, temperature=GREEDY).to_host().new_tokens()[2][6],)


@every_case
def test_greedy_text_ends_at_the_stop_token_of_plain_decoding(case):
    out = generate(case, temperature=GREEDY, stop_tokens=stop(case))
    assert texts(out) == texts(generate(case, plain=True, temperature=GREEDY, stop_tokens=stop(case)))
    assert len(out.to_host().new_tokens()[2]) <= 7


@every_case
def test_a_row_does_not_depend_on_its_neighbours(case):
    """Nor on its place; and neither another request nor other parameters compile the loop again."""
    _, drafter = CASES[case]
    rule = EveryRule() if isinstance(drafter, ByRow) else verify.block  # the one program of many drafters
    run = functools.partial(generate, case, rule=rule, stop_tokens=stop(case))
    together = run()
    with compilations() as names:
        others = jax.block_until_ready(run(order=(2, 3, 3, 0), temperature=(1.5, 0.0, 0.7, 0.9)))
        trained = jax.tree.map(lambda x: 2 * x if x.dtype == jnp.float32 else x, drafter)
        jax.block_until_ready(run(drafter=trained))
    assert [name for name in names if "generate" in str(name)] == []
    now, then, last = (slice(row, None, len(PROMPTS)) for row in (0, 2, 3))
    assert texts(others)[now] == texts(together)[then]
    np.testing.assert_array_equal(others.stats.accepted_at[now], together.stats.accepted_at[then])
    np.testing.assert_array_equal(others.stats.drafted_at[now], together.stats.drafted_at[then])
    assert texts(others)[last] != texts(together)[now]
