"""Rounds that take as many drafts as pay: the law, what drafters know after plain rounds, and what is chosen."""

import dataclasses
import itertools
import math
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_laws
from forced_width import force
from test_compiled import compilations

import specjax
from specjax import ModelDrafter, NGramDrafter, Sampling, Verdict, verify
from specjax.engine import adapt as adapt_lib
from specjax.engine import costs as costs_lib
from specjax.engine import programs
from specjax.engine.adapt import Adapt, kept_by
from specjax.testing import table_model

VOCAB = 7
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(VOCAB,) * 3).astype(np.float32)
TARGET = table_model(TABLE)
GOOD, USELESS = ModelDrafter(TARGET, 4), ModelDrafter(table_model(-20 * TABLE), 4)
GREEDY = Sampling(temperature=0.0)
ROWS = jnp.ones((1,), bool)
CHEAP = np.asarray([1, 1.2, 1.4], np.float32)
DEAR = np.asarray([1, 2.2, 2.7], np.float32)


# The law, enumerated.


@jax.jit
def after_drafts(adapt, cost_bw, width, kept):
    verdict = Verdict(kept[None], jnp.zeros((1,), jnp.int32))
    return adapt.after_drafts(cost_bw, ROWS, jnp.asarray([9], jnp.int32), width[None], verdict, True)


after_plain = jax.jit(lambda adapt, cost_bw: adapt.after_plain(cost_bw, ROWS, ()))


def after(adapt, cost_bw, width, kept):
    """What the controller knows after a round of ``width`` drafts, of which ``kept`` were accepted."""
    if width == 0:
        return after_plain(adapt, cost_bw)
    return after_drafts(adapt, cost_bw, np.int32(width), np.int32(kept))


def adaptive_law(rule, target, draft, cost_w, count, admit=lambda drafts, p, q: len(drafts)):
    """Returns the law of ``count`` tokens of rounds whose widths the controller chooses, and the widths that occurred.

    Args:
      rule: a rule of ``reference``.
      target, draft: ``target(tokens) -> distribution`` of the token after them.
      cost_w: costs of widths 0, 1 and 2.
      count: tokens.
      admit: how many of a round's drafts are admitted; a fault if it looks at them.
    """
    cost_bw = jnp.asarray(cost_w, jnp.float32)[None]
    law, seen = defaultdict(float), set()

    def go_on(tokens, adapt, mass):
        if len(tokens) >= count:
            law[tokens[:count]] += mass
            return
        g = adapt.widths[int(adapt.width)]
        seen.add(g)
        known = {}
        for drafts in itertools.product(range(len(target(()))), repeat=g):
            p = [target(tokens + drafts[:i]) for i in range(g + 1)]
            q = [draft(tokens + drafts[:i]) for i in range(g)]
            path = math.prod(q[i][x] for i, x in enumerate(drafts))
            taken = admit(drafts, p, q)
            few, p, q = drafts[:taken], p[: taken + 1], q[:taken]
            chances = rule(few, p, q, [0] * taken)[2]
            for succeeds in itertools.product((True, False), repeat=taken):
                part = path * math.prod(c if yes else 1 - c for c, yes in zip(chances, succeeds, strict=True))
                if part == 0:
                    continue
                uniforms = [c / 2 if yes else (1 + c) / 2 for c, yes in zip(chances, succeeds, strict=True)]
                kept, weights, _ = rule(few, p, q, uniforms)
                if kept not in known:
                    known[kept] = after(adapt, cost_bw, g, kept)
                for token, weight in enumerate(weights):
                    if weight:
                        share = weight / sum(weights)
                        go_on((*tokens, *few[:kept], token), known[kept], mass * part * share)

    go_on((), Adapt.start(cost_bw, (0, 1, 2), ()), 1.0)
    return law, seen


