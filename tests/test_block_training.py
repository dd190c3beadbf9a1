"""Training of draft heads of blocks: blocks trained at once are the blocks that are drafted; losses; documents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_heads import LAYER, VOCAB, in_speculators
from draft_heads import open_block
from jitted import jit
from tokenizers import Tokenizer, models

from specjax.checkpoint.block import block_head
from specjax.drafters.block import BlockDrafter
from specjax.hf.config import decoder_config
from specjax.training.blocks import Blocks, block_logits, block_objective, choose_blocks
from specjax.training.recipe import Recipe, Stage
from specjax.training.trainees import make_trainee
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import Context, Event, whole_feed

LENGTH, START = 12, 3
TARGET = decoder_config(LAYER | {"model_type": "llama", "num_hidden_layers": 6, "max_position_embeddings": 64})
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3, "use_sliding_window": True}
HEADS = {
    "DFlash, a smaller vocabulary": in_speculators(draft_vocab_size=11),
    "DSpark, vanilla": in_speculators("dspark", markov_head_type="vanilla"),
    "DSpark, rnn, windows": in_speculators("dspark", layer=WINDOWS),
}


def lively(params, seed):
    """Parameters under which every part matters."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if x.dtype != jnp.float32:
            return x
        return jnp.asarray(rng.normal(size=x.shape) / max(1, x.shape[0]) ** 0.5, x.dtype)

    return jax.tree.map(draw, params)


@pytest.fixture(scope="module")
def teacher():
    return decoder_model(TARGET, lively(init_params(TARGET, jax.random.key(0)), 0))


@pytest.fixture(scope="module", params=HEADS)
def head(request, teacher):
    head = block_head(HEADS[request.param], teacher)
    return head, lively(head.init_params(jax.random.key(1)), 1)


def text(rows=2, seed=2, low=START + 1):
    return jnp.asarray(np.random.default_rng(seed).integers(low, VOCAB, (rows, LENGTH)), jnp.int32)


@jit(static_argnames="capture")
def read(teacher, tokens, capture):
    return teacher.forward(teacher.params, whole_feed(tokens), teacher.init_cache(*tokens.shape), capture)


answers = jit(block_logits, static_argnums=0)


@jit
def proposed(drafter, teacher, tokens, features, anchor):
    """Returns the law and the confidence of each draft of one round that starts at an anchor, drafts being the text."""
    rows, g = tokens.shape[0], drafter.num_draft
    length = jnp.full((rows,), anchor + 1, jnp.int32)
    context = Context(teacher, teacher.init_cache(rows, LENGTH), tokens, length, jnp.full((rows,), g, jnp.int32))
    event = Event(whole_feed(tokens), features, length - 1)
    state = drafter.observe(drafter.init(teacher, rows, LENGTH), context, event)

    def draw(logits, drafts, index, before=None):
        at = jnp.minimum(length + index, LENGTH - 1)[:, None]
        return jnp.take_along_axis(tokens, at, axis=1)[:, 0], jax.nn.softmax(logits)

    proposal, _ = drafter.propose(state, context, draw)
    block, _ = drafter.head.block(drafter.params, state, context, g)
    before = jnp.concatenate([tokens[jnp.arange(rows), length - 1][:, None], proposal.tokens_bg[:, :-1]], axis=1)
    trusts = [
        drafter.head.confidence_of(drafter.params, block.states_bgd[:, k], before[:, k])
        for k in range(g if drafter.head.confidence else 0)
    ]
    return proposal.probs_bgv, jnp.stack(trusts, axis=1) if trusts else None


