"""The tree rules keep the target's law, by exact enumeration, and are those of the slow twins.

The twins follow every tree that can be drawn and every outcome of its decisions, in rational numbers. The library's
rules run as they are, in float64, on the same trees. What is wrong by one part in 10**12 fails. Faulty variants go
through the same enumeration and must fail by the listed amount.

The library runs at one shape: six drafts over three tokens. Smaller trees are cut by ``length_b``. Two tokens are three
of which one has probability 0. Tables are flat: the distributions after 0, 1, .. tokens, one context after the other.
"""

import dataclasses
import functools
import itertools
from fractions import Fraction
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_trees as twin
import wrong_tree_rules as wrong
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verify import TOLERANCE, normalised, precision
from wrong_tree_rules import FULL, TWO_PATHS, trees_of

from specjax import verify
from specjax.types import Proposal, ancestors
from specjax.verify import paths

RULES = {"recursive": verify.recursive, "traversal": verify.traversal, "multipath": verify.multipath}
TWINS = {"recursive": twin.recursive, "traversal": twin.traversal, "multipath": twin.multipath, "walk": twin.walk}
THREE_PATHS = (-1, 0, -1, 2, -1, 4)
G, VOCAB = 6, 3
CHUNK = 4096


# Tables of the reference: p, q, number of tokens.


def by_context(table, otherwise):
    law = {context: [Fraction(entry) for entry in entries.split()] for context, entries in table.items()}
    return lambda tokens: law.get(tokens, law[otherwise])


def constant(entries):
    return by_context({(): entries}, ())


TABLES = {
    "A": (constant("1/3 2/3"), constant("2/3 1/3"), 2),
    "B": (constant("1/2 1/3 1/6"), constant("1/6 1/3 1/2"), 3),
    "C": (
        by_context({(): "1/2 1/2", (0,): "1/4 3/4", (1,): "1 0"}, ()),
        by_context({(): "3/4 1/4", (0,): "1/2 1/2", (1,): "1/3 2/3"}, ()),
        2,
    ),
    "D": (constant("3/5 2/5 0"), constant("1/10 3/10 6/10"), 3),
}

# E[kept drafts] on A, B, C and D: rule, tree, whether drawn with replacement, whether duplicates are merged.
GOLDEN = {
    ("recursive", (-1, 0), True, False): "10/9 10/9 29/24 14/25",
    ("traversal", (-1, 0), True, False): "11/9 7/6 4/3 14/25",
    ("multipath", (-1, 0), True, False): "11/9 7/6 4/3 14/25",
    ("recursive", FULL, True, False): "112/81 403/324 205/144 546/625",
    ("traversal", FULL, True, False): "118/81 209/162 107/72 4439/5000",
    ("recursive", FULL, False, False): "2 112/81 2 429/400",
    ("traversal", FULL, False, False): "2 115/81 2 443/400",
    ("recursive", TWO_PATHS, True, True): "4/3 197/162 779/576 4/5",
    ("traversal", TWO_PATHS, True, True): "115/81 821/648 103/72 409/500",
    ("multipath", TWO_PATHS, True, False): "131/81 463/324 115/72 87/100",
    ("multipath", TWO_PATHS, True, True): "131/81 463/324 115/72 87/100",
    ("multipath", THREE_PATHS, True, False): "1289/729 2689/1728 21023/13824 1016761/1000000",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_twins_are_exact_in_rationals(case):
    """No difference at all of the joint law, and the known accepted lengths."""
    rule, parents, replacement, merge = case
    for (p, q, vocab), wanted in zip(TABLES.values(), GOLDEN[case].split(), strict=True):
        trees = trees_of(parents, q, replacement, vocab, twin.merged if merge else lambda root: root)
        law, kept = twin.round_law(TWINS[rule], trees, p, 3, replacement)
        assert twin.difference(law, twin.joint(p, 3)) == (0, 0)
        assert kept == Fraction(wanted)


@pytest.mark.parametrize("fault", wrong.FAULTS)
def test_faults_are_caught(fault):
    """Each faulty variant misses the law by the known amount. Tables A and B let some through, so D is there."""
    make, wanted = wrong.FAULTS[fault]
    for name, error in wanted.items():
        p, q, vocab = TABLES[name]
        rule, trees, replacement = make(p, q, vocab)
        assert sum(mass for mass, _ in trees) == 1
        law, _ = twin.round_law(rule, trees, p, 3, replacement)
        assert twin.difference(law, twin.joint(p, 3))[0] == error
    assert max(wanted.values()) > 0


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_exact_on_random_tables(name):
    """Tables that depend on the context, with zeros, in rational numbers."""
    rng = np.random.default_rng(3)
    shapes = (
        [THREE_PATHS[:4], (-1, -1, 0, 1, 2, 3)] if name == "multipath" else [FULL, (-1, 0, -1, 0, 1), (-1, -1, -1, 2)]
    )
    for parents, vocab, replacement in itertools.product(shapes, (2, 3), (True, False)):
        if (name == "multipath" and not replacement) or vocab ** len(parents) > 300:
            continue
        p, q = (functools.cache(lambda _: rational(rng, vocab)) for _ in range(2))  # noqa: B023
        depth = max(map(len, twin_lines(parents))) + 1
        law, kept = twin.round_law(TWINS[name], trees_of(parents, q, replacement, vocab), p, depth, replacement)
        assert twin.difference(law, twin.joint(p, depth)) == (0, 0)
        assert 0 <= kept < depth


def rational(rng, vocab):
    weights = rng.integers(0, 6, vocab) * (rng.random(vocab) > 0.25)
    weights[rng.integers(vocab)] += 1
    return [Fraction(int(weight), int(weights.sum())) for weight in weights]


def twin_lines(parents):
    """Yields the line of each draft, itself last."""
    lines = [()]
    for j, parent in enumerate(parents):
        lines.append((*lines[parent + 1], j))
    return lines[1:]


# The library, at one shape.

YES, NO = -1.0, -2.0  # in place of a uniform: one that lets the draft succeed, or fail


class Given:
    """Draws that hand out given uniforms and keep what the rule asks to be drawn."""

    def __init__(self, uniforms_bg):
        self.uniforms_bg = uniforms_bg

    def uniforms(self, count):
        assert self.uniforms_bg.shape[1] == count
        return self.uniforms_bg

    def emit(self, weights_bv, offset_b):
        self.weights_bv, self.offset_b = weights_bv, offset_b
        return jnp.full(weights_bv.shape[:1], -7, jnp.int32)


@functools.partial(jax.jit, static_argnames="rule")
def _run(rule, proposal, p_btv, uniforms_bg):
    chance_bg = rule.thresholds(proposal, p_btv).chance_bg
    uniforms_bg = jnp.where(uniforms_bg == YES, chance_bg / 2, uniforms_bg)
    draws = Given(jnp.where(uniforms_bg == NO, (1 + chance_bg) / 2, uniforms_bg))
    verdict = rule(proposal, p_btv, draws)
    return chance_bg, verdict, draws.weights_bv, draws.offset_b


def run(rule, proposal, p_btv, uniforms_bg, dtype=np.float64):
    """Returns the chances, the verdict and the weights of the next token; rows in chunks of one size."""
    proposal = jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x.astype(np.int32), proposal)
    rows, results = len(p_btv), []
    size = CHUNK if p_btv.shape[-1] == VOCAB else rows
    for start in range(0, rows, size):
        index = np.minimum(np.arange(start, start + size), rows - 1)
        with precision(dtype):
            part = (jax.tree.map(lambda x: x[index], proposal), p_btv.astype(dtype)[index])  # noqa: B023
            results.append(jax.device_get(_run(rule, *part, uniforms_bg.astype(dtype)[index])))
    chance_bg, verdict, weights_bv, offset_b = jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *results)
    assert chance_bg.dtype == weights_bv.dtype == dtype and (chance_bg >= 0).all()
    for counts in (verdict.num_accepted_b, verdict.next_b, verdict.path_bd):
        assert counts.dtype == np.int32
    np.testing.assert_array_equal(offset_b, verdict.num_accepted_b)
    return np.minimum(chance_bg, 1), verdict, weights_bv


