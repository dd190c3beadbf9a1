"""specjax as rollout engine of tunix. ``pip install -e '.[tunix]'`` brings what it needs."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import specjax

pytest.importorskip("tunix", reason="google-tunix is not installed: pip install -e '.[tunix]'")

from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout, vanilla_rollout

from specjax.integrations.tunix import SpecjaxRollout

VOCAB, PAD, BOS, EOS = 64, 0, 1, 2
CONFIG = qwen3.ModelConfig(
    num_layers=2, vocab_size=VOCAB, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8, num_kv_heads=2,
    rope_theta=10_000, norm_eps=1e-6,
)  # fmt: skip
ROLLOUT = base_rollout.RolloutConfig(
    max_tokens_to_generate=12, max_prompt_length=8, temperature=1.0, return_logprobs=True
)
GREEDY = dataclasses.replace(ROLLOUT, temperature=0.0)
THEIR_GREEDY = dataclasses.replace(GREEDY, top_p=None)
PROMPTS = ["abca", "abca", "z", "z", "hello wor", "hello wor"]  # the last one is longer than max_prompt_length


@pytest.fixture(autouse=True)
def _foreign_code():
    """tunix promotes ranks and dtypes, which this suite forbids elsewhere; in threads of its own, too."""
    ours = {"jax_numpy_rank_promotion": "allow", "jax_numpy_dtype_promotion": "standard"}
    before = {name: jax.config.values[name] for name in ours}
    for name, value in ours.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class Letters:
    """A tokenizer of letters."""

    def encode(self, text):
        return [3 + ord(letter) % (VOCAB - 3) for letter in text]

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def bos_id(self):
        return BOS

    def eos_id(self):
        return EOS

    def pad_id(self):
        return PAD


def policy(seed=0):
    """A policy whose laws are neither flat nor sharp."""
    model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    moved = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape, x.dtype), nnx.state(model))
    nnx.update(model, moved)
    return model


def engine(seed=0, **options):
    return SpecjaxRollout(policy(seed), Letters(), **options)


def vanilla(seed=0):
    """tunix's own engine. It is greedy if top_p is None, and divides by a temperature of 0 if not."""
    sizes = base_rollout.CacheConfig(cache_size=64, num_layers=2, num_kv_heads=2, head_dim=8)
    return vanilla_rollout.VanillaRollout(policy(seed), Letters(), sizes)


def without_end(tokens):
    """The tokens as tunix's own engine returns them."""
    return [row[: -1 if row[-1] == EOS else None].tolist() for row in tokens]


@pytest.mark.parametrize("drafter", [None, specjax.NGramDrafter(num_draft=3)])
def test_greedy_text_is_that_of_tunix(drafter):
    ours, theirs = engine(drafter=drafter).generate(PROMPTS, GREEDY), vanilla().generate(PROMPTS, THEIR_GREEDY)
    assert without_end(ours.tokens) == [row.tolist() for row in theirs.tokens]
    assert ours.text == theirs.text
    np.testing.assert_array_equal(ours.left_padded_prompt_tokens, theirs.left_padded_prompt_tokens)
    for row, own in zip(ours.logprobs, theirs.logprobs, strict=True):
        np.testing.assert_allclose(row[: len(own)], own, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_law_that_was_sampled(temperature):
    sampler = engine(drafter=specjax.NGramDrafter(num_draft=3))
    out = sampler.generate(PROMPTS, dataclasses.replace(ROLLOUT, temperature=temperature))
    wide = np.stack([np.pad(row, (0, 12 - len(row)), constant_values=PAD) for row in out.tokens])
    prompts = jnp.asarray(out.left_padded_prompt_tokens)
    graph, state = nnx.split(sampler.model())
    law = common.compute_per_token_logps(graph, state, prompts, jnp.asarray(wide), PAD, EOS, temperature=temperature)
    if temperature == 1.0:
        np.testing.assert_array_equal(law, sampler.get_per_token_logps(prompts, jnp.asarray(wide)))
    for row, want in zip(out.logprobs, np.asarray(law), strict=True):
        np.testing.assert_allclose(row, want[: len(row)], atol=1e-4)


def test_a_prompt_that_stands_several_times_is_read_once_and_calls_have_their_own_noise():
    sampler = engine()
    first = sampler.generate(PROMPTS, ROLLOUT)
    assert len(sampler.last.lengths) == 6 and sampler.last.tokens.shape[0] == 6
    second = sampler.generate(PROMPTS, ROLLOUT)
    assert [row.tolist() for row in first.tokens] != [row.tolist() for row in second.tokens]
    assert first.tokens[0].tolist() != first.tokens[1].tolist()
    again = engine().generate(PROMPTS, ROLLOUT)
    assert [row.tolist() for row in first.tokens] == [row.tolist() for row in again.tokens]


@pytest.mark.parametrize("seed", [3, jax.random.PRNGKey(3), jax.random.key(3)])
def test_seeds_of_all_sorts(seed):
    out = engine().generate(PROMPTS, dataclasses.replace(ROLLOUT, seed=seed))
    want = engine().generate(PROMPTS, dataclasses.replace(ROLLOUT, seed=3))
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in want.tokens]


