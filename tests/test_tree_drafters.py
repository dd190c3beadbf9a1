"""Drafters of chosen trees: Medusa's static ones, EAGLE-2's, which grow, the likeliest drafts of a block, and copies.

They are compared with slow twins, and run through the loop, where a few trees that are drawn run with them.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_rule import EveryTreeRule
from flax import struct
from heads_observing import context_of
from jitted import jit
from stateless import Stateless
from test_conformance import (
    CASES,
    DFLASH,
    DSPARK,
    EAGLE_1,
    EAGLE_3,
    MEDUSA,
    MODEL,
    MTP,
    P_EAGLE,
    TARGET,
    VOCAB,
    WIDTH,
    eagle,
)
from test_medusa import affine, perfect, walk
from trees import path_to

import specjax
from specjax import Cascade, FeatureDrafter, MedusaDrafter, NGramDrafter, Sampling, verify
from specjax.drafters.block import Block, BlockDrafter
from specjax.drafters.medusa import accepted_by_rank, head_logits
from specjax.drafters.trees import MEDUSA_CHOICES, best_tree, check_static_tree, drawn_tree, in_order, paths_tree

PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
TREE = ((0,), (0, 0), (1,), (0, 2), (1, 0), (0, 0, 1), (3,), (1, 0, 0))


def grown(drafter, depth=4, top_k=3, nodes=12):
    return dataclasses.replace(drafter, num_draft=nodes, tree_depth=depth, top_k=top_k)


def of_block(drafter, nodes=12):
    return dataclasses.replace(drafter, num_draft=nodes, tree_depth=3)


NARROW = eagle(capture=(1, 2, 3), width=8, target_hidden_size=WIDTH, own_embedding=True, draft_vocab_size=2)
DRAFTERS = {
    "medusa": dataclasses.replace(MEDUSA, num_draft=len(TREE), tree=TREE),
    "medusa, published": dataclasses.replace(MEDUSA, num_draft=27, tree=MEDUSA_CHOICES),
    "eagle-1": grown(EAGLE_1),
    "eagle-3": grown(EAGLE_3),
    "eagle-3, fewer tokens than children": grown(NARROW),
    "eagle-3, a chain of the likeliest": grown(EAGLE_3, 3, 1, 3),
    "mtp": grown(MTP, 3, 4, 20),
    "dflash": of_block(DFLASH),
    "dspark, rnn": of_block(DSPARK),
    "dspark, gated, few tokens": of_block(CASES["dspark, a smaller vocabulary"][1], 9),
    "p-eagle": of_block(P_EAGLE),
    "n-gram": NGramDrafter(10, 1, 3, tree_depth=4),
    "model, distinct": dataclasses.replace(MODEL, num_draft=9, tree=drawn_tree(9, 4, "distinct")),
    "eagle-3, paths": dataclasses.replace(EAGLE_3, num_draft=7, tree=paths_tree(7, 3), tree_depth=3, siblings="paths"),
}
every_drafter = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)


def paths(proposal, row):
    """Returns the drafts of a row as tokens from the root on."""
    parents = np.asarray(proposal.parents_bg[row]).tolist()
    tokens = np.asarray(proposal.tokens_bg[row])
    return [tuple(tokens[path_to(parents, draft)].tolist()) for draft in range(len(parents))]


# Through the loop.


@every_drafter
def test_text_is_that_of_plain_decoding_and_little_slots_are_enough(drafter):
    """At temperatures 0 and 1, greedily by each rule; and what is accepted does not depend on the slots past a row's
    end."""
    options = {
        "sampling": Sampling(temperature=np.float32([0, 0, 1, 0.7]), seed=2),
        "max_new_tokens": 20,
        "fixed": True,
    }
    plain = specjax.generate(TARGET, PROMPTS, verify=verify.walk, **options)
    outs = [
        specjax.generate(TARGET, PROMPTS, drafter=drafter, verify=EveryTreeRule(), slots=slots, **options)
        for slots in (8 + 20 + drafter.num_draft + 1, 128)
    ]
    for out in outs:
        assert [row.tolist() for row in out.rows()] == [row.tolist() for row in plain.rows()]
        assert out.stats.drafted_at.shape == (4, drafter.tree_depth)
        np.testing.assert_array_equal(out.stats.accepted, outs[0].stats.accepted)
    assert outs[0].stats.accepted.sum() > 0


@every_drafter
def test_a_smaller_tree_is_a_part_of_the_whole_one(drafter):
    """What a round of fewer drafts has are the most valuable drafts. Here the likeliest tokens are drawn."""

    def likeliest(logits_bv, drafts_bg, index, before_bg=None, siblings=None):
        token = jax.lax.top_k(logits_bv, siblings or 1)[1].astype(jnp.int32)
        return token if siblings else token[:, 0], jax.nn.softmax(logits_bv)

    state = specjax.prefill(TARGET, PROMPTS, drafter=drafter, max_new_tokens=20, fixed=True)
    width = drafter.tree_depth

    @jit
    def propose(draft):
        whole = context_of(TARGET, state)
        narrow = dataclasses.replace(whole, width=width)
        return drafter.propose(draft, whole, likeliest)[0], drafter.propose(draft, narrow, likeliest)[0].first(width)

    whole, narrow = propose(state.draft)
    np.testing.assert_array_equal(narrow.length_b, np.minimum(whole.length_b, width))
    for row in range(1, len(PROMPTS)):
        found = paths(narrow, row)[: int(narrow.length_b[row])]
        assert set(found) <= set(paths(whole, row)[: int(whole.length_b[row])])


@jit(static_argnums=0)
def proposed(kind, target, state, drafter):
    """Returns the drafter's proposal, and the one after it has read each row's text anew, in one pass."""
    del kind
    context = context_of(target, state)
    found, _ = drafter.propose(state.draft, context, None)
    rows, slots = state.tokens_bs.shape
    feed = specjax.Feed(state.tokens_bs, jnp.zeros((rows,), jnp.int32), state.length_b - 1)
    output = target.forward(target.params, feed, target.init_cache(rows, slots), drafter.capture)
    draft = drafter.observe(
        drafter.init(target, rows, slots), context, specjax.Event(feed, output.features, feed.count_b)
    )
    return found, drafter.propose(draft, context, None)[0]


@pytest.mark.parametrize("name", ["medusa", "eagle-3", "mtp", "n-gram", "dspark, rnn"])
def test_rounds_leave_what_one_pass_over_the_text_does(name):
    """The kept path alone is read, from the target's own states."""
    drafter = DRAFTERS[name]
    options = {"sampling": Sampling(seed=2), "max_new_tokens": 40, "fixed": True}
    state = specjax.prefill(TARGET, PROMPTS, drafter=drafter, **options)
    for _ in range(3):
        state = specjax.run(TARGET, state, drafter=drafter, verify=verify.walk, rounds=2)
        found, wanted = proposed(type(drafter), TARGET, state, drafter)
        for row in range(len(PROMPTS)):
            assert paths(found, row) == paths(wanted, row)
    assert state.stats.accepted.sum() > 0 and not state.done_b.any()


