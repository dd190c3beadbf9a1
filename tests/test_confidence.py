"""Drafts that are cut where a draft head trusts them too little: the law, its controls, and what is cut."""

import dataclasses
import itertools
import math
from collections import defaultdict
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_laws
from block_heads import CASES, published
from flax import struct
from forced_width import force
from jitted import jit
from test_adapt import distance, laws_of
from test_eagle import random_target, write_folder

import specjax
from specjax import BlockDrafter, Cascade, NGramDrafter, Sampling, Verdict, verify
from specjax.drafters.block import Block
from specjax.drafters.confidence import BINS, Calibration, pays
from specjax.engine import adapt as adapt_lib
from specjax.engine.adapt import Adapt, share_of
from specjax.testing import table_model

RULES = {"token": reference.verify_token, "block": reference.verify_block}
PASSES, KEPT = (0, 1, 2), (0, 0, 1, 2)
ROW = jnp.ones((1,), bool)
ROOM = jnp.asarray([9], jnp.int32)


# The law, enumerated.


def outcomes(rule, drafts, p, q):
    """Yields (probability, kept drafts, token after them) of one round that proposes these drafts."""
    chances = rule(drafts, p, q, [0] * len(drafts))[2]
    for succeeds in itertools.product((True, False), repeat=len(drafts)):
        part = math.prod(c if yes else 1 - c for c, yes in zip(chances, succeeds, strict=True))
        if part:
            uniforms = [c / 2 if yes else (1 + c) / 2 for c, yes in zip(chances, succeeds, strict=True)]
            kept, weights, _ = rule(drafts, p, q, uniforms)
            yield from ((part * w / sum(weights), kept, token) for token, w in enumerate(weights) if w)


def law_of_rounds(rule, target, draft, controller, count):
    """Returns the law of ``count`` tokens, and how many drafts rounds proposed.

    ``controller`` is what is known before a round: it has ``drafts``, ``taken(tokens, drafts)``, which is how many of a
    round's drafts are proposed, and ``after(tokens, drafts, taken, kept)``.
    """
    law, seen = defaultdict(int), set()

    def go_on(tokens, controller, mass):
        if len(tokens) >= count:
            law[tokens[:count]] += mass
            return
        for drafts in itertools.product(range(len(target(()))), repeat=controller.drafts):
            p = [target(tokens + drafts[:i]) for i in range(len(drafts) + 1)]
            q = [draft(tokens + drafts[:i]) for i in range(len(drafts))]
            taken = controller.taken(tokens, drafts)
            seen.add(taken)
            path = mass * math.prod(q[i][x] for i, x in enumerate(drafts))
            for part, kept, token in outcomes(rule, drafts[:taken], p[: taken + 1], q[:taken]):
                go_on((*tokens, *drafts[:kept], token), controller.after(tokens, drafts, taken, kept), path * part)

    go_on((), controller, 1)
    return law, seen


