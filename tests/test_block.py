"""Heads that draft blocks: published layouts against a NumPy twin, drafts of rounds, heads that are always right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_block
from block_heads import CASES, VOCAB, WIDTH, published
from draft_heads import open_block
from flax import struct
from heads_observing import (
    assert_chunks_are_as_one_pass,
    assert_rounds_alone_are_as_one_pass,
    assert_rows_that_change_are_as_read_anew,
    context_of,
)
from jitted import jit
from perfect_blocks import acceptance, perfect_target
from test_drafters import step
from test_eagle import PROMPTS, prefilled, random_target, tables_of, true_states, write_folder

import specjax
from specjax.drafters.dflash import DFlashHead
from specjax.transformer.config import DecoderConfig, LayerConfig, plain_rope
from specjax.transformer.decoder import empty_cache

TARGET = random_target()


def opened(case, folder, drafts=None, **options):
    """Writes a published head into a folder and opens it."""
    write_folder(folder, case.config, published(case))
    return open_block(f"{folder}{case.options}", TARGET, drafts or case.drafts, "float32", **options)


# The published layouts, on random weights.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_round_drafts_what_the_twin_does(case, tmp_path):
    """The distribution of every draft of four rounds is the twin's, which starts each round anew from the row's tokens
    and the target's states over them: nothing that a block computed may count."""
    tensors, drafter = published(case), opened(case, tmp_path / "head")
    assert drafter.capture == case.states
    table, target_head = tables_of(TARGET, tensors)
    state, accepted = prefilled(TARGET, drafter, seed=4), set()
    for _ in range(4):
        features = [np.asarray(x, np.float64) for x in true_states(TARGET, state.tokens_bs)]
        after, proposal = step(TARGET, state, drafter)
        for row, length in enumerate(np.asarray(state.length_b)):
            assert proposal.length_b[row] == case.drafts
            tokens, drafted = np.asarray(state.tokens_bs)[row, :length], np.asarray(proposal.tokens_bg)[row]
            read = [features[i][row, : length - 1] for i in case.states]
            states = reference_block.block(case.twin, tensors, table, read, tokens[-1])
            logits = reference_block.drafts(case.twin, tensors, states, target_head, tokens[-1], drafted)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            wanted = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(proposal.probs_bgv[row], wanted, atol=1e-4, rtol=0)
        accepted |= set(np.asarray(after.stats.accepted - state.stats.accepted).tolist())
        state = after
    assert {0, 1} <= accepted, "some drafts should be accepted and some not"


@pytest.mark.parametrize("name", ["DSpark, DeepSpec", "DSpark, SpecForge"])
def test_the_confidence_head_equals_the_twin(name, tmp_path):
    case = CASES[name]
    drafter, tensors = opened(case, tmp_path / "head"), published(case)
    rng = np.random.default_rng(0)
    state_bd, token_b = rng.normal(size=(5, WIDTH)).astype(np.float32), rng.integers(VOCAB, size=5)
    found = drafter.head.confidence_of(drafter.params, jnp.asarray(state_bd), jnp.asarray(token_b, jnp.int32))
    wanted = [reference_block.confidence(case.twin, tensors, *at) for at in zip(state_bd, token_b, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(wanted) > 0.1
    with pytest.raises(ValueError, match="the draft head has no confidence head"):
        opened(CASES["DFlash, z-lab"], tmp_path / "plain").head.confidence_of({}, state_bd, token_b)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DFlash, z-lab", {"causal": (True, False)}),
        ("DFlash, z-lab", {"windows": (3, None)}),
        ("DFlash, z-lab", {"mask_token_id": 38}),
        ("DFlash, z-lab", {"block_size": 5}),
        ("DFlash, speculators, windows that stay", {"window_stays": False}),
        ("DSpark, DeepSpec", {"markov_head_type": None}),
        ("DFlash2, z-lab", {"conv_group_size": None}),
        ("DFlash2, z-lab", {"selector_top_k": None}),
    ],
)
def test_the_twin_minds_what_it_is_told(name, change):
    """Or its agreement would say nothing."""
    case, tensors, rng = CASES[name], published(CASES[name]), np.random.default_rng(3)
    features, table = [rng.normal(size=(6, WIDTH)) for _ in case.states], rng.normal(size=(VOCAB, WIDTH))

    def logits(twin):
        states = reference_block.block(twin, tensors, table, features, 4)
        return reference_block.drafts(twin, tensors, states, table, 4, [1, 2])

    one, other = logits(case.twin), logits(case.twin | change)
    seen = np.isfinite(one) & np.isfinite(other)
    assert np.abs(one[seen] - other[seen]).max() > 0.1


# Heads that must always be right.

DECODER = DecoderConfig(VOCAB, WIDTH, 20, 2, 4, 2, head_dim=6, query_key_norm="heads")
WINDOWED = dataclasses.replace(DECODER, layers=(LayerConfig(plain_rope(6), 4), LayerConfig(plain_rope(6))))
HEADS = {
    "DFlash": DFlashHead(DECODER, (2, 4, 5), 4, 39),
    "DFlash, windows": DFlashHead(WINDOWED, (1, 6), 4, 39, causal=(True, False), own_embedding=True, own_head=True),
    "DFlash2": DFlashHead(*(WINDOWED, (1, 6), 4, 39), conv_taps=2, conv_group=4, selector_rank=4, selector_top_k=8),
    "DSpark, vanilla": DFlashHead(DECODER, (0, 3), 3, 7, True, markov="vanilla", markov_rank=4, confidence=True),
    "DSpark, gated": DFlashHead(WINDOWED, (1, 2), 3, 7, True, markov="gated", markov_rank=4),
    "DSpark, rnn, a smaller vocabulary": DFlashHead(
        *(DECODER, (2, 4), 4, 39, True), markov="rnn", markov_rank=4, own_head=True, draft_vocab_size=7
    ),
}


