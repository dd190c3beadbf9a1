"""Training of draft heads: chains trained all at once are the chains that are drafted, and losses fall."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_model
from draft_heads import open_mtp
from jitted import jit

from specjax.drafters.mtp import MTPConfig, MTPHead, init_mtp_params
from specjax.hf.config import decoder_config
from specjax.training import losses
from specjax.training.chains import ChainCache
from specjax.training.objectives import chain_logits, head_objective
from specjax.training.recipe import Recipe, Stage
from specjax.training.trainees import make_trainee, most_frequent
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

VOCAB, LENGTH, STEPS = 23, 11, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {
    **SIZES,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "first_k_dense_replace": 9,
    "kv_lora_rank": 10,
    "q_lora_rank": 9,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
TARGET = decoder_config(SIZES)
HEADS = {
    "grouped queries": decoder_config({**SIZES, "num_hidden_layers": 1}),
    "soft caps and a window": decoder_config(
        {
            **SIZES,
            "model_type": "gemma2",
            "num_hidden_layers": 1,
            "head_dim": 4,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
        }
    ),
    "latents": decoder_config({**LATENT, "num_hidden_layers": 1}),
}


def lively(params, seed):
    """Parameters under which every part matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / max(1, x.shape[0]) ** 0.5, x.dtype), params)


@pytest.fixture(scope="module")
def teacher():
    return decoder_model(TARGET, lively(init_params(TARGET, jax.random.key(0)), 0))


@pytest.fixture(scope="module", params=HEADS)
def head(request):
    config = MTPConfig(HEADS[request.param])
    return MTPHead(config), lively(init_mtp_params(config, jax.random.key(1)), 1)


def text(rows=2, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH)), jnp.int32)


@jit(static_argnames="capture")
def features_of(teacher, tokens, capture):
    return teacher.forward(teacher.params, whole_feed(tokens), teacher.init_cache(*tokens.shape), capture)


chains = jit(chain_logits, static_argnums=(0, 5))


def test_every_chain_is_the_one_that_would_be_drafted(teacher, head):
    """Each start by itself: the true slots in a cache, then the head's own states one at a time."""
    head, params = head
    tokens = text()
    taught = features_of(teacher, tokens, head.capture)
    at_once = np.asarray(chains(head, params, teacher, tokens, taught.features, STEPS))
    tokens, states = np.asarray(tokens), np.asarray(taught.features[0])

    @jit
    def step(tokens, states, cache, start):
        """Returns the last state, its logits, and the cache."""
        states, cache = head.run(params, teacher, whole_feed(tokens, start), states, cache)
        return states[:, -1:], head.logits(params, teacher, states[:, -1]), cache

    compared = 0
    for start in range(LENGTH - STEPS):
        cache, begin = head.init_cache(params, 2, LENGTH), np.zeros(2, np.int32)
        state, logits, cache = step(tokens[:, 1 : start + 2], states[:, : start + 1], cache, begin)
        for j in range(STEPS):
            if j:
                at = begin + np.int32(start + j)
                state, logits, cache = step(tokens[:, start + j + 1 : start + j + 2], state, cache, at)
            np.testing.assert_allclose(at_once[j][:, start + j], logits, atol=2e-5, rtol=0)
            compared += 1
    assert compared == STEPS * (LENGTH - STEPS)
    assert np.std(at_once[2][:, 2:]) > 0.1


@pytest.mark.parametrize("loss", ["next_token", "kl", "total_variation"])
def test_the_objective_is_the_weighted_mean_of_its_steps(loss, teacher, head):
    """Position by position in NumPy: slot i stands for token i + 2, and for the teacher's law after token i + 1."""
    head, params = head
    tokens = text()
    taught = features_of(teacher, tokens, head.capture)
    steps = chains(head, params, teacher, tokens, taught.features, 3)
    target, values = np.asarray(taught.logits_btv, np.float64), []
    for j, logits in enumerate(np.asarray(step, np.float64) for step in steps):
        terms = []
        for row in range(2):
            for i in range(j, LENGTH - 2):
                q = np.exp(logits[row, i] - logits[row, i].max())
                q /= q.sum()
                p = np.exp(target[row, i + 1] - target[row, i + 1].max())
                p /= p.sum()
                terms.append(
                    {
                        "next_token": -np.log(q[tokens[row, i + 2]]),
                        "kl": np.sum(p * np.log(p / q)),
                        "total_variation": 0.5 * np.abs(p - q).sum(),
                    }[loss]
                )
        values.append(np.mean(terms))
    expected = (values[0] + 0.8 * values[1] + 0.64 * values[2]) / 2.44
    got = jax.jit(head_objective(loss, head, 3))(params, tokens, teacher)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_a_head_learns_what_it_is_trained_on(teacher):
    head = MTPHead(MTPConfig(HEADS["grouped queries"]))
    params = init_mtp_params(head.config, jax.random.key(3))
    objective, optimizer = head_objective("kl", head, 2), optax.adam(1e-2)
    tokens = text(4)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(objective)(params, tokens, teacher)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):
        state, values = optimizer.init(params), []
        for _ in range(60):
            params, state, loss = step(params, state)
            values.append(float(loss))
    assert np.isfinite(values).all()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    "keys",
    [{"model_type": "gemma2", "head_dim": 4, "sliding_window": 6}, {**LATENT, "first_k_dense_replace": 1}],
    ids=["every other layer has a window", "experts from the second layer on"],
)
def test_the_mtp_layer_that_is_trained_is_the_one_that_is_opened(keys, tmp_path):
    """The target's last layer, not its first."""
    config = decoder_config({**SIZES, **keys})
    target = decoder_model(config, init_params(config, jax.random.key(0)))
    stage = Stage("kl", 2, 1, 16, 1e-3, warmup_steps=0)
    recipe = Recipe("head", 0, {**SIZES, **keys}, (stage,), "target", 0, "", "mtp", 2)
    trainee = make_trainee(recipe, target, np.zeros(1, np.int64))
    params = trainee.init(jax.random.key(1))
    trainee.write(tmp_path / "head", params, None, {})
    opened = open_mtp(tmp_path / "head", target, 2, "float32")
    assert opened.head == trainee.drafter(params, 2).head
    assert config.each_layer[0] != config.each_layer[-1]