# Trees in arrays.

FIRST = np.cumsum([0, *(VOCAB**d for d in range(G + 1))])  # the first row of each level of a table


class Trees(NamedTuple):
    """Rows of drafts: tokens, parents and lengths; the probability that each is drawn; its table, and its own law."""

    tokens: np.ndarray
    parents: np.ndarray
    length: np.ndarray
    mass: np.ndarray
    table: np.ndarray
    case: np.ndarray


def table(rng, cases, vocab=VOCAB, zeros=0.0):
    """Returns distributions ``[cases, FIRST[-1], VOCAB]`` after all contexts, entries 0 with probability ``zeros``."""
    weights = rng.gamma(0.7, size=(cases, FIRST[-1], VOCAB)) + 1e-3
    keep = rng.random(weights.shape) >= zeros
    np.put_along_axis(keep, rng.integers(vocab, size=weights.shape[:-1])[..., None], True, axis=-1)
    keep[..., vocab:] = False
    return normalised(weights * keep)


def one_hot_table(rng, cases, vocab=VOCAB):
    return np.eye(VOCAB)[rng.integers(vocab, size=(cases, FIRST[-1]))]


def contexts(tokens, parents):
    """Returns int ``[rows, g + 1]``, the row of a table at each place, and the depth of each place."""
    rows, g = tokens.shape
    number, depth = np.zeros((rows, g + 1), int), np.zeros((rows, g + 1), int)
    for j in range(g):
        above = (np.arange(rows), parents[:, j] + 1)
        number[:, j + 1] = number[above] * VOCAB + tokens[:, j]
        depth[:, j + 1] = depth[above] + 1
    return FIRST[depth] + number, depth


def padded(parents):
    """Returns parents of G drafts. What is past the length is a child of the root."""
    return np.array([*parents, *[-1] * (G - len(parents))])


def all_trees(q, parents, replacement, length=None, merge=False):
    """Returns every tree of this shape that can be drawn from the tables q; a filler where q has nothing left."""
    cases, g = len(q), len(parents)
    tokens = np.array(list(itertools.product(range(VOCAB), repeat=g)))
    tokens = np.pad(tokens, ((0, 0), (0, G - g)))
    parents = np.tile(padded(parents), (len(tokens), 1))
    context, _ = contexts(tokens, parents)
    mass = np.ones((cases, len(tokens)))
    for j in range(g):
        law = q[:, context[np.arange(len(tokens)), parents[:, j] + 1]].copy()
        elders = [i for i in range(j) if parents[0, i] == parents[0, j]]
        used = np.stack([tokens[:, i, None] == np.arange(VOCAB) for i in elders], 0).any(0) if elders else None
        if elders and not replacement:
            law[:, used] = 0
            filler = np.eye(VOCAB)[np.argmin(used, axis=-1)]
            law = np.where(law.sum(-1, keepdims=True) > 0, law, filler)
        mass *= np.take_along_axis(normalised(law), tokens[None, :, j, None], axis=-1)[..., 0]
    if merge:
        parents = merged(tokens, parents)
    case, row = np.nonzero(mass)
    length = np.full(len(row), g if length is None else length)
    return Trees(tokens[row], parents[row], length, mass[case, row], case, case)


