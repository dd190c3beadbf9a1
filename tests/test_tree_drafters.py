"""Drafters of trees: Medusa's static trees, and EAGLE-2's, which grow, against slow twins and through the loop."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from heads_observing import context_of
from jitted import jit
from stateless import Stateless
from test_conformance import EAGLE_1, EAGLE_3, MEDUSA, MTP, TARGET, VOCAB, WIDTH, eagle
from test_medusa import affine, perfect, walk
from trees import path_to

import specjax
from specjax import Cascade, FeatureDrafter, MedusaDrafter, NGramDrafter, Sampling, verify
from specjax.drafters.medusa import head_logits
from specjax.drafters.trees import MEDUSA_CHOICES, check_static_tree, in_order

PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8, 7, 7]]
TREE = ((0,), (0, 0), (1,), (0, 2), (1, 0), (0, 0, 1), (3,), (1, 0, 0))


def grown(drafter, depth=4, top_k=3, nodes=12):
    return dataclasses.replace(drafter, num_draft=nodes, tree_depth=depth, top_k=top_k)


NARROW = eagle(capture=(1, 2, 3), width=8, target_hidden_size=WIDTH, own_embedding=True, draft_vocab_size=2)
DRAFTERS = {
    "medusa": dataclasses.replace(MEDUSA, num_draft=len(TREE), tree=TREE),
    "medusa, published": dataclasses.replace(MEDUSA, num_draft=27, tree=MEDUSA_CHOICES),
    "eagle-1": grown(EAGLE_1),
    "eagle-3": grown(EAGLE_3),
    "eagle-3, fewer tokens than children": grown(NARROW),
    "eagle-3, a chain of the likeliest": grown(EAGLE_3, 3, 1, 3),
    "mtp": grown(MTP, 3, 4, 20),
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
    """At temperatures 0 and 1; and what is accepted does not depend on the slots past a row's end."""
    options = {
        "sampling": Sampling(temperature=np.float32([0, 0, 1, 0.7]), seed=2),
        "max_new_tokens": 20,
        "fixed": True,
    }
    plain = specjax.generate(TARGET, PROMPTS, verify=verify.walk, **options)
    outs = [
        specjax.generate(TARGET, PROMPTS, drafter=drafter, verify=verify.walk, slots=slots, **options)
        for slots in (8 + 20 + drafter.num_draft + 1, 128)
    ]
    for out in outs:
        assert [row.tolist() for row in out.rows()] == [row.tolist() for row in plain.rows()]
        assert out.stats.drafted_at.shape == (4, drafter.tree_depth)
        np.testing.assert_array_equal(out.stats.accepted, outs[0].stats.accepted)
    assert outs[0].stats.accepted.sum() > 0


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


@pytest.mark.parametrize("name", ["medusa", "eagle-3", "mtp"])
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
        ("ngram", 8, "tree is 8 and ngram drafts chains"),
        (f"eagle:{root / 'py-14m-eagle'}", 0, "tree must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.load_drafter(spec, target, 3, tree=tree)
