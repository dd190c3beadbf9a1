"""The verification rules keep the target's law, by exact enumeration.

One round is followed along every draft path and every outcome of its comparisons with uniforms, its stop
distribution is taken from the rule itself, the text is completed with the target's own law, and the joint law of the
first g+2 tokens is compared with the target's. The rules run as they are, in float64; what is wrong by one part in
10**12 fails. Faulty variants, each a bug seen in practice, go through the same enumeration and must fail.

Tables are flat: ``p[d]`` is ``[c, v**d, v]``, the target's distribution after each of the v**d first d tokens, for
c cases at once; ``q[d]`` is the draft's. Paths are numbered like the digits of a number in base v, so the first d
tokens of path k of g are number ``k // v**(g - d)``.
"""

import contextlib
import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import chdtrc

import specjax
from specjax import sampling, verify
from specjax.engine import round as engine_round
from specjax.sampling import RoundDraws, Sampling
from specjax.types import Proposal

RULES = {"token": verify.token, "block": verify.block}
TWINS = {"token": reference.verify_token, "block": reference.verify_block}
TOLERANCE = 1e-12
VISIBLE = 1e-3  # what a faulty variant must miss the law by, at the least


class Recorder:
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
def _run(rule, tokens_bg, p_bsv, q_bgv, length_b, uniforms_bg):
    draws = Recorder(uniforms_bg)
    verdict = rule(Proposal(tokens_bg, q_bgv, length_b), p_bsv, draws)
    return verdict.num_accepted_b, verdict.next_b, draws.weights_bv, draws.offset_b


@functools.partial(jax.jit, static_argnames="thresholds")
def _thresholds(thresholds, tokens_bg, p_bsv, q_bgv, length_b):
    if q_bgv is None:
        q_bgv = Proposal(tokens_bg, None, length_b).q(p_bsv.shape[-1]).astype(p_bsv.dtype)
    return thresholds(tokens_bg, p_bsv, q_bgv, length_b)


@contextlib.contextmanager
def precision(dtype):
    """float64 for what is inside, and float32 as it ships."""
    if dtype == np.float32:
        yield
        return
    # Under x64 an arange is int64, which strict promotion would not compare with int32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def run(rule, tokens_bg, p_bsv, q_bgv, length_b, uniforms_bg):
    """Returns num_accepted_b and the weights that the rule hands to ``emit``, in the tables' own dtype."""
    with precision(p_bsv.dtype):
        accepted_b, next_b, weights_bv, offset_b = jax.device_get(
            _run(rule, tokens_bg, p_bsv, q_bgv, length_b, uniforms_bg)
        )
    assert weights_bv.dtype == p_bsv.dtype
    np.testing.assert_array_equal(offset_b, accepted_b)
    np.testing.assert_array_equal(next_b, -7)
    return accepted_b, weights_bv


def chances(rule, tokens_bg, p_bsv, q_bgv, length_b):
    """Returns ``[b, g]``, the probability that each draft succeeds, u being uniform on [0, 1)."""
    with precision(p_bsv.dtype):
        numerator, denominator, _ = jax.device_get(_thresholds(rule.thresholds, tokens_bg, p_bsv, q_bgv, length_b))
    numerator, denominator = numerator.astype(np.float64), denominator.astype(np.float64)
    assert (numerator >= 0).all() and (denominator >= 0).all()
    return np.where(
        numerator >= denominator, (numerator > 0) * 1.0, numerator / np.where(denominator > 0, denominator, 1)
    )


# Tables.


def random_tables(rng, cases, vocab, depth, zeros=0.0):
    """Returns ``depth`` levels of context-dependent distributions, entries 0 with probability ``zeros``."""
    levels = []
    for d in range(depth):
        weights = rng.gamma(0.7, size=(cases, vocab**d, vocab)) + 1e-3
        keep = rng.random(weights.shape) >= zeros
        np.put_along_axis(keep, rng.integers(vocab, size=(cases, vocab**d, 1)), True, axis=-1)
        levels.append(normalised(weights * keep))
    return levels


def normalised(weights):
    return weights / weights.sum(-1, keepdims=True)


def one_hot_tables(rng, cases, vocab, depth):
    return [np.eye(vocab)[rng.integers(vocab, size=(cases, vocab**d))] for d in range(depth)]


def disjoint_tables(rng, cases, vocab, g):
    """Returns p and q of which no context shares a token, but that after the last draft."""
    p, q = random_tables(rng, cases, vocab, g + 2), random_tables(rng, cases, vocab, g)
    for d in range(g):
        split = rng.integers(1, vocab, size=(cases, vocab**d, 1))
        rank = np.argsort(rng.random(p[d].shape), axis=-1)
        p[d], q[d] = normalised(p[d] * (rank < split)), normalised(q[d] * (rank >= split))
    return p, q