# Losses over a part of the vocabulary.


@pytest.mark.parametrize("loss", ["next_token", "kl", "total_variation"])
def test_tokens_that_cannot_be_drafted_count_for_nothing(loss):
    """As if the vocabulary were the part, over the positions whose token lies in it, whatever the draft's order."""
    rng = np.random.default_rng(0)
    draft, target = (rng.normal(size=(2, 6, VOCAB)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, VOCAB, (2, 6)).astype(np.int32)
    part = rng.permutation(np.arange(0, VOCAB, 2))
    draft_of_v = np.full(VOCAB, -1, np.int32)
    draft_of_v[part] = np.arange(len(part))
    wanted = tokens if loss == "next_token" else target.argmax(-1)
    kept = wanted % 2 == 0
    assert 0 < kept.sum() < kept.size
    small_draft, small_target = (jnp.asarray(x[kept][:, part])[None] for x in (draft, target))
    small_tokens = jnp.asarray(draft_of_v[tokens[kept]])[None]
    lesson = losses.lesson(loss, jnp.asarray(target), jnp.asarray(tokens), jnp.asarray(draft_of_v), len(part))
    expected = losses.draft(loss, small_draft, losses.lesson(loss, small_target, small_tokens))
    np.testing.assert_allclose(losses.draft(loss, jnp.asarray(draft[..., part]), lesson), expected, rtol=1e-5)


def test_the_draft_vocabulary_is_of_the_most_frequent_tokens():
    """In the target's order; of equally frequent ones, the first."""
    tokens = np.asarray([8, 8, 8, 3, 3, 5, 5, 1])
    assert most_frequent(tokens, 3, 10).tolist() == [-1, -1, -1, 0, -1, 1, -1, -1, 2, -1]
    assert most_frequent(tokens, 2, 10).tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, 1, -1]


def test_nothing_to_draft_is_no_loss():
    target = jnp.zeros((1, 2, VOCAB)).at[..., 3].set(5.0)
    first_alone = jnp.full((VOCAB,), -1, jnp.int32).at[0].set(0)
    lesson = losses.lesson("kl", target, jnp.ones((1, 2), jnp.int32), first_alone, 1)
    assert float(losses.draft("kl", jnp.zeros((1, 2, 1)), lesson)) == 0


@pytest.mark.parametrize(
    "options",
    [{"window": 4}, {"chunk": 5, "sinks_n": np.array([-1.0, 0.5, 2.0, 9.0], np.float32)}, {"window": 2, "cap": 0.7}],
    ids=str,
)
def test_chains_attend_as_one_chain_after_the_other(options):
    """Every slot's query sees the true slots before its chain and the chain's own steps, as if they were its row."""
    rng, t, cache = np.random.default_rng(0), 12, ChainCache()
    made = [[rng.normal(size=(1, heads, t, 6)).astype(np.float32) for heads in (4, 2, 2)] for _ in range(3)]
    for j, (query, keys, values) in enumerate(made):
        out, cache = cache.attend(query, (keys, values), scale=0.4, **options)
        for i in range(j, t):
            slots = [(0, s) for s in range(i - j + 1)] + [(m, i - j + m) for m in range(1, j + 1)]
            row = [np.stack([made[m][part][0, :, s] for m, s in slots], axis=1) for part in (1, 2)]
            wanted = reference_model.attend(query[0, :, i : i + 1], *row, np.array([i]), scale=0.4, **options)
            np.testing.assert_allclose(out[0, :, i], wanted[:, 0], atol=1e-5, rtol=0)
