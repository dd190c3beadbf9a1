"""Rollouts: each completion is the text of ``generate`` alone, whatever rows run beside it and take its place."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_row import ByRow
from jax.scipy.special import gammaincc
from test_compiled import compilations
from test_conformance import DELTA, EAGLE_3, MODEL, NGRAM, TARGET, other_vocabulary

import specjax
from specjax import ModelDrafter, NGramDrafter, Sampling, verify
from specjax.engine.pool import pool_slots
from specjax.testing import table_model
from specjax.types import whole_feed

PROMPTS = [[3], [1, 5, 9], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8, 7, 7, 8]]
SAMPLES, NEW = 3, 14
LIMITS = np.array([14, 1, 9, 14, 14, 5, 2, 14, 14, 14, 3, 14])
# Two completions in three are drawn, the others greedy.
SAMPLING = Sampling(temperature=np.tile(np.float32([1.0, 0.7, 0.0]), 4), top_k=np.tile([0, 5, 0], 4), seed=11)


@dataclasses.dataclass(frozen=True)
class TokenAndBlock:
    """Two rules in one program: ``block`` in rounds that start at an even length, else ``token``."""

    shares_noise = False

    def __call__(self, proposal, target_btv, draws):
        token, block = (rule(proposal, target_btv, draws) for rule in (verify.token, verify.block))
        return jax.tree.map(lambda a, b: jnp.where(draws.length_b % 2 == 0, a, b), block, token)


def both(rows, drafter=None, target=TARGET, prompts=PROMPTS, samples=SAMPLES, **settings):
    """Returns a rollout and the generation of the repeated prompts, on the host."""
    options = {"max_new_tokens": LIMITS, "stop_tokens": (6,), "fixed": True, "sampling": SAMPLING} | settings
    options |= {"drafter": drafter, "logprobs": True}
    rollout = specjax.rollout(target, prompts, samples=samples, rows=rows, **options)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    return rollout.to_host(), specjax.generate(target, repeated, **options).to_host()


def assert_same(rollout, generation):
    np.testing.assert_array_equal(rollout.lengths, generation.lengths)
    np.testing.assert_array_equal(rollout.tokens, generation.tokens)
    np.testing.assert_array_equal(rollout.prompt_lengths, generation.prompt_lengths)
    for name in ("logprobs", "warped_logprobs"):
        np.testing.assert_allclose(getattr(rollout, name), getattr(generation, name), atol=2e-5)
    for mine, own in zip(jax.tree.leaves(rollout.stats), jax.tree.leaves(generation.stats), strict=True):
        np.testing.assert_array_equal(mine, own)


# A row's first token says who drafts for it: an EAGLE head has the first prompt, the draft model two, n-grams one.
DRAFTERS = ByRow((EAGLE_3, MODEL, NGRAM))


@pytest.mark.parametrize("rule", [TokenAndBlock(), verify.coupled], ids=["token and block", "coupled"])
def test_completions_are_those_of_the_repeated_prompts(rule):
    """Two widths of the batch give one text: it does not depend on the schedule."""
    rollout, generation = both(5, DRAFTERS, verify=rule)
    assert_same(rollout, generation)
    assert 0 < rollout.stats.accepted.sum() < rollout.stats.drafted.sum()
    assert (rollout.rounds == rollout.rounds[0]).all() and rollout.rounds.shape == (5,)


def test_coupled_rollouts_are_the_same_without_drafts():
    plain, generation = both(4, verify=verify.coupled)
    assert_same(plain, generation)
    drafted, _ = both(5, DRAFTERS, verify=verify.coupled)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=2e-5)


def test_recurrent_targets_and_drafters_that_take_no_pool_of_few_slots():
    drafter = other_vocabulary()
    assert_same(*both(5, drafter, DELTA))
    assert pool_slots(TARGET, EAGLE_3, 17, 128) == 17 and pool_slots(DELTA, None, 17, 128) == 17
    assert pool_slots(TARGET, drafter, 17, 128) == 128  # its cache has two slots for each of the text's


@pytest.mark.parametrize(("rows", "samples"), [(1, 3), (4, 1), (99, 2)])
def test_any_number_of_rows_and_samples(rows, samples):
    prompts = [[0], [1, 2] * 150, [4, 3, 3]]  # one is read in two passes
    table = table_model(np.random.default_rng(3).normal(size=(5,) * 3))
    rollout, generation = both(
        rows, NGramDrafter(3, 1, 2), table, prompts, samples, max_new_tokens=20, stop_tokens=(3,), sampling=Sampling()
    )
    assert_same(rollout, generation)
    assert rollout.rounds.shape == (min(rows, 3 * samples),)
    if rows == 1:
        assert rollout.resting_share == 0


def test_rounds_that_adapt_give_the_same_greedy_text():
    """And under ``coupled`` the same drawn text, inside the caller's jit."""

    @jax.jit
    def adapted(target, drafter, key):
        sampling = Sampling(temperature=np.tile(np.float32([0, 1]), 6), seed=key)
        return specjax.rollout(
            target, np.asarray([[3, 1], [1, 5], [2, 4]]), samples=4, rows=5, drafter=drafter, verify=verify.coupled,
            sampling=sampling, max_new_tokens=30, stop_tokens=(6,), costs=np.float32([1, 1.1, 1.2]),
        )  # fmt: skip

    key = jax.random.key(2)
    rollout = adapted(TARGET, MODEL, key)
    plain = specjax.generate(
        TARGET, np.repeat([[3, 1], [1, 5], [2, 4]], 4, axis=0), verify=verify.coupled, max_new_tokens=30,
        sampling=Sampling(temperature=np.tile(np.float32([0, 1]), 6), seed=key), stop_tokens=(6,),
    )  # fmt: skip
    assert [list(row) for row in rollout.rows()] == [list(row) for row in plain.rows()]
    assert 0 < rollout.stats.accepted.sum()
    changed = TARGET.replace(params=jax.tree.map(lambda x: 1.01 * x, TARGET.params))
    with compilations() as names:
        jax.block_until_ready(adapted(changed, MODEL, jax.random.key(3)))
    assert not names