def families(rng, cases, vocab, g):
    """Yields (name, p, q, whether q is told): all the kinds of tables that a rule may meet."""
    dense = functools.partial(random_tables, rng, cases, vocab)
    hot = functools.partial(one_hot_tables, rng, cases, vocab)
    yield "dense", dense(g + 2), dense(g), True
    yield "zeros", dense(g + 2, 0.4), dense(g, 0.4), True
    p = dense(g + 2, 0.3)
    yield "equal", p, p[:g], True
    p, q = dense(g + 2, 0.3), dense(g, 0.3)
    same = [rng.random((cases, vocab**d, 1)) < 0.5 for d in range(g)]
    yield "equal in places", p, [np.where(s, a, b) for s, a, b in zip(same, p[:g], q, strict=True)], True
    p = dense(g + 2)
    yield "nearly equal", p, [normalised(a * (1 + 1e-7 * rng.standard_normal(a.shape))) for a in p[:g]], True
    yield "disjoint", *disjoint_tables(rng, cases, vocab, g), True
    yield "greedy target", hot(g + 2), dense(g), True
    yield "one-hot draft", dense(g + 2), hot(g), True
    yield "both one-hot", hot(g + 2), hot(g), True
    yield "deterministic draft", dense(g + 2), hot(g), False
    yield "deterministic draft, zeros", dense(g + 2, 0.4), hot(g), False


# Enumeration.


def paths(vocab, g):
    """Returns every path of g tokens, int32 ``[v**g, g]``."""
    return np.array(list(itertools.product(range(vocab), repeat=g)), np.int32).reshape(vocab**g, g)