# Medusa.


def test_static_drafts_are_the_likeliest_tokens_of_their_heads():
    drafter = DRAFTERS["medusa"]
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, WIDTH)), jnp.float32)
    context = specjax.Context(TARGET, None, jnp.zeros((2, 8), jnp.int32), jnp.int32([1, 4]), jnp.int32([9, 9]))
    proposal, _ = drafter.propose(states, context, None)
    assert proposal.length_b.tolist() == [0, len(TREE)] and proposal.probs_bgv is None
    shared = {"lm_head": drafter.params[0]["lm_head"]}
    order = [np.argsort(-np.asarray(head_logits(shared | drafter.params[i], states)), axis=-1) for i in range(3)]
    for row in range(2):
        wanted = {tuple(int(order[i][row, rank]) for i, rank in enumerate(path)) for path in TREE}
        assert set(paths(proposal, row)) == wanted


@pytest.mark.parametrize("path", [(0, 0, 0), (2,), (1, 2), (3, 0, 1)])
def test_medusa_heads_that_know_the_text_are_kept_along_every_path(path):
    """Head i ranks the right token at ``path[i]``."""
    target, following = affine()
    target = target.replace(gather=lambda cache, feed, path_bt: cache)
    heads = perfect(following, len(path))
    size = len(following)
    # The tokens before the right one in the alphabet get higher logits, as many as the rank says.
    turn = [
        30 * np.eye(size) + sum(np.eye(size)[(np.arange(size) - 1 - n) % size] * 31 for n in range(r)) for r in path
    ]
    for i, head in heads.items():
        head["lm_head"]["kernel"] = head["lm_head"]["kernel"] @ jnp.asarray(turn[i] / 30, jnp.float32)
    tree = tuple(path[: i + 1] for i in range(len(path))) + tuple((rank,) for rank in range(4) if rank != path[0])
    drafter = MedusaDrafter(heads, len(tree), tree)
    new = 6 * (len(path) + 1)
    out = specjax.generate(
        target,
        [walk(following, token, length) for token, length in ((8, 2), (2, 7))],
        drafter=drafter,
        verify=verify.walk,
        sampling=Sampling(temperature=0),
        max_new_tokens=new,
        fixed=True,
    )
    np.testing.assert_array_equal(out.stats.rounds, 6)
    np.testing.assert_array_equal(out.stats.accepted_at, 6)
    assert out.rows()[0].tolist() == walk(following, 8, 2 + new)


