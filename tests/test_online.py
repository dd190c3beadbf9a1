"""Drafts that keep up: training on rollouts, at the tokens of completions alone, without compiling anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compiled import compilations
from test_conformance import DSPARK, EAGLE_3, MEDUSA, MODEL, MTP, NGRAM, P_EAGLE, SUFFIX, TARGET

import specjax
from specjax import Cascade, ModelDrafter, Sampling
from specjax.testing import table_model
from specjax.training import DraftTrainer

DRAFTERS = {"eagle": EAGLE_3, "mtp": MTP, "medusa": MEDUSA, "dspark": DSPARK, "model": MODEL}
PROMPTS = [[3, 1], [1, 5, 9], [2, 4, 1, 0, 5, 3, 2], [7, 7, 8]]


def rolled(target=TARGET, drafter=None, seed=0, samples=4, prompts=PROMPTS, **settings):
    options = {"max_new_tokens": 24, "fixed": True, "sampling": Sampling(seed=seed), "rows": 8} | settings
    return specjax.rollout(target, prompts, samples=samples, drafter=drafter, **options)


ROLLOUT = rolled()


@pytest.fixture(autouse=True)
def promotes():
    """optax raises a decay rate to the power of a step count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_draft_of_each_kind_learns(kind):
    """Loss falls, further rollouts and another policy compile nothing, and what is past a completion has no part."""
    trainer = DraftTrainer(learning_rate=3e-3, rows=8)
    state = trainer.init(DRAFTERS[kind])
    state, first = trainer.update(state, TARGET, ROLLOUT)
    policy = TARGET.with_params(jax.tree.map(lambda x: 1.001 * x, TARGET.params))
    mask = np.asarray(ROLLOUT.mask)
    changed = np.where(np.arange(mask.shape[1])[None] < np.asarray(ROLLOUT.lengths)[:, None], ROLLOUT.tokens, 4)
    noisy = ROLLOUT.replace(tokens=jnp.asarray(changed))
    with compilations() as names:
        for _ in range(12):
            state, last = trainer.update(state, policy, ROLLOUT)
        again, same = trainer.update(state, policy, ROLLOUT)
        other, noise = trainer.update(state, policy, noisy)
        jax.block_until_ready((again, other))
    assert not [name for name in names if "update" in str(name)]
    assert float(last["loss"]) < 0.9 * float(first["loss"])
    if kind != "dspark":  # its anchors follow from all tokens
        assert float(same["loss"]) == float(noise["loss"])
    assert jax.tree.structure(state.drafter) == jax.tree.structure(DRAFTERS[kind])
    for new, old in zip(jax.tree.leaves(state.drafter), jax.tree.leaves(DRAFTERS[kind]), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_a_draft_follows_a_policy_that_moves():
    """Tables: the frozen draft is right at first and wrong in the end, and the trained one is right all the time."""
    rng = np.random.default_rng(0)
    begin, end = rng.normal(size=(2, 6, 6)) * 2.5
    policies = [table_model((1 - share) * begin + share * end) for share in np.linspace(0, 1, 8)]
    frozen = ModelDrafter(policies[0], 3)
    trainer = DraftTrainer(learning_rate=0.2, passes=4)
    state = trainer.init(frozen)
    rates = []
    for update, policy in enumerate(policies):
        shared = {"target": policy, "prompts": [[0], [5]], "seed": 100 * update, "samples": 64, "max_new_tokens": 16}
        with compilations() as names:
            still, moving = (rolled(drafter=drafter, **shared) for drafter in (frozen, state.drafter))
            state, metrics = trainer.update(state, policy, moving)
            jax.block_until_ready(state)
        if update > 1:
            assert not [name for name in names if "rollout" in str(name) or "update" in str(name)]
        rates.append((float(still.stats.acceptance_rate), float(moving.stats.acceptance_rate)))
        assert float(metrics["acceptance_rate"]) == rates[-1][1]
        assert float(metrics["tokens_per_round"]) == float(moving.stats.tokens_per_round)
    assert rates[0][0] > 0.95 and rates[-1][0] < 0.5 and min(rate for _, rate in rates) > 0.7, rates


def test_fifty_updates_inside_the_callers_jit_compile_once():
    """Policy, draft and key are arguments: a rollout, a step of the policy and one of the draft are one program."""
    trainer = DraftTrainer(learning_rate=0.1)
    state = trainer.init(ModelDrafter(table_model(np.zeros((5, 5))), 2))

    @jax.jit
    def step(target, state, key):
        rollout = specjax.rollout(
            target, np.asarray([[1, 2], [3, 0]]), samples=4, rows=3, drafter=state.drafter, max_new_tokens=8,
            sampling=Sampling(seed=key), stop_tokens=(4,),
        )  # fmt: skip
        params = target.params + 0.01 * jnp.sin(9 * target.params)
        return (
            target.with_params(params),
            trainer.update(state, target.with_params(params), rollout)[0],
            rollout.lengths,
        )

    target, lengths = table_model(np.random.default_rng(1).normal(size=(5, 5))), set()
    target, state, _ = step(target, state, jax.random.key(0))
    with compilations() as names:
        for update in range(1, 50):
            target, state, length = step(target, state, jax.random.fold_in(jax.random.key(0), update))
            lengths.add(tuple(np.asarray(length).tolist()))
    assert not [name for name in names if "step" in str(name)] and len(lengths) > 20


@pytest.mark.parametrize("drafter", [NGRAM, SUFFIX, P_EAGLE, Cascade(NGRAM, EAGLE_3)])
def test_drafts_without_training_are_refused(drafter):
    with pytest.raises(TypeError, match=r"there is no training; give a FeatureDrafter"):
        DraftTrainer().init(drafter)


def test_what_is_refused():
    with pytest.raises(ValueError, match="16 completions and rows is 5; give a divisor of 16"):
        DraftTrainer(rows=5).update(DraftTrainer(rows=5).init(MODEL), TARGET, ROLLOUT)
    for settings, words in (
        ({"loss": "mse"}, "loss is 'mse'; give one of next_token, kl, total_variation"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"rows": 0}, "rows is 0; give an integer of at least 1"),
        ({"passes": True}, "passes is True"),
    ):
        with pytest.raises(ValueError, match=words):
            DraftTrainer(**settings)
