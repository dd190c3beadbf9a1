"""Decoders with recurrent layers, as target and as draft: the recurrence by chunks, what a round takes back, and texts.

``test_parity_hybrid.py`` compares the families with transformers, and ``test_recurrent.py`` has the drafters.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from every_rule import EveryRule
from jax.scipy.special import gammaincc
from jitted import jit

import specjax
from specjax import FeatureDrafter, Feed, ModelDrafter, NGramDrafter, verify
from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.transformer.config import DecoderConfig, DeltaConfig, LayerConfig, MambaConfig, plain_rope
from specjax.transformer.decoder import decoder_model, init_params
from specjax.transformer.recurrent import CHUNK, Places, RecurrentPass, recur
from specjax.types import whole_feed

K, R, E, H = 2, 3, 5, 4  # key heads, value heads for each, widths of keys and values
RECURRENCES = {"delta rule": DeltaConfig(K, K * R, E, H, taps=3), "mamba": MambaConfig(K * R, H, K, E, taps=3)}


# The recurrence alone, against a loop over tokens in float64.


def make_places(rule, width, seed=0):
    """Places of two rows. Some tokens forget nearly all, others nothing, and some keys repeat."""
    rng = np.random.default_rng(seed)
    query, keys = rng.normal(size=(2, 2, K, width, E))
    keys[:, :, 1::5] = keys[:, :, :1]
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.normal(size=(2, K, width, R, H))
    decay = -np.exp(rng.uniform(-8, 4, (2, K, width, R)))
    rate = rng.uniform(0, 1, (2, K, width, R)) if rule == "delta rule" else None
    state = rng.normal(size=(2, K, E, R, H))
    return state, Places(query, keys, values, decay, rate)


def by_steps(state, places):
    """The paper's recurrence, one token after another: what tokens read, and the states before and after each."""
    out, states = [], [state]
    for i in range(places.keys_bkte.shape[2]):
        state = state * np.exp(places.decay_bktr[:, :, i])[:, :, None, :, None]
        write = places.values_bktrh[:, :, i]
        if places.rate_bktr is not None:
            held = np.einsum("bke,bkerh->bkrh", places.keys_bkte[:, :, i], state)
            write = places.rate_bktr[:, :, i, :, None] * (write - held)
        state = state + np.einsum("bke,bkrh->bkerh", places.keys_bkte[:, :, i], write)
        out.append(np.einsum("bke,bkerh->bkrh", places.query_bkte[:, :, i], state))
        states.append(state)
    return np.stack(out, axis=2), np.stack(states)