def test_published_choices_are_a_tree_at_every_size():
    assert len(MEDUSA_CHOICES) == 63 and MEDUSA_CHOICES[-1] == (0, 7, 0)
    for size in range(1, 64):
        check_static_tree(MEDUSA_CHOICES, size)
    assert in_order(MEDUSA_CHOICES[:5]) == ((0,), (1,), (2,), (0, 0), (0, 1))


# EAGLE-2, against a twin that follows each path by itself, along a chain.


def twin(drafter, state, context, row):
    """Returns the paths of the tree: expansion and reranking in Python, over the logits of chains."""

    @functools.cache
    def log_probs(path):
        chain = FeatureDrafter(drafter.params, drafter.head, len(path) + 1)
        found = []

        def draw(logits_bv, drafts_bg, index):
            found.append(logits_bv)
            token = path[index] if index < len(path) else 0
            return jnp.full((len(PROMPTS),), token, jnp.int32), jax.nn.softmax(logits_bv)

        chain.propose(state, context, draw)
        return np.asarray(jax.nn.log_softmax(found[-1][row]), np.float64)

    def children(path, score):
        values = log_probs(path)
        return [((*path, int(x)), score + values[x]) for x in np.argsort(-values, kind="stable")[: drafter.top_k]]

    level = children((), 0.0)
    found = list(level)
    for _ in range(drafter.tree_depth - 1):
        grown = [child for path, score in level for child in children(path, score)]
        level = sorted(grown, key=lambda pair: -pair[1])[: drafter.top_k]
        found += grown
    return sorted(path for path, _ in sorted(found, key=lambda pair: -pair[1])[: drafter.num_draft])


@pytest.mark.parametrize("name", ["eagle-1", "eagle-3", "mtp"])
def test_grown_trees_equal_the_twin(name):
    drafter = grown(DRAFTERS[name], 3, 2, 8)
    state = specjax.prefill(TARGET, PROMPTS, drafter=drafter, max_new_tokens=20, fixed=True)
    context = context_of(TARGET, state)
    proposal, _ = drafter.propose(state.draft, context, None)
    assert proposal.length_b.tolist() == [0, 8, 8, 8] and proposal.probs_bgv is None
    shapes = set()
    for row in (1, 2, 3):
        found = paths(proposal, row)
        assert sorted(found) == twin(drafter, state.draft, context, row)
        assert len(set(found)) == 8
        shapes.add(tuple(np.asarray(proposal.parents_bg[row]).tolist()))
    parents_bg = np.asarray(proposal.parents_bg)
    assert (parents_bg < np.arange(8)).all() and (parents_bg >= -1).all()
    assert len(shapes) > 1  # the tree depends on the text


# The likeliest drafts of a block.