def merged(tokens, parents):
    """Returns parents after which the children of a draft follow its elder sibling of the same token."""
    parents = parents.copy()
    for row, line in zip(tokens, parents, strict=True):
        first = {}
        for j in range(len(row)):
            line[j] = first.get((line[j], "kept"), line[j])
            first[j, "kept"] = first.setdefault((line[j], row[j]), j)
    return parents


def certain_trees(cases, parents, length=None):
    """Returns every tree of this shape whose siblings are different tokens, each as a case of its own."""
    g = len(parents)
    tokens = np.array(list(itertools.product(range(VOCAB), repeat=g)))
    for j, i in itertools.combinations(range(g), 2):
        if parents[i] == parents[j]:
            tokens = tokens[tokens[:, i] != tokens[:, j]]
    tokens = np.tile(np.pad(tokens, ((0, 0), (0, G - g))), (cases, 1))
    rows = len(tokens)
    length = np.full(rows, g if length is None else length)
    which = np.repeat(np.arange(cases), rows // cases)
    return Trees(tokens, np.tile(padded(parents), (rows, 1)), length, np.ones(rows), which, np.arange(rows))


def proposal_of(trees, q, replacement):
    """Returns the proposal, its q None for deterministic drafts, and the context of each place."""
    context, _ = contexts(trees.tokens, trees.parents)
    above = np.take_along_axis(context, trees.parents + 1, axis=1)
    probs = None if q is None else q[trees.table[:, None], above]
    return Proposal(trees.tokens, probs, trees.length, parents_bg=trees.parents, replacement=replacement), context


def round_law(rule, p, q, trees, replacement=True, dtype=np.float64):
    """Enumerates one round, followed by the target.

    Args:
      rule: a ``TreeRule``.
      p: the target's tables.
      q: the tables that drafts were drawn from, None for deterministic drafts.
      trees: all trees that the round may have.
      replacement: how siblings were drawn.
      dtype: in which the rule computes; the law of what it does is found in float64.

    Returns:
      The largest difference from the target's joint law, and E[kept drafts], for each case.
    """
    proposal, context = proposal_of(trees, q, replacement)
    p_btv = p[trees.table[:, None], context]
    count = int(trees.length.max(initial=0))
    outcomes = np.array(list(itertools.product((YES, NO), repeat=count))).reshape(2**count, count)
    outcomes = np.pad(outcomes, ((0, 0), (0, G - count)), constant_values=YES)  # past the end all would succeed

    def repeat(x):
        return np.repeat(x, len(outcomes), axis=0)

    uniforms = np.tile(outcomes, (len(p_btv), 1))
    chance, verdict, weights = run(rule, jax.tree.map(repeat, proposal), repeat(p_btv), uniforms, dtype)
    counts = np.arange(G) < repeat(trees.length)[:, None]
    odds = np.where(uniforms == YES, chance.astype(np.float64), 1 - chance.astype(np.float64))
    # A row that is shorter than the longest meets some outcomes several times.
    mass = repeat(trees.mass) * np.where(counts, odds, np.where(np.arange(G) < count, 0.5, 1)).prod(-1)

    # Where each row stops, and the target's law from there on.
    kept, row = verdict.num_accepted_b, np.arange(len(mass))
    last = np.where(kept > 0, verdict.path_bd[row, kept - 1] + 1, 0)
    follow = np.where(np.arange(G)[None] < kept[:, None], verdict.path_bd, 0)
    above = np.take_along_axis(repeat(trees.parents), follow, axis=1)
    for d in range(int(kept.max(initial=0))):
        goes = kept > d
        np.testing.assert_array_equal(above[goes, d], follow[goes, d - 1] if d else -1)  # a path from the root
    assert (follow < np.maximum(repeat(trees.length), 1)[:, None]).all()
    np.testing.assert_array_equal(verdict.path_bd[np.arange(G) >= kept[:, None]], 0)
    stopped = mass[:, None] * normalised(weights.astype(np.float64))
    case, number = repeat(trees.case), repeat(context)[row, last] - FIRST[kept]
    table_of_case = np.zeros(trees.case.max() + 1, int)
    table_of_case[trees.case] = trees.table
    law, wanted = np.zeros((len(table_of_case), 1)), np.ones((len(table_of_case), 1))
    for n in range(int(contexts(trees.tokens, trees.parents)[1].max()) + 1):
        level = p[table_of_case, FIRST[n] : FIRST[n + 1]]
        law, wanted = law[..., None] * level, wanted[..., None] * level
        here = kept == n
        np.add.at(law, (case[here], number[here]), stopped[here])
        law, wanted = law.reshape(len(law), -1), wanted.reshape(len(law), -1)
    return np.abs(law - wanted).max(-1), np.bincount(case, mass * kept)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_golden_numbers(case):
    """The library's rules have the law and the accepted lengths of the twins on the tables of the reference."""
    rule, parents, replacement, merge = case
    p, q = np.zeros((4, FIRST[-1], VOCAB)), np.zeros((4, FIRST[-1], VOCAB))
    for i, (target, draft, vocab) in enumerate(TABLES.values()):
        for d in range(3):
            for number, tokens in enumerate(itertools.product(range(VOCAB), repeat=d)):
                p[i, FIRST[d] + number, :vocab] = [float(x) for x in target(tokens)]
                q[i, FIRST[d] + number, :vocab] = [float(x) for x in draft(tokens)]
    worst, kept = round_law(RULES[rule], p, q, all_trees(q, parents, replacement, merge=merge), replacement)
    assert worst.max() <= TOLERANCE
    np.testing.assert_allclose(kept, [float(Fraction(x)) for x in GOLDEN[case].split()], atol=TOLERANCE, rtol=0)


def families(rng):
    """Returns p and q of all the kinds of tables that a rule may meet, and of how many tokens each is."""
    zeros, hot = functools.partial(table, rng, 1, zeros=0.4), functools.partial(one_hot_table, rng, 1)
    dense, same = table(rng, 1), zeros()
    split = rng.integers(1, VOCAB, size=dense.shape[:-1])[..., None]
    rank = np.argsort(rng.random(dense.shape), axis=-1)
    pairs = [
        (dense, table(rng, 1)),
        (zeros(), zeros()),
        (table(rng, 1, 2), table(rng, 1, 2)),
        (zeros(vocab=2), zeros(vocab=2)),
        (same, same),
        (np.where(rng.random(split.shape) < 0.5, same, dense), same),
        (normalised(dense * (1 + 1e-7 * rng.standard_normal(dense.shape))), dense),
        (normalised(dense * (rank < split)), normalised(table(rng, 1) * (rank >= split))),
        (hot(), table(rng, 1)),
        (dense, hot()),
        (hot(), hot()),
    ]
    return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))


