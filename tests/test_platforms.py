"""The seam for code by platform: which way is taken, and that the ways of GPUs and TPUs say what a CPU's say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import specjax
from specjax import cache, filters, platforms
from specjax.engine import loop as engine
from specjax.platforms import by_platform, platform_of
from specjax.quantized import GROUP
from specjax.transformer import DecoderConfig, ExpertsConfig, LayerConfig, decoder_model, init_params, plain_rope
from specjax.transformer.decoder import DecoderLayer
from specjax.types import whole_feed

WAYS = {name: functools.partial(lambda name, x: name, name) for name in ("cpu", "tpu", "cuda", "default")}


def known(platform):
    described = AbstractDevice("a device", None, platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


@pytest.mark.parametrize(("platform", "way"), [("cpu", "cpu"), ("tpu", "tpu"), ("other", "default")])
def test_a_known_platform_traces_its_own_way_alone(platform, way):
    with known(platform):
        assert by_platform(1, **WAYS) == way


def test_of_gpus_jax_says_which():
    """A GPU's mesh does not say whose it is. This lowers for a CPU, which has none of their ways."""
    ways = {name: functools.partial(lambda n, x: x + n, n) for n, name in enumerate(("cpu", "cuda", "tpu", "default"))}
    with known("gpu"):
        jaxpr = jax.make_jaxpr(lambda x: by_platform(x, **ways))(0)
        assert jax.jit(lambda x: by_platform(x, **ways))(0) == 3
        assert by_platform(0, default=lambda x: x + 5, cpu=lambda x: x) == 5
    assert "platform" in str(jaxpr) and str(jaxpr).count("add") == 2


def test_an_unknown_platform_is_left_to_jax():
    ways = {name: functools.partial(lambda n, x: x + n, n) for n, name in enumerate(("cpu", "cuda", "tpu", "default"))}
    assert str(jax.make_jaxpr(lambda x: by_platform(x, **ways))(0)).count("add") == 4
    assert jax.jit(lambda x: by_platform(x, **ways))(0) == 0


def test_the_platform_is_that_of_the_arrays_unless_it_is_known():
    def seen():
        return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", None)

    with platform_of({"host": np.ones(2), "device": jnp.ones(2)}):
        assert seen() == "cpu"
    with platform_of({"host": np.ones(2)}):
        assert seen() is None
    described = specjax.make_mesh().abstract_mesh.abstract_device
    with platform_of(jnp.ones(2)):
        assert jax.sharding.get_abstract_mesh().abstract_device == described  # as kernels may ask for it
    with known("tpu"), platform_of(jnp.ones(2)):
        assert seen() == "cpu"  # arrays are where they are
    with jax.set_mesh(specjax.make_mesh()), platform_of(jnp.ones(2)):
        assert seen() == "cpu" and jax.sharding.get_abstract_mesh().axis_names

    @jax.jit
    def traced(x):
        with platform_of((jnp.ones(2), x)):
            assert seen() is None
        return x

    traced(jnp.ones(2))


DENSE = DecoderConfig(64, GROUP, GROUP, 1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
MIXTURE = dataclasses.replace(
    DENSE, layers=(LayerConfig(rope=plain_rope(32), experts=True),), experts=ExpertsConfig(6, 2, GROUP)
)


def dense():
    return decoder_model(DENSE, init_params(DENSE, jax.random.key(0)))


def quantised_mixture():
    return specjax.quantize(decoder_model(MIXTURE, init_params(MIXTURE, jax.random.key(1))), "int8")


def ways_of(monkeypatch, platform):
    """Makes the engine trace the ways of another platform. The kernel of attention is XLA's: others run on a GPU."""
    monkeypatch.setenv("SPECJAX_ATTENTION", "xla")
    monkeypatch.setattr(engine, "platform_of", lambda tree: known(platform))
    # Of a GPU, this one's own: JAX lowers for a CPU.
    monkeypatch.setattr(
        platforms.lax, "platform_dependent", lambda *args, default, **ways: ways.get("cuda", default)(*args)
    )
    monkeypatch.setattr(filters, "_LARGE", 32)  # so that the vocabulary is dealt to buckets
    monkeypatch.setattr(filters, "LEVELS", ((8, 2), (16, 4)))
    jax.clear_caches()


def test_a_gpu_gives_up_drafts_that_do_not_pay(monkeypatch):
    """It chooses after blocks of four rounds. One trial is all in 100 rounds, at two batches."""
    target, useless = dense(), specjax.ModelDrafter(dense(), 4)
    norm = {"norm": {"weight": -useless.model.params["norm"]["weight"]}}  # the likeliest is the least likely
    useless = useless.replace(model=useless.model.replace(params=useless.model.params | norm))
    ways_of(monkeypatch, "gpu")
    for rows in (1, 3):
        options = {"drafter": useless, "max_new_tokens": 100, "costs": (1, 2, 2.5), "sampling": specjax.Sampling(0.0)}
        stats = specjax.generate(target, [[1, 2, 3]] * rows, **options).stats
        assert stats.accepted.sum() < 10 and 0 < stats.drafted_at[:, 0].max() <= 8


@pytest.mark.parametrize("make", [dense, quantised_mixture])
def test_text_is_that_of_the_ways_of_a_cpu(make, monkeypatch):
    """One row with drafts; and more rows than are unrolled, greedy, filtered and neither."""
    target = make()
    sampling = specjax.Sampling(temperature=[0.0, 1.0, 0.7] * 6, top_k=[0, 5, 0] * 6, top_p=[1.0, 1.0, 0.8] * 6)
    prompts = [[i + 1, i + 2, 3][: 1 + i % 3] for i in range(18)]

    def texts():
        one = specjax.generate(
            target, [[1, 2, 3]], drafter=specjax.ModelDrafter(dense(), 2), fixed=True, max_new_tokens=12
        )
        return one.tokens, specjax.generate(target, prompts, sampling=sampling, max_new_tokens=12).tokens

    wanted, traced = texts(), []
    for platform, room, way in (("gpu", cache, "scattered"), ("tpu", filters, "among_largest")):
        with monkeypatch.context() as patch:
            ways_of(patch, platform)
            true = getattr(room, way)
            patch.setattr(room, way, lambda *args, true=true, way=way: traced.append(way) or true(*args))
            for found, expected in zip(texts(), wanted, strict=True):
                np.testing.assert_array_equal(found, expected)
        assert way in traced


def test_layers_that_differ_in_their_arrays_alone_share_a_trace(monkeypatch):
    """Of 6 layers of 2 kinds two are traced, and another form of attention traces them again."""
    kinds = [LayerConfig(rope=plain_rope(32), window=window) for window in (None, 8)]
    config = dataclasses.replace(DENSE, num_hidden_layers=6, layers=(*kinds, *kinds, *kinds))
    target, traced = decoder_model(config, init_params(config, jax.random.key(0))), []
    true = DecoderLayer.inline
    monkeypatch.setattr(DecoderLayer, "inline", lambda *args: traced.append(1) or true(*args))

    def trace():
        traced.clear()
        jax.eval_shape(lambda: target.forward(target.params, whole_feed(jnp.ones((1, 3), jnp.int32)), None))
        return len(traced)

    jax.clear_caches()
    assert (trace(), trace()) == (2, 0)
    monkeypatch.setenv("SPECJAX_ATTENTION", "xla")
    assert trace() == 2
    monkeypatch.setenv("SPECJAX_ATTENTION", "nonsense")
    with pytest.raises(ValueError, match="SPECJAX_ATTENTION is 'nonsense'"):
        trace()