class Ours:
    """The controller of the library: ``Adapt`` and ``Calibration``, row by row as in the loop."""

    def __init__(self, cost_w, confidence, own=0):
        """``own``: 1 is a fault, a confidence that reads the draft that it is of."""
        self.cost_bw, self.confidence, self.own = jnp.asarray([cost_w], jnp.float32), confidence, own
        self.adapt, self.calibration = Adapt.start(self.cost_bw, KEPT, ()), Calibration.start(1, 2)
        self.known = {}
        self.price = jax.jit(lambda adapt: adapt.price(self.cost_bw, PASSES, ROW, ROOM))
        self.chance = jax.jit(Calibration.chance)
        self.pays = jax.jit(lambda calibration, *known: pays(known[0], known[1], calibration.rate_bg, known[2]))
        self.learn = jax.jit(self._learn)

    @property
    def drafts(self):
        return self.adapt.widths[int(self.adapt.width)]

    def _walk(self, tokens, drafts):
        """Returns the bins of the drafts, and how many are proposed."""
        price_bg, reached_b, bins, taken = self.price(self.adapt), jnp.ones((1,)), [], None
        for i in range(len(drafts)):
            told = self.confidence((*tokens, *drafts[: i + self.own]))[0]
            chance_b, bin_b = self.chance(self.calibration, jnp.asarray([told], jnp.float32), i)
            reached_b = reached_b * chance_b
            bins.append(int(bin_b[0]))
            if taken is None and not self.pays(self.calibration, reached_b, i, price_bg)[0]:
                taken = i
        return bins, len(drafts) if taken is None else taken

    def taken(self, tokens, drafts):
        key = tokens, drafts
        if key not in self.known:
            self.known[key] = self._walk(tokens, drafts)
        return self.known[key][1]

    def _learn(self, adapt, calibration, bin_bg, taken_b, kept_b):
        verdict = Verdict(kept_b, jnp.zeros((1,), jnp.int32))
        cost_w = self.cost_bw[0]
        share = jnp.stack([share_of(cost_w[1:], number) for number in range(3)])[taken_b[0]]
        adapt = adapt.after_drafts(self.cost_bw, ROW, ROOM, jnp.asarray([2], jnp.int32), verdict, share)
        return adapt, calibration.proposed(bin_bg, taken_b).after(kept_b, ROW)

    def after(self, tokens, drafts, taken, kept):
        after = object.__new__(Ours)
        vars(after).update(vars(self), known={})
        if not drafts:
            after.adapt = self.adapt.after_plain(self.cost_bw, ROW, ())
            return after
        bins = jnp.asarray([self.known[tokens, drafts][0]], jnp.int32)
        told = [jnp.asarray([x], jnp.int32) for x in (taken, kept)]
        after.adapt, after.calibration = self.learn(self.adapt, self.calibration, bins, *told)
        return after


@pytest.fixture
def no_trials(monkeypatch):
    """Texts are short."""
    monkeypatch.setattr(adapt_lib, "_LEAST", 0)


COSTS = (1.0, 1.01, 1.2, 1.35)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_law_of_cut_drafts(rule, no_trials):
    """Several rounds that propose none, one or two drafts, by confidences that read the drafts before."""
    target, draft = laws_of(0)
    law, seen = law_of_rounds(rule, target, draft, Ours(COSTS, laws_of(3)[0]), 3)
    assert seen == {0, 1, 2}
    assert distance(law, target, 3) < 1e-12


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_control_confidence_that_reads_its_own_draft(rule, no_trials):
    target, draft = laws_of(0)
    law, _ = law_of_rounds(rule, target, draft, Ours(COSTS, laws_of(3)[0], own=1), 3)
    assert distance(law, target, 3) > 1e-3


@dataclasses.dataclass
class By:
    """A controller of one round with drafts, that looks at these alone. Then the target goes on."""

    admits: object
    drafts: int = 2

    def taken(self, tokens, drafts):
        return self.admits(drafts) if drafts else 0

    def after(self, *_):
        return By(self.admits, 0)


def fixed(*law):
    return lambda tokens: [Fraction(x) for x in law]


def test_golden_laws_of_cuts_that_look_at_the_draft():
    """From enumeration by hand: the first draft is verified only if it is token 0."""
    target, draft = fixed("7/10", "3/10"), fixed("1/2", "1/2")
    for rule in RULES.values():
        first, _ = law_of_rounds(rule, target, draft, By(lambda drafts: int(drafts[0] == 0), 1), 1)
        assert first == {(0,): Fraction(17, 20), (1,): Fraction(3, 20)}
        both, _ = law_of_rounds(rule, target, draft, By(lambda drafts: 2 * (drafts[0] == 0)), 2)
        assert [both[text] * 200 for text in itertools.product((0, 1), repeat=2)] == [119, 51, 21, 9]
        # The second draft may be proposed by what the first is.
        law, seen = law_of_rounds(rule, target, draft, By(lambda drafts: 2 - (drafts[0] != 0)), 3)
        assert seen == {0, 1, 2} and distance(law, target, 3) == 0
        kept = sum(
            Fraction(1, 4) * part * kept
            for drafts in itertools.product((0, 1), repeat=2)
            for taken in [2 - (drafts[0] != 0)]
            for part, kept, _ in outcomes(rule, drafts[:taken], [target(())] * (taken + 1), [draft(())] * taken)
        )
        assert kept == Fraction(6, 5)
        target_2, draft_2 = fixed("1/3", "2/3"), fixed("2/3", "1/3")
        likely, _ = law_of_rounds(rule, target_2, draft_2, By(lambda drafts: int(drafts[0] == 0), 1), 1)
        assert likely == {(0,): Fraction(4, 9), (1,): Fraction(5, 9)}