def many_paths(parents):
    """Whether only the root has several children."""
    return all(parents.count(parent) <= 1 for parent in parents if parent >= 0)


LARGE = [FULL, THREE_PATHS, (-1, -1, 0, 1, 2, 3), (-1, -1, -1, 0, 1, 3), (-1, 0, 1, 1, 1, -1)]


def shapes(name):
    """Returns every tree of four drafts with one length each, and some of six."""
    small = [tuple(parents) for parents in twin.shapes(4)]
    return [
        *((parents, None) for parents in small if name != "multipath" or many_paths(parents)),
        *((parents, i % 4) for i, parents in enumerate(small) if name != "multipath" or many_paths(parents)),
        *((parents, length) for parents in LARGE for length in (None, 5) if name != "multipath" or many_paths(parents)),
    ]


MODES = [("recursive", True), ("recursive", False), ("traversal", True), ("traversal", False), ("multipath", True)]


@pytest.mark.parametrize(("name", "replacement"), MODES)
def test_joint_law_is_the_targets(name, replacement):
    """Over all families of tables, all small trees, and some larger ones; cut by their length, and merged."""
    rng = np.random.default_rng(4)
    p, q = families(rng)
    number, worst = 0, 0.0
    for parents, length in shapes(name):
        part = np.arange(len(p)) if len(parents) == 4 else rng.permutation(len(p))[:2]
        merge = name == "multipath" and number % 2 == 1
        trees = all_trees(q[part], parents, replacement, length, merge)
        law, kept = round_law(RULES[name], p[part], q[part], trees, replacement)
        worst, number = max(worst, law.max()), number + 1
        if name == "traversal" and parents == FULL:
            assert (kept >= round_law(RULES["recursive"], p[part], q[part], trees, replacement)[1] - TOLERANCE).all()
    print(f"\n{name}, replacement={replacement}: {number} trees, largest difference {worst:.1e}")
    assert number > 30
    assert worst <= TOLERANCE


def test_traversal_does_not_always_keep_more():
    """On this tree, drawn without replacement, recursive rejection keeps more drafts than traversal on average."""
    high, low = [Fraction(2, 3), Fraction(1, 3)], [Fraction(1, 3), Fraction(2, 3)]
    p, q = (lambda tokens, laws=laws: laws[len(tokens)] for laws in ((low, high, low, low), (high, low, low, high)))
    trees = trees_of((-1, 0, 0, 2), q, False, 2)
    for rule, wanted in ((twin.traversal, Fraction(13, 9)), (twin.recursive, Fraction(14, 9))):
        law, kept = twin.round_law(rule, trees, p, 4, False)
        assert twin.difference(law, twin.joint(p, 4)) == (0, 0) and kept == wanted


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_duplicates(name, merge):
    """Paths drawn independently often share tokens. The rules are exact with their children together or apart, and the
    two rules that follow one draft keep more if they are together."""
    p, q = families(np.random.default_rng(5))
    parents = (-1, -1, 0, 1)
    worst, kept = round_law(RULES[name], p, q, all_trees(q, parents, True, merge=merge))
    assert worst.max() <= TOLERANCE
    _, apart = round_law(RULES[name], p, q, all_trees(q, parents, True))
    assert (kept >= apart - TOLERANCE).all()
    assert (kept > apart + 1e-3).any() == (merge and name != "multipath")


