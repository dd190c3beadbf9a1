"""Decoders with recurrent layers, as target and as draft: the recurrence by chunks, what a round takes back, and texts.

``test_parity_hybrid.py`` compares the families with transformers, ``test_conformance.py`` has texts with all drafters,
and ``test_laws.py`` the law of drawn ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forced_width import force
from hybrid import RECURRENCES, E, H, K, R, model
from jitted import jit

import specjax
from specjax import Feed, ModelDrafter, verify
from specjax.transformer.config import DecoderConfig, DeltaConfig, LayerConfig
from specjax.transformer.recurrent import CHUNK, Places, RecurrentPass, recur
from specjax.types import whole_feed

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


def texts(out):
    return [row.tolist() for row in out.rows()]


@rules
def test_long_prompts_more_prompt_and_new_rows(rule):
    """A draft that is the target is always right: of prompts in chunks, of turns, and of rows that are replaced.

    And whatever the widths of the rounds before; penalties count, and each token's logits are those of its text.
    """
    target = model(rule)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, n).tolist() for n in (300, 5, 600)]
    drafter, new = ModelDrafter(target, 2), 9
    sampling = specjax.Sampling(np.float32([0, 1, 0]), seed=np.arange(3), repetition_penalty=1.2)
    options = {"drafter": drafter, "sampling": sampling, "max_new_tokens": new, "slots": 700, "costs": (1, 1.2, 1.4)}
    options["logprobs"] = True

    def run(state):
        for width, rounds in ((0, 2), (1, 1), (2, new)):
            state = specjax.run(target, force(state, width), drafter=drafter, verify=verify.coupled, rounds=rounds)
        out = state.generation.to_host()
        np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
        assert (out.stats.drafted_at.min(0) > 0).all()
        return state, texts(out)

    state, first = run(specjax.prefill(target, prompts, **options))
    more = [[1, 2, 3], [], [4]]
    state, second = run(specjax.extend(target, state, more, drafter=drafter, max_new_tokens=new))
    whole = [text + added for text, added in zip(first, more, strict=True)]
    other, at_once = run(specjax.prefill(target, whole, **options))
    assert [second[0], second[2]] == [at_once[0], at_once[2]] and second[1] == first[1]
    for row in (0, 2):
        scores = (out.generation.to_host().logprobs[row, len(whole[row]) : len(at_once[row])] for out in (state, other))
        np.testing.assert_allclose(*scores, atol=1e-5)
    # All rows are done, and the other state's take their places: row 0 its row 1, and so on.
    state = specjax.insert(state, [2, 0, 1], other)
    more = [[7, 8], [1], []]
    _, moved = run(specjax.extend(target, state, [more[i] for i in (1, 2, 0)], drafter=drafter, max_new_tokens=new))
    _, stayed = run(specjax.extend(target, other, more, drafter=drafter, max_new_tokens=new))
    assert [moved[2], moved[0], moved[1]] == stayed
