"""Models of gemma through ``specjax.adapt``; skipped without the package (``pip install 'specjax[gemma]'``), which asks
for Python 3.12."""

import argparse

import jax
import jax.numpy as jnp
import pytest
from adapted_texts import assert_texts_and_law, moved, run_section

import specjax
from specjax.commands import adapted

pytest.importorskip("gemma.gm.nn", reason="gemma is not installed: pip install 'specjax[gemma]' on Python 3.12")

SIZES = {"num_embed": 97, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
SIZES |= {"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 16}


@pytest.fixture(autouse=True)
def promotion():
    """The package promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def gemma2():
    from gemma.gm.nn import _config, _modules, _transformer

    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
    config = _config.TransformerConfig(
        **SIZES, attention_types=kinds, final_logit_softcap=30.0, attn_logits_soft_cap=50.0
    )
    return _transformer.Transformer(config=config, dtype=jnp.float32)


def gemma4():
    from gemma.gm.nn.gemma4 import _config, _modules, _transformer

    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
    config = _config.TransformerConfig(
        **SIZES,
        attention_types=kinds,
        final_logit_softcap=30.0,
        per_layer_input_dim=8,
        local_rope_proportion=1.0,
        global_rope_proportion=0.25,
    )
    return _transformer.Transformer(config=config, dtype=jnp.float32)


CASES = [("gemma 2", "mapped"), ("gemma 2", "scratch"), ("gemma 3", "mapped"), ("gemma 3", "scratch")]
CASES += [("gemma 4", "indexed")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_texts_and_law_are_those_of_a_pass_without_a_cache(name, way):
    names = run_section("gemma")
    if name != "gemma 3":
        names["model"] = {"gemma 2": gemma2, "gemma 4": gemma4}[name]()  # the page's functions call it by this name
    model = names["model"]
    params = jax.tree.map(moved, model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
    target = specjax.adapt(params, names["empty_cache"], call=names["call"], way=way)
    specjax.check_model(target, length=48)
    second = target.replace(params=jax.tree.map(lambda x: x + 0.02 * jnp.sin(9 * x), params))
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)
    assert_texts_and_law(target, second, logits_of)
    assert specjax.adapt(params, names["empty_cache"], call=names["call"], way=way).forward is target.forward


def test_the_benchmark_has_the_texts_of_the_packages_own_sampler():
    args = argparse.Namespace(package=["gemma"], batch=[2], num_draft=[2], new_tokens=4, repeats=1)
    rows = adapted.bench_adapted(args)
    assert len(rows) >= 3 and {row["text equal"] for row in rows} == {"2 of 2"}