# A batch: which row's tokens decide over which row's drafts.


def throughput(admitted, time):
    """Tokens per time: two rows emit one token each, and what is admitted."""
    return (2 + sum(admitted)) / time[len(admitted)]


def schedule(confidence, drafts, time, breaks):
    """Returns how many drafts each of two rows proposes (DSpark, algorithm 1).

    The likeliest of the rows' next drafts is admitted as long as throughput grows. Without ``breaks``, the best of all
    lengths is taken, a fault.
    """
    lengths, admitted = [0, 0], []
    reached = [1.0, 1.0]
    best = [(throughput([], time), [0, 0])]
    while True:
        following = []
        for row in (0, 1):
            if lengths[row] < 2:
                chance = reached[row] * confidence[row](drafts[row][: lengths[row]])[0]
                following.append((chance, -row))
        if not following:
            break
        chance, row = max(following)
        admitted, row = [*admitted, chance], -row
        reached[row], lengths[row] = chance, lengths[row] + 1
        now = throughput(admitted, time)
        if breaks and now <= best[-1][0]:
            break
        best.append((now, list(lengths)))
    return best[-1][1] if breaks else max(best)[1]


def two_rows_error(rule, seed, scheduled):
    """Returns the largest error of the joint law of two rows' first three tokens, whose rounds have two drafts."""
    laws = [laws_of(seed), laws_of(seed + 1)]
    joint = defaultdict(float)

    def texts(row, drafts):
        """The law of three tokens of a row that proposes these drafts: after the round, the target's."""
        target, draft = laws[row]
        p = [target(drafts[:i]) for i in range(len(drafts) + 1)]
        q = [draft(drafts[:i]) for i in range(len(drafts))]
        found = defaultdict(float)
        for part, kept, token in outcomes(rule, drafts, p, q):
            start = (*drafts[:kept], token)
            for rest in itertools.product((0, 1), repeat=3 - len(start)):
                text = start + rest
                found[text] += part * math.prod(target(text[:i])[text[i]] for i in range(len(start), 3))
        return found

    paths = list(itertools.product((0, 1), repeat=2))
    for both in itertools.product(paths, paths):
        path = math.prod(laws[row][1](both[row][:i])[both[row][i]] for row in (0, 1) for i in (0, 1))
        lengths = scheduled(both)
        first, second = (texts(row, both[row][: lengths[row]]) for row in (0, 1))
        for (one, a), (other, b) in itertools.product(first.items(), second.items()):
            joint[one, other] += path * a * b

    def exact(row, text):
        return math.prod(laws[row][0](text[:i])[text[i]] for i in range(3))

    texts_of = list(itertools.product((0, 1), repeat=3))
    return max(abs(joint[one, other] - exact(0, one) * exact(1, other)) for one in texts_of for other in texts_of)


SEED = 210
TIME = [1.0, *(1 + np.cumsum(np.random.default_rng(SEED).uniform(0, 0.6, size=4)))]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_control_a_batch_whose_lengths_follow_from_all_drafts(rule):
    """The best of all lengths lets a later draft of one row decide over an earlier draft of the other."""
    confidence = [laws_of(SEED + 50000)[0], laws_of(SEED + 50001)[0]]

    def error(breaks):
        return two_rows_error(rule, SEED, lambda both: schedule(confidence, both, TIME, breaks))

    assert error(breaks=True) < 1e-12
    assert error(breaks=False) > 1e-3