def laws_of(seed):
    """A target and a draft whose next token depends on all tokens before it."""
    target, draft = {}, {}

    def of(table, which):
        def law(tokens):
            if tokens not in table:
                rng = np.random.default_rng([seed, which, *(x + 1 for x in tokens)])
                table[tokens] = rng.dirichlet([0.7] * 2).tolist()
            return table[tokens]

        return law

    return of(target, 0), of(draft, 1)


def distance(law, target, count):
    exact = defaultdict(float)
    for tokens in itertools.product(range(2), repeat=count):
        exact[tokens] = math.prod(target(tokens[:i])[x] for i, x in enumerate(tokens))
    return max(abs(law[tokens] - exact[tokens]) for tokens in exact)


RULES = {"token": reference.verify_token, "block": reference.verify_block}


@pytest.mark.parametrize(("cost_w", "widths"), [((1, 1.4, 1.62), {0, 1, 2}), ((1, 2.1, 2.5), {0, 2})])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_law_over_adaptive_rounds(rule, cost_w, widths):
    """Six tokens: two to six rounds, whose widths depend on what was accepted before."""
    target, draft = laws_of(0)
    law, seen = adaptive_law(rule, target, draft, cost_w, 6)
    assert distance(law, target, 6) < 1e-12
    assert seen == widths


def unlikely_last(drafts, p, q):
    """Leaves out the last draft if the target likes it less than the draft does."""
    return len(drafts) - 1 if drafts and p[-2][drafts[-1]] < q[-1][drafts[-1]] else len(drafts)


def fails_later(drafts, p, q):
    """Leaves out all drafts if one of them is unlikely."""
    return 0 if any(p[i][x] < 0.5 * q[i][x] for i, x in enumerate(drafts)) else len(drafts)


@pytest.mark.parametrize("admit", [unlikely_last, fails_later])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_control_admission_that_looks_at_drafts(rule, admit):
    target, draft = laws_of(0)
    law, _ = adaptive_law(rule, target, draft, (1, 1.1, 1.2), 3, admit)
    assert distance(law, target, 3) > 1e-3


# The loop.


@pytest.mark.parametrize(
    "drafter", (test_laws.DRAFTERS | test_laws.SLOW).values(), ids=test_laws.DRAFTERS | test_laws.SLOW
)
def test_plain_rounds_starve_no_drafter(drafter):
    """After rounds without drafts, and a late look at their tokens, it drafts what it does when it reads all anew."""
    target, prompts = test_laws.TARGET, [[0], [1, 2, 1], [2, 0, 1, 2, 0]]
    options = {
        "drafter": drafter,
        "sampling": Sampling(seed=3),
        "slots": 128,
        "costs": (1.0, 1.2, 1.4, 1.6)[: len(kept_by(drafter))],
    }
    state = specjax.prefill(target, prompts, max_new_tokens=60, **options)
    for plain in (3, 21):
        state = specjax.run(target, force(state, 0), drafter=drafter, rounds=plain)
        assert not np.asarray(state.stats.drafted).any() or plain == 21
        texts = state.generation.rows()
        anew = specjax.prefill(target, texts, max_new_tokens=40, **options)
        rounds = {"drafter": drafter, "rounds": 2}
        before = jax.device_get(state.stats)
        state = specjax.run(target, force(state, len(options["costs"]) - 1), **rounds)
        anew = specjax.run(target, force(anew, len(options["costs"]) - 1), **rounds)
        for row, wanted in zip(state.generation.rows(), anew.generation.rows(), strict=True):
            np.testing.assert_array_equal(row, wanted)
        for name in ("drafted_at", "accepted_at"):
            found = np.asarray(getattr(state.stats, name)) - np.asarray(getattr(before, name))
            np.testing.assert_array_equal(found, np.asarray(getattr(anew.stats, name)))