def drawn(head, seed=1):
    """Parameters under which all that a head reads matters."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if x.dtype == jnp.int32:
            return x
        middle, scale = (0.0, 1.6 / x.shape[0] ** 0.5) if x.ndim > 1 else (1.0, 0.3)
        return jnp.asarray(middle + scale * rng.normal(size=x.shape), jnp.float32)

    return jax.tree.map(draw, head.init_params(jax.random.key(0)))


def perfect_pair(name):
    head = HEADS[name]
    params = drawn(head)
    empty = lambda rows, slots: empty_cache(head.decoder, rows, slots, jnp.float32)
    return perfect_target(head, params, empty, head.most_drafts), params


@pytest.mark.parametrize("name", HEADS)
def test_a_perfect_head_is_always_accepted(name):
    target, params = perfect_pair(name)
    drafter = specjax.BlockDrafter(params, HEADS[name], HEADS[name].most_drafts)
    for temperature in (0.0, 1.0):
        accepted, drafted = acceptance(target, drafter, temperature)
        assert accepted.tolist() == drafted.tolist() and (drafted >= 10).all()


@struct.dataclass
class StatesLate(specjax.BlockDrafter):
    """Of a round, slot i holds the state at position i - 1."""

    def observe(self, state, context, event):
        if event.drafted:
            event = dataclasses.replace(event, features=tuple(jnp.roll(x, 1, axis=1) for x in event.features))
        return super().observe(state, context, event)


@struct.dataclass
class NoPrefill(specjax.BlockDrafter):
    """Slots of the prompt stay empty."""

    def observe(self, state, context, event):
        return super().observe(state, context, event) if event.drafted else state


@struct.dataclass
class AnchorSeen(specjax.BlockDrafter):
    """The block sees one slot more than the states that are known."""

    def propose(self, state, context, draw):
        late = dataclasses.replace(context, length_b=context.length_b + 1)
        return super().propose(state, late, draw)


@pytest.mark.parametrize("fault", [StatesLate, NoPrefill, AnchorSeen])
def test_a_fault_in_the_wiring_is_seen(fault):
    target, params = perfect_pair("DFlash")
    accepted, drafted = acceptance(target, fault(params, HEADS["DFlash"], 3), 1.0)
    assert (accepted / drafted).min() < 0.95


def test_states_of_the_wrong_layers_are_seen():
    target, params = perfect_pair("DFlash")
    head = dataclasses.replace(HEADS["DFlash"], capture=(1, 3, 4))  # one layer off
    accepted, drafted = acceptance(target, specjax.BlockDrafter(params, head, 3), 1.0)
    assert (accepted / drafted).min() < 0.95


# What a head reads of a text, and how many drafts a round takes.


@pytest.fixture(params=["DFlash, z-lab, windows", "DSpark, speculators"], scope="module")
def small(request, tmp_path_factory):
    """A target and a head that reads it."""
    return TARGET, opened(CASES[request.param], tmp_path_factory.mktemp("head"))


def test_a_prompt_in_chunks_is_as_in_one_pass(small):
    assert_chunks_are_as_one_pass(*small)


def test_rounds_without_drafts_are_read_as_a_prompt_is(small):
    assert_rounds_alone_are_as_one_pass(*small)


def test_rows_that_are_extended_or_put_in_are_as_read_anew(small):
    assert_rows_that_change_are_as_read_anew(*small)


def test_narrow_rounds_take_the_first_drafts(small):
    target, drafter = small
    state = prefilled(target, drafter, seed=4)
    context = context_of(target, state)

    @jit(static_argnums=0)
    def proposed(width, target, state):
        narrow = dataclasses.replace(context, width=width)
        return drafter.propose(state.draft, narrow, likeliest)[0]

    def likeliest(logits_bv, drafts_bg, index):
        return jnp.argmax(logits_bv, -1).astype(jnp.int32), jax.nn.softmax(logits_bv)

    whole, narrow = proposed(None, target, state), proposed(2, target, state)
    np.testing.assert_array_equal(narrow.tokens_bg, whole.tokens_bg[:, :2])
    np.testing.assert_allclose(narrow.probs_bgv, whole.probs_bgv[:, :2], atol=1e-6)
    assert (narrow.length_b == 2).all()
    out = specjax.generate(target, PROMPTS, drafter=drafter, max_new_tokens=30)  # of adaptive width
    assert (out.stats.emitted == 30).all()


def test_a_loop_on_the_device_drafts_the_same(small):
    target, drafter = small
    state = prefilled(target, drafter, seed=4)
    after, proposal = step(target, state, drafter)
    looped, same = step(target, state, dataclasses.replace(drafter, unrolled=False))
    np.testing.assert_array_equal(proposal.tokens_bg, same.tokens_bg)
    np.testing.assert_allclose(proposal.probs_bgv, same.probs_bgv, atol=1e-6)
    np.testing.assert_array_equal(after.tokens_bs, looped.tokens_bs)


def test_likeliest_drafts_are_certain(small):
    target, drafter = small
    state = prefilled(target, drafter, seed=4, temperature=0.7)
    _, sampled = step(target, state, drafter)
    _, proposal = step(target, state, dataclasses.replace(drafter, argmax=True))
    assert proposal.probs_bgv is None
    first = np.asarray(sampled.probs_bgv)[:, 0]
    np.testing.assert_array_equal(proposal.tokens_bg[:, 0], first.argmax(-1))
    assert (np.asarray(sampled.tokens_bg) != np.asarray(proposal.tokens_bg)).any()