def test_new_parameters_give_the_new_policys_text_and_compile_nothing(caplog):
    sampler = engine(drafter=specjax.NGramDrafter(num_draft=3))
    before = sampler.generate(PROMPTS, GREEDY)
    new = nnx.state(policy(1), nnx.Param)
    with jax.log_compiles(True), caplog.at_level("WARNING", logger="jax"):
        sampler.update_params(new, (nnx.Param,))
        after = sampler.generate(PROMPTS, GREEDY)
    compiled = [record.message for record in caplog.records if "rollout_program" in record.message]
    assert not compiled
    assert without_end(after.tokens) == [row.tolist() for row in vanilla(1).generate(PROMPTS, THEIR_GREEDY).tokens]
    assert without_end(before.tokens) != without_end(after.tokens)
    lower = jax.tree.map(lambda x: x.astype(jnp.bfloat16), new)
    sampler.update_params(lower)
    assert {x.dtype for x in jax.tree.leaves(sampler.target.params)} == {jnp.dtype("float32")}


def test_refuses_what_it_cannot_do():
    sampler = engine()
    held = sampler.target
    wrong = jax.tree.map(lambda x: jnp.zeros((*x.shape, 1), x.dtype), nnx.state(sampler.model(), nnx.Param))
    with pytest.raises(ValueError, match=r"the update has \(.*\) at .*, and the policy \(.*\); give parameters"):
        sampler.update_params(wrong)
    assert sampler.target is held
    with pytest.raises(ValueError, match=r"the update has .*, which the policy lacks"):
        sampler.update_params(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="prompts is empty"):
        sampler.generate([], ROLLOUT)
    with pytest.raises(TypeError, match=r"prompts has 3; give texts"):
        sampler.generate(["a", 3], ROLLOUT)
    with pytest.raises(TypeError, match="takes no images"):
        sampler.generate(PROMPTS, ROLLOUT, images=[None])
    with pytest.raises(ValueError, match="rows is 0; give an integer"):
        engine(rows=0)
    with pytest.raises(ValueError, match="Linear has no init_cache; give SpecjaxRollout adapt="):
        SpecjaxRollout(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Letters())


def test_grpo_trains_a_policy_with_the_engine():
    """tunix's own learner: the reward rises, and the engine samples from the policy as it is after the last step."""
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles, steps, rewards = rl_cluster.Role, 12, []
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
        rollout_engine=functools.partial(SpecjaxRollout, drafter=specjax.NGramDrafter(num_draft=3)),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adam(3e-3), eval_every_n_steps=1000, max_steps=steps
        ),
        rollout_config=dataclasses.replace(ROLLOUT, top_p=None, kv_cache_size=64),
    )

    def even(prompts, completions, **_):
        share = [np.mean([int(token) % 2 == 0 for token in text.split()]) for text in completions]
        rewards.append(np.mean(share))
        return share

    with mesh:
        cluster = rl_cluster.RLCluster(actor=policy(), reference=policy(), tokenizer=Letters(), cluster_config=config)
        learner = GRPOLearner(cluster, GRPOConfig(num_generations=4, num_iterations=1, beta=0.0), reward_fns=even)
        learner.train([{"prompts": np.array(["abca", "z", "hello"])}] * steps)
    assert len(rewards) == steps and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
    engine, trained = cluster.rollout, nnx.state(cluster.actor_trainer.model, nnx.Param)
    assert isinstance(engine, SpecjaxRollout) and len(engine.last.lengths) == 12
    for own, wanted in zip(jax.tree.leaves(engine.target.params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(own, wanted)


def test_tunix_takes_the_engine_of_the_page():
    page = (Path(__file__).parent.parent / "docs" / "rollouts.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"## In tunix\n.*?```\n(.*?)```", page, re.DOTALL)[1], names)
    sampler = names["rollout_engine"](rollout_actor=policy(), tokenizer=Letters(), mesh=None, rollout_config=ROLLOUT)
    assert isinstance(sampler, base_rollout.BaseRollout)
    out = sampler.generate(PROMPTS, ROLLOUT)
    assert len(out.tokens) == len(PROMPTS) and sampler.last.rounds.shape == (6,)