def along_paths(levels, vocab, g):
    """Returns the distributions met along every path of g tokens, ``[c, v**g, levels, v]``."""
    path = np.arange(vocab**g)
    return np.stack([level[:, path // vocab ** (g - d)] for d, level in enumerate(levels)], axis=2)


def joint(levels):
    """Returns the law of the tokens that the levels emit one after the other, ``[c, v**len(levels)]``."""
    cases = levels[0].shape[0]
    law = np.ones((cases, 1))
    for level in levels:
        law = (law[..., None] * level).reshape(cases, -1)
    return law


def independent(q_at, _q_below, chance):
    """Returns the probability of drawing the drafts and seeing each succeed, and fail: two times ``[c, k, g]``."""
    return q_at * chance, q_at * (1 - chance)


def unchanged(weights_bv, _p_bsv, _accepted_b):
    return weights_bv


def round_law(rule, p, q, length, *, told=None, weigh=independent, stop=unchanged, dtype=np.float64):
    """Enumerates one round, followed by the target.

    Args:
      rule: a ``ChainRule``.
      p: g+2 levels of target tables.
      q: g levels of the tables that drafts are drawn from.
      length: ``[c, v**g]``, the length of each path's proposal.
      told: what the rule is told that q is: ``q`` itself, None for one-hot at the drafts, or something false.
      weigh: the joint probability of drafts and successes.
      stop: changes the weights of the token after the drafts.
      dtype: in which the rule computes; the law of what it does is found in float64.

    Returns:
      The law of the first g+2 tokens, ``[c, v**(g+2)]``, and E[kept drafts], ``[c]``.
    """
    g, vocab, cases = len(q), p[0].shape[-1], p[0].shape[0]
    count = vocab**g
    path_kg = paths(vocab, g)
    q_ckgv = along_paths(q, vocab, g)
    q_at = np.take_along_axis(q_ckgv, path_kg[None, ..., None], axis=-1)[..., 0]
    q_below = np.cumsum(q_ckgv, axis=-1) - q_ckgv
    q_below = np.take_along_axis(q_below, path_kg[None, ..., None], axis=-1)[..., 0]

    tokens_bg = np.tile(path_kg, (cases, 1))
    p_bsv = along_paths(p[: g + 1], vocab, g).reshape(cases * count, g + 1, vocab).astype(dtype)
    q_bgv = None if told is None else along_paths(told, vocab, g).reshape(cases * count, g, vocab).astype(dtype)
    length_b = np.broadcast_to(length, (cases, count)).reshape(-1).astype(np.int32)
    chance_bg = chances(rule, tokens_bg, p_bsv, q_bgv, length_b)
    succeeds, fails = weigh(q_at, q_below, chance_bg.reshape(cases, count, g))

    # The uniforms' cube is cut at the chances: within a cell the verdict is the same.
    outcomes = np.array(list(itertools.product((True, False), repeat=g)))[:, None]  # [o, 1, g]
    uniforms = np.where(outcomes, chance_bg / 2, (1 + chance_bg) / 2).astype(dtype)  # [o, b, g]
    mass = np.where(outcomes, succeeds.reshape(-1, g), fails.reshape(-1, g)).prod(-1)  # [o, b]

    def repeat(array):
        return None if array is None else np.tile(array, (len(outcomes),) + (1,) * (array.ndim - 1))

    rows = [repeat(array) for array in (tokens_bg, p_bsv, q_bgv, length_b)]
    accepted_b, weights_bv = run(rule, *rows, uniforms.reshape(-1, g))
    weights_bv = stop(weights_bv, rows[1], accepted_b).astype(np.float64)
    stopped = mass.reshape(-1, 1) * normalised(weights_bv)  # [o * b, v]

    case_b = np.tile(np.repeat(np.arange(cases), count), len(outcomes))
    path_b = np.tile(np.arange(count), cases * len(outcomes))
    law = np.zeros((cases, 1))
    for n in range(g + 2):
        law = (law[..., None] * p[n]).reshape(cases, vocab**n, vocab)
        if n <= g:
            here = accepted_b == n
            np.add.at(law, (case_b[here], path_b[here] // vocab ** (g - n)), stopped[here])
        law = law.reshape(cases, -1)
    kept = np.bincount(case_b, mass.reshape(-1) * accepted_b, cases)
    return law, kept


def lengths(rng, cases, vocab, g):
    """Yields every fixed proposal length, and one that depends on the drafts before its end."""
    for n in range(g + 1):
        yield np.full((cases, vocab**g), n)
    path = np.arange(vocab**g)
    length = np.full((cases, vocab**g), g)
    for d in reversed(range(g)):
        ends = rng.random((cases, vocab**d)) < 0.4
        length = np.where(ends[:, path // vocab ** (g - d)], d, length)
    yield length


SIZES = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]


def all_cases(seed, cases, sizes=SIZES):
    """Yields (family of each case, p, q, length, told) with all families and lengths of a size as one batch."""
    rng = np.random.default_rng(seed)
    for vocab, g in sizes:
        members = [
            (name, p, q, length, told)
            for name, p, q, told in families(rng, cases, vocab, g)
            for length in lengths(rng, cases, vocab, g)
        ]
        for group in (True, False):
            names, p, q, length, _ = zip(*(member for member in members if member[-1] == group), strict=True)
            p, q = ([np.concatenate(level) for level in zip(*tables, strict=True)] for tables in (p, q))
            yield np.repeat(names, cases), p, q, np.concatenate(length), q if group else None


def expected_kept(name, p, q, length):
    """Returns E[kept drafts] by the acceptance laws: sum_i E_q[prod_{j<=i} min(1, r_j)], or sum_i E_q[P_i]."""
    g, vocab, cases = len(q), p[0].shape[-1], p[0].shape[0]
    path_kg = paths(vocab, g)
    p_at, q_at = (
        np.take_along_axis(along_paths(levels, vocab, g), path_kg[None, ..., None], axis=-1)[..., 0]
        for levels in (p[:g], q)
    )
    reach, total = np.ones((cases, vocab**g)), np.zeros((cases, vocab**g))
    for i in range(g):
        ratio = p_at[..., i] / np.where(q_at[..., i] > 0, q_at[..., i], 1)
        reach = reach * np.minimum(1, ratio) if name == "token" else np.minimum(1, reach * ratio)
        total += reach * (i < length)
    return (total * q_at.prod(-1)).sum(-1)


def difference(law, p):
    return np.abs(law - joint(p)).max()


def enumerate_all(name, cases, sizes=SIZES, dtype=np.float64):
    """Returns the number of cases, the largest difference of the laws, and that of E[kept drafts]."""
    number, worst, worst_kept = 0, 0.0, 0.0
    for families_c, p, q, length, told in all_cases(20, cases, sizes):
        law, kept = round_law(RULES[name], p, q, length, told=told, dtype=dtype)
        worst = max(worst, difference(law, p))
        worst_kept = max(worst_kept, np.abs(kept - expected_kept(name, p, q, length)).max())
        number += len(families_c)
    return number, worst, worst_kept


@pytest.mark.parametrize("name", RULES)
def test_joint_law_is_the_targets(name):
    """The joint law of the first g+2 tokens, and the acceptance law, over all families and proposal lengths."""
    number, worst, worst_kept = enumerate_all(name, cases=8)
    print(f"\n{name}: {number} cases, largest difference {worst:.1e}, of E[kept] {worst_kept:.1e}")
    assert number == 8 * 11 * 24
    assert worst <= TOLERANCE
    assert worst_kept <= TOLERANCE


@pytest.mark.parametrize("name", RULES)
def test_float32_law(name):
    """In the precision that is shipped, rounding moves no probability by more than a few units of the last place."""
    number, worst, _ = enumerate_all(name, 8, [(3, 3)], np.float32)
    print(f"\n{name} in float32: {number} cases, largest difference {worst:.1e}")
    assert worst <= 1e-6


def test_x64_leaves_no_trace():
    p, q = random_tables(np.random.default_rng(0), 1, 2, 3), random_tables(np.random.default_rng(1), 1, 2, 1)
    round_law(verify.token, p, q, 1, told=q)
    assert jnp.ones(2).dtype == jnp.float32
    assert jax.config.jax_numpy_dtype_promotion == "strict"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("vocab", "g"), [(2, 1), (2, 2), (3, 2), (2, 3)])
def test_reference_is_exact_in_rationals(name, vocab, g):
    """The twin, in rational numbers: no difference at all, and the library's law is the same."""
    rng = np.random.default_rng(vocab * 10 + g)

    def table(depth):
        levels = []
        for d in range(depth):
            weights = rng.integers(0, 6, size=(vocab**d, vocab)) * (rng.random((vocab**d, vocab)) > 0.2)
            weights[np.arange(vocab**d), rng.integers(vocab, size=vocab**d)] += 1
            levels.append([[Fraction(int(w), int(row.sum())) for w in row] for row in weights])
        return levels

    def lookup(levels):
        def distribution(tokens):
            index = functools.reduce(lambda number, token: number * vocab + token, tokens, 0)
            return levels[len(tokens)][index]

        return distribution

    for _ in range(5):
        p, q = table(g + 2), table(g)
        law, kept = reference.round_law(TWINS[name], lookup(p), lookup(q), g, g + 2)
        target = lookup(p)
        for tokens in itertools.product(range(vocab), repeat=g + 2):
            mass = Fraction(1)
            for i in range(g + 2):
                mass *= target(tokens[:i])[tokens[i]]
            assert law.get(tokens, 0) == mass
        p, q = ([np.array([level], float) for level in levels] for levels in (p, q))
        law, library_kept = round_law(RULES[name], p, q, g, told=q)
        assert difference(law, p) <= TOLERANCE
        np.testing.assert_allclose(library_kept, [float(kept)], atol=TOLERANCE, rtol=0)


# Acceptance.


def test_golden_numbers():
    """E[kept] of the example in Sun et al. 2025: 10/9 and 11/9; exactly so in rational numbers."""
    p, q = [Fraction(1, 3), Fraction(2, 3)], [Fraction(2, 3), Fraction(1, 3)]
    for name, wanted in (("token", Fraction(10, 9)), ("block", Fraction(11, 9))):
        assert reference.round_law(TWINS[name], lambda _: p, lambda _: q, 2, 4)[1] == wanted
        levels = [np.tile(np.array(p, float), (1, 2**d, 1)) for d in range(4)]
        drafts = [np.tile(np.array(q, float), (1, 2**d, 1)) for d in range(2)]
        kept = round_law(RULES[name], levels, drafts, 2, told=drafts)[1]
        np.testing.assert_allclose(kept, float(wanted), atol=TOLERANCE, rtol=0)


def test_block_keeps_at_least_as_many():
    """On every table and for every proposal length; strictly more on most dense tables with g > 1."""
    more = []
    for family, p, q, length, told in all_cases(21, 8):
        token, block = (round_law(rule, p, q, length, told=told)[1] for rule in (verify.token, verify.block))
        assert (block >= token - TOLERANCE).all()
        certain = np.isin(
            family, ["one-hot draft", "both one-hot", "deterministic draft", "deterministic draft, zeros"]
        )
        np.testing.assert_allclose(block[certain], token[certain], atol=TOLERANCE, rtol=0)  # nothing to gain
        if len(q) > 1:
            more.extend((block - token > VISIBLE)[(family == "dense") & (length == len(q)).all(1)])
    assert np.mean(more) > 0.8


@pytest.mark.parametrize("name", RULES)
def test_one_draft_is_kept_with_the_overlap(name):
    """One draft is kept with probability sum_x min(p, q) = 1 - TV, the most that any rule can do."""
    rng = np.random.default_rng(22)
    p, q = random_tables(rng, 100, 5, 3, 0.2), random_tables(rng, 100, 5, 1, 0.2)
    kept = round_law(RULES[name], p, q, 1, told=q)[1]
    np.testing.assert_allclose(kept, np.minimum(p[0], q[0]).sum((1, 2)), atol=TOLERANCE, rtol=0)


# The full call: comparisons at their edges, and the twin on random input.


@pytest.mark.parametrize("name", RULES)
def test_uniforms_beside_the_thresholds(name):
    """Each uniform a hair below or above its threshold: kept drafts and stop weights are those of the twin."""
    rng = np.random.default_rng(23)
    vocab, g, cases = 3, 3, 24
    p = along_paths(random_tables(rng, cases, vocab, g + 1, 0.15), vocab, g)[:, 5]
    q = along_paths(random_tables(rng, cases, vocab, g), vocab, g)[:, 5]
    drafts = rng.integers(vocab, size=(cases, g)).astype(np.int32)
    length = rng.integers(1, g + 1, size=cases).astype(np.int32)
    rows, wanted = [], []
    for case in range(cases):
        n = length[case]
        chance = TWINS[name](drafts[case, :n], p[case], q[case], [0.5] * n)[2]
        for side in itertools.product((1 - 1e-12, 1 + 1e-12), repeat=int(n)):
            uniforms = np.zeros(g)  # past the proposal's end 0 would always succeed, were it looked at
            uniforms[:n] = np.minimum(np.array(chance) * side, 1 - 1e-15)
            rows.append((drafts[case], p[case], q[case], n, uniforms))
            kept, weights, _ = TWINS[name](drafts[case, :n], p[case], q[case], uniforms[:n])
            wanted.append((kept, np.array(weights) / sum(weights)))
    accepted_b, weights_bv = run(RULES[name], *(np.stack(column) for column in zip(*rows, strict=True)))
    np.testing.assert_array_equal(accepted_b, [kept for kept, _ in wanted])
    np.testing.assert_allclose(normalised(weights_bv), [weights for _, weights in wanted], atol=TOLERANCE, rtol=0)
    assert set(accepted_b) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", RULES)
def test_comparison_is_strict(name):
    """u equal to the chance fails: u takes each of its values on [0, 1) from 0, so that P(u < t) = t."""
    p = np.tile([0.25, 0.75], (3, 2, 1))
    q = np.tile([0.5, 0.5], (3, 1, 1))
    uniforms = np.array([[0.5], [np.nextafter(0.5, 0)], [0.0]])
    accepted_b, _ = run(RULES[name], np.zeros((3, 1), np.int32), p, q, np.ones(3, np.int32), uniforms)
    np.testing.assert_array_equal(accepted_b, [0, 1, 1])


@pytest.mark.parametrize("name", RULES)
def test_impossible_tokens_fail_even_at_zero(name):
    """p = 0 fails at u = 0, whether q is 0 as well or not; and q = 0 makes no nan."""
    p = np.tile([0.0, 0.4, 0.6], (2, 3, 1))
    q = np.stack([np.tile([0.5, 0.5, 0.0], (2, 1)), np.tile([0.0, 0.5, 0.5], (2, 1))])
    accepted_b, weights_bv = run(
        RULES[name], np.zeros((2, 2), np.int32), p, q, np.full(2, 2, np.int32), np.zeros((2, 2))
    )
    np.testing.assert_array_equal(accepted_b, 0)
    np.testing.assert_allclose(weights_bv, [[0, 0, 0.6], [0, 0, 0.1]], atol=1e-15)


def test_nothing_left_to_sample_from_gives_the_target():
    """Where scale p <= q everywhere, which only rounding can bring about, the next token is drawn from p."""
    p = jnp.array([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]])
    q = jnp.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75]])
    weights = verify.residual(p, q, jnp.array([1.0, 0.9, 1.0]))
    np.testing.assert_array_equal(weights, [[0.25, 0.75], [0.25, 0.75], [0.25, 0.0]])


@pytest.mark.parametrize("rule", [verify.token, verify.block, verify.coupled])
def test_verdict_is_int32_under_x64(rule):
    """The counts are part of the loop's carry, whose types do not change with the caller's settings."""

    class Fixed:
        def uniforms(self, count):
            return jnp.zeros((1, count), jnp.float32)

        def emit(self, weights_bv, offset_b):
            return jnp.argmax(weights_bv, axis=-1).astype(jnp.int32)

    p = jnp.full((1, 3, 2), 0.5, jnp.float32)
    proposal = Proposal(jnp.zeros((1, 2), jnp.int32), p[:, :2], jnp.full((1,), 2, jnp.int32))
    with jax.enable_x64(True):
        verdict = rule(proposal, p, Fixed())
    assert verdict.num_accepted_b.dtype == jnp.int32
    assert verdict.next_b.dtype == jnp.int32


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(RULES)),
    size=st.sampled_from([(2, 1), (5, 3), (17, 5)]),
    zeros=st.sampled_from([0.0, 0.3, 0.8]),
    certain=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rule_agrees_with_twin(name, size, zeros, certain, seed):
    """Random distributions, drafts, ragged lengths and uniforms."""
    (vocab, g), rows = size, 16
    rng = np.random.default_rng(seed)
    p_bsv = np.stack([random_tables(rng, g + 1, vocab, 1, zeros)[0][:, 0] for _ in range(rows)])
    q_bgv = np.stack([random_tables(rng, g, vocab, 1, zeros)[0][:, 0] for _ in range(rows)])
    drafts_bg = (q_bgv / rng.exponential(size=q_bgv.shape)).argmax(-1).astype(np.int32)
    length_b = rng.integers(0, g + 1, size=rows).astype(np.int32)
    uniforms_bg = rng.random((rows, g))
    if certain:
        q_bgv = np.eye(vocab)[drafts_bg]
    accepted_b, weights_bv = run(RULES[name], drafts_bg, p_bsv, q_bgv, length_b, uniforms_bg)
    for row, n in enumerate(length_b):
        kept, weights, _ = TWINS[name](drafts_bg[row, :n], p_bsv[row], q_bgv[row], uniforms_bg[row, :n])
        assert accepted_b[row] == kept
        np.testing.assert_allclose(normalised(weights_bv[row]), np.array(weights) / sum(weights), atol=1e-9, rtol=0)