@pytest.mark.parametrize("name", RULES)
def test_deterministic_drafts(name):
    """Every tree of different siblings keeps the law. Recursive and traversal keep what the walk keeps, the most that
    a rule can keep of such a tree: the sum of p over its paths."""
    p, _ = families(np.random.default_rng(6))
    for i, parents in enumerate(parents for parents in twin.shapes(4) if parents.count(-1) <= VOCAB):
        trees = certain_trees(len(p), parents, None if i % 2 else 3)
        worst, kept = round_law(RULES[name], p, None, trees)
        assert worst.max() <= TOLERANCE
        context, _ = contexts(trees.tokens, trees.parents)
        reach = np.ones((len(trees.tokens), G + 1))
        for j in range(4):
            above = trees.parents[:, j] + 1
            row = np.arange(len(reach))
            reach[:, j + 1] = reach[row, above] * p[trees.table, context[row, above], trees.tokens[:, j]]
        most = np.where(np.arange(G) < trees.length[:, None], reach[:, 1:], 0).sum(-1)
        assert (kept <= most + TOLERANCE).all()
        if name != "multipath":
            np.testing.assert_allclose(kept, most, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", RULES)
def test_float32_law(name):
    """In the precision that is shipped, rounding moves no probability by more than a few units of the last place."""
    p, q = families(np.random.default_rng(7))
    worst, _ = round_law(RULES[name], p, q, all_trees(q, (-1, -1, 0, 1), True), dtype=np.float32)
    print(f"\n{name} in float32: largest difference {worst.max():.1e}")
    assert worst.max() <= 1e-6


# Draw by draw.


def random_trees(rng, rows, name, replacement, certain, zeros):
    """Returns tables of one case for each row, and a tree that was drawn from q, of any shape and length."""
    p, q = table(rng, rows, zeros=zeros), table(rng, rows, zeros=zeros)
    tokens, parents = np.zeros((rows, G), int), np.zeros((rows, G), int)
    for row in range(rows):
        while True:
            line = [int(rng.integers(-1, j)) for j in range(G)]
            if (name != "multipath" or many_paths(line)) and (not certain or line.count(-1) <= VOCAB):
                break
        parents[row] = line
        for j, parent in enumerate(line):
            context, _ = contexts(tokens[row : row + 1], parents[row : row + 1])
            law = q[row, context[0, parent + 1]].copy()
            elders = [tokens[row, i] for i in range(j) if line[i] == parent]
            if certain:
                law = np.isin(np.arange(VOCAB), elders, invert=True) * 1.0
            elif not replacement:
                law[elders] = 0
            if not law.any():
                law = np.eye(VOCAB)[min(set(range(VOCAB)) - set(elders), default=0)]
            tokens[row, j] = rng.choice(VOCAB, p=law / law.sum())
    length, row = rng.integers(0, G + 1, rows), np.arange(rows)
    return p, q, Trees(tokens, parents, length, np.ones(rows), row, row)


def place_of(tokens):
    """Returns the row of a table after some tokens."""
    number = functools.reduce(lambda number, token: number * VOCAB + token, tokens, 0)
    return FIRST[len(tokens)] + number


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from([*MODES, ("recursive", None), ("traversal", None), ("multipath", None)]),
    zeros=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rules_agree_with_twins(mode, zeros, seed):
    """The same uniforms keep the same path and leave the same weights: random trees, tables, lengths and uniforms."""
    (name, replacement), rows = mode, 32
    rng = np.random.default_rng(seed)
    certain, replacement = replacement is None, replacement is not False
    p, q, trees = random_trees(rng, rows, name, replacement, certain, zeros)
    proposal, context = proposal_of(trees, None if certain else q, replacement)
    uniforms = rng.random((rows, G))
    _, verdict, weights = run(RULES[name], proposal, p[trees.table[:, None], context], uniforms)
    chex.assert_shape(verdict.path_bd, (rows, G))
    for row, n in enumerate(trees.length):
        target, draft = (lambda tokens, laws=laws[row]: list(laws[place_of(tokens)]) for laws in (p, q))
        root = twin.grow(trees.parents[row, :n], trees.tokens[row, :n], None if certain else draft)
        decide = lambda index, chance, row=row: uniforms[row, index] < chance
        node, wanted = TWINS[name](root, target, decide, replacement)
        kept = verdict.path_bd[row, : verdict.num_accepted_b[row]]
        assert (kept[-1] if len(kept) else -1) == node.index
        assert tuple(trees.tokens[row, kept]) == node.tokens
        np.testing.assert_allclose(normalised(weights[row]), normalised(np.array(wanted)), atol=1e-9, rtol=0)


@functools.partial(jax.jit, static_argnames="rule")
def _alone(rule, proposal, p_btv, uniforms_bg):
    draws = Given(uniforms_bg)
    return rule(proposal, p_btv, draws), draws.weights_bv


@pytest.mark.parametrize(("name", "chain"), [("recursive", "token"), ("traversal", "block"), ("multipath", "block")])
def test_chains_are_trees(name, chain):
    """On chains the tree rules decide as the chain rules do, with parents or without."""
    rng, rows = np.random.default_rng(8), 400
    p, q = table(rng, rows, zeros=0.2), table(rng, rows, zeros=0.2)
    tokens, parents = np.zeros((rows, G), int), np.tile(np.arange(G) - 1, (rows, 1))
    length, row = rng.integers(0, G + 1, rows), np.arange(rows)
    for j in range(G):
        context, _ = contexts(tokens, parents)
        tokens[:, j] = (q[row, context[:, j]] / rng.exponential(size=(rows, VOCAB))).argmax(-1)
    proposal, context = proposal_of(Trees(tokens, parents, length, np.ones(rows), row, row), q, True)
    p_btv, uniforms = p[row[:, None], context], rng.random((rows, G))
    _, verdict, weights = run(RULES[name], proposal, p_btv, uniforms)
    with precision(np.float64):
        for rule in (getattr(verify, chain), RULES[name]):
            plain = dataclasses.replace(proposal, parents_bg=None, length_b=length.astype(np.int32))
            wanted, wanted_weights = jax.device_get(_alone(rule, plain, p_btv, uniforms))
            assert wanted.path_bd is None
            np.testing.assert_array_equal(verdict.num_accepted_b, wanted.num_accepted_b)
            np.testing.assert_allclose(normalised(weights), normalised(wanted_weights), atol=1e-12, rtol=0)
    kept = np.arange(G) < verdict.num_accepted_b[:, None]
    np.testing.assert_array_equal(verdict.path_bd, np.where(kept, np.arange(G), 0))
    assert set(verdict.num_accepted_b) == set(range(G + 1))


def test_multipath_ranks_a_larger_vocabulary():
    """Of 300 tokens, the upper bits of p / q rank them as p / q does: chances and residual of the first level."""
    rng, vocab, rows = np.random.default_rng(16), 300, 8
    p, q = (normalised(rng.gamma(0.7, size=(rows, vocab)) + 1e-3) for _ in range(2))
    q[:, 200:] = 0
    q = normalised(q)
    tokens = np.stack([rng.choice(vocab, size=4, p=law) for law in q])
    parents = np.full((rows, 4), -1)
    proposal = Proposal(tokens, np.repeat(q[:, None], 4, axis=1), np.full(rows, 4), parents_bg=parents)
    chance, verdict, weights = run(verify.multipath, proposal, np.repeat(p[:, None], 5, axis=1), np.full((rows, 4), NO))
    np.testing.assert_array_equal(verdict.num_accepted_b, 0)
    for row in range(rows):
        asked = {}
        note = lambda index, chance, asked=asked: asked.update({index: chance})
        laws = [lambda _, law=law[row]: law.tolist() for law in (p, q)]
        root = twin.grow(parents[row], tokens[row].tolist(), laws[1])
        _, wanted = twin.multipath(root, laws[0], note, True)
        np.testing.assert_allclose(chance[row], [asked.get(j, 0) for j in range(4)], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(normalised(weights[row]), wanted, atol=TOLERANCE, rtol=0)


# Temperature 0.


@pytest.mark.parametrize(
    ("name", "replacement"), [*MODES[:4], ("recursive", None), ("traversal", None), ("multipath", None)]
)
def test_one_hot_targets_keep_one_path(name, replacement):
    """Where p is one-hot, all rules keep what the walk keeps, whatever the uniforms and q."""
    rng, rows = np.random.default_rng(10), 400
    certain, replacement = replacement is None, replacement is not False
    _, q, trees = random_trees(rng, rows, "walk", replacement, certain, 0.5)
    p = one_hot_table(rng, rows)
    proposal, context = proposal_of(trees, None if certain else q, replacement)
    _, verdict, weights = run(RULES[name], proposal, p[trees.table[:, None], context], rng.random((rows, G)))
    for row, n in enumerate(trees.length):
        target = lambda tokens, law=p[row]: list(law[place_of(tokens)])
        root = twin.grow(trees.parents[row, :n], trees.tokens[row, :n], None)
        node, wanted = twin.walk(root, target, lambda _, chance: chance == 1, True)
        assert tuple(trees.tokens[row, verdict.path_bd[row, : verdict.num_accepted_b[row]]]) == node.tokens
        np.testing.assert_array_equal(weights[row] > 0, np.array(wanted) > 0)
    assert set(verdict.num_accepted_b) >= {0, 1, 2, 3}


# The target's own samples.


class Sampled:
    """Draws whose samples are given: the token after d kept drafts is ``own_bt[:, d]``, if its weight is not 0."""

    def __init__(self, own_bt):
        self.own_bt = own_bt

    def uniforms(self, count):
        raise AssertionError("the target's own samples are compared with no uniforms")

    def emit(self, weights_bv, offset_b):
        row_b = jnp.arange(len(weights_bv))
        own_b = self.own_bt[row_b, offset_b]
        return jnp.where(weights_bv[row_b, own_b] > 0, own_b, -9)


@pytest.mark.parametrize("rule", [verify.walk, verify.coupled], ids=["walk", "coupled"])
def test_walks_emit_the_targets_own_samples(rule):
    """Whatever the tree, the text is what the target samples, and it goes on as far as the tree does."""
    rng, rows = np.random.default_rng(9), 400
    p, _, trees = random_trees(rng, rows, "walk", True, False, 0.0)
    proposal, context = proposal_of(trees, None, True)
    own = rng.integers(VOCAB, size=(rows, G + 1)).astype(np.int32)
    with precision(np.float64):
        arguments = jax.tree.map(jnp.asarray, (proposal, p[trees.table[:, None], context], own))
        verdict = jax.jit(lambda proposal, p_btv, own_bt: rule(proposal, p_btv, Sampled(own_bt)))(*arguments)
    verdict = jax.device_get(verdict)
    for row, n in enumerate(trees.length):
        at, kept = -1, []
        while True:
            children = [
                j for j in range(n) if trees.parents[row, j] == at and trees.tokens[row, j] == own[row, len(kept)]
            ]
            if not children:
                break
            at = children[0]
            kept.append(at)
        assert list(verdict.path_bd[row]) == kept + [0] * (G - len(kept))
        assert verdict.num_accepted_b[row] == len(kept)
        assert verdict.next_b[row] == own[row, len(kept)]
    assert set(verdict.num_accepted_b) >= {0, 1, 2, 3}


def test_walks_keep_the_paths_of_the_tree():
    """On trees of q's likeliest tokens, E[kept drafts] is the sum of p over the paths. The law is p's on any tree."""
    for (p, q, vocab), wanted in zip(TABLES.values(), ("4/9 2", "7/36 3/4", "5/8 2", "0 14/25"), strict=True):
        for count, kept in zip((1, 2), wanted.split(), strict=True):
            parents, tokens, likeliest = [], [], []
            for depth in range(2):
                for place, path in [(-1, ())] if depth == 0 else likeliest:
                    law = q(path)
                    best = sorted(range(vocab), key=law.__getitem__, reverse=True)[:count]
                    parents += [place] * count
                    tokens += best
                    likeliest = likeliest + [(len(tokens) - count + i, (x,)) for i, x in enumerate(best)] * (depth == 0)
            law, mean = twin.round_law(twin.walk, [(1, twin.grow(parents, tokens, None))], p, 3)
            assert twin.difference(law, twin.joint(p, 3)) == (0, 0)
            assert mean == Fraction(kept)


# Faulty variants and misuse of the library's rules: each must fail the enumeration that the rules pass.


def unscaled_chance(proposal, p_btv):
    """The chances of traversal with what recursive rejection leaves."""
    return verify.traversal_thresholds(proposal, p_btv)._replace(
        left_btv=verify.recursive_thresholds(proposal, p_btv).left_btv
    )


CONTROLS = {
    "traversal from the root on": (verify.TreeRule(verify.traversal_thresholds, verify.own_success), True, True),
    "recursive from the leaves on": (verify.TreeRule(verify.recursive_thresholds, verify.success_below), True, True),
    "traversal with the residual of recursive": (verify.TreeRule(unscaled_chance, verify.success_below), True, True),
    "recursive: drawn without, told with": (verify.recursive, False, True),
    "traversal: drawn without, told with": (verify.traversal, False, True),
    "multipath of siblings without replacement": (verify.multipath, False, True),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_are_caught(control):
    rule, drawn, told = CONTROLS[control]
    rng = np.random.default_rng(11)
    p, q = table(rng, 12), table(rng, 12)
    worst, _ = round_law(rule, p, q, all_trees(q, (-1, -1, 0, 1), drawn), told)
    print(f"\ncaught: {control}: off by {worst.max():.1e}")
    assert worst.max() > 1e-3


@pytest.mark.parametrize("name", ["recursive", "traversal"])
def test_draws_with_replacement_may_be_told_as_without(name):
    """A draft that repeats an elder sibling then counts as none. The others are draws without replacement. So the law
    stays exact, and fewer drafts are kept."""
    p, q = families(np.random.default_rng(14))
    trees = all_trees(q, (-1, -1, 0, 1), True)
    worst, kept = round_law(RULES[name], p, q, trees, False)
    assert worst.max() <= TOLERANCE
    more = round_law(RULES[name], p, q, trees, True)[1] - kept
    assert more.min() >= -TOLERANCE and more.max() > 1e-3


def test_deterministic_drafts_scored_with_their_softmax_are_caught():
    p, q = families(np.random.default_rng(12))
    trees = certain_trees(len(p), (-1, -1, 0, 1))
    for rule in RULES.values():
        assert round_law(rule, p, q, trees)[0].max() > 1e-2


def test_branches_below_the_root_are_no_paths():
    """Multipath takes paths that were drawn from the root on. Siblings elsewhere are not counted as it counts."""
    p, q = families(np.random.default_rng(13))
    assert round_law(verify.multipath, p, q, all_trees(q, (-1, -1, 0, 0, 1), True))[0].max() > 1e-3


# What may depend on what.


def test_a_length_that_looks_at_its_draft():
    """p = (7/10, 3/10), q = (1/2, 1/2): draft 1 is verified only if it is token 0. The law is off by a known amount."""
    p, q = [Fraction(7, 10), Fraction(3, 10)], [Fraction(1, 2), Fraction(1, 2)]
    target, draft = lambda _: p, lambda _: q
    one = [(mass, cut(root)) for mass, root in trees_of((-1,), draft, True, 2)]
    law, _ = twin.round_law(twin.recursive, one, target, 2)
    first = [law[0, 0] + law[0, 1], law[1, 0] + law[1, 1]]
    assert first == [Fraction(17, 20), Fraction(3, 20)]
    two = [(mass, cut(root)) for mass, root in trees_of((-1, 0), draft, True, 2)]  # draft 2 is verified as usual
    law, _ = twin.round_law(twin.recursive, two, target, 3)
    pairs = [sum(law[a, b, c] for c in range(2)) for a in range(2) for b in range(2)]
    assert pairs == [Fraction(n, 200) for n in (119, 51, 21, 9)]
    # A draft of q below 1/2 is dropped: the target's law would be (1/3, 2/3).
    p, q, vocab = TABLES["A"]
    dropped = [(mass, cut(root)) for mass, root in trees_of((-1,), q, True, vocab)]
    law, _ = twin.round_law(twin.recursive, dropped, p, 2)
    assert [law[0, 0] + law[0, 1], law[1, 0] + law[1, 1]] == [Fraction(4, 9), Fraction(5, 9)]


def cut(root, lowest=1):
    """Drops the first drafts whose own token is ``lowest`` or more."""
    root.children = [child for child in root.children if child.tokens[-1] < lowest]
    return root


@pytest.mark.parametrize("rule", [twin.recursive, twin.traversal], ids=["recursive", "traversal"])
def test_a_shape_that_follows_from_what_is_known(rule):
    """p = (7/10, 3/10), q = (1/2, 1/2): draft 2 exists only if draft 1 is token 0. The law is exact."""
    p, q = [Fraction(7, 10), Fraction(3, 10)], [Fraction(1, 2), Fraction(1, 2)]

    def change(root):
        for child in root.children:
            child.children = child.children if child.tokens == (0,) else []
        return root

    law, kept = twin.round_law(rule, trees_of((-1, 0), lambda _: q, True, 2, change), lambda _: p, 3)
    assert twin.difference(law, twin.joint(lambda _: p, 3)) == (0, 0)
    assert kept == Fraction(6, 5) if rule is twin.recursive else kept >= Fraction(6, 5)


@pytest.mark.parametrize("rule", [twin.recursive, twin.traversal, twin.walk], ids=["recursive", "traversal", "walk"])
def test_trees_pruned_by_their_own_tokens(rule):
    """What a draft's presence or rank may follow from: never its own token or what was drawn from it; but from the
    context, and from tokens of its elder siblings and of drafts on other branches. For the walk it may follow from
    anything."""
    p, _, vocab = TABLES["B"]
    draft = lambda tokens: [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)][:: -1 if tokens else 1]

    def own_token(root):
        return cut(root, 2)

    def own_children(root):
        root.children = [child for child in root.children if child.children[0].tokens[-1] != 2]
        return root

    def rank_by_children(root):
        root.children.sort(key=lambda child: child.children[0].tokens[-1])
        return root

    def number_by_context(root):
        for child in root.children:
            child.children = child.children[: child.tokens[-1]]
        return root

    def shape_by_siblings(root):
        last = root.children[-1]
        last.children = last.children if root.children[0].tokens[-1] == 1 else last.children[:1]
        return root

    for replacement in (True, False):
        for change, exact in (
            (own_token, False),
            (own_children, False),
            (rank_by_children, False),
            (number_by_context, True),
            (shape_by_siblings, True),
        ):
            law, _ = twin.round_law(rule, trees_of(FULL, draft, replacement, vocab, change), p, 3, replacement)
            error = twin.difference(law, twin.joint(p, 3))[0]
            exact = exact or rule is twin.walk
            assert error == 0 if exact else error > Fraction(1, 1000), change.__name__


# Misuse, and edges.


def test_chain_rules_refuse_trees():
    p = jnp.full((1, 3, 2), 0.5)
    parents = jnp.array([[-1, -1]], jnp.int32)
    proposal = Proposal(jnp.zeros((1, 2), jnp.int32), p[:, :2], jnp.array([2], jnp.int32), parents_bg=parents)
    for rule in (verify.token, verify.block):
        assert not rule.trees
        with pytest.raises(ValueError, match=r"tree.*verify=specjax.verify.traversal"):
            rule(proposal, p, Given(jnp.zeros((1, 2))))
    assert all(rule.trees for rule in (*RULES.values(), verify.walk, verify.coupled))
    assert [rule.shares_noise for rule in (*RULES.values(), verify.walk, verify.coupled)] == [False] * 4 + [True]


def test_multipath_refuses_draws_without_replacement():
    p = jnp.full((1, 3, 2), 0.5)
    proposal = Proposal(
        jnp.zeros((1, 2), jnp.int32),
        p[:, :2],
        jnp.array([2], jnp.int32),
        parents_bg=jnp.array([[-1, -1]], jnp.int32),
        replacement=False,
    )
    with pytest.raises(ValueError, match=r"replacement=False.*verify=specjax.verify.traversal"):
        verify.multipath(proposal, p, Given(jnp.zeros((1, 2))))


@pytest.mark.parametrize("rule", [*RULES.values(), verify.walk], ids=[*RULES, "walk"])
def test_rounds_without_drafts(rule):
    """A proposal of no drafts, as in plain rounds: the next token comes from p."""
    p = jnp.array([[[0.25, 0.75]], [[1.0, 0.0]]])
    draws = Given(jnp.zeros((2, 0)))
    verdict = rule(Proposal(jnp.zeros((2, 0), jnp.int32), None, jnp.zeros((2,), jnp.int32)), p, draws)
    np.testing.assert_array_equal(verdict.num_accepted_b, [0, 0])
    np.testing.assert_array_equal(draws.weights_bv, p[:, 0])


@pytest.mark.parametrize("rule", [*RULES.values(), verify.walk], ids=[*RULES, "walk"])
def test_verdict_is_int32_under_x64(rule):
    """The counts are part of the loop's carry, whose types do not change with the caller's settings."""
    p, parents = jnp.full((1, 3, 2), 0.5, jnp.float32), jnp.array([[-1, -1]], jnp.int32)
    length = jnp.array([2], jnp.int32)
    proposal = Proposal(jnp.array([[0, 1]], jnp.int32), p[:, :2], length, parents_bg=parents)
    with jax.enable_x64(True):
        verdict = rule(proposal, p, Given(jnp.zeros((1, 2), jnp.float32)))
    for counts in (verdict.num_accepted_b, verdict.next_b, verdict.path_bd):
        assert counts.dtype == jnp.int32


@pytest.mark.parametrize("name", RULES)
def test_impossible_tokens_fail_even_at_zero(name):
    """p = 0 fails at u = 0; q = 0 makes no nan."""
    p = np.tile([0.0, 0.4, 0.6], (1, G + 1, 1))
    for q in ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]):
        proposal = Proposal(
            np.zeros((1, G), int), np.tile(q, (1, G, 1)), np.full(1, G), parents_bg=np.array([padded((-1, 0))])
        )
        chance, verdict, weights = run(RULES[name], proposal, p, np.zeros((1, G)))
        np.testing.assert_array_equal(chance, 0)
        np.testing.assert_array_equal(verdict.num_accepted_b, 0)
        assert np.isfinite(weights).all() and weights[0, 0] == 0