def test_every_block_is_the_one_that_would_be_drafted(teacher, head):
    """Each anchor by itself: ``BlockDrafter.propose`` on the text up to the anchor, drafts being the text's tokens."""
    head, params = head
    tokens, g = text(), head.most_drafts
    features = read(teacher, tokens, head.capture).features
    anchors = np.arange(LENGTH - g)
    place = np.tile(anchors[:, None] + 1 + np.arange(g), (2, 1, 1))
    found = np.take_along_axis(np.asarray(tokens)[:, None], place, axis=2)
    whole = jnp.asarray(np.tile(anchors, (2, 1)), jnp.int32)
    blocks = Blocks(whole, jnp.zeros_like(whole), jnp.asarray(found, jnp.int32), jnp.ones(found.shape, bool))
    logits, trust = answers(head, params, teacher, tokens, features, blocks)
    probs, drafter = np.asarray(jax.nn.softmax(logits)), BlockDrafter(params, head, g)
    for i, anchor in enumerate(anchors):
        wanted, trusted = proposed(drafter, teacher, tokens, features, anchor)
        np.testing.assert_allclose(probs[:, i], wanted, atol=2e-6, rtol=0)
        assert (trust is None) == (trusted is None) == (not head.confidence)
        if trust is not None and trusted is not None:
            np.testing.assert_allclose(jax.nn.sigmoid(trust[:, i]), trusted, atol=2e-6, rtol=0)
    # The last drafts differ from anchor to anchor by hundreds of times the tolerance.
    assert np.std(probs[:, :, -1], axis=(0, 1)).max() > 1e-3


def test_a_block_sees_its_own_document_alone(teacher, head):
    """The states and tokens before the document do not count, and those within it do."""
    head, params = head
    tokens, one = text(1), jnp.full((1, 1), 8, jnp.int32)
    features = read(teacher, tokens, head.capture).features
    token = tokens[:, None, 9 : 9 + head.most_drafts]
    token = jnp.pad(token, ((0, 0), (0, 0), (0, head.most_drafts - token.shape[2])))
    blocks = Blocks(one, jnp.full((1, 1), 6, jnp.int32), token, jnp.ones(token.shape, bool))
    other = lambda at: tuple(x.at[:, at].add(1.0) for x in features)
    plain, before, within = (
        np.asarray(answers(head, params, teacher, tokens, given, blocks)[0])
        for given in (features, other(slice(0, 6)), other(slice(6, 8)))
    )
    np.testing.assert_array_equal(plain, before)
    finite = np.isfinite(plain)
    assert np.abs(plain[finite] - within[finite]).max() > 1e-3


def test_anchors_are_drawn_without_replacement_and_drafts_stay_in_the_document():
    tokens = text(3, low=START + 1).at[:, 0].set(START).at[1, 5].set(START).at[2, 11].set(START)
    blocks = jax.tree.map(np.asarray, choose_blocks(tokens, 10, 4, START))
    again = choose_blocks(tokens, 10, 4, START)
    jax.tree.map(np.testing.assert_array_equal, blocks, jax.tree.map(np.asarray, again))
    other = choose_blocks(tokens.at[0, 1].add(-1), 10, 4, START)
    assert (np.asarray(other.anchor_bm) != blocks.anchor_bm).any()
    starts, tokens = {0: [0], 1: [0, 5], 2: [0, 11]}, np.asarray(tokens)
    for row in range(3):
        assert len(set(blocks.anchor_bm[row])) == 10 and blocks.anchor_bm[row].max() <= LENGTH - 2
        for i, anchor in enumerate(blocks.anchor_bm[row]):
            assert blocks.first_bm[row, i] == max(start for start in starts[row] if start <= anchor)
            end = min([start for start in starts[row] if start > anchor], default=LENGTH)
            for k in range(4):
                counts = anchor + 1 + k < end
                assert blocks.counts_bmg[row, i, k] == counts
                assert not counts or blocks.token_bmg[row, i, k] == tokens[row, anchor + 1 + k]
    # The anchor before a second document has no draft that counts, so it comes last.
    assert blocks.counts_bmg[1].any(-1).all() and blocks.counts_bmg[2].any(-1).all()
    whole = choose_blocks(jnp.asarray(tokens), 11, 4, None)
    assert not np.asarray(whole.first_bm).any()


