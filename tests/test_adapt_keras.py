"""Models of keras-hub on JAX through ``specjax.adapt``; skipped without it (``pip install 'specjax[keras]'``)."""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_texts import assert_texts_and_law, moved, run_section

import specjax
from specjax.commands import adapted

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="keras-hub is not installed: pip install 'specjax[keras]'")
keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed: pip install 'specjax[keras]'")
if keras.backend.backend() != "jax":
    pytest.skip("keras has another backend than JAX: set KERAS_BACKEND=jax", allow_module_level=True)


@pytest.fixture(autouse=True)
def promotion():
    """The package promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def llama():
    sizes = {"vocabulary_size": 97, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2}
    backbone = keras_hub.models.Llama3Backbone(**sizes, hidden_dim=32, intermediate_dim=48)
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


@pytest.fixture(params=["qwen3", "llama3"])
def model(request):
    """A model of each family, and the function of the page that calls it."""
    names = run_section("keras-hub")
    if request.param == "llama3":
        names["model"] = llama()  # the page's function calls the model by this name
    model = names["model"]
    model.backbone.set_weights([np.asarray(moved(x)) for x in model.backbone.get_weights()])
    return model, names["call"]


def values_of(model):
    return [variable.value for variable in model.variables]


def empty(rows, slots):
    return jnp.zeros((rows, 2, 2, slots, 2, 8))


def logits_of(model):
    return lambda tokens: model({"token_ids": tokens, "padding_mask": np.ones(tokens.shape, np.int32)})


def test_texts_and_law_are_those_of_a_pass_without_a_cache(model):
    model, call = model
    target = specjax.adapt(values_of(model), empty, call=call)
    specjax.check_model(target, length=48)
    second = target.replace(
        params=[x + 0.02 * jnp.sin(jnp.arange(x.size) * 9.0).reshape(x.shape).astype(x.dtype) for x in target.params]
    )
    assert_texts_and_law(target, second, logits_of(model))
    again = specjax.adapt(values_of(model), empty, call=call)
    assert again.forward is target.forward


def test_the_benchmark_has_the_texts_of_the_packages_own_sampler():
    args = argparse.Namespace(package=["keras-hub"], batch=[2], num_draft=[2], new_tokens=4, repeats=1)
    rows = adapted.bench_adapted(args)
    assert len(rows) >= 3 and {row["text equal"] for row in rows} == {"2 of 2"}