# Faulty variants: each must fail the enumeration that the rules pass.


def fault_tables(seed):
    """Returns four cases of p and q for g = 2 over three symbols."""
    rng = np.random.default_rng(seed)
    return random_tables(rng, 4, 3, 4), random_tables(rng, 4, 3, 2)


def assert_caught(fault, rule, p, q, length=2, **choices):
    """Asserts that the enumeration sees the fault."""
    wrong = difference(round_law(rule, p, q, length, **choices)[0], p)
    print(f"\ncaught: {fault}: off by {wrong:.1e}")
    assert wrong > VISIBLE


def test_control_break_in_block():
    """Block verification that stops at the first failure keeps too few, with the wrong residual after them."""
    p, q = fault_tables(30)
    faulty = verify.ChainRule(verify.block_thresholds, verify.leading_successes)
    assert_caught("break in block", faulty, p, q, told=q)
    # The reverse, token chances without the break, is as wrong.
    faulty = verify.ChainRule(verify.token_thresholds, verify.last_success)
    assert_caught("token without its break", faulty, p, q, told=q)


@pytest.mark.parametrize("name", RULES)
def test_control_residual_from_p(name):
    """Accepted drafts already carry min(p, q): tokens that the draft likes come twice."""
    p, q = fault_tables(31)

    def from_p(_weights_bv, p_bsv, accepted_b):
        return p_bsv[np.arange(len(accepted_b)), accepted_b]

    assert_caught(f"residual from p ({name})", RULES[name], p, q, told=q, stop=from_p)