CHAIN = test_laws.DRAFTERS["another model"]
TREE = dataclasses.replace(CHAIN, num_draft=5, tree=((0,), (1,), (0, 0), (0, 1), (1, 0)), siblings="distinct")


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [(CHAIN, verify.token), (CHAIN, verify.block), (TREE, verify.recursive), (TREE, verify.traversal)],
    ids=["token", "block", "tree, recursive", "tree, traversal"],
)
def test_the_loops_law_is_the_targets(drafter, rule, monkeypatch):
    """Four thousand batches of three rows, each of which chooses its own widths by what it accepts."""
    monkeypatch.setattr(adapt_lib, "_LEAST", 1)  # texts are short
    prompt_bt, length_b = specjax.pad_prompts(test_laws.PROMPTS)
    tokens = test_laws.TOKENS

    @jax.jit
    def texts(seed_nb):
        def batch(seed_b):
            options = {"sampling": Sampling(seed=seed_b), "max_new_tokens": tokens, "slots": 32, "costs": (1, 1.5, 2)}
            out = specjax.generate(test_laws.TARGET, prompt_bt, length_b, drafter=drafter, verify=rule, **options)
            at_bt = length_b[:, None] + np.arange(tokens)
            return jnp.take_along_axis(out.tokens, at_bt, axis=1), out.stats.drafted

        return jax.lax.map(batch, seed_nb)

    found_nbt, drafted_nb = texts(np.arange(12000, dtype=np.uint32).reshape(4000, 3))
    assert len(np.unique(np.asarray(drafted_nb).max(1))) > 3, "batches take other widths"
    assert test_laws.p_value(np.asarray(found_nbt).swapaxes(0, 1), test_laws.TARGET, {}) > 1e-3


# What is chosen.


def looked_at(adapt, cost_w, width, kept, times=1, rows=1, wide=True):
    """What is known after rounds of ``width`` drafts, of which ``kept`` were accepted in each row."""
    cost_bw = jnp.broadcast_to(jnp.asarray(cost_w, jnp.float32), (adapt.width_b.shape[0], len(cost_w)))
    full = lambda value: jnp.full_like(adapt.width_b, value)
    running_b = jnp.arange(len(adapt.width_b)) < rows
    for _ in range(times):
        adapt = adapt.after_drafts(cost_bw, running_b, full(9), full(width), Verdict(full(kept), full(0)), wide)
    return adapt


def begun(cost_w=DEAR, widths=(0, 2, 4), rows=1):
    return Adapt.start(jnp.broadcast_to(jnp.asarray(cost_w, jnp.float32), (rows, len(cost_w))), widths, ())


def test_a_block_of_rounds_goes_on_after_drafting_was_given_up():
    """As on a GPU: what is known stays, also where no row runs any more."""
    given_up = looked_at(begun(), DEAR, 2, 0, times=3)
    assert int(given_up.width) == 0 and float(given_up.rest_b[0]) == 250
    for after in (looked_at(given_up, DEAR, 2, 0, times=3), looked_at(begun(), DEAR, 2, 2, rows=0)):
        kept = given_up if int(after.width) == 0 else begun()
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(kept), strict=True):
            np.testing.assert_array_equal(new, old)


def test_a_trial_ends_though_rows_propose_nothing():
    """Where a round without proposals costs what a wide one does, drafting is given up, and tried again later."""
    adapt = looked_at(begun(), DEAR, 0, 0, times=60)
    assert int(adapt.width) == 0 and float(adapt.rest_b[0]) == 250
    adapt = looked_at(dataclasses.replace(adapt, width_b=adapt.width_b + 1, rest_b=adapt.rest_b * 0), DEAR, 0, 0, 20)
    assert int(adapt.width) == 0 and float(adapt.rest_b[0]) == 500


def test_where_rounds_without_proposals_cost_nothing_they_go_on():
    """And nothing becomes of it that is no number, however long they do."""
    cost_w = (1.0, 2.5)
    adapt = looked_at(begun(cost_w, (0, 4)), cost_w, 4, 0, times=2)
    adapt = looked_at(adapt, cost_w, 0, 0, times=700, wide=False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapt))


