"""Prompts read in chunks, rows that go on with more text, rows that are replaced, rows that are stopped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compiled import compilations
from test_conformance import CASES, MODEL, TARGET, texts

import specjax
from specjax import ModelDrafter, NGramDrafter, Sampling
from specjax.engine import programs, prompt, request
from specjax.testing import table_model
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params, decoder_model

GREEDY = Sampling(temperature=0)
# One of each kind of state.
KINDS = ("model", "model of another vocabulary", "mtp, three modules", "eagle-3", "medusa", "cascade: n-gram, model")
DRAFTERS = {name: CASES[name][1] for name in KINDS}
every_kind = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
MORE = [[9, 1, 2], [4], [], [0, 1, 2, 3, 4, 5, 6]]


def read_on(state, drafter=None):
    """Until all rows are done, by the program of a few rounds."""
    state = specjax.run(TARGET, state, drafter=drafter, rounds=1000)
    assert state.done_b.all()
    return state


def prefill(prompts, drafter=None, **settings):
    """All prompts are padded to one width and share a program."""
    options = {"sampling": GREEDY, "max_new_tokens": 6, "slots": 128} | settings
    prompt_bt, length_b = specjax.pad_prompts(prompts)
    prompt_bt = np.pad(prompt_bt, ((0, 0), (0, 32 - prompt_bt.shape[1])))
    return specjax.prefill(TARGET, prompt_bt, length_b, drafter=drafter, fixed=True, **options)


# More text.


@every_kind
def test_a_row_that_is_extended_goes_on_as_one_that_began_with_all_its_text(drafter):
    """The history is in the caches, of target and drafter alike; a row without new tokens stays as it is."""
    first = read_on(prefill(PROMPTS, drafter), drafter)
    history = texts(first.generation)
    second = read_on(specjax.extend(TARGET, first, MORE, drafter=drafter, max_new_tokens=9), drafter)
    whole = [[*text, *more] for text, more in zip(history, MORE, strict=True)]
    fresh = read_on(prefill(whole, drafter, max_new_tokens=9), drafter)
    for row in (0, 1, 3):
        assert texts(second.generation)[row] == texts(fresh.generation)[row]
    assert texts(second.generation)[2] == history[2]
    assert second.generation.prompt_lengths.tolist()[3] == len(whole[3])


def test_drafts_are_as_good_after_a_turn_as_in_a_fresh_row():
    """A draft model that is the target would lose its certainty if its cache missed a token."""
    drafter = ModelDrafter(TARGET, 3)
    state = read_on(prefill(PROMPTS, drafter), drafter)
    state = read_on(specjax.extend(TARGET, state, MORE, drafter=drafter, max_new_tokens=9), drafter)
    np.testing.assert_array_equal(state.stats.accepted, state.stats.drafted)


def test_a_row_can_be_extended_while_it_runs():
    state = specjax.run(TARGET, prefill(PROMPTS, max_new_tokens=30), rounds=4)
    so_far = texts(state.generation)
    state = read_on(specjax.extend(TARGET, state, [[1], [2], [3], [4]], max_new_tokens=5))
    fresh = read_on(prefill([[*text, new] for text, new in zip(so_far, (1, 2, 3, 4), strict=True)], max_new_tokens=5))
    assert texts(state.generation) == texts(fresh.generation)


def test_other_turns_compile_nothing():
    drafter = NGramDrafter(3, 1, 2)

    def turn(more):
        state = read_on(prefill(PROMPTS, drafter), drafter)
        return read_on(specjax.extend(TARGET, state, more, drafter=drafter, max_new_tokens=9), drafter)

    jax.block_until_ready(turn(MORE))
    with compilations() as names:
        jax.block_until_ready(turn([[1], [], [2, 3, 4, 5], [6]]))
    assert [name for name in names if "jit" in str(name)] == []


# Replaced rows.


@every_kind
def test_a_row_that_is_replaced_leaves_nothing(drafter):
    """The new rows' text is that of a batch of their own, and the others' does not change."""
    state = specjax.run(TARGET, prefill(PROMPTS, drafter, max_new_tokens=[3, 30, 3, 30]), drafter=drafter, rounds=3)
    alone = texts(read_on(prefill(PROMPTS, drafter, max_new_tokens=[3, 30, 3, 30]), drafter).generation)
    assert state.done_b.tolist() == [True, False, True, False]
    new = [[5, 5, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [1], [1]]
    other = jax.tree.map(lambda x: x[:2], prefill(new, drafter, max_new_tokens=20))  # rows are the first axis of all
    wanted = texts(read_on(prefill(new, drafter, max_new_tokens=20), drafter).generation)
    found = texts(read_on(specjax.insert(state, [2, 0], other), drafter).generation)
    assert [found[2], found[0]] == wanted[:2]
    assert [found[1], found[3]] == [alone[1], alone[3]]


# Stopped rows.


@pytest.mark.parametrize("rows", [[1], np.array([False, True, False, False])], ids=["numbers", "mask"])
def test_a_row_that_is_stopped_emits_no_more(rows):
    whole = texts(read_on(prefill(PROMPTS)).generation)
    state = specjax.run(TARGET, prefill(PROMPTS), rounds=2)
    before = texts(state.generation)
    after = texts(read_on(specjax.stop(state, rows)).generation)
    assert after == [whole[0], before[1], whole[2], whole[3]]


def test_stop_tokens_of_each_row():
    free = texts(read_on(prefill(PROMPTS)).generation)
    stops = np.asarray([[free[row][len(PROMPTS[row]) + 2], -1] for row in range(4)])
    stops[3] = -1
    out = read_on(prefill(PROMPTS, stop_tokens=stops)).generation
    for row in range(3):
        at = free[row].index(stops[row][0], len(PROMPTS[row]))
        assert texts(out)[row] == free[row][: at + 1]
    assert texts(out)[3] == free[3]


# Chunks.


@pytest.fixture
def chunks_of_four(monkeypatch):
    """Prompts of four tokens or more are read in a loop."""
    for module in (request, prompt):
        monkeypatch.setattr(module, "CHUNK", 4)
    programs.generate_program.clear_cache()
    yield
    programs.generate_program.clear_cache()


LONG = [list(np.random.default_rng(row).integers(0, 11, size)) for row, size in enumerate((1, 5, 31, 18))]


@functools.cache
def read_at_once(name):
    return specjax.generate(
        TARGET, LONG, drafter=DRAFTERS[name], fixed=True, sampling=GREEDY, max_new_tokens=9
    ).to_host()


@pytest.mark.parametrize("name", ["model", "eagle-3"])  # the tests of each drafter have the others
def test_chunks_change_nothing(name, request):
    """Neither the text nor what is drafted: rows of one token, of one chunk, of many, all in a batch."""
    whole = read_at_once(name)
    request.getfixturevalue("chunks_of_four")
    out = specjax.generate(
        TARGET, LONG, drafter=DRAFTERS[name], fixed=True, sampling=GREEDY, max_new_tokens=9
    ).to_host()
    assert texts(out) == texts(whole)
    np.testing.assert_array_equal(out.stats.accepted_at, whole.stats.accepted_at)


def test_one_program_reads_prompts_of_all_lengths():
    model = table_model(np.zeros((11, 11)))

    def read(length):
        tokens = [np.arange(length) % 11]
        return jax.block_until_ready(specjax.generate(model, tokens, max_new_tokens=2, slots=4096).tokens)

    read(300)
    with compilations() as names:
        for length in (256, 257, 1000, 4000):
            read(length)
    assert [name for name in names if "jit" in str(name)] == []


def test_memory_does_not_grow_with_the_square_of_a_prompt():
    """A prompt of 8192 tokens through 8 layers: scores of all pairs would be 256 MiB for each head and layer."""
    config = DecoderConfig(32, 16, 16, 8, 2, 1, head_dim=8, max_position_embeddings=8192)
    params = abstract_params(config)
    target = decoder_model(config, params)
    tokens = np.ones((1, 8000), np.int32)
    prompt_bs, asked, static = request.lay_out(target, None, tokens, None, GREEDY, 100, (), 8192)
    assert static["chunk"] == 256
    lowered = programs.prefill_program.lower(target, prompt_bs, asked, None, classes=0, **static)
    used = lowered.compile().memory_analysis()
    square = 8192 * 8192 * 4 * config.num_attention_heads
    assert used.temp_size_in_bytes < square / 8


def test_a_fault_in_the_order_of_chunks_is_seen(monkeypatch):
    """The control: chunks of which each starts where the one before it started."""
    honest = texts(read_at_once("model"))
    read = prompt._read

    def late(target, state, drafter, start_b, *settings, **options):
        return read(target, state, drafter, jnp.minimum(start_b + 1, state.length_b - 1), *settings, **options)

    monkeypatch.setattr(prompt, "_read", late)
    programs.generate_program.clear_cache()
    out = specjax.generate(TARGET, LONG, drafter=MODEL, fixed=True, sampling=GREEDY, max_new_tokens=9)
    programs.generate_program.clear_cache()
    assert texts(out) != honest