def test_control_block_residual_without_scale():
    """max(p - q, 0) is the residual of token verification, not of block verification after n > 0 drafts."""
    p, q = fault_tables(32)

    def unscaled(*arguments):
        return verify.block_thresholds(*arguments)._replace(scale_bt=jnp.ones_like(arguments[1][..., 0]))

    faulty = verify.ChainRule(unscaled, verify.last_success)
    assert_caught("block residual without its scale", faulty, p, q, told=q)


@pytest.mark.parametrize("name", RULES)
def test_control_bonus_from_the_last_drafts_distribution(name):
    """Behind g accepted drafts the next token follows p_{g+1}; p_g is one place too early."""
    p, q = fault_tables(33)

    def late(weights_bv, p_bsv, accepted_b):
        return np.where((accepted_b == 2)[:, None], p_bsv[:, 1], weights_bv)

    assert_caught(f"bonus from p_g ({name})", RULES[name], p, q, told=q, stop=late)


@pytest.mark.parametrize("name", RULES)
def test_control_raw_q(name):
    """Drafts drawn from the top 2 of q and scored with q itself: tokens of the top are accepted too often."""
    p, raw = fault_tables(34)
    drawn = [normalised(level * (level > level.min(-1, keepdims=True))) for level in raw]
    assert_caught(f"raw q ({name})", RULES[name], p, drawn, told=raw)
    assert difference(round_law(RULES[name], p, drawn, 2, told=drawn)[0], p) <= TOLERANCE