def test_each_tree_is_judged_by_its_own_rounds():
    """The larger one is taken where its longer paths are worth its time."""
    for cost_w, kept, best in [((1, 1.2, 1.6), (1, 3), 2), ((1, 1.2, 2.9), (1, 3), 1), ((1, 1.2, 1.6), (3, 3), 1)]:
        adapt, widths = Adapt.start(jnp.asarray([cost_w], jnp.float32), (0, 3, 3), (), trees=True), []
        for _ in range(60):
            widths.append(int(adapt.width))
            adapt = looked_at(adapt, cost_w, 3, kept[widths[-1] - 1])
        assert widths[:3] == [1, 1, 1] and widths.count(best) > 45, widths


def test_a_row_that_is_inserted_waits_while_others_pause():
    both = looked_at(begun(rows=2), DEAR, 2, 0, times=3, rows=2)
    assert int(both.width) == 0
    fresh = begun(rows=2)
    mixed = jax.tree.map(lambda old, new: old.at[1].set(new[1]), both, fresh)
    assert int(mixed.width) == 0
    cost_bw = jnp.broadcast_to(DEAR, (2, 3))
    both_run, second_runs = jnp.asarray([True, True]), jnp.asarray([False, True])
    assert int(mixed.after_plain(cost_bw, both_run, ()).width) == 0
    assert int(mixed.after_plain(cost_bw, second_runs, ()).width) == 1, "the row that paused is done"


def generate(drafter, prompts=([1, 2], [3]), new=200, temperature=1.0, costs=CHEAP, **options):
    sampling = Sampling(temperature, seed=list(range(len(prompts))))
    options = {"drafter": drafter, "sampling": sampling, "max_new_tokens": new, "costs": costs, **options}
    return specjax.generate(TARGET, list(prompts), **options)