PRICES = [[0.2, 0.21]]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_law_of_two_rows_that_share_the_price(rule):
    """Each row decides by its own drafts, with half of the price."""
    confidence, price_bg = [laws_of(7)[0], laws_of(8)[0]], jnp.asarray(PRICES)
    decide = jax.jit(lambda reached_b, i: pays(reached_b, i, jnp.asarray([[0.6, 0.6]]), price_bg)[0])
    seen = set()

    def lengths(both):
        taken = []
        for row, drafts in enumerate(both):
            reached, length = 1.0, 2
            for i in reversed(range(2)):
                reached = math.prod(confidence[row](drafts[:j])[0] for j in range(i + 1))
                length = length if decide(jnp.asarray([reached], jnp.float32), i) else i
            taken.append(length)
        seen.add(tuple(taken))
        return taken

    assert two_rows_error(rule, 7, lengths) < 1e-12
    assert len(seen) > 1


# The loop.

CUTS = test_laws.SLOW["dspark, cut"]
HEAD, PARAMS = CUTS.head, CUTS.params


@struct.dataclass
class Anticipates(BlockDrafter):
    """Proposes nothing where the first draft is token 0."""

    def propose(self, state, context, draw):
        proposal, state = super().propose(state, context, draw)
        length_b = jnp.where(proposal.tokens_bg[:, 0] == 0, 0, proposal.length_b)
        return dataclasses.replace(proposal, length_b=length_b), state


def texts_of(drafter, costs, batches):
    """Texts of batches of three rows, and counts of all of them together."""
    prompt_bt, length_b = specjax.pad_prompts(test_laws.PROMPTS)

    @jit
    def texts(seed_nb, costs):
        def batch(seed_b):
            options = {"sampling": Sampling(seed=seed_b), "max_new_tokens": test_laws.TOKENS, "slots": 32}
            options |= {"costs": costs, "verify": verify.block}
            out = specjax.generate(test_laws.TARGET, prompt_bt, length_b, drafter=drafter, **options)
            at_bt = length_b[:, None] + np.arange(test_laws.TOKENS)
            return jnp.take_along_axis(out.tokens, at_bt, axis=1), out.stats

        return jax.lax.map(batch, seed_nb)

    seed_nb = np.arange(3 * batches, dtype=np.uint32).reshape(batches, 3)
    found_nbt, stats = texts(seed_nb, np.asarray(costs, np.float32))
    return np.asarray(found_nbt).swapaxes(0, 1), jax.tree.map(lambda x: np.asarray(x).sum((0, 1)), stats)


def test_the_loops_law_is_the_targets(no_trials):
    found, stats = texts_of(CUTS, (1.0, 1.01, 1.15, 1.2), 4000)
    first, second = stats.drafted_at
    assert 0.1 * stats.rounds < second < 0.5 * first < 0.45 * stats.rounds, "rounds propose none, one and two drafts"
    assert test_laws.p_value(found, test_laws.TARGET, {}) > 1e-3


def test_control_a_loop_that_looks_at_the_first_draft(no_trials):
    found, _ = texts_of(Anticipates(PARAMS, HEAD, test_laws.DRAFTS), (1.0, 1.01, 1.02), 2000)
    assert test_laws.p_value(found, test_laws.TARGET, {}) < 1e-6


# What is cut. A target that counts up, and a head that drafts what follows, or never does, whatever it says of itself.

COUNT = table_model(20 * np.roll(np.eye(8, dtype=np.float32), 1, axis=1))


@dataclasses.dataclass(frozen=True)
class Says:
    """A head of no parameters. Its drafts are right up to the one that is number ``right``."""

    says: float
    right: int

    capture, vocab_size, most_drafts, marginal, confidence = (), 8, None, False, True

    def axes(self, params):
        return ()

    def init(self, params, target, rows, slots):
        return ()

    def observe(self, params, state, context, event):
        return ()

    def block(self, params, state, context, count):
        rows = context.length_b.shape[0]
        index_bg1 = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[None, :, None], (rows, count, 1))
        return Block(index_bg1, jnp.zeros((rows, count, 8)), context.running_b), ()

    def start(self, params, rows):
        return None

    def step(self, params, carry, logits_bu, state_bd, token_b):
        ahead_b = jnp.where(state_bd[:, 0] < self.right, 1, 2)
        return 20 * jax.nn.one_hot((token_b + ahead_b) % 8, 8), None

    def confidence_of(self, params, state_bd, token_b):
        return jnp.full(token_b.shape, self.says, jnp.float32)