def test_a_cut_proposal_stays_a_tree():
    """The first drafts of a tree are a tree, since parents come first."""
    rng = np.random.default_rng(15)
    _, q, trees = random_trees(rng, 3, "walk", False, False, 0.0)
    proposal = proposal_of(trees, q, False)[0]
    cut_short = jax.tree.map(jnp.asarray, proposal).first(4)
    chex.assert_trees_all_close(cut_short.parents_bg, trees.parents[:, :4])
    chex.assert_shape(cut_short.probs_bgv, (3, 4, VOCAB))
    assert not cut_short.replacement and (cut_short.length_b <= 4).all()


def test_paths():
    """Lines of ancestors, the first path of successes, its last place and its drafts in order."""
    parents = jnp.array([[-1, -1, 0, 0, 1, 3]], jnp.int32)
    lines = ancestors(parents)
    assert [list(np.flatnonzero(line)) for line in lines[0]] == [
        sorted(line) for line in twin_lines(parents[0].tolist())
    ]
    for success, wanted in (([0, 1, 1, 1, 1, 1], [1, 4]), ([1, 1, 0, 1, 1, 1], [0, 3, 5]), ([0, 0, 1, 1, 1, 1], [])):
        kept = paths.first_path(jnp.array([success], bool), parents, lines)
        assert list(np.flatnonzero(kept[0])) == wanted
        assert paths.last_place(kept)[0] == (wanted[-1] + 1 if wanted else 0)
        assert paths.path_of(kept)[0].tolist() == wanted + [0] * (6 - len(wanted))