def rounds_with_drafts(stats):
    """The most rounds of any row in which it drafted."""
    return int(np.asarray(stats.drafted_at)[:, 0].max())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_good_draft_drafts_in_every_round(temperature):
    """The first three rounds of all rows together are a trial of half of the drafts, then all are taken."""
    stats = generate(GOOD, temperature=temperature).stats
    rounds, drafted_at = np.asarray(stats.rounds), np.asarray(stats.drafted_at)
    assert (rounds <= -(-200 // 5) + 2).all() and (drafted_at[:, 0] >= rounds - 1).all(), stats
    assert (drafted_at[:, 3] >= rounds - 4).all(), stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_useless_draft_is_left_out(temperature):
    """After a few rounds at the beginning; of 200 rounds, one trial follows."""
    stats = generate(USELESS, temperature=temperature, costs=DEAR).stats
    assert 0 < rounds_with_drafts(stats) <= 5
    stats = generate(USELESS, temperature=temperature, costs=CHEAP).stats
    assert 0 < rounds_with_drafts(stats) <= 40


def test_a_draft_that_costs_more_than_it_brings_is_left_out():
    """All five tokens of a round at six times the time of a plain one."""
    stats = generate(GOOD, costs=[1, 4, 6]).stats
    assert rounds_with_drafts(stats) <= 4


def test_half_of_the_drafts_are_taken_where_these_pay():
    stats = generate(GOOD, costs=[1, 1.2, 6]).stats
    drafted_at = np.asarray(stats.drafted_at).sum(0)
    assert drafted_at[1] > 60 and drafted_at[2] <= 4


def test_a_trial_finds_that_drafts_pay_again():
    """After so many plain rounds as were to come, though the last drafts were rejected."""
    state = specjax.prefill(TARGET, [[1, 2]], drafter=GOOD, sampling=GREEDY, max_new_tokens=400, costs=CHEAP)
    zero_be = jnp.zeros_like(state.adapt.tried_be)
    bad = dataclasses.replace(state.adapt, tried_be=zero_be + 1, kept_be=zero_be, width_b=state.adapt.width_b * 0)
    state = dataclasses.replace(state, adapt=dataclasses.replace(bad, rest_b=jnp.full((1,), 50.0)))
    out = specjax.run(TARGET, state, drafter=GOOD).generation
    plain = int(out.stats.rounds[0]) - rounds_with_drafts(out.stats)
    assert plain in (50, 51)  # a last token needs no draft


def test_a_round_without_proposals_is_plain():
    """N-grams find nothing in a text without repetition, and cost nothing; where they do find, they are taken."""
    count = table_model(10.0 * np.eye(64, k=1, dtype=np.float32)[:, :])  # counts up
    options = {"drafter": NGramDrafter(4), "max_new_tokens": 40, "sampling": GREEDY, "costs": CHEAP[:2]}
    stats = specjax.generate(count, [[1]], **options).stats
    assert stats.drafted.sum() == 0 and stats.rounds.tolist() == [40]
    cycle = table_model(10.0 * np.roll(np.eye(5, dtype=np.float32), 1, axis=1))
    stats = specjax.generate(cycle, [[1]], **options).stats
    assert stats.rounds[0] < 20


def test_streaming_takes_the_same_rounds():
    whole = generate(GOOD, costs=[1, 1.9, 3.1])
    options = {"sampling": Sampling(1.0, seed=[0, 1]), "max_new_tokens": 200, "costs": [1, 1.9, 3.1]}
    *_, last = specjax.stream(TARGET, [[1, 2], [3]], rounds=7, drafter=GOOD, **options)
    assert last.tokens.tolist() == np.asarray(whole.tokens).tolist()
    assert last.stats.drafted_at.tolist() == np.asarray(whole.stats.drafted_at).tolist()


def test_greedy_and_coupled_texts_do_not_depend_on_costs():
    for options in ({"temperature": 0.0}, {"verify": verify.coupled}):
        texts = [np.asarray(generate(GOOD, costs=costs, **options).tokens) for costs in (CHEAP, [1, 4, 6])]
        np.testing.assert_array_equal(*texts)


def test_under_jit_costs_are_assumed():
    prompt_bt, length_b = specjax.pad_prompts([[1, 2], [3]])
    run = jax.jit(lambda x: specjax.generate(TARGET, x, length_b, drafter=USELESS, max_new_tokens=200, slots=256).stats)
    assert 0 < rounds_with_drafts(run(prompt_bt)) <= 60


def test_costs_are_measured_once(monkeypatch):
    asked = []

    def seconds(widths, room, run):
        assert run(costs_lib.forced(widths, 2), 9)[1] < run(costs_lib.forced(widths, 0), 9)[1] == 9
        asked.append(widths)
        return np.asarray([1.0, 4.0, 6.0])

    monkeypatch.setattr(costs_lib, "_file", lambda: None)
    monkeypatch.setattr(costs_lib, "_known", {})
    monkeypatch.setattr(costs_lib, "_seconds", seconds)
    for new, slots in ((60, 128), (30, 128), (60, 256)):
        assert rounds_with_drafts(generate(GOOD, costs=None, new=new, slots=slots).stats) <= 4
    assert asked == [(0, 2, 4)]
    generate(GOOD.replace(num_draft=2), costs=None, new=30, slots=128)
    generate(GOOD, ([1], [2], [3]), costs=None, new=30, slots=128)
    assert asked == [(0, 2, 4), (0, 1, 2), (0, 2, 4)]
    list(specjax.stream(TARGET, [[1], [2], [3], [4]], drafter=GOOD, max_new_tokens=30, slots=128))
    assert len(asked) == 4, "and once for all rounds of a stream"


def test_all_rounds_that_are_timed_have_the_width_that_is_timed(monkeypatch):
    """Also in ``run``, whose state has chosen another width, or pauses. Else costs would be mixed."""
    seen = []

    def seconds(widths, room, run):
        seen.append([run(costs_lib.forced(widths, number), 11)[1] for number in range(len(widths))])
        return np.asarray([1.0, 1.1, 1.2])

    monkeypatch.setattr(costs_lib, "_file", lambda: None)
    monkeypatch.setattr(costs_lib, "_seconds", seconds)
    state = specjax.prefill(TARGET, [[1, 2]], drafter=GOOD, sampling=GREEDY, max_new_tokens=60)
    pauses = dataclasses.replace(state.adapt, width_b=state.adapt.width_b * 0, rest_b=state.adapt.rest_b + 50)
    for known in (state.adapt, pauses):
        monkeypatch.setattr(costs_lib, "_known", {})
        specjax.run(TARGET, jax.tree.map(jnp.copy, dataclasses.replace(state, adapt=known)), drafter=GOOD, rounds=1)
    monkeypatch.setattr(costs_lib, "_known", {})
    specjax.generate(TARGET, [[1, 2]], drafter=GOOD, sampling=GREEDY, max_new_tokens=60)
    assert seen == [[11, 4, 3]] * 3


def test_a_long_prompt_is_not_read_again_and_again(monkeypatch):
    lengths = []
    true = programs.generate_program

    def spy(target, prompt_bs, request, drafter, **static):
        lengths.append(int(request.prompt_length_b[0]))
        return true(target, prompt_bs, request, drafter, **static)

    monkeypatch.setattr(costs_lib, "_file", lambda: None)
    monkeypatch.setattr(costs_lib, "_known", {})
    for module in (specjax.engine.loop, specjax.engine.measuring):
        monkeypatch.setattr(module, "generate_program", spy)
    specjax.generate(TARGET, [[1, 2] * 300], drafter=GOOD, max_new_tokens=60)
    assert lengths[-1] == 600 and set(lengths[:-1]) == {256}


def test_costs_outlast_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(costs_lib, "_file", lambda: tmp_path / "folder" / "costs.json")
    monkeypatch.setattr(costs_lib, "_known", {})

    def ask():
        return costs_lib.measured("key", lambda: "lasting", (0, 2, 4), (0, 2, 4), lambda: 100, None).tolist()

    monkeypatch.setattr(costs_lib, "_seconds", lambda *_: np.asarray([2.0, 3.0, 4.0]))
    assert ask() == [1.0, 1.5, 2.0]
    costs_lib._known.clear()
    monkeypatch.setattr(costs_lib, "_seconds", None)
    assert ask() == [1.0, 1.5, 2.0]
    for dear in (True, False):
        costs_lib._known.clear()
        (tmp_path / "folder" / "costs.json").write_text("{}")
        monkeypatch.setattr(costs_lib, "_seconds", lambda *_, dear=dear: np.asarray([1.0, 2.5, 3.5 if dear else 3.3]))
        ask()
        costs_lib._known.clear()
        monkeypatch.setattr(costs_lib, "_seconds", lambda *_: np.asarray([1.0, 1.0, 1.0]))
        assert (ask() == [1.0, 1.0, 1.0]) == dear, "costs under which nothing pays are of this process alone"
    for text in ("broken", "[]", "null"):
        (tmp_path / "folder" / "costs.json").write_text(text)
        costs_lib._known.clear()
        assert ask() == [1.0, 1.0, 1.0], "a file that cannot be read is no error"


def test_nothing_compiles_as_costs_acceptance_and_widths_change():
    generate(GOOD, new=60, slots=128)
    with compilations() as names:
        for costs in (CHEAP, [1, 4, 6], [1, 1.2, 6]):
            for temperature in (0.0, 0.5, [0.0, 1.0]):
                generate(GOOD, ([4, 4], [2, 1]), 50, temperature, costs, slots=128)
    assert names == []


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ([1, 2], ["costs has shape (2,)", "(3,)", "(0, 2, 4)"]),
        ([1, 0, 2], ["costs are [1, 0, 2]", "above 0"]),
        ("cheap", ["costs"]),
    ],
    ids=["two", "zero", "a word"],
)
def test_costs_are_checked(costs, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        generate(GOOD, costs=costs)
    assert all(word in str(caught.value) for word in words), caught.value


def test_costs_and_fixed_exclude_each_other():
    with pytest.raises(ValueError, match="fixed"):
        generate(GOOD, fixed=True)