# A long tail: the stop token comes with probability 1 / 16 after every token.
STOP, LONGEST = 3, 120
TAIL = table_model(np.tile(np.log(np.float32([5, 5, 5, 1]) / 16), (4, 1)))


def tail(rows, **settings):
    return specjax.rollout(
        TAIL, [[0], [1]], samples=32, rows=rows, max_new_tokens=LONGEST, stop_tokens=(STOP,), sampling=Sampling(seed=5),
        **settings,
    ).to_host()  # fmt: skip


def rounds_of(lengths, rows):
    """Returns how many steps a batch takes whose rows go on with the next text as soon as they are done."""
    free = [0] * rows
    for length in lengths:
        row = free.index(min(free))
        free[row] += length
    return max(free)


def test_rows_that_are_done_go_on_with_the_next_completion():
    together, replaced = tail(None), tail(8)
    emitted = together.lengths - together.prompt_lengths
    np.testing.assert_array_equal(together.tokens, replaced.tokens)
    assert together.rounds.tolist() == [emitted.max()] * 64
    assert replaced.rounds.tolist() == [rounds_of(emitted, 8)] * 8
    assert together.resting_share > 0.6 > 3 * replaced.resting_share
    np.testing.assert_allclose(replaced.resting_share, 1 - emitted.sum() / replaced.rounds.sum(), rtol=1e-6)


def test_limits_that_are_traced_may_be_nothing():
    """As under ``generate``, whose values are not checked either inside the caller's jit."""
    limits = np.int32([0, 3, 0, 0, 5, 0])

    @jax.jit
    def lengths(limits):
        options = {"max_new_tokens": limits, "slots": 32, "sampling": Sampling(seed=2)}
        rolled = specjax.rollout(TAIL, np.asarray([[0, 1], [1, 2]]), samples=3, rows=2, **options)
        return rolled.lengths, specjax.generate(TAIL, np.repeat([[0, 1], [1, 2]], 3, axis=0), **options).lengths

    rolled, generated = lengths(limits)
    assert rolled.tolist() == generated.tolist() == (2 + limits).tolist()


def test_shapes_of_losses():
    rollout = tail(8)
    given = rollout.completions(LONGEST)
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        text = rollout.tokens[row, start:end]
        assert np.asarray(given.mask[row]).sum() == len(text) and given.mask[row, : len(text)].all()
        np.testing.assert_array_equal(given.tokens[row, : len(text)], text)
        np.testing.assert_array_equal(given.logprobs[row, : len(text)], rollout.logprobs[row, start:end])
        assert rollout.stopped[row] == (text[-1] == STOP) == (len(text) < LONGEST)
        np.testing.assert_array_equal(np.flatnonzero(rollout.mask[row]), np.arange(start, end))
    assert not np.asarray(given.tokens)[~np.asarray(given.mask)].any()
    own = jax.nn.log_softmax(TAIL.params, axis=-1)
    np.testing.assert_allclose(rollout.logprobs[0, 1], own[0, rollout.tokens[0, 1]], rtol=1e-5)
    bare = tail(8, logprobs=False)
    assert bare.logprobs is None and bare.completions(LONGEST).warped_logprobs is None
    with pytest.raises(ValueError, match=r"width is 2 and a completion has \d+ tokens; give at least that"):
        rollout.completions(2)
    with pytest.raises(ValueError, match="width is 0; give an integer"):
        rollout.completions(0)


