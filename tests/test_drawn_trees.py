"""Trees whose drafts are drawn: their law through the loop, what each draft is drawn from, and that faults are seen."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from heads_observing import context_of
from jitted import jit
from test_conformance import DFLASH, DSPARK, EAGLE_3, MAMBA, MEDUSA, MODEL, P_EAGLE, PROMPTS
from test_conformance import TARGET as DECODER
from test_laws import (
    AGAINST,
    BLOCK,
    DECODER_ROWS,
    EAGLE,
    FILTERED,
    PENALIZED,
    PLAIN,
    TABLE,
    TARGET,
    emitted,
    lively,
    medusa_head,
    p_value,
    random_table,
)
from trees import path_to

import specjax
from specjax import FeatureDrafter, MedusaDrafter, ModelDrafter, Sampling, verify
from specjax.drafters.drawn import DrawnTree, Shape
from specjax.drafters.trees import best_tree, drawn_tree, in_order, paths_tree
from specjax.sampling import RoundDraws, row_keys
from specjax.testing import table_model

# The root has three children, which are all tokens; the first of them two, and one of these two again.
BUSHY = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1))
SLOTS = 24


def drawn(drafter, tree=BUSHY, siblings="distinct"):
    """Returns a drafter of a static tree."""
    options = {"num_draft": len(tree), "tree": tree, "siblings": siblings}
    if not isinstance(drafter, ModelDrafter | MedusaDrafter):
        options["tree_depth"] = max(map(len, tree))
    return dataclasses.replace(drafter, **options)


OTHER, BAD = (ModelDrafter(table_model(np.asarray(table))) for table in (random_table(1), AGAINST))
HEADS = MedusaDrafter({i: medusa_head(*logits) for i, logits in enumerate(([0.5, -0.5, 1], [-1, 1, 0], [1, 1, 0]))})
HEAD = FeatureDrafter(lively(EAGLE.init_params(jax.random.key(0)), 30), EAGLE)
SHALLOW = tuple(path for path in BUSHY if len(path) < 3)  # a block of the test's head has two drafts
CASES = {
    "model, recursive": (drawn(OTHER), verify.recursive, PENALIZED),
    "model, traversal": (drawn(OTHER), verify.traversal, FILTERED),
    "model, walk": (drawn(OTHER), verify.walk, PLAIN),
    "model, coupled": (drawn(OTHER), verify.coupled, PENALIZED),
    "bad model, recursive": (drawn(BAD), verify.recursive, FILTERED),
    "bad model, traversal": (drawn(BAD), verify.traversal, PENALIZED),
    "independent, recursive": (drawn(OTHER, siblings="independent"), verify.recursive, FILTERED),
    "paths, multipath": (drawn(OTHER, paths_tree(5, 2), "paths"), verify.multipath, PENALIZED),
    "paths of a bad model, multipath": (drawn(BAD, paths_tree(6, 3), "paths"), verify.multipath, FILTERED),
    "paths, traversal": (drawn(OTHER, paths_tree(6, 2), "paths"), verify.traversal, PENALIZED),
    "medusa, recursive": (drawn(HEADS), verify.recursive, PENALIZED),
}
SLOW = {  # the heads draft two tokens of three, and the third of the siblings is none of them
    "eagle, traversal": (drawn(HEAD), verify.traversal, PENALIZED),
    "eagle, paths, multipath": (drawn(HEAD, paths_tree(4, 2), "paths"), verify.multipath, FILTERED),
    "dspark, recursive": (drawn(BLOCK, SHALLOW), verify.recursive, FILTERED),
    "dspark, likeliest, walk": (dataclasses.replace(BLOCK, num_draft=6, tree_depth=2), verify.walk, PLAIN),
}
texts_of = functools.partial(emitted, slots=SLOTS)


@pytest.mark.parametrize("name", CASES)
def test_joint_law(name):
    drafter, rule, settings = CASES[name]
    p = p_value(texts_of(TARGET, drafter, rule, settings), TARGET, settings)
    print(f"p = {p:.4f}")
    assert p > 1e-3


@pytest.mark.parametrize("name", SLOW)
def test_joint_law_of_heads(name):
    drafter, rule, settings = SLOW[name]
    texts = texts_of(TARGET, drafter, rule, settings, rows_per_prompt=DECODER_ROWS)
    assert p_value(texts, TARGET, settings) > 1e-3


# Faults.


@struct.dataclass
class SaysIndependent(ModelDrafter):
    """Siblings that were drawn without replacement, proposed as if with it."""

    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        return dataclasses.replace(proposal, replacement=True), state


@struct.dataclass
class DropsUnlikely(ModelDrafter):
    """Proposes the last drafts only where they are likely: their presence depends on their own tokens."""

    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        q_bg = jnp.take_along_axis(proposal.probs_bgv, proposal.tokens_bg[..., None], axis=-1)[..., 0]
        count_b = jnp.cumprod((q_bg > 0.4).astype(jnp.int32), axis=1).sum(1)
        return dataclasses.replace(proposal, length_b=count_b), state


@struct.dataclass
class SaysPaths(ModelDrafter):
    """Siblings are drawn independently, and branch below the root."""

    def init(self, target, rows, slots):
        return ModelDrafter(self.model, self.num_draft).init(target, rows, slots)  # which checks no tree


FORK = ((0,), (0, 0), (0, 1), (0, 2))
FAULTS = {
    "siblings that differ, as if independent": (SaysIndependent, BUSHY, verify.recursive, PLAIN),
    "drafts dropped by their own probability": (DropsUnlikely, BUSHY[:3], verify.recursive, PLAIN),
    "branches below the root as paths": (SaysPaths, FORK, verify.multipath, PLAIN),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_seen(fault):
    make, tree, rule, settings = fault
    siblings = "paths" if make is SaysPaths else "distinct"
    drafter = make(table_model(AGAINST), len(tree), tree=tree, siblings=siblings)
    p = p_value(texts_of(TARGET, drafter, rule, settings), TARGET, settings)
    print(f"p = {p:.2e}")
    assert p < 1e-6


# What is drawn.


def test_distinct_drafts_are_drawn_without_replacement():
    """All orders of three of four tokens, against the product of what is left; the first is that of a single draw."""
    rows, weights = 40_000, np.asarray([0.5, 0.3, 0.2, 0.0], np.float32)
    draws = RoundDraws(row_keys(Sampling(seed=0).per_row(rows)), jnp.full((rows,), 5, jnp.int32), jnp.bool_(True))
    weights_bv, else_bv = (jnp.broadcast_to(jnp.asarray(x), (rows, 4)) for x in (weights, np.float32([0, 0, 0, 3])))
    drawn_bn = np.asarray(draws.draft(weights_bv, 2, (4, else_bv)))
    np.testing.assert_array_equal(drawn_bn[:, 0], draws.draft(weights_bv, 2))
    assert (drawn_bn[:, 3] == 3).all()  # what cannot be drawn comes last
    emitted = draws.emit(weights_bv, jnp.full((rows,), 1, jnp.int32), (2, else_bv))
    np.testing.assert_array_equal(emitted[:, 0], draws.emit(weights_bv, jnp.full((rows,), 1, jnp.int32)))
    statistic = 0.0
    for order in itertools.permutations(range(3)):
        law = weights[order[0]] * weights[order[1]] / (1 - weights[order[0]])
        statistic += ((drawn_bn[:, :3] == order).all(1).sum() - rows * law) ** 2 / (rows * law)
    assert statistic < 25  # 5 degrees of freedom: above it with probability 1e-4


def test_where_all_is_drawn_the_likeliest_others_follow():
    """Of greedy rows, those of a top-k; of filtered ones, what the filter leaves and then what it takes."""
    logits = np.float32([[1, 4, 2, 3, 0], [0, 1, 2, 3, 4]])
    for temperature, sampled in ((0.0, False), (0.0, True), (1.0, True)):
        draws = RoundDraws(row_keys(Sampling(seed=3).per_row(2)), jnp.full((2,), 5, jnp.int32), jnp.bool_(sampled))
        law = specjax.sampling.warp(jnp.asarray(logits)[:, None], Sampling(temperature, top_k=2).per_row(2))[:, 0]
        found = np.asarray(draws.draft(law, 0, (5, jnp.asarray(logits))))
        for row, best in zip(found, ([1, 3, 2, 0, 4], [4, 3, 2, 1, 0]), strict=True):
            assert row[2:].tolist() == best[2:]
            assert row.tolist() == best if temperature == 0 else set(row[:2]) == set(best[:2])


DECODERS = {
    "model": MODEL,
    "eagle-3": EAGLE_3,
    "medusa": MEDUSA,
    "dspark, rnn": DSPARK,
    "p-eagle": P_EAGLE,
}


@pytest.mark.parametrize("name", DECODERS)
def test_each_path_is_drawn_from_what_a_chain_would_be(name):
    """The same drafter drafts each path of the tree again as a chain, and says what it draws from."""
    chain = dataclasses.replace(DECODERS[name], num_draft=3)
    drafter, settings = drawn(chain), {"max_new_tokens": 20, "fixed": True}
    state, alone = (specjax.prefill(DECODER, PROMPTS, drafter=each, **settings) for each in (drafter, chain))

    def random_draw(logits_bv, drafts_bg, index, before_bg=None, siblings=None):
        noise_bv = jax.random.gumbel(jax.random.fold_in(jax.random.key(0), index), logits_bv.shape)
        token = jax.lax.top_k(logits_bv + noise_bv, siblings)[1].astype(jnp.int32)
        return token, jax.nn.softmax(logits_bv)

    proposal, _ = jit(lambda draft: drafter.propose(draft, context_of(DECODER, state), random_draw))(state.draft)
    parents, g = np.asarray(proposal.parents_bg), drafter.num_draft
    assert proposal.length_b.tolist() in ([g] * 4, [0, g, g, g])  # a row of one token has no state to draft from
    assert not proposal.replacement and (parents == parents[:1]).all()

    @jit
    def again(draft, path_d):
        def follow(logits_bv, drafts_bg, index):
            return proposal.tokens_bg[:, path_d[index]], jax.nn.softmax(logits_bv)

        return chain.propose(draft, context_of(DECODER, alone), follow)[0].probs_bgv

    for leaf in (2, 3, 5, 6, 7):
        path = path_to(parents[0].tolist(), leaf)
        wanted_bgv = again(alone.draft, jnp.asarray([*path, 0, 0][:3]))
        for depth, draft in enumerate(path):
            np.testing.assert_allclose(proposal.probs_bgv[1:, draft], wanted_bgv[1:, depth], atol=1e-5)
    tokens = np.asarray(proposal.tokens_bg)
    for parent in set(parents[0].tolist()):
        assert all(len(set(row)) == len(row) for row in tokens[1:, parents[0] == parent].tolist())


@pytest.mark.parametrize("rule", ["traversal", "coupled"])
def test_a_target_is_accepted_as_its_own_draft(rule):
    """Each round keeps a path of full depth, whatever the temperature."""
    drafter = drawn(ModelDrafter(DECODER), drawn_tree(7, 3, "distinct"))
    sampling = Sampling(temperature=np.float32([0, 1, 0.7, 1.3]), seed=3)
    settings = {"drafter": drafter, "sampling": sampling, "max_new_tokens": 24, "fixed": True}
    out = specjax.generate(DECODER, PROMPTS, verify=getattr(verify, rule), **settings)
    np.testing.assert_array_equal(out.stats.accepted, 3 * 6)
    np.testing.assert_array_equal(out.stats.accepted_at, 6)


def test_several_paths_of_a_target_are_accepted_whole():
    """By rules that look at one path after the other; ``multipath`` compares the paths and keeps fewer here."""
    drafter = drawn(ModelDrafter(table_model(TABLE)), paths_tree(6, 3), "paths")
    for rule in (verify.recursive, verify.traversal):
        out = specjax.generate(TARGET, [[0], [1, 2]], drafter=drafter, verify=rule, max_new_tokens=24, fixed=True)
        np.testing.assert_array_equal(out.stats.accepted_at, 6)


@pytest.mark.parametrize("name", ["model", "eagle-3"])
def test_rows_do_not_see_each_other_and_stop_at_their_tokens(name):
    """Each row alone, and in a batch of other rows in another order; a stop token only cuts."""
    drafter = drawn(DECODERS[name])
    options = {"drafter": drafter, "verify": verify.traversal, "fixed": True, "slots": 64}

    def texts(order, **more):
        temperature = np.float32([1, 0.7, 0, 1.3])[order]
        sampling = Sampling(temperature=temperature, seed=np.asarray(order) + 7, presence_penalty=0.3)
        prompts, limits = [PROMPTS[i] for i in order], np.asarray([24, 13, 24, 20])[order]
        out = specjax.generate(DECODER, prompts, sampling=sampling, max_new_tokens=limits, **options, **more)
        new = [row.tolist() for row in out.new_tokens()]
        return dict(zip(order, new, strict=True))

    together = texts([0, 1, 2, 3])
    assert texts([3, 1, 0, 2]) == together
    assert [len(together[i]) for i in range(4)] == [24, 13, 24, 20]
    stop = together[0][11]
    cut = texts([0, 1, 2, 3], stop_tokens=(stop,))
    for row, text in together.items():
        assert cut[row] == (text[: text.index(stop) + 1] if stop in text else text)


# Shapes.


def test_the_best_tree_keeps_the_most():
    """Against all trees of four drafts; and smaller trees begin larger ones."""
    accepted = [[0.6, 0.25, 0.1], [0.5, 0.3, 0.1]]
    every = [(i,) for i in range(3)] + [(i, j) for i in range(3) for j in range(3)]

    def value(tree):
        return sum(np.prod([accepted[depth][rank] for depth, rank in enumerate(path)]) for path in tree)

    whole = [
        tree
        for tree in itertools.combinations(every, 4)
        if all(path[:-1] in ((), *tree) and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree) for path in tree)
    ]
    found = best_tree(accepted, 4)
    assert value(found) == max(map(value, whole))
    assert found == best_tree(accepted, 7)[:4] == ((0,), (0, 0), (1,), (0, 1))
    with pytest.raises(ValueError, match="nodes is 13 and there are 12 drafts of known acceptance"):
        best_tree(accepted, 13)
    assert paths_tree(5, 2) == ((0,), (0, 0), (1,), (1, 0), (2,))


def test_a_shape_says_what_is_fed():
    shape = Shape(in_order(BUSHY))
    assert shape.paths[:6] == ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0))
    assert shape.parents == (-1, -1, -1, 0, 0, 1, 4, 4)
    assert [shape.fed(depth) for depth in (1, 2)] == [[0, 1], [0, 1, 4]]
    assert [shape.last_fed(depth) for depth in (0, 1, 2)] == [[-1], [0, 1], [4]]
    assert shape.parents_fed(2) == [-1, -1, 0]
    assert shape.followed(4).nonzero()[0].tolist() == [0, 4]


def test_drafts_without_a_law_are_not_proposed():
    tree = DrawnTree.of(((0,), (1,), (0, 0)), "distinct", 2)
    logits = jnp.zeros((2, 1, 3))

    def draw(logits_bv, drafts_bg, index, before_bg, siblings):
        token = jnp.broadcast_to(jnp.arange(siblings)[None], (2, siblings))
        return token, jnp.where(index == 2, jnp.asarray([[jnp.nan], [1 / 3]]), 1 / 3) * jnp.ones((2, 3))

    proposal = tree.add(draw, logits).add(draw, logits).propose(jnp.ones((2,), bool))
    assert proposal.length_b.tolist() == [2, 3]


def test_bad_trees_are_refused_before_anything_compiles():
    fork = drawn(MODEL, FORK)
    for drafter, rule, message in [
        (fork, verify.multipath, "siblings is 'distinct' and verify takes drawn trees of independent paths alone"),
        (drawn(MODEL, FORK, "independent"), verify.multipath, "siblings='paths'"),
        (drawn(MODEL, FORK, "paths"), verify.traversal, r"several drafts after \(0,\)"),
        (drawn(MODEL, FORK, "chosen"), verify.walk, "siblings is 'chosen'; give one of distinct, independent, paths"),
        (drawn(MODEL, FORK, "many"), verify.walk, "siblings is 'many'; give one of chosen, distinct"),
        (fork, verify.block, "a rule for chains"),
        (drawn(MODEL, ((0,), (1, 0))), verify.walk, r"the tree has \(1, 0\) after"),
        (drawn(MODEL, tuple((i,) for i in range(12))), verify.walk, "12 siblings that differ and there are 11 tokens"),
        (dataclasses.replace(drawn(EAGLE_3), tree_depth=2), verify.walk, "tree_depth is 2 and the tree has another"),
        (dataclasses.replace(EAGLE_3, siblings="distinct", tree_depth=2), verify.walk, "a tree that grows is chosen"),
        (dataclasses.replace(DFLASH, siblings="distinct", tree_depth=2), verify.walk, "a tree of the likeliest"),
        (dataclasses.replace(DFLASH, num_draft=200, tree_depth=1), verify.walk, "num_draft is 200 and a tree of depth"),
        (dataclasses.replace(DFLASH, argmax=True, tree_depth=1), verify.walk, "argmax is True and a tree is drafted"),
        (drawn(ModelDrafter(MAMBA)), verify.walk, "the draft model has no gather"),
    ]:
        with pytest.raises(ValueError, match=message):
            specjax.generate(DECODER, PROMPTS, drafter=drafter, verify=rule, max_new_tokens=4)
    with pytest.raises(ValueError, match="tree_depth is 4 and a block has 3 drafts"):
        dataclasses.replace(DFLASH, num_draft=8, tree_depth=4)


@pytest.mark.parametrize("name", ["model", "dspark, rnn"])
def test_drafters_pass_the_check(name):
    specjax.check_drafter(drawn(DECODERS[name]), DECODER)


def test_the_check_sees_wrong_siblings():
    for make, siblings in ((SaysPaths, "paths"), (SaysIndependent, "distinct")):
        drafter = make(DECODER, len(FORK), tree=FORK, siblings=siblings)
        with pytest.raises(
            ValueError, match=f"siblings is '{siblings}', and the proposal has probs_bgv, replacement=T"
        ):
            specjax.check_drafter(drafter, DECODER)