def counted(head, costs, prompts=((0,),), new=120, **options):
    drafter = BlockDrafter((), head, 4, cuts=True)
    sampling = Sampling(temperature=0.0)
    out = specjax.generate(
        *(COUNT, [list(prompt) for prompt in prompts]),
        **{"drafter": drafter, "sampling": sampling, "max_new_tokens": new, "costs": costs, **options},
    )
    for row, prompt in zip(out.new_tokens(), prompts, strict=True):
        np.testing.assert_array_equal(row, (prompt[-1] + 1 + np.arange(new)) % 8)
    return jax.device_get(out.stats)


def test_a_head_that_is_right_and_sure_drafts_all():
    stats = counted(Says(0.9, 4), (1, 1.05, 1.5, 2.0))
    assert stats.rounds[0] <= 26 and stats.drafted_at[0, 3] >= 23


def test_a_head_that_is_sure_and_wrong_is_no_longer_believed():
    """Half of the drafts are right: the others are cut, but for a few rounds at first and one of sixteen."""
    stats = counted(Says(0.95, 2), (1, 1.05, 1.3, 2.2))
    rounds = stats.rounds[0]
    assert rounds <= 42 and (stats.drafted_at[0, :2] >= rounds - 2).all()
    assert 3 <= stats.drafted_at[0, 2] <= 20, stats.drafted_at


def test_a_head_that_is_unsure_and_right_is_tried():
    """Rounds that cut nothing teach what its confidence is worth."""
    stats = counted(Says(0.3, 4), (1, 1.05, 1.6, 2.2), new=1600)
    assert stats.drafted_at[0, 3] > 0.6 * stats.rounds[0], stats.drafted_at


def test_where_wide_passes_cost_nothing_no_draft_is_cut():
    stats = counted(Says(0.01, 0), (1, 1.0, 1.0, 1.0))
    np.testing.assert_array_equal(stats.drafted_at[0, 3:] >= stats.rounds[0] - 5, True)


def test_rounds_of_a_fixed_width_cut_nothing():
    stats = counted(Says(0.01, 0), None, fixed=True)
    assert stats.drafted_at[0, 3] >= stats.rounds[0] - 5


def test_the_targets_pass_is_as_wide_as_what_is_proposed():
    widths = []

    def forward(params, feed, cache, capture=()):
        jax.debug.callback(lambda _, width=feed.tokens_bt.shape[1]: widths.append(width), feed.count_b)
        return COUNT.forward(params, feed, cache, capture)

    target, drafter = COUNT.replace(forward=forward), BlockDrafter((), Says(0.95, 2), 4, cuts=True)
    options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 100, "costs": (1, 1.05, 1.3, 2.2)}
    stats = specjax.generate(target, [[0]], drafter=drafter, **options).stats
    jax.effects_barrier()
    assert widths.count(5) == int(stats.drafted_at[0, 2]) and widths.count(3) >= 20


@pytest.mark.parametrize(("number", "proposed"), list(enumerate((0, 0, 2, 4))))
def test_costs_force_one_pass(number, proposed):
    """As where costs are measured."""
    drafter = BlockDrafter((), Says(0.5, 4), 4, cuts=True)
    options = {"drafter": drafter, "sampling": Sampling(temperature=0.0), "max_new_tokens": 90, "slots": 128}
    state = specjax.prefill(COUNT, [[0], [1, 2]], costs=(1, 1.1, 1.2, 1.3), **options)
    state = specjax.run(COUNT, force(state, number), drafter=drafter, rounds=10)
    np.testing.assert_array_equal(state.stats.drafted, 10 * proposed)