@pytest.mark.parametrize("name", RULES)
def test_control_argmax_draft_scored_with_its_softmax(name):
    """The draft's favourite comes with probability 1, so accepting it with p / softmax over-samples it."""
    p, softmax = fault_tables(35)
    drawn = [np.eye(3)[level.argmax(-1)] for level in softmax]
    assert_caught(f"argmax scored with its softmax ({name})", RULES[name], p, drawn, told=softmax)
    assert difference(round_law(RULES[name], p, drawn, 2, told=None)[0], p) <= TOLERANCE


@pytest.mark.parametrize("name", RULES)
def test_control_reused_uniform(name):
    """A draft drawn by inverting q's cumulative sum with the very uniform that decides on it.

    Exact: token x is drafted while u lies in [below, below + q), and succeeds while u < chance.
    """
    p, q = fault_tables(36)

    def reused(q_at, q_below, chance):
        succeeds = np.clip(chance - q_below, 0, q_at)
        return succeeds, q_at - succeeds

    assert_caught(f"reused uniform ({name})", RULES[name], p, q, told=q, weigh=reused)


def test_control_epsilon_in_the_ratio():
    """p / (q + eps) accepts too little; the residual no longer fills the gap."""
    p, q = fault_tables(37)

    def padded(*arguments):
        thresholds = verify.token_thresholds(*arguments)
        return thresholds._replace(denominator_bg=thresholds.denominator_bg + 0.05)

    faulty = verify.ChainRule(padded, verify.leading_successes)
    assert_caught("p / (q + eps)", faulty, p, q, told=q)


def test_control_comparison_that_is_not_strict():
    """u on a grid k/4 that starts at 0, and chances on that grid: u < t is exact, u <= t accepts 1/4 too much."""
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    uniforms = np.arange(4) / 4
    for shift, exact in ((0.0, True), (1e-9, False)):  # u <= t is u - shift < t for any shift below the grid's step
        law = np.zeros(2)
        for x in range(2):
            accepted_b, weights_bv = run(
                verify.token,
                np.full((4, 1), x, np.int32),
                np.tile(p, (4, 2, 1)),
                np.tile(q, (4, 1, 1)),
                np.ones(4, np.int32),
                (uniforms - shift)[:, None],
            )
            first = np.where(accepted_b[:, None] == 1, np.eye(2)[x], normalised(weights_bv))
            law += q[x] * first.mean(0)
        wrong = np.abs(law - p).max()
        assert wrong <= TOLERANCE if exact else wrong > VISIBLE


@pytest.mark.parametrize("name", RULES)
def test_control_length_that_looks_at_the_token_it_drops(name):
    """A proposal may end by what it holds, but not by looking at the next token: what is left is no sample of q."""
    p, q = fault_tables(38)
    length = np.where(paths(3, 2)[:, 1] == 0, 1, 2)[None]
    assert_caught(f"length that looks ahead ({name})", RULES[name], p, q, length, told=q)


# Coupled.


class ChosenNoise:
    """Draws whose noise is given: position j of row b gets the arrivals ``[b, j, v]``."""

    def __init__(self, arrival_bsv):
        self.arrival_bsv = arrival_bsv

    def uniforms(self, count):
        raise AssertionError("coupled verification compares no uniforms")

    def emit(self, weights_bv, offset_b):
        arrival_bv = self.arrival_bsv[jnp.arange(weights_bv.shape[0]), offset_b]
        return jnp.argmax(weights_bv / arrival_bv, axis=-1).astype(jnp.int32)


def test_coupled_emits_the_targets_own_samples():
    """For every noise of a finite set, any drafts, and any proposal length: kept drafts and next token are what the
    target alone would sample with that noise, up to and with the first difference."""
    rng = np.random.default_rng(40)
    vocab, g, outcomes, cases = 3, 3, 4, 6
    arrivals = rng.exponential(size=(outcomes, vocab))
    noise = np.array(list(itertools.product(range(outcomes), repeat=g + 1)))
    seen = set()
    for case in range(cases):
        p, q = (random_tables(rng, 1, vocab, depth, 0.2) for depth in (g + 1, g))

        def sample(levels, noise=noise):
            """Follows each noise tuple through the tables: tokens ``[b, len(levels)]``."""
            context = np.zeros(len(noise), int)
            tokens = []
            for d, level in enumerate(levels):
                tokens.append((level[0, context] / arrivals[noise[:, d]]).argmax(-1))
                context = context * vocab + tokens[-1]
            return np.stack(tokens, axis=1)

        own, drafts = sample(p), sample(q)
        if case == 0:
            drafts = rng.integers(vocab, size=drafts.shape)  # no relation to the noise at all
        path = (drafts * vocab ** np.arange(g)[::-1]).sum(1)
        p_bsv = along_paths(p, vocab, g)[0, path]
        length_b = rng.integers(0, g + 1, size=len(noise)).astype(np.int32)
        with precision(np.float64):
            proposal = Proposal(jnp.asarray(drafts, jnp.int32), None, jnp.asarray(length_b))
            verdict = verify.coupled(proposal, jnp.asarray(p_bsv), ChosenNoise(jnp.asarray(arrivals[noise])))
        for row, n in enumerate(np.asarray(verdict.num_accepted_b)):
            emitted = [*drafts[row, :n], int(verdict.next_b[row])]
            assert emitted == list(own[row, : n + 1])
            assert n == length_b[row] or emitted[-1] != drafts[row, n]
            seen.add(int(n))
    assert seen == set(range(g + 1))