@dataclasses.dataclass(frozen=True)
class Marginals:
    """A draft head of blocks whose distributions are given, the same for all texts."""

    probs: tuple

    capture = ()
    marginal = True
    vocab_size = 3

    @property
    def most_drafts(self):
        return len(self.probs)

    def block(self, params, state, context, count):
        logits_bgv = jnp.log(jnp.broadcast_to(jnp.asarray(self.probs)[None, :count], (1, count, 3)))
        return Block(logits_bgv, logits_bgv, jnp.ones((1,), bool)), state

    def start(self, params, rows):
        return None

    def step(self, params, carry, logits_bu, state_bd, token_b):
        return logits_bu, carry


def test_the_likeliest_tree_of_known_marginals():
    """DDTree's tree of four drafts keeps 0.6 + 0.3 + 0.25 + 0.18 of them."""
    head = Marginals(((0.6, 0.25, 0.15), (0.5, 0.3, 0.2)))
    context = specjax.Context(TARGET, None, jnp.zeros((1, 8), jnp.int32), jnp.int32([4]), jnp.int32([9]))
    for nodes, wanted in ((4, {(0,), (0, 0), (1,), (0, 1)}), (12, None)):
        proposal, _ = BlockDrafter((), head, nodes, tree_depth=2).propose((), context, None)
        found = paths(proposal, 0)
        assert len(set(found)) == nodes and (wanted is None or set(found) == wanted)
    value = sum(np.prod([head.probs[depth][token] for depth, token in enumerate(path)]) for path in wanted or ())
    assert wanted is None or abs(value - 1.33) < 1e-9


@pytest.mark.parametrize("name", ["dflash", "dspark, rnn"])
def test_trees_of_blocks_have_the_likeliest_paths(name):
    """Against the probabilities of all paths, each drafted as a chain."""
    drafter = DRAFTERS[name]
    chain = dataclasses.replace(drafter, num_draft=3, tree_depth=None)
    state = specjax.prefill(TARGET, PROMPTS, drafter=drafter, max_new_tokens=20, fixed=True)
    context = context_of(TARGET, state)

    @jax.jit
    def laws(text_g):
        def follow(logits_bv, drafts_bg, index):
            return jnp.broadcast_to(text_g[index][None], (len(PROMPTS),)), jax.nn.softmax(logits_bv)

        return jnp.log(chain.propose(state.draft, context, follow)[0].probs_bgv)

    scores = {}
    for prefix in itertools.product(range(VOCAB), repeat=2):
        log_bgv = np.asarray(laws(jnp.asarray([*prefix, 0], jnp.int32)), np.float64)
        score_b = np.zeros(len(PROMPTS))
        for depth in range(3):
            for token in range(VOCAB):
                scores[(*prefix[:depth], token)] = score_b + log_bgv[:, depth, token]
            score_b = score_b + log_bgv[:, depth, prefix[depth] if depth < 2 else 0]
    proposal, _ = drafter.propose(state.draft, context, None)
    assert proposal.length_b.tolist() == [12] * 4 and proposal.probs_bgv is None
    for row in range(len(PROMPTS)):
        found = paths(proposal, row)
        best = sorted((values[row] for values in scores.values()), reverse=True)[:12]
        np.testing.assert_allclose(sorted((scores[path][row] for path in found), reverse=True), best, atol=1e-4)
        assert len(set(found)) == 12 and all(path[:-1] in ((), *found) for path in found)


# Copies of n-grams.


def copies(row, drafter):
    """Returns the tree's paths: all matches, the best first, each followed until there are enough drafts."""
    ends = []
    for slot in range(len(row) - 1):
        most = next((n for n in range(drafter.max_n) if n > slot or row[slot - n] != row[-1 - n]), drafter.max_n)
        ends.append((most, slot))
    found = []
    for most, slot in sorted(ends, reverse=True)[: drafter.matches]:
        text = (row[slot + 1 :] * drafter.tree_depth)[: drafter.tree_depth]
        for depth in range(1, drafter.tree_depth + 1):
            if most >= drafter.min_n and len(found) < drafter.num_draft and tuple(text[:depth]) not in found:
                found.append(tuple(text[:depth]))
    return found