def test_rows_share_the_price():
    """With many rows, a row's drafts are hardly ever not worth the time."""
    costs = (1, 1.05, 1.5, 2.2)
    one = counted(Says(0.6, 2), costs, new=60)
    many = counted(Says(0.6, 2), costs, [(i,) for i in range(8)] * 2, new=60)
    assert one.drafted_at[0, 2] < 0.5 * one.rounds[0]
    assert (many.drafted_at[:, 2] > 0.5 * many.rounds).all()


def test_calibration_is_what_was_accepted_of_each_bin():
    """Against counts in plain Python; rows that rest learn nothing."""
    rng = np.random.default_rng(0)
    calibration, tried, kept = Calibration.start(2, 3), np.zeros((2, 3, BINS)), np.zeros((2, 3, BINS))
    for _ in range(60):
        told = rng.uniform(size=(2, 3)).astype(np.float32)
        length, ran = rng.integers(0, 4, size=2), rng.uniform(size=2) < 0.7
        accepted = np.minimum(rng.integers(0, 4, size=2), length)
        bins = np.minimum((told * BINS).astype(int), BINS - 1)
        found = jnp.stack([calibration.chance(jnp.asarray(told[:, i]), i)[1] for i in range(3)], axis=1)
        np.testing.assert_array_equal(found, bins)
        for row in np.flatnonzero(ran):
            for place in range(min(accepted[row] + 1, length[row])):
                tried[row, place] *= 0.99
                kept[row, place] *= 0.99
                tried[row, place, bins[row, place]] += 1
                kept[row, place, bins[row, place]] += place < accepted[row]
        calibration = calibration.proposed(found, jnp.asarray(length, jnp.int32))
        calibration = calibration.after(jnp.asarray(accepted, jnp.int32), jnp.asarray(ran))
    np.testing.assert_allclose(calibration.tried_bgk, tried, rtol=1e-4)
    np.testing.assert_allclose(calibration.kept_bgk, kept, rtol=1e-4, atol=1e-6)
    told = np.asarray([0.25, 0.85], np.float32)
    chance, _ = calibration.chance(jnp.asarray(told), 1)
    wanted = [(8 * told[row] + kept[row, 1, k]) / (8 + tried[row, 1, k]) for row, k in ((0, 1), (1, 4))]
    np.testing.assert_allclose(chance, wanted, rtol=1e-4)


# Bad input.


def test_what_cannot_cut_says_so(tmp_path):
    plain = dataclasses.replace(HEAD, confidence=False, confidence_with_markov=False)
    with pytest.raises(ValueError, match="cuts is True and the draft head has no confidence head; give a DSpark head"):
        BlockDrafter(PARAMS, plain, 2, cuts=True)
    with pytest.raises(ValueError, match="cuts is True and a tree is drafted; leave out cuts"):
        BlockDrafter(PARAMS, HEAD, 2, cuts=True, tree_depth=2)
    with pytest.raises(ValueError, match="the cascade's second drafter cuts its drafts"):
        specjax.generate(test_laws.TARGET, [[1]], drafter=Cascade(NGramDrafter(2), CUTS), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"costs has shape \(3,\); give \(4,\)"):
        specjax.generate(test_laws.TARGET, [[1]], drafter=CUTS, max_new_tokens=4, costs=(1, 2, 3))


def test_an_option_of_the_folder_cuts(tmp_path):
    for name in ("DSpark, DeepSpec", "DFlash, z-lab"):
        folder = tmp_path / name[:6]
        write_folder(folder, CASES[name].config, published(CASES[name]))
        if name.startswith("DSpark"):
            assert specjax.load_drafter(f"block:{folder}@cuts", random_target(), 3).cuts
            assert not specjax.load_drafter(f"block:{folder}", random_target(), 3).cuts
        else:
            with pytest.raises(ValueError, match="no confidence head"):
                specjax.load_drafter(f"block:{folder}@cuts", random_target(), 3)