def chi_square(rollout, target, prompt, rows, tokens):
    """Returns the p-value of completions under the probabilities that the target gives them in one pass each."""
    vocab, stop = target.vocab_size, target.vocab_size - 1
    paths = np.asarray(list(itertools.product(range(vocab), repeat=tokens)))
    text = np.concatenate([np.tile(prompt, (len(paths), 1)), paths], axis=1).astype(np.int32)
    cache = target.init_cache(*text.shape)
    logits = target.forward(target.params, whole_feed(jnp.asarray(text)), cache).logits_btv
    probs = np.asarray(jax.nn.softmax(logits), np.float64)[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(probs, paths[..., None], axis=-1)[..., 0]
    law = {}
    for path, each in zip(paths.tolist(), chosen, strict=True):  # a stop token ends a completion
        end = path.index(stop) + 1 if stop in path else tokens
        law[tuple(path[:end])] = each[:end].prod()
    assert abs(sum(law.values()) - 1) < 1e-5
    seen = dict.fromkeys(law, 0)
    for row in rows:
        seen[tuple(rollout.tokens[row, len(prompt) : rollout.lengths[row]].tolist())] += 1
    expected = np.asarray(list(law.values())) * len(rows)
    assert expected.min() > 5
    statistic = ((np.asarray(list(seen.values())) - expected) ** 2 / expected).sum()
    return float(gammaincc((len(law) - 1) / 2, statistic / 2))


def test_rollouts_have_the_policys_law():
    """Under another law the same counts are impossible."""
    rng = np.random.default_rng(7)
    policy, draft, other = (table_model(rng.normal(size=(3,) * 3)) for _ in range(3))
    prompts, samples = [[0, 1], [2, 0]], 6000
    for rule in (TokenAndBlock(), verify.coupled):
        rollout = specjax.rollout(
            policy, prompts, samples=samples, rows=500, drafter=ModelDrafter(draft, 2), verify=rule, fixed=True,
            sampling=Sampling(seed=1), max_new_tokens=4, stop_tokens=(2,), logprobs=False,
        ).to_host()  # fmt: skip
        for number, prompt in enumerate(prompts):
            rows = range(number * samples, (number + 1) * samples)
            assert chi_square(rollout, policy, prompt, rows, 4) > 1e-3
            assert chi_square(rollout, other, prompt, rows, 4) < 1e-9


def ask(prompts=((1, 2), (3,)), **settings):
    return specjax.rollout(TAIL, prompts, **{"samples": 2, "max_new_tokens": 5} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 0}, "samples is 0; give an integer of at least 1"),
        ({"samples": 2.0}, "samples is 2.0; give an integer"),
        ({"rows": 0}, "rows is 0; give an integer of at least 1"),
        ({"prompts": [[1, 2], [9]]}, "prompt 1 holds token 9; the target's ids are 0 to 3"),
        ({"prompts": [[1, 2], []]}, "prompts have lengths"),
        ({"max_new_tokens": [5, 5]}, r"max_new_tokens is \[5, 5\]; give .* one per row: \(4,\)"),
        ({"sampling": Sampling(seed=np.arange(2))}, r"seed has shape \(2,\); give one number, or one per row: \(4,\)"),
        ({"slots": 7}, "slots is 7; .* allocate more slots or ask for fewer tokens"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ask(**settings)


def test_an_update_of_other_parameters_is_refused():
    """Other shapes or dtypes would compile the whole loop once more, and say nothing."""
    params = TARGET.params
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert jax.tree.leaves(TARGET.with_params(doubled).params)[0] is jax.tree.leaves(doubled)[0]
    with pytest.raises(ValueError, match=r"params\['embed.*bfloat16 and the model's is \(11, 16\) float32; cast it"):
        TARGET.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    with pytest.raises(ValueError, match=r"is \(22, 16\) float32 and the model's is \(11, 16\) float32"):
        TARGET.with_params(params | {"embed_tokens": {"weight": jnp.zeros((22, 16))}})
    with pytest.raises(ValueError, match=r"params is a tree .* give the model's names"):
        TARGET.with_params({"weights": params})