def test_copies_equal_the_twin():
    rng = np.random.default_rng(0)
    rows = [[1, 2, 3, 1, 2, 4, 1, 2], [5], [6, 6], *(rng.integers(0, 3, length).tolist() for length in (9, 20, 31))]
    tokens_bs, length_b = specjax.pad_prompts(rows)
    room_b = jnp.full((len(rows),), 9, jnp.int32)
    context = specjax.Context(TARGET, None, jnp.asarray(tokens_bs), jnp.asarray(length_b), room_b)
    for options in ({"min_n": 2, "matches": 4}, {"min_n": 1, "max_n": 3, "matches": 3}, {"min_n": 2, "matches": 40}):
        drafter = NGramDrafter(8, tree_depth=3, **options)
        proposal, _ = drafter.propose(None, context, None)
        for row, tokens in enumerate(rows):
            assert paths(proposal, row)[: int(proposal.length_b[row])] == copies(tokens, drafter), (row, options)
    assert copies(rows[0], NGramDrafter(8, tree_depth=2)) == [(4,), (4, 1), (3,), (3, 1)]


def test_trees_of_copies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_draft is 17, and 8 matches of 2 tokens have fewer"):
        NGramDrafter(17, tree_depth=2)
    with pytest.raises(ValueError, match="matches must be an integer of at least 1"):
        NGramDrafter(matches=0)


# A tree that is searched.


def test_ranks_are_counted_and_the_searched_tree_is_kept(tmp_path):
    """Heads that know the text have it at rank 0; and a folder keeps its own tree."""
    target, following = affine()
    drafter = MedusaDrafter(perfect(following, 3), 3)
    text = jnp.asarray([walk(following, 8, 12), walk(following, 2, 12)], jnp.int32)
    assert accepted_by_rank(drafter, target, text, 3) == [[1, 0, 0]] * 3
    wrong = (text + 1) % len(following)
    assert all(row[0] < 1 and sum(row) <= 1 for row in accepted_by_rank(drafter, target, wrong, 3))
    tree = best_tree([[0.5, 0.4], [0.5, 0.2], [0.5, 0.1]], 6)
    specjax.save_drafter(tmp_path / "own", dataclasses.replace(drafter, num_draft=6, tree=tree), target)
    opened = specjax.load_drafter(f"medusa:{tmp_path / 'own'}", target, 3, tree=4)
    assert isinstance(opened, MedusaDrafter) and opened.tree == tree and opened.num_draft == 4
    (tmp_path / "own" / "medusa_choices.json").write_text("[[0], [1, 0]]")
    with pytest.raises(ValueError, match=r"medusa_choices.json: the tree has \(1, 0\) after"):
        specjax.load_drafter(f"medusa:{tmp_path / 'own'}", target, 3, tree=2)


# Bad input.