def coupled_match(p, q):
    """P(x = y) when both are drawn in the same race: sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    both = [(a, b) for a, b in zip(p, q, strict=True) if a > 0 and b > 0]
    return sum(1 / sum(max(c / a, d / b) for c, d in zip(p, q, strict=True)) for a, b in both)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]),
        ([0.6, 0.4, 0.0], [0.0, 0.4, 0.6]),
        ([0.7, 0.2, 0.1], [0.7, 0.2, 0.1]),
        ([1.0, 0.0], [0.5, 0.5]),
    ],
)
def test_coupled_matches_with_the_known_probability(p, q):
    rows = 1 << 17
    keys_b = sampling.row_keys(Sampling(seed=41).per_row(rows))
    draws = RoundDraws(keys_b, jnp.zeros((rows,), jnp.int32), jnp.array(True))
    x, y = (draws.emit(jnp.tile(jnp.array(w, jnp.float32), (rows, 1)), jnp.int32(2)) for w in (q, p))
    wanted, seen = coupled_match(p, q), float(jnp.mean((x == y).astype(jnp.float32)))
    overlap = np.minimum(p, q).sum()
    print(f"\ncoupled: formula {wanted:.4f}, seen {seen:.4f}, 1 - TV {overlap:.4f}")
    assert abs(seen - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / rows) + 1e-6
    assert overlap / (2 - overlap) - TOLERANCE <= wanted <= overlap + TOLERANCE


# Keys across rounds: block verification's noise must be keyed by where the round starts.


def cells(*points):
    """Cuts [0, 1) at the points: returns the middle and the width of each cell."""
    edges = np.unique(np.concatenate([[0.0, 1.0], *(np.ravel(p) for p in points)]))
    return (edges[:-1] + edges[1:]) / 2, np.diff(edges)


def two_rounds_law(rule, p, q, keyed_by):
    """Returns the exact law of the first four tokens over two rounds of g = 2 over two symbols.

    A draft is 1 when its noise is at least q(0), which for two symbols is what a race does: E_0 / (E_0 + E_1) is
    uniform. All noise is cut at every value that it is ever compared with. If the first round keeps both drafts or
    one, the second is at positions whose noise is new under either key. If it keeps none, then, keyed by position,
    the second round's first draft and uniform reuse the noise of the first round's second draft.
    """
    rows = lambda level, context: level[0, context]
    every, none = paths(2, 2), np.full(4, 2, np.int32)

    def tables(context):
        """The p and q along each path of two drafts after a context of d tokens, given by (d, number)."""
        d, number = context
        first, second = number * 2 + every[:, 0], number * 4 + every[:, 0] * 2 + every[:, 1]
        here = np.full(4, number)
        p_bsv = np.stack([rows(p[d], here), rows(p[d + 1], first), rows(p[d + 2], second)], axis=1)
        return p_bsv, np.stack([rows(q[d], here), rows(q[d + 1], first)], axis=1)

    chance = {context: chances(rule, every, *tables(context), none) for context in ((0, 0), (1, 0), (1, 1))}
    later = [chance[1, 0], chance[1, 1]]
    draft_cells = [cells(level[0, :, 0]) for level in q]
    uniform_cells = [
        cells(chance[0, 0][:, 0]),
        cells(chance[0, 0][:, 1], *(c[:, 0] for c in later)),
        cells(*(c[:, 1] for c in later)),
    ]

    def grid(*axes):
        """All combinations of cells: their middles, one array per axis, and their probabilities."""
        middles = np.meshgrid(*(a[0] for a in axes), indexing="ij")
        widths = np.meshgrid(*(a[1] for a in axes), indexing="ij")
        return [m.ravel() for m in middles], np.prod([w.ravel() for w in widths], axis=0)

    def round_(d, number, s, t, u, w):
        """One round after contexts ``number`` of d tokens, draft noise s and t, uniforms u and w."""
        x = (s >= q[d][0, number, 0]).astype(np.int32)
        first = number * 2 + x
        y = (t >= q[d + 1][0, first, 0]).astype(np.int32)
        second = first * 2 + y
        p_bsv = np.stack([rows(p[d], number), rows(p[d + 1], first), rows(p[d + 2], second)], axis=1)
        q_bgv = np.stack([rows(q[d], number), rows(q[d + 1], first)], axis=1)
        length_b = np.full(len(s), 2, np.int32)
        tokens, uniforms = np.stack([x, y], axis=1), np.stack([u, w], axis=1)
        accepted_b, weights_bv = run(rule, tokens, p_bsv, q_bgv, length_b, uniforms)
        return accepted_b, normalised(weights_bv), (number, first, second)

    # emitted[n] collects the mass of texts of n tokens that end a round and are completed by the target.
    emitted = [np.zeros((2 ** max(n - 1, 0), 2)) for n in range(5)]

    (s1, s2, u1, u2), mass = grid(draft_cells[0], draft_cells[1], uniform_cells[0], uniform_cells[1])
    accepted_b, stop_bv, contexts = round_(0, np.zeros(len(s1), int), s1, s2, u1, u2)
    for n in (1, 2):
        here = accepted_b == n
        np.add.at(emitted[n + 1], contexts[n][here], (mass[:, None] * stop_bv)[here])

    none_kept = np.flatnonzero(accepted_b == 0)
    if keyed_by == "position":
        (s3, u3), mass3 = grid(draft_cells[2], uniform_cells[2])
        again = np.repeat(none_kept, len(s3))
        s, u = s2[again], u2[again]
        t, w, mass3 = (np.tile(a, len(none_kept)) for a in (s3, u3, mass3))
    else:
        (s, t, u, w), mass3 = grid(draft_cells[1], draft_cells[2], uniform_cells[1], uniform_cells[2])
        again = np.repeat(none_kept, len(s))
        s, t, u, w, mass3 = (np.tile(a, len(none_kept)) for a in (s, t, u, w, mass3))
    for y in range(2):
        accepted2_b, stop2_bv, contexts2 = round_(1, np.full(len(s), y), s, t, u, w)
        mass2 = mass[again] * stop_bv[again, y] * mass3
        for n in range(3):
            here = accepted2_b == n
            np.add.at(emitted[n + 2], contexts2[n][here], (mass2[:, None] * stop2_bv)[here])

    law = np.zeros(1)
    for n in range(4):
        law = (law[:, None] * p[n][0] + emitted[n + 1].reshape(2**n, 2)).ravel()
    return law


# Next to token 0 and next to token 1. A target that likes what the draft does not is often left with no draft kept.
KEY_TARGET = np.array([[0.2, 0.8], [0.7, 0.3]])
KEY_DRAFT = np.array([[0.8, 0.2], [0.8, 0.2]])


def after_zero(table, depth):
    """Returns the levels of a model that sees one token, after a prompt that ends in token 0."""
    return [np.stack([table[number % 2] for number in range(2**d)])[None] for d in range(depth)]


@pytest.mark.parametrize("name", RULES)
def test_noise_keyed_by_round_start_is_exact_over_two_rounds(name):
    p, q = after_zero(KEY_TARGET, 4), after_zero(KEY_DRAFT, 3)
    worst = difference(two_rounds_law(RULES[name], p, q, "round"), p)
    print(f"\n{name}, two rounds, keyed by round start: {worst:.1e}")
    assert worst <= TOLERANCE


def test_control_noise_keyed_by_position():
    """Block verification decides from all drafts and uniforms of a round. That nothing was kept says that the last
    uniform was high for its draft; the next round must not meet them again.

    Token verification never looks past its first failure, so it stays exact: only block shows the fault.
    """
    p, q = after_zero(KEY_TARGET, 4), after_zero(KEY_DRAFT, 3)
    wrong = difference(two_rounds_law(verify.block, p, q, "position"), p)
    right = difference(two_rounds_law(verify.token, p, q, "position"), p)
    print(f"\ntwo rounds, keyed by position: block {wrong:.1e}, token {right:.1e}")
    assert wrong > VISIBLE
    assert right <= TOLERANCE


class PositionDraws(RoundDraws):
    """The fault: drafts and uniforms keyed by absolute position."""

    def uniforms(self, count):
        places = [self._keys(sampling._ACCEPT, self.length_b + j) for j in range(count)]
        return jnp.stack([jax.vmap(jax.random.uniform)(keys) for keys in places], axis=1)

    def draft(self, weights_bv, index, distinct=None):
        return self._race(weights_bv, lambda: self._keys(sampling._DRAFT, self.length_b + index), distinct)


@pytest.mark.parametrize("draws", [RoundDraws, PositionDraws])
def test_production_rounds_follow_the_law(draws, monkeypatch):
    """The engine's own rounds, caches and keys on 32,768 rows: the joint law of four tokens, by chi-square."""
    monkeypatch.setattr(engine_round, "RoundDraws", draws)
    rows, new, g = 1 << 15, 4, 2
    target, draft = (specjax.testing.table_model(np.log(table)) for table in (KEY_TARGET, KEY_DRAFT))
    drafter = specjax.ModelDrafter(draft, g)
    state = specjax.prefill(
        target,
        np.zeros((rows, 1), np.int32),
        drafter=drafter,
        fixed=True,
        sampling=Sampling(seed=51),
        max_new_tokens=new,
        slots=1 + new + g + 1,
    )
    rounds = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, new, lambda _, state: specjax.step(target, state, drafter=drafter, verify=verify.block), state
        )
    )
    tokens = np.asarray(rounds(state).tokens_bs[:, 1 : new + 1])
    seen = np.bincount((tokens * 2 ** np.arange(new)[::-1]).sum(1), minlength=2**new)
    expected = rows * joint(after_zero(KEY_TARGET, new))[0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    chance = chdtrc(2**new - 1, statistic)
    print(f"\n{draws.__name__}: chi-square {statistic:.1f} on {2**new - 1} degrees of freedom, p = {chance:.2g}")
    if draws is RoundDraws:
        assert chance > 1e-3
    else:
        assert chance < 1e-9