@pytest.mark.parametrize("width", [1, 5, CHUNK, 2 * CHUNK + 22])
@pytest.mark.parametrize("rule", RECURRENCES)
def test_chunks_read_and_keep_what_steps_do(rule, width):
    """And the state after any number of places, some rows keeping none and others all."""
    state, places = make_places(rule, width)
    wanted, states = by_steps(state, places)
    state, places = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (state, places))
    out, writes = jit(recur)(state, places)
    np.testing.assert_allclose(out, wanted, atol=1e-4, rtol=1e-4)
    inputs = jnp.arange(2 * (2 + width), dtype=jnp.float32).reshape(2, -1, 1)
    done = RecurrentPass(state, places.keys_bkte, writes, places.decay_bktr, (inputs,))
    keep = jit(RecurrentPass.keep)
    for first in range(0, width + 1, 1 + width // 6):
        kept = keep(done, jnp.int32([first, width - first]))
        for row, count in enumerate((first, width - first)):
            np.testing.assert_allclose(kept.state_bkerh[row], states[count, row], atol=1e-4, rtol=1e-4)
            np.testing.assert_array_equal(kept.windows[0][row], inputs[row, count : count + 2])
        np.testing.assert_array_equal(keep(done, jnp.int32([0, 0])).state_bkerh, state)


def test_a_cpu_waits_for_no_other_thread():
    """A call into LAPACK would wait for XLA's threads, for ever if all of them are in such calls."""
    state, places = jax.tree.map(jnp.float32, make_places("delta rule", 2 * CHUNK))
    assert "custom_call" not in jax.jit(recur).lower(state, places).as_text()


# Models.


@functools.cache
def model(rule, vocab=11, seed=2, positions=768, kinds="rar"):
    """A small decoder: "r" is a recurrent layer, "a" one with attention and an output gate."""
    layers = tuple(
        LayerConfig(None, recurrent=True) if kind == "r" else LayerConfig(plain_rope(4, 100.0)) for kind in kinds
    )
    config = DecoderConfig(
        *(vocab, 16, 24, len(kinds), 4, 2),
        head_dim=8,
        max_position_embeddings=positions,
        layers=layers,
        norm_eps=1e-3,
        output_gate=True,
        query_key_norm=True,
        recurrence=RECURRENCES[rule],
    )
    params = init_params(config, jax.random.key(seed))
    params["embed_tokens"]["weight"] *= 30
    return decoder_model(config, jax.tree.map(lambda x: 12 * x if x.ndim > 1 and x.shape[0] > 3 else x, params))


def near(target):
    """Another model that often agrees."""
    return target.replace(params=jax.tree.map(lambda x: x + 0.03 * jnp.sin(99 * x), target.params))


rules = pytest.mark.parametrize("rule", RECURRENCES)


@rules
def test_the_contract_is_kept(rule):
    specjax.check_model(model(rule), rows=2, length=80)


@rules
def test_rows_are_independent_and_places_that_are_not_real_leave_no_trace(rule):
    """A row's bits are the same beside other rows and other padding, and a row that rests keeps its bits."""
    target = model(rule)

    @jit
    def feed(params, tokens_bt, count_b, kept_b, cache):
        feed = Feed(tokens_bt, jnp.full_like(count_b, 3), count_b)
        output = target.forward(params, feed, cache)
        return output.logits_btv, target.keep(output.cache, feed, kept_b)

    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 11)
    first = whole_feed(tokens[:, :3])
    cache = target.keep(target.forward(target.params, first, target.init_cache(3, 16)).cache, first, first.count_b)
    count, kept = jnp.int32([5, 0, 6]), jnp.int32([2, 0, 6])
    logits, after = feed(target.params, tokens[:, 3:], count, kept, cache)
    others = tokens.at[2].set((tokens[2] + 1) % 11).at[0, 8].set(0).at[1].set(0)
    logits2, after2 = feed(target.params, others[:, 3:], count, kept, cache)
    np.testing.assert_array_equal(logits[0, :5], logits2[0, :5])
    for now, then, before in zip(*(jax.tree.leaves(x.layers[0]) for x in (after, after2, cache)), strict=True):
        np.testing.assert_array_equal(now[:2], then[:2])
        np.testing.assert_array_equal(now[1], before[1])
        assert (now[2] != then[2]).any() and (now[0] != before[0]).any()


def test_what_a_recurrent_model_cannot():
    target = model("delta rule")
    assert target.early_exit is None
    tree = dataclasses.replace(whole_feed(jnp.zeros((1, 2), jnp.int32)), parents_bt=jnp.int32([[-1, -1]]))
    with pytest.raises(ValueError, match="the feed is a tree"):
        target.forward(target.params, tree, target.init_cache(1, 4))
    config = DecoderConfig(7, 8, 8, 1, 2)
    with pytest.raises(ValueError, match="recurrence is None"):
        dataclasses.replace(config, layers=(LayerConfig(None, recurrent=True),))
    with pytest.raises(ValueError, match="5 value heads for 2 keys"):
        dataclasses.replace(config, recurrence=DeltaConfig(2, 5, 4, 4))
    with pytest.raises(ValueError, match="recurrence's taps"):
        dataclasses.replace(config, recurrence=DeltaConfig(2, 4, 4, 4, taps=0))


# Texts.

PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [6, 6, 1, 6, 6, 1, 6, 6]]
NEW = np.int32([14, 9, 14, 11])


def mtp(drafts):
    config = MTPConfig(DecoderConfig(11, 16, 8, 1, 2, 1, head_dim=4, max_position_embeddings=768))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, init_mtp_params(config, jax.random.key(0)))
    return FeatureDrafter(params, MTPHead(config), drafts)


def generate(target, drafter, rule, prompts=PROMPTS, new=NEW, temperature=(0, 0, 0, 1), **options):
    sampling = specjax.Sampling(np.float32(temperature), seed=np.arange(9, 9 + len(prompts)))
    return specjax.generate(
        target, prompts, drafter=drafter, fixed=True, verify=rule, sampling=sampling, max_new_tokens=new, **options
    )


def texts(out):
    return [row.tolist() for row in out.rows()]


@functools.cache
def plain(rule):
    return texts(generate(model(rule), None, EveryRule(), slots=64))


