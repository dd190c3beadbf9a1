"""Weight-only quantisation, and the products that read it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, save_tiny

import specjax
from specjax import EarlyExitDrafter, MedusaDrafter, ModelDrafter
from specjax.commands import generate as generate_command
from specjax.drafters.medusa import init_medusa_params
from specjax.planning import Mesh, Model, weights
from specjax.quantized import GROUP, KINDS, Quantized, is_quantized, quantize_leaf
from specjax.training.loop import fit
from specjax.transformer import (
    DecoderConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    decoder_model,
    init_params,
    plain_rope,
    products,
)
from specjax.transformer.moe import Form, Stacks, expert_by_expert, sorted_by_expert
from specjax.transformer.products import product, ragged_product
from specjax.types import whole_feed

DENSE = DecoderConfig(64, GROUP, 2 * GROUP, 2, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
ROPE = plain_rope(32)
FAMILIES = {
    "tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "untied": DENSE,
    "experts": dataclasses.replace(
        DENSE,
        layers=(LayerConfig(rope=ROPE, experts=True),) * 2,
        experts=ExpertsConfig(6, 2, GROUP),
    ),
    "latent": dataclasses.replace(
        DENSE,
        attention_bias=False,
        num_key_value_heads=None,
        latent=LatentConfig(query_rank=None, key_value_rank=GROUP, plain_width=16, rotary_width=16, value_width=32),
        layers=(LayerConfig(rope=plain_rope(16)),) * 2,
    ),
}
PATH = (jax.tree_util.DictKey("q_proj"), jax.tree_util.DictKey("kernel"))
TABLE = (jax.tree_util.DictKey("embed_tokens"), jax.tree_util.DictKey("weight"))


@functools.cache
def model(family, seed=0):
    config = FAMILIES[family]
    params = init_params(config, jax.random.key(seed))
    # Large weights, so that greedy texts depend on all that came before.
    return decoder_model(config, jax.tree.map(lambda x: 8.0 * x if x.ndim > 1 else x, params))


def kernel(shape, seed=0, path=PATH, kind="int8"):
    dense = jax.random.normal(jax.random.key(seed), shape)
    return dense, quantize_leaf(kind, path, dense)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), outputs=st.integers(1, 5), seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
def test_an_entry_is_off_by_half_a_step_at_most(kind, outputs, seed, scale):
    dense = scale * jax.random.normal(jax.random.key(seed), (2 * GROUP, outputs))
    quantized = quantize_leaf(kind, PATH, dense)
    error = np.abs(quantized.dequantize() - dense).reshape(quantized.values.shape)
    step = np.asarray(jnp.expand_dims(quantized.scales, quantized.axis))
    if kind == "fp8":  # 3 bits after the leading one; numbers below 2**-6 have the step 2**-9
        step = np.maximum(np.abs(dense) * 2.0**-3, step * 2.0**-9)
    assert (error <= step / 2 * (1 + 1e-5)).all()


def test_zeros_stay_zeros():
    for kind in KINDS:
        assert not quantize_leaf(kind, PATH, jnp.zeros((GROUP, 3))).dequantize().any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_twin(kind, family):
    quantized = specjax.quantize(model(family), kind)
    feed = whole_feed(jnp.arange(10, dtype=jnp.int32)[None])
    run = jax.jit(lambda model: model.forward(model.params, feed, None, ()).logits_btv)
    ours, twin, plain = map(np.asarray, map(run, (quantized, specjax.dequantize(quantized), model(family))))
    scale = np.abs(plain).max()
    np.testing.assert_allclose(ours / scale, twin / scale, atol=2e-5)
    assert np.abs(ours - plain).max() / scale > 1e-4  # it is another model


def test_what_is_quantised():
    params = specjax.quantize(model("experts"), "int4").params
    layer = params["layers"][0]
    dtypes = {
        "table": params["embed_tokens"]["weight"].values.dtype,
        "output head": params["lm_head"]["kernel"].values.dtype,
        "attention": layer["self_attn"]["o_proj"]["kernel"].values.dtype,
        "experts": layer["mlp"]["experts"]["down_proj"].values.dtype,
    }
    assert dtypes == {"table": "int8", "output head": "int4", "attention": "int4", "experts": "int4"}
    whole = [layer["mlp"]["gate"]["kernel"], layer["input_layernorm"]["weight"], layer["self_attn"]["q_proj"]["bias"]]
    assert all(x.dtype == jnp.float32 for x in whole)
    shapes = jax.tree.map(lambda x: x.shape, params, is_leaf=lambda x: isinstance(x, Quantized))
    assert shapes == jax.tree.map(lambda x: x.shape, model("experts").params)
    abstract = jax.eval_shape(lambda: specjax.quantize(model("experts"), "int4"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def greedy(target, drafter=None):
    prompts, sampling = [[1, 2, 3], [4, 5, 6, 7, 8]], specjax.Sampling(temperature=0.0)
    return specjax.generate(target, prompts, max_new_tokens=12, sampling=sampling, drafter=drafter, fixed=True).tokens


@pytest.mark.parametrize(
    "family, kind, early",
    [("tied", "int8", False), ("untied", "int4", False), ("experts", "int8", True), ("latent", "fp8", True)],
)
def test_speculative_text_is_the_quantised_target_s_own(family, kind, early):
    """The drafter is a quantised draft model, or the first layer of the target."""
    target = specjax.quantize(model(family), kind)
    drafter = EarlyExitDrafter(1, 2) if early else specjax.quantize(ModelDrafter(model(family, seed=1), 2), kind)
    np.testing.assert_array_equal(greedy(target, drafter), greedy(target))


def test_draft_heads_are_quantised():
    heads = MedusaDrafter(init_medusa_params(jax.random.normal(jax.random.key(0), (GROUP, 64)), 2), 2)
    quantized = specjax.quantize(heads, "int8")
    assert is_quantized(quantized.params[1]["blocks"]) and quantized.vocab_size == 64
    placed = specjax.shard(quantized, specjax.make_mesh())
    target = specjax.quantize(model("tied"), "int8")
    np.testing.assert_array_equal(greedy(target, placed), greedy(target))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5])
def test_all_ways_to_multiply_agree(kind, rows):
    """Those of TPUs and GPUs run here as well. The table is multiplied from its other side."""
    for path, shape in ((PATH, (2 * GROUP, 24)), (TABLE, (24, 2 * GROUP))):
        _, stored = kernel(shape, path=path, kind=kind)
        x = jax.random.normal(jax.random.key(1), (rows, 1, 2 * GROUP))
        wanted = np.asarray(x) @ np.asarray(stored.dequantize() if path == PATH else stored.dequantize().T)
        ways = set(products._quantized_ways(stored, few=True).values())
        assert len(ways) == (3 if stored.grouped else 2)
        for way in ways | {functools.partial(products._twice, way) for way in ways if rows == 1}:
            np.testing.assert_allclose(way(x, stored, dtype=jnp.dtype("float32")), wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(product(x, stored), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_on_a_cpu(rows, transposed):
    """The sum is one of float32 and is rounded once. A second row joins a single one."""
    keys = jax.random.split(jax.random.key(0))
    x, stored = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, ((rows, 64), (64, 24)), strict=True)
    )
    wanted = np.asarray(x, np.float64) @ np.asarray(stored, np.float64)
    compiled = jax.jit(functools.partial(product, transposed=transposed)).lower(x, stored.T if transposed else stored)
    assert f"tensor<{max(rows, 2)}x24xf32>" in compiled.as_text()
    y = compiled.compile()(x, stored.T if transposed else stored)
    assert y.shape == (rows, 24) and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=2.0**-8, atol=1e-4)


def test_experts_agree():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(7, GROUP)), jnp.float32)
    chosen = jnp.asarray(rng.integers(0, 4, size=(7, 2)), jnp.int32)
    share = jnp.full((7, 2), 0.5)
    for kind in KINDS:
        stacks = Stacks(
            *(
                quantize_leaf(kind, (jax.tree_util.DictKey("experts"), jax.tree_util.DictKey(name)), stack)
                for name, stack in zip(
                    "gud", jnp.asarray(rng.normal(size=(3, 4, GROUP, GROUP)) / 10, jnp.float32), strict=True
                )
            )
        )
        one, other = (run(Form("silu"), x, chosen, share, stacks) for run in (expert_by_expert, sorted_by_expert))
        dense = expert_by_expert(Form("silu"), x, chosen, share, Stacks(*(stack.dequantize() for stack in stacks[:3])))
        np.testing.assert_allclose(one, dense, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(other, dense, rtol=1e-3, atol=1e-3)
        late = jnp.asarray([2, 4], jnp.int32)  # 4 is the place of no expert
        found = ragged_product(x[:2], stacks[0], jnp.asarray([0, 0, 1, 0], jnp.int32), late)
        np.testing.assert_allclose(found[0], x[0] @ stacks[0].dequantize()[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mapped", [False, True])
def test_one_row_is_two_except_on_a_cpu(mapped):
    function = jax.vmap(product, in_axes=(0, None)) if mapped else product
    x, w = jnp.ones((3, 1, 1, 8) if mapped else (1, 1, 8)), jnp.ones((8, 4))
    traced = jax.jit(function).trace(x, w)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert "2x8xf32" not in texts["cpu"]
    assert all("2x8xf32>, tensor<8x4xf32>" in texts[name] for name in ("tpu", "cuda"))
    assert function(x, w).shape == (*x.shape[:-1], 4)
    assert "case" not in jax.jit(product).trace(jnp.ones((2, 8)), w).lower().as_text()  # nothing to choose


@pytest.mark.parametrize("family", ["tied", "untied"])
def test_logits_are_not_rounded(family):
    half = decoder_model(FAMILIES[family], jax.tree.map(lambda x: x.astype(jnp.bfloat16), model(family).params))
    logits = half.forward(half.params, whole_feed(jnp.arange(4, dtype=jnp.int32)[None]), None, ()).logits_btv
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_an_embedding_is_looked_up_in_its_row():
    dense, table = kernel((24, 8), path=TABLE)
    for tokens in (jnp.asarray([[5]]), jnp.asarray([[5, 0, 23]])):
        found = products.rows(table, tokens)
        np.testing.assert_array_equal(found, table.dequantize()[tokens])
        np.testing.assert_allclose(found, dense[tokens], atol=0.02)


def test_parts_of_a_split_kernel_hold_whole_groups():
    for kind, values, scales in (
        ("int8", (("heads", 8), "embed"), ("embed",)),
        ("int4", (("heads", 2), None, "embed"), (("heads", 2), "embed")),
    ):
        _, stored = kernel((2 * GROUP, 6), kind=kind)
        axes = stored.split_axes((("heads", 8), "embed"))
        assert (axes.values, axes.scales) == (values, scales)
    places = specjax.sharding.shardings(specjax.quantize(model("latent"), "int4"), specjax.make_mesh())
    assert jax.tree.structure(places.params) == jax.tree.structure(specjax.quantize(model("latent"), "int4").params)


def test_folders_open_quantised(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    wanted = specjax.quantize(specjax.load(folder), "int8").params
    specjax.export_hf(folder, tmp_path / "hf")
    for path in (folder, tmp_path / "hf"):
        for mesh in (None, specjax.make_mesh()):
            found = specjax.open(path, quantize="int8", mesh=mesh).model.params
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
    target = specjax.open(folder)
    for spec in (f"model:{folder}", f"cascade:ngram,model:{folder}"):
        assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(specjax.load_drafter(spec, target, quantize="int8")))


def test_the_commands_quantise(tmp_path, capsys):
    folder = save_tiny(tmp_path / "tiny")
    options = ["--target", str(folder), "--prompt", "ab", "--max-new-tokens", "6", "--temperature", "0"]
    generate_command.main([*options, "--drafter", "none", "--quantize", "int8", "--json", str(tmp_path / "a")])
    draft = ["--drafter", f"model:{folder}", "--quantize-draft", "fp8"]
    generate_command.main([*options, *draft, "--quantize", "int8", "--json", str(tmp_path / "b")])
    plain, drafted = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert plain["prompts"][0]["text"] == drafted["prompts"][0]["text"]
    assert drafted["settings"]["quantize draft"] == "fp8"
    with pytest.raises(SystemExit):
        generate_command.main([*options, "--quantize", "int4"])
    assert "has 16 inputs, and int4 has groups of 128; give int8" in capsys.readouterr().err


def test_plans_know_the_bytes():
    config = FAMILIES["tied"]
    quantized = specjax.quantize(model("tied"), "int4").params
    stored = sum(
        x.size * (0.5 if x.dtype == jnp.int4 else x.dtype.itemsize)
        for x in jax.tree.leaves(quantized)
        if x.ndim > 1 or x.dtype != jnp.float32
    )
    assert weights(Model(config, "int4"), Mesh()).held == pytest.approx(stored, rel=0.05)


def test_what_cannot_be_quantised(tmp_path):
    tied = model("tied")
    quantized = specjax.quantize(tied, "int8")
    with pytest.raises(ValueError, match="quantize is 'int3'; give int8, int4, fp8, or None"):
        specjax.quantize(tied, "int3")
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        specjax.open(tmp_path, quantize="int3")
    with pytest.raises(ValueError, match="quantised already"):
        specjax.quantize(quantized, "int8")
    with pytest.raises(ValueError, match=r"parameter \['layers'\]\[0\]\['mlp'\]\['down_proj'\].* 200 inputs.*of 128"):
        config = dataclasses.replace(FAMILIES["tied"], intermediate_size=200)
        specjax.quantize(decoder_model(config, init_params(config, jax.random.key(0))), "int4")
    with pytest.raises(TypeError, match="give a LanguageModel or a drafter"):
        specjax.quantize(tied.params, "int8")
    with pytest.raises(ValueError, match="is of test_quantized, whose parameters specjax cannot quantise"):
        specjax.quantize(dataclasses.replace(tied, forward=lambda *_: None), "int8")
    with pytest.raises(ValueError, match="checkpoints hold weights as they were trained"):
        specjax.save(tmp_path / "no", CONFIG, quantized.params)
    with pytest.raises(ValueError, match="train floating-point ones and quantise the result"):
        fit(None, quantized.params, None, None, tmp_path)
    with pytest.raises(TypeError, match="has no entry 0"):
        quantized.params["embed_tokens"]["weight"][0]