@pytest.mark.parametrize("loss", ["kl", "dspark"])
def test_the_objective_is_the_weighted_mean_of_its_drafts(loss, teacher, head):
    """Draft by draft in NumPy: draft k of anchor a stands for token a + 1 + k and the teacher's law at a + k."""
    head, params = head
    tokens = text().at[:, 0].set(START).at[1, 6].set(START)
    taught = read(teacher, tokens, head.capture)
    blocks = choose_blocks(tokens, LENGTH // 4, head.most_drafts, START)
    logits, trust = answers(head, params, teacher, tokens, taught.features, blocks)
    law = np.asarray(jax.nn.softmax(taught.logits_btv.astype(jnp.float32)), np.float64)
    q_all, total, weights = np.asarray(jax.nn.softmax(logits), np.float64), 0.0, 0.0
    for row, i, k in zip(*np.nonzero(np.asarray(blocks.counts_bmg)), strict=True):
        anchor, token = int(blocks.anchor_bm[row, i]), int(blocks.token_bmg[row, i, k])
        p, q = law[row, anchor + k], q_all[row, i, k]
        away = 0.5 * np.abs(p - q).sum()
        entropy = -np.log(q[token]) if q[token] else 0.0
        shared = p / p[q > 0].sum()
        value = {
            "kl": sum(s * np.log(s / r) for s, r in zip(shared[q > 0], q[q > 0], strict=True)),
            "dspark": 0.1 * entropy + 0.9 * np.abs(p - q).sum(),
        }[loss]
        if head.confidence:
            c = 1 / (1 + np.exp(-float(trust[row, i, k])))
            value -= (1 - away) * np.log(c) + away * np.log(1 - c)
        weight = np.exp(-k / (4 if head.from_anchor else 7))
        total, weights = total + weight * value, weights + weight
    found = jit(block_objective(loss, head, START))(params, tokens, teacher)
    np.testing.assert_allclose(found, total / weights, rtol=2e-5)


def test_every_parameter_learns(teacher, head):
    head, params = head
    constants = {name: x for name, x in params.items() if name == "draft_of_v"}
    trained = {name: x for name, x in params.items() if name not in constants}
    loss = lambda objective: lambda p: objective(p | constants, text(), teacher)
    grads = jit(jax.grad(loss(block_objective("dspark", head, START))))(trained)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def recipe(config, kind, **changes):
    stage = Stage("kl", 4, 2, LENGTH, peak_learning_rate=1e-2, warmup_steps=1)
    return Recipe("student", 0, config, (stage,), "teacher", 0, "", kind, **changes)


@pytest.mark.parametrize(
    ("name", "kind"), [("DFlash, a smaller vocabulary", "dflash"), ("DSpark, rnn, windows", "dspark")]
)
def test_what_is_written_opens_and_drafts_the_same(name, kind, teacher, tmp_path):
    trainee = make_trainee(recipe(HEADS[name], kind), teacher, np.asarray(text()).reshape(-1), START)
    params = trainee.init(jax.random.key(3))
    trainee.write(tmp_path / "head", params, Tokenizer(models.BPE()), {"some": 1})
    opened = open_block(tmp_path / "head", teacher, 3, "float32")
    wanted: Any = trainee.drafter(params, 3)
    assert trainee.max_draft == opened.head.most_drafts and opened.head == wanted.head
    jax.tree.map(np.testing.assert_array_equal, opened.params, wanted.params)


def test_what_does_not_fit_is_refused(teacher):
    tokens = np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r"head is 'dflash' and \[architecture\] that of a DSpark head"):
        make_trainee(recipe(HEADS["DSpark, vanilla"], "dflash"), teacher, tokens)
    with pytest.raises(ValueError, match=r"that of a DFlash2 head"):
        make_trainee(recipe(in_speculators("dflash2"), "dflash"), teacher, tokens)
    with pytest.raises(ValueError, match="stage sequence is 12; for 15 drafts give at least 17"):
        make_trainee(recipe(in_speculators(block_size=16), "dflash"), teacher, tokens)
    with pytest.raises(ValueError, match="chain_steps is 2"):
        recipe(in_speculators(), "dflash", chain_steps=2)
    one = recipe(in_speculators(), "dflash")
    with pytest.raises(ValueError, match="stage loss 'dspark' is for heads of kind"):
        dataclasses.replace(one, head="medusa", stages=(dataclasses.replace(one.stages[0], loss="dspark"),))