DRAFTERS = {
    "n-gram": lambda target: NGramDrafter(3, 1, 2),
    "hybrid model": lambda target: ModelDrafter(near(target), 3),
    "mtp": lambda target: mtp(3),
}


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [("delta rule", "n-gram"), ("delta rule", "hybrid model"), ("delta rule", "mtp"), ("mamba", "hybrid model")],
)
def test_text_is_that_of_plain_decoding(rule, drafter):
    """Under all three rules: greedy, and drawn under ``coupled``."""
    out = generate(model(rule), DRAFTERS[drafter](model(rule)), EveryRule(), slots=64)
    assert texts(out) == plain(rule)
    assert max(len(set(text[-9:])) for text in plain(rule)) > 2
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()


@rules
def test_long_prompts_more_prompt_and_new_rows(rule):
    """A draft that is the target is always right: of prompts in chunks, of turns, and of rows that are replaced."""
    target = model(rule)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, n).tolist() for n in (300, 5, 600)]
    drafter, new = ModelDrafter(target, 2), 7
    sampling = specjax.Sampling(np.float32([0, 1, 0]), seed=np.arange(3))
    options = {"drafter": drafter, "fixed": True, "sampling": sampling, "max_new_tokens": new, "slots": 700}

    def run(state):
        state = specjax.run(target, state, drafter=drafter, verify=verify.coupled)
        out = state.generation.to_host()
        np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
        return state, texts(out)

    state, first = run(specjax.prefill(target, prompts, **options))
    more = [[1, 2, 3], [], [4]]
    state, second = run(specjax.extend(target, state, more, drafter=drafter, max_new_tokens=new))
    whole = [text + added for text, added in zip(first, more, strict=True)]
    other, at_once = run(specjax.prefill(target, whole, **options))
    assert [second[0], second[2]] == [at_once[0], at_once[2]] and second[1] == first[1]
    # All rows are done, and the other state's take their places: row 0 its row 1, and so on.
    state = specjax.insert(state, [2, 0, 1], other)
    more = [[7, 8], [1], []]
    _, moved = run(specjax.extend(target, state, [more[i] for i in (1, 2, 0)], drafter=drafter, max_new_tokens=new))
    _, stayed = run(specjax.extend(target, other, more, drafter=drafter, max_new_tokens=new))
    assert [moved[2], moved[0], moved[1]] == stayed


# The law.

LAW_VOCAB, TOKENS, ROWS = 3, 3, 1000
LAW_PROMPTS = ((0,), (1, 2, 1))


@pytest.mark.parametrize("rule", [verify.token, verify.block], ids=["token", "block"])
def test_joint_law(rule):
    """Of three tokens, by Pearson's chi-square against one pass over each text."""
    target = model("delta rule", LAW_VOCAB, 5, 64)
    drafter = ModelDrafter(model("mamba", LAW_VOCAB, 6, 64), 2)
    prompts = [list(prompt) for prompt in LAW_PROMPTS] * ROWS
    sampling = specjax.Sampling(temperature=3.0, seed=np.arange(len(prompts), dtype=np.uint32))
    out = specjax.generate(
        target, prompts, drafter=drafter, fixed=True, verify=rule, sampling=sampling, max_new_tokens=TOKENS, slots=16
    ).to_host()
    assert 0 < out.stats.accepted.sum() < out.stats.drafted.sum()
    new = np.indices((LAW_VOCAB,) * TOKENS).reshape(TOKENS, -1).T
    for i, prompt in enumerate(LAW_PROMPTS):
        texts_bt = np.concatenate([np.tile(prompt, (len(new), 1)), new], axis=1).astype(np.int32)
        logits = jit(target.forward)(
            target.params, whole_feed(jnp.asarray(texts_bt)), target.init_cache(*texts_bt.shape)
        )
        logits = np.asarray(logits.logits_btv, np.float64)[:, len(prompt) - 1 : -1]
        chances = [
            [reference.warp(logits_v, temperature=3.0)[token] for logits_v, token in zip(*row, strict=True)]
            for row in zip(logits, new, strict=True)
        ]
        expected = ROWS * np.prod(chances, axis=1)
        new_bt = out.tokens[i :: len(LAW_PROMPTS), len(prompt) : len(prompt) + TOKENS]
        observed = np.bincount(np.ravel_multi_index(new_bt.T, (LAW_VOCAB,) * TOKENS), minlength=len(expected))
        rare = expected < 5
        assert rare.sum() < len(rare) // 2
        expected, observed = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (expected, observed))
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert float(gammaincc(jnp.float32((len(expected) - 1) / 2), jnp.float32(statistic / 2))) > 1e-3
