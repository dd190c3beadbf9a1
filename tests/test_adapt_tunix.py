"""Models of google-tunix through ``specjax.adapt``; skipped without the package (``pip install 'specjax[tunix]'``)."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_texts import PROMPTS, assert_greedy, assert_texts_and_law, generate, moved, run_section
from flax import nnx

import specjax
from specjax.commands import adapted

pytest.importorskip("tunix.models.qwen3.model", reason="google-tunix is not installed: pip install 'specjax[tunix]'")


@pytest.fixture(autouse=True)
def promotion():
    """The package promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def gemma2():
    from tunix.models.gemma import model as gemma

    kinds = gemma.AttentionType
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=97,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        attn_logits_soft_cap=50.0,
        sliding_window_size=16,
    )
    return gemma.Gemma(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def models():
    """Returns modules and their caches, with weights that were moved."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names, gemma = run_section("tunix"), gemma2()
        cache = lambda model: lambda rows, slots: model.init_cache(rows, slots, jnp.float32)
        found = {
            "qwen3": (names["model"], cache(names["model"])),
            "llama3": (names["llama"], names["llama_cache"]),
            "gemma": (gemma, cache(gemma)),
        }
        for model, _ in found.values():
            nnx.update(model, jax.tree.map(moved, nnx.state(model)))
    return found


def logits_of(model):
    def call(tokens):
        tokens = jnp.asarray(tokens)
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model(tokens, place, None, place[:, None, :] <= place[:, :, None])[0]

    return call


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
def test_texts_and_law_are_those_of_a_pass_without_a_cache(models, name):
    model, cache = models[name]
    target = specjax.adapt(model, cache)
    specjax.check_model(target, length=48)
    second = specjax.adapt(model, cache)
    second = second.replace(
        params=jax.tree.map(lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size) * 9.0).reshape(x.shape), second.params)
    )
    assert_texts_and_law(target, second, logits_of(model))


def test_a_target_drafts_for_itself_without_loss(models):
    target = specjax.adapt(*models["qwen3"])
    out = generate(target, specjax.ModelDrafter(target, 3))
    np.testing.assert_array_equal(out.stats.accepted_at, out.stats.drafted_at)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_scratch_slots_have_the_same_text(models, name):
    model, cache = models[name]
    target = specjax.adapt(model, cache, way="scratch")
    specjax.check_model(target, length=48)
    assert_greedy(generate(target, specjax.NGramDrafter(3, 1, 2)), PROMPTS, logits_of(model))


def test_a_window_of_slots_is_refused_in_scratch_slots(models):
    with pytest.raises(ValueError, match="breaks the contract"):
        specjax.check_model(specjax.adapt(*models["gemma"], way="scratch"), length=48)


def test_a_model_of_the_same_sizes_is_the_same_architecture(models):
    """As after each update of a policy."""
    again = run_section("tunix")
    assert again["target"].forward is specjax.adapt(*models["qwen3"]).forward
    assert again["target"].init_cache is specjax.adapt(*models["qwen3"]).init_cache


def test_the_benchmark_has_the_texts_of_the_packages_own_sampler():
    args = argparse.Namespace(package=["tunix"], batch=[2], num_draft=[2], new_tokens=4, repeats=1)
    rows = adapted.bench_adapted(args)
    assert len(rows) >= 3 and {row["text equal"] for row in rows} == {"2 of 2"}