def test_bad_trees_are_refused_before_anything_compiles():
    medusa, grows = DRAFTERS["medusa"], DRAFTERS["eagle-3"]
    stays = dataclasses.replace(EAGLE_3.head, window_stays=True, decoder=_windowed(EAGLE_3.head.decoder))
    for wrong, message in [
        (dataclasses.replace(medusa, num_draft=9), "num_draft is 9 and the tree has 8 drafts"),
        (dataclasses.replace(medusa, tree=((0,), (1, 0)), num_draft=2), r"the tree has \(1, 0\) after \[\(0,\)\]"),
        (dataclasses.replace(medusa, tree=((0,), (0,)), num_draft=2), r"the tree has \(0,\) after"),
        (dataclasses.replace(medusa, tree=((0,), (-1,)), num_draft=2), r"the tree has \(-1,\) after"),
        (dataclasses.replace(medusa, tree=((VOCAB,),), num_draft=1), f"rank {VOCAB} and there are {VOCAB} tokens"),
        (dataclasses.replace(medusa, tree=((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)), num_draft=4), "3 Medusa heads"),
        (dataclasses.replace(grows, top_k=0), "top_k is 0; give an integer from 1 to 11"),
        (dataclasses.replace(grows, num_draft=31), "num_draft is 31 and a tree of depth 4 with top_k 3 has 30 drafts"),
        (dataclasses.replace(grows, tree_depth=13), "tree_depth is 13; give an integer from 1 to num_draft, 12"),
        (dataclasses.replace(grows, head=stays), "windows stay where they are"),
        (Cascade(NGramDrafter(12), grows), "the cascade's second drafter proposes trees"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.generate(TARGET, PROMPTS, drafter=wrong, verify=verify.walk, max_new_tokens=4)


def _windowed(decoder):
    return dataclasses.replace(
        decoder, layers=tuple(dataclasses.replace(layer, window=4) for layer in decoder.each_layer)
    )


@pytest.mark.parametrize("name", ["medusa", "eagle-3"])
def test_right_drafters_pass_the_check(name):
    specjax.check_drafter(DRAFTERS[name], TARGET)


def test_wrong_trees_are_named():
    for wrong, message in [
        (Lies(TARGET.vocab_size, (-1, 1)), "a draft follows an earlier one"),
        (Lies(TARGET.vocab_size, (-1, 0)), "a path has 2 drafts and tree_depth is 1"),
        (Lies(TARGET.vocab_size, (-1, -1)), "siblings without probs_bgv are the same token"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.check_drafter(wrong, TARGET)


@struct.dataclass
class Lies(Stateless):
    """Two drafts of one token, in whatever tree."""

    vocab_size: int = struct.field(pytree_node=False)
    parents: tuple = struct.field(pytree_node=False)

    num_draft = 2
    tree_depth = 1

    def propose(self, state, context, draw):
        rows = context.length_b.shape[0]
        parents_bg = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), (rows, 2))
        tokens_bg, length_b = jnp.zeros((rows, 2), jnp.int32), jnp.full((rows,), 2, jnp.int32)
        return specjax.Proposal(tokens_bg, None, length_b, parents_bg=parents_bg), state


# From folders.


def test_a_folder_of_draft_heads_opens_as_a_tree():
    root = Path(__file__).parents[1] / "checkpoints"
    target = specjax.load(root / "py-14m")
    medusa = specjax.load_drafter(f"medusa:{root / 'py-14m-medusa'}", target, 3, tree=20)
    assert (medusa.num_draft, medusa.tree_depth, len(medusa.params)) == (20, 3, 3)
    eagle = specjax.load_drafter(f"eagle:{root / 'py-14m-eagle'}", target, 5, tree=32)
    assert (eagle.num_draft, eagle.tree_depth) == (32, 5)
    for spec, tree, message in [
        (f"medusa:{root / 'py-14m-medusa'}", 64, "tree is 64 and Medusa's choices for 3 heads are 61 drafts"),
        ("early-exit:2", 8, "tree is 8 and early-exit drafts chains"),
        (f"eagle:{root / 'py-14m-eagle'}", 0, "tree must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.load_drafter(spec, target, 3, tree=tree)
    for spec, siblings, kind in [
        (f"model:{root / 'py-14m-draft'}", None, "distinct"),
        (f"model:{root / 'py-14m-draft'}", "paths", "paths"),
        (f"eagle:{root / 'py-14m-eagle'}", None, "distinct"),
        (f"eagle:{root / 'py-14m-eagle'}", "chosen", "chosen"),
        ("ngram", None, "chosen"),
    ]:
        drafter = specjax.load_drafter(spec, target, 3, tree=10, siblings=siblings)
        assert (drafter.num_draft, drafter.tree_depth, drafter.siblings) == (10, 3, kind)
    for spec, options, message in [
        ("ngram", {"siblings": "chosen"}, "siblings is 'chosen' and tree is None"),
        ("ngram", {"tree": 8, "siblings": "paths"}, "the drafts of ngram are copied, never drawn"),
        ("ngram", {"tree": 8, "siblings": "all"}, "siblings is 'all'; give one of chosen, distinct, paths"),
        (f"model:{root / 'py-14m-draft'}", {"tree": 8, "siblings": "chosen"}, "the drafts of model are drawn"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.load_drafter(spec, target, 3, **options)
