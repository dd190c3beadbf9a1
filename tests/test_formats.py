"""Quantised folders, each format against a slow dequantiser; and what is damaged or unknown is refused in words."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantised_folders import awq, compressed, float8, gptq, mxfp4

import specjax
from specjax.hf.config import decoder_config
from specjax.hf.families import sources
from specjax.hf.formats import decode, read_format
from specjax.hf.weights import check_tensors
from specjax.hf.weights import plain_tensors as weights_of

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
WANTED = sources("llama", decoder_config(CONFIG))
SHAPES = {name: source.shape for name, source in WANTED.items()}
UP = "model.layers.0.mlp.up_proj"


def compressed_config(weights, layout="pack-quantized", **others):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    named = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return named | {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None} | others


def weights(bits=4, kind="int", strategy="group", size=32, **others):
    size = {"group": size, "channel": -1}.get(strategy)
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": True, **others}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
ASYMMETRIC = weights(symmetric=False)
E8M0 = ml_dtypes.float8_e8m0fnu

# The quantization_config, the packer, its arguments, and what stands before the ends of names.
CASES = {
    "gptq": (GPTQ, gptq, {}, "."),
    "gptq 8 bits": ({**GPTQ, "bits": 8}, gptq, {"bits": 8}, "."),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, gptq, {"bits": 3}, "."),
    "gptq 2 bits": ({**GPTQ, "bits": 2}, gptq, {"bits": 2}, "."),
    "gptq one group": ({**GPTQ, "group_size": -1}, gptq, {"size": -1}, "."),
    "gptq by activations": ({**GPTQ, "desc_act": True}, gptq, {"order": True}, "."),
    "gptq without g_idx": (GPTQ, gptq, {"index": False}, "."),
    "gptq with biases of zeros": (GPTQ, gptq, {"bias": True}, "."),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq, {"offset": 0}, "."),
    "gptq with rules": ({**GPTQ, "dynamic": {"-:.*gate.*": {}}}, gptq, {"bits": 8, "size": 16}, "."),
    "gptq with rules, no g_idx": ({**GPTQ, "dynamic": {"-:.*gate.*": {}}}, gptq, {"index": False}, "."),
    "awq": (AWQ, awq, {}, "."),
    "awq one group": ({**AWQ, "group_size": -1}, awq, {"size": -1}, "."),
    "awq gemv": ({**AWQ, "version": "GEMV"}, awq, {"gemv": True}, "."),
    "pack-quantized": (compressed_config(weights()), compressed, {}, ".weight"),
    "pack-quantized channels": (
        compressed_config(weights(8, strategy="channel")),
        compressed,
        {"bits": 8, "strategy": "channel"},
        ".weight",
    ),
    "pack-quantized tensor": (
        compressed_config(weights(strategy="tensor")),
        compressed,
        {"strategy": "tensor"},
        ".weight",
    ),
    "pack-quantized zeros": (compressed_config(ASYMMETRIC), compressed, {"zeros": "packed"}, ".weight"),
    "pack-quantized int8 zeros": (compressed_config(ASYMMETRIC), compressed, {"zeros": "plain"}, ".weight"),
    "pack-quantized by activations": (
        compressed_config(weights(actorder="group")),
        compressed,
        {"order": True},
        ".weight",
    ),
    "int-quantized": (
        compressed_config(weights(8, strategy="channel"), "int-quantized"),
        compressed,
        {"bits": 8, "strategy": "channel", "packed": False},
        ".weight",
    ),
    "int-quantized zeros": (
        compressed_config(weights(8, strategy="channel", symmetric=False), "int-quantized"),
        compressed,
        {"bits": 8, "strategy": "channel", "packed": False, "zeros": "plain"},
        ".weight",
    ),
    "naive-quantized": (
        compressed_config(weights(8), "naive-quantized"),
        compressed,
        {"bits": 8, "packed": False},
        ".weight",
    ),
    **{
        f"float-quantized {strategy}": (
            compressed_config(
                weights(8, "float", strategy, block_structure=[16, 24] if strategy == "block" else None),
                "float-quantized",
            ),
            compressed,
            {"kind": "float", "packed": False, "strategy": strategy, "block": (16, 24)},
            ".weight",
        )
        for strategy in ("tensor", "channel", "block")
    },
    "fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        float8,
        {"scales": "channel"},
        ".weight",
    ),
    "fp8 scalar": (FP8, float8, {"scales": "scalar", "end": "_scale_inv"}, ".weight"),
    "fp8 tensor": (FP8, float8, {"scales": "tensor"}, ".weight"),
    "fp8 outputs": (FP8, float8, {"scales": "vector"}, ".weight"),
    "fp8 blocks": (
        {**FP8, "weight_block_size": [16, 24]},
        float8,
        {"scales": "block", "end": "_scale_inv"},
        ".weight",
    ),
    "fp8 blocks of exponents": (
        {**FP8, "weight_block_size": [16, 24], "scale_fmt": "ue8m0"},
        float8,
        {"scales": "block", "end": "_scale_inv", "dtype": E8M0},
        ".weight",
    ),
}


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = [
        specjax.hf.TensorSpec(name, tensor.dtype, tensor.shape, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    specjax.hf.write_tensors(folder, specs)
    return folder


def plain_tensors(rng):
    return {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in SHAPES.items()}


def quantised(case, rng):
    """Returns the config, the stored tensors, and the plain tensors that they stand for."""
    quantization, packer, options, between = CASES[case]
    plain = plain_tensors(rng)
    stored = {name: tensor.astype(np.float16) for name, tensor in plain.items()}
    plain = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    for name in [name for name in plain if "_proj" in name]:
        parts, plain[name] = packer(rng, *plain[name].shape, **options)
        del stored[name]
        stored |= {name.removesuffix(".weight") + between + end: part for end, part in parts.items()}
    return {**CONFIG, "quantization_config": quantization}, stored, plain


def logits(model):
    tokens_bt = jnp.arange(12, dtype=jnp.int32)[None]
    feed = specjax.Feed(tokens_bt, jnp.zeros(1, jnp.int32), jnp.full(1, 12, jnp.int32))
    return np.asarray(jax.jit(model.forward)(model.params, feed, model.init_cache(1, 12)).logits_btv)


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_folder_is_its_dequantised_self(case, tmp_path):
    config, stored, plain = quantised(case, np.random.default_rng(0))
    ours = specjax.load(write(tmp_path / "quantised", config, stored), "float32")
    expected = specjax.load(write(tmp_path / "plain", CONFIG, plain), "float32")
    jax.tree.map(np.testing.assert_array_equal, ours.params, expected.params)
    np.testing.assert_allclose(logits(ours), logits(expected), rtol=0, atol=1e-6)


# One weight by itself.


def one_weight(case, folder):
    """Returns the config and tensors of one quantised weight in a folder, and the weight."""
    quantization, packer, options, between = CASES[case]
    parts, weight = packer(np.random.default_rng(1), *SHAPES[f"{UP}.weight"], **options)
    write(folder, CONFIG, {UP + between + end: np.asarray(part) for end, part in parts.items()})
    return quantization, specjax.hf.open_tensors(folder), weight


def test_mxfp4_is_the_plain_stack(tmp_path):
    """With a scale of each size; and in blocks of one expert."""
    parts, stack = mxfp4(np.random.default_rng(0), 3, 20, 64)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write(tmp_path / "folder", CONFIG, {name + end: part for end, part in parts.items()})
    form = read_format({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}})
    (weight,) = decode(specjax.hf.open_tensors(tmp_path / "folder"), form).values()
    assert weight.name == name and weight.shape == stack.shape and weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.read(), stack)
    ((start, stop, block),) = weight.blocks(1, 2)
    assert (start, stop) == (1, 2)
    np.testing.assert_array_equal(block, stack[1:2])


@pytest.mark.parametrize("case", CASES)
def test_any_rows_in_blocks_of_any_size(case, tmp_path, monkeypatch):
    quantization, tensors, expected = one_weight(case, tmp_path / "folder")
    (weight,) = (
        x
        for x in decode(tensors, read_format({"quantization_config": quantization})).values()
        if x.name == f"{UP}.weight"
    )
    for entries in (1, 5 * 64, 10**9):
        monkeypatch.setattr("specjax.hf.computed._BLOCK", entries)
        np.testing.assert_array_equal(weight.read(), expected)
        rows = np.concatenate([block for _, _, block in weight.blocks(3, 42)])
        np.testing.assert_array_equal(rows, expected[3:42])


def damages(tensor):
    """Yields other headers for the data of a tensor."""
    shape = tensor.shape
    for dtype in (np.float64, np.int16, np.uint8, np.bool_):
        if dtype != tensor.dtype:
            yield {"dtype": np.dtype(dtype)}
    yield {"shape": (*shape, 2)}
    for axis, size in enumerate(shape):
        for other in (0, size - 1, size + 1, 2 * size):
            if other not in (size, 1):  # one entry may be a scale for all
                yield {"shape": (*shape[:axis], other, *shape[axis + 1 :])}
    if len(shape) == 2 and shape[0] != shape[1] and 1 not in shape:
        yield {"shape": shape[::-1]}


@pytest.mark.parametrize("case", CASES)
def test_damaged_tensors_are_refused_by_name(case, tmp_path):
    quantization, tensors, _ = one_weight(case, tmp_path / "folder")
    form, tried = read_format({"quantization_config": quantization}), 0
    for name, tensor in tensors.items():
        if name.endswith((".bias", "_shape")):
            continue
        for changes in damages(tensor):
            damaged = {**tensors, name: dataclasses.replace(tensor, **changes)}
            tried += 1
            with pytest.raises(ValueError, match=re.escape(UP)):
                check_tensors(decode(damaged, form), {f"{UP}.weight": WANTED[f"{UP}.weight"]}, lambda name: None, form)
    assert tried >= 14


@pytest.mark.parametrize("case", CASES)
def test_a_weight_without_one_of_its_tensors(case, tmp_path):
    quantization, tensors, expected = one_weight(case, tmp_path / "folder")
    form = read_format({"quantization_config": quantization})
    for name in tensors:
        left = {other: tensor for other, tensor in tensors.items() if other != name}
        if name.endswith(".bias") or (name.endswith("g_idx") and "activations" not in case):
            np.testing.assert_array_equal(decode(left, form)[f"{UP}.weight"].read(), expected)
        elif name.endswith((".qweight", "_packed", ".weight")):  # without it, nothing says that there is a weight
            assert f"{UP}.weight" not in decode(left, form)
        else:
            with pytest.raises(ValueError, match=rf"'{re.escape(name)}(_inv)?' of a quantised weight is missing"):
                decode(left, form)


def rewritten(folder, changes):
    """Writes a folder's tensors again, some with other values, and returns them."""
    tensors = {name: np.array(tensor.read()) for name, tensor in specjax.hf.open_tensors(folder).items()}
    return specjax.hf.open_tensors(write(folder.with_name("rewritten"), CONFIG, tensors | changes))


@pytest.mark.parametrize(("case", "end"), [("gptq", ".g_idx"), ("pack-quantized by activations", ".weight_g_idx")])
@pytest.mark.parametrize("group", [3, -2, 2**30])
def test_groups_that_are_none(case, end, group, tmp_path):
    quantization, tensors, _ = one_weight(case, tmp_path / "folder")
    groups = np.array(tensors[UP + end].read())
    groups[17] = group
    damaged = rewritten(tmp_path / "folder", {UP + end: groups})
    weight = decode(damaged, read_format({"quantization_config": quantization}))[f"{UP}.weight"]
    with pytest.raises(ValueError, match=rf"g_idx' has groups from .*{group}.*the groups 0 to 1"):
        weight.read()


def test_groups_marked_as_following_each_other(tmp_path):
    """As compressed-tensors does: -1 in every place."""
    quantization, _, expected = one_weight("pack-quantized", tmp_path / "folder")
    tensors = rewritten(tmp_path / "folder", {f"{UP}.weight_g_idx": np.full(64, -1, np.int32)})
    weight = decode(tensors, read_format({"quantization_config": quantization}))[f"{UP}.weight"]
    np.testing.assert_array_equal(weight.read(), expected)


@pytest.mark.parametrize("sizes", [[-96, 64], [96, 56], [96, 0]])
def test_a_packed_weight_of_another_shape(sizes, tmp_path):
    quantization, _, _ = one_weight("pack-quantized", tmp_path / "folder")
    tensors = rewritten(tmp_path / "folder", {f"{UP}.weight_shape": np.array(sizes)})
    with pytest.raises(ValueError, match=UP):
        decode(tensors, read_format({"quantization_config": quantization}))


def test_a_scale_that_is_no_number(tmp_path):
    quantization, tensors, _ = one_weight("fp8 blocks of exponents", tmp_path / "folder")
    scales = np.array(tensors[f"{UP}.weight_scale_inv"].read())
    scales.view(np.uint8)[1, 2] = 255
    damaged = rewritten(tmp_path / "folder", {f"{UP}.weight_scale_inv": scales})
    weight = decode(damaged, read_format({"quantization_config": quantization}))[f"{UP}.weight"]
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale_inv' has a scale that is no number"):
        weight.read()


# What lies next to weights.


def test_scales_of_states_and_caches_are_left_out(tmp_path):
    config, stored, _ = quantised("fp8 tensor", np.random.default_rng(0))
    stored |= {f"{UP}.input_scale": np.ones(1, np.float32), "model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
    report = "\n".join(specjax.hf.open_weights(write(tmp_path / "folder", config, stored)).report)
    assert "1 left out: a scale of states, which are not quantised here" in report
    assert "1 left out: a scale of the cache or of attention" in report


def test_zero_points_of_zero_are_left_out_and_others_refused(tmp_path):
    config, stored, _ = quantised("int-quantized", np.random.default_rng(0))
    for value in (0, 1):
        more = {f"{UP}.weight_zero_point": np.full((96, 1), value, np.int8)}
        folder = write(tmp_path / str(value), config, stored | more)
        if value == 0:
            assert "zero points that are all zero" in "\n".join(specjax.hf.open_weights(folder).report)
        else:
            with pytest.raises(ValueError, match=r"1 tensors are unknown, such as '.*weight_zero_point'"):
                specjax.hf.open_weights(folder)


def test_a_bias_that_is_not_zero_is_refused(tmp_path):
    config, stored, _ = quantised("gptq with biases of zeros", np.random.default_rng(0))
    report = "\n".join(specjax.hf.open_weights(write(tmp_path / "zeros", config, stored)).report)
    assert "7 left out: a bias of zeros, which quantising added" in report
    stored[f"{UP}.bias"][5] = 0.25
    with pytest.raises(ValueError, match=rf"1 tensors are unknown, such as '{UP}\.bias'"):
        specjax.hf.open_weights(write(tmp_path / "other", config, stored))


def test_a_weight_that_is_there_twice(tmp_path):
    config, stored, plain = quantised("gptq", np.random.default_rng(0))
    folder = write(tmp_path / "folder", config, stored | {f"{UP}.weight": plain[f"{UP}.weight"]})
    with pytest.raises(ValueError, match=rf"'{UP}\.weight' is there as it is and quantised"):
        specjax.hf.open_weights(folder)


def test_groups_of_modules_have_their_own_schemes(tmp_path):
    """A module's own group comes before the group of its class, whatever the order."""
    rng = np.random.default_rng(0)
    quantization = compressed_config(weights())
    quantization["config_groups"]["mlp"] = {
        "targets": [r"re:.*\.mlp\..*"],
        "weights": weights(8, "float", "channel"),
        "format": "float-quantized",
    }
    quantization["format"] = "mixed-precision"
    plain = plain_tensors(rng)
    stored = {name: tensor for name, tensor in plain.items() if "_proj" not in name}
    for name in [name for name in plain if "_proj" in name]:
        options = {"kind": "float", "packed": False, "strategy": "channel"} if ".mlp." in name else {}
        parts, plain[name] = compressed(rng, *SHAPES[name], **options)
        stored |= {name + end: part for end, part in parts.items()}
    folder = write(tmp_path / "quantised", {**CONFIG, "quantization_config": quantization}, stored)
    expected = specjax.load(write(tmp_path / "plain", CONFIG, plain), "float32").params
    jax.tree.map(np.testing.assert_array_equal, specjax.load(folder, "float32").params, expected)


def test_embeddings_have_the_scheme_of_their_class(tmp_path):
    """The group of another class, which comes first, does not hold for them."""
    rng = np.random.default_rng(0)
    quantization = compressed_config(weights())
    quantization["config_groups"]["embeddings"] = {
        "targets": ["Embedding"],
        "weights": weights(8, "int", "channel"),
        "format": "pack-quantized",
    }
    name = "model.embed_tokens.weight"
    parts, expected = compressed(rng, *SHAPES[name], bits=8, strategy="channel")
    up, plain_up = compressed(rng, *SHAPES[f"{UP}.weight"])
    stored = {name + end: part for end, part in parts.items()} | {f"{UP}.weight{end}": part for end, part in up.items()}
    tensors = specjax.hf.open_tensors(write(tmp_path / "folder", CONFIG, stored))
    decoded = decode(tensors, read_format({"quantization_config": quantization}))
    np.testing.assert_array_equal(decoded[name].read(), expected)
    np.testing.assert_array_equal(decoded[f"{UP}.weight"].read(), plain_up)
    quantization["config_groups"].pop("embeddings")
    with pytest.raises(ValueError, match=r"model\.embed_tokens is quantised, but is in no group"):
        decode(tensors, read_format({"quantization_config": quantization}))


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_float8_stacks_of_experts_are_read_with_their_scales(scales, tmp_path):
    """As transformers 5 writes them: scales of all experts in one tensor, the gate's before the up-projection's."""
    rng, stored, plain = np.random.default_rng(0), {}, {}
    shapes = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
    for held in (("gate_proj", "up_proj"), ("down_proj",)):
        stack = EXPERTS + (".gate_up_proj" if len(held) > 1 else ".down_proj")
        experts = []
        for e in range(3):
            parts = [float8(rng, *shapes[name], scales, end="_scale_inv") for name in held]
            plain |= {f"{EXPERTS}.{e}.{name}.weight": part[1] for name, part in zip(held, parts, strict=True)}
            experts.append({end: np.concatenate([part[0][end] for part in parts]) for end in ("", "_scale_inv")})
        stored |= {stack + end: np.stack([expert[end] for expert in experts]) for end in ("", "_scale_inv")}
    quantization = FP8 | ({"weight_block_size": [16, 24]} if scales == "block" else {})
    found = specjax.hf.open_tensors(write(tmp_path / "folder", CONFIG, stored))
    tensors, _ = weights_of({"quantization_config": quantization}, found, plain)
    assert tensors.keys() == plain.keys()
    for name, expected in plain.items():
        np.testing.assert_array_equal(tensors[name].read(), expected)
    if scales == "block":
        wide = {"quantization_config": quantization | {"weight_block_size": [64, 24]}}
        with pytest.raises(ValueError, match=r"gate_up_proj' holds projections of 32 rows, and 64 rows share a scale"):
            weights_of(wide, found, plain)
        unknown = {"quantization_config": {**FP8, "weight_block_size": None}}
        with pytest.raises(ValueError, match=r"gate_up_proj' .* an unknown number of rows share a scale"):
            weights_of(unknown, found, plain)


def test_a_quantised_folder_may_be_quantised_converted_and_split(tmp_path):
    config, stored, plain = quantised("gptq", np.random.default_rng(0))
    folder = write(tmp_path / "quantised", config, stored)
    expected = write(tmp_path / "plain", CONFIG, plain)
    ours, theirs = (specjax.load(path, "float32", quantize="int8").params for path in (folder, expected))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # Scales of 16 bits are the dtype of what is written.
    specjax.convert_hf(folder, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["torch_dtype"] == "float16" and "quantization_config" not in written
    half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), specjax.load(expected, "float32").params)
    jax.tree.map(np.testing.assert_array_equal, specjax.load(tmp_path / "ours", "float32").params, half)
    # A device reads its part alone.
    kernel = specjax.hf.open_weights(folder).params["layers"][0]["mlp"]["up_proj"]["kernel"]
    part = kernel.read(np.float32, (slice(8, 40), slice(24, 72)))
    np.testing.assert_array_equal(part, plain[f"{UP}.weight"].T[8:40, 24:72])


# What quantization_config may say.

COMPRESSED = compressed_config(weights())
BAD_QUANTIZATIONS = {
    **{
        f"by {method}": ({"quant_method": method}, [f"'{method}'", "is not read", "supported", cure])
        for method, cure in {
            "bitsandbytes": "model.dequantize()",
            "auto-round": 'format="auto_gptq"',
            **dict.fromkeys(("hqq", "aqlm", "quanto", "torchao", "eetq", "vptq", "gguf", "odd"), "folder of floats"),
        }.items()
    },
    "bitsandbytes of old": ({"load_in_4bit": True, "quant_method": "gptq"}, ["'bitsandbytes'", "dequantize()"]),
    "a string": ("awq", ["quantization_config is 'awq'"]),
    "nothing": ({"bits": 4}, ["quant_method {'bits': 4}"]),
    "float8 in blocks of zero": ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ["weight_block_size", "0"]),
    "float8 in one size": ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size", "[128]"]),
    "float8 of another format": ({"quant_method": "fp8", "fmt": "e5m2"}, ["quantization_config", "fmt", "'e5m2'"]),
    "float8 with an unknown key": ({"quant_method": "fp8", "zero": 3}, ["quantization_config", "zero", "3"]),
    "float8 with experts of 4 bits": ({"quant_method": "fp8", "expert_dtype": "fp4"}, ["expert_dtype", "'fp4'"]),
    **{f"gptq of {bits} bits": ({**GPTQ, "bits": bits}, ["bits", repr(bits)]) for bits in (5, 0, 16, True, "4", None)},
    **{
        f"{name} of {size}": ({**config, "group_size": size}, ["group_size", repr(size)])
        for name, config in {"gptq": GPTQ, "awq": AWQ}.items()
        for size in (0, -2, 32.5, "32", True, None)
    },
    "gptq for marlin": ({**GPTQ, "checkpoint_format": "marlin"}, ["'marlin'", "'gptq_v2'"]),
    "gptq in two formats": ({**GPTQ, "format": "gptq", "checkpoint_format": "gptq_v2"}, ["checkpoint_format"]),
    "gptq in int64": ({**GPTQ, "pack_dtype": "int64"}, ["pack_dtype", "'int64'"]),
    "gptq with states of 8 bits": ({**GPTQ, "activation": {"mode": "w4afp8"}}, ["activation", "w4afp8"]),
    "awq of 8 bits": ({**AWQ, "bits": 8}, ["bits", "8"]),
    "awq of llm-awq": ({**AWQ, "backend": "llm-awq"}, ["llm-awq", "'gemv'"]),
    "awq gemv_fast": ({**AWQ, "version": "gemv_fast"}, ["gemv_fast", "'gemv'"]),
    "awq without zero points": ({**AWQ, "zero_point": False}, ["zero_point", "False"]),
    "mxfp4 with an unknown key": ({"quant_method": "mxfp4", "block": 16}, ["block", "16"]),
    "fbgemm with an unknown key": ({"quant_method": "fbgemm_fp8", "block": 16}, ["block", "16"]),
    **{
        f"compressed, {name}": ({**COMPRESSED, **changes}, words)
        for name, changes, words in (
            ("sparse", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config", "sparse-24-bitmask"]),
            ("transformed", {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config", "R1"]),
            (
                "not compressed",
                {"quantization_status": "frozen"},
                ["quantization_status", "'frozen'", "save_compressed"],
            ),
            ("in a format of floats of 4 bits", {"format": "nvfp4-pack-quantized"}, ["nvfp4-pack-quantized", "dense"]),
            ("without groups", {"config_groups": {}}, ["config_groups", "{}"]),
            ("groups that are a list", {"config_groups": [1]}, ["config_groups", "[1]"]),
            ("a group by name", {"config_groups": {"W4A16": ["Linear"]}}, ["config_groups.W4A16", "['Linear']"]),
            ("an unknown key", {"odd": 1}, ["odd", "1"]),
        )
    },
    **{
        f"compressed weights, {name}": (compressed_config({**weights(), **changes}), words)
        for name, changes, words in (
            ("of 3 bits", {"num_bits": 3}, ["num_bits 3", "2, 4 or 8"]),
            ("of no bits", {"num_bits": 0}, ["num_bits", "0"]),
            ("floats of 4 bits", {"type": "float"}, ["'float'", "num_bits 4"]),
            ("of another type", {"type": "fixed"}, ["'fixed'"]),
            ("by tokens", {"strategy": "token"}, ["strategy", "'token'"]),
            ("in groups of 0", {"group_size": 0}, ["group_size", "0"]),
            ("in groups of none", {"group_size": None}, ["group_size", "None"]),
            ("in blocks of none", {"strategy": "block"}, ["block_structure"]),
            ("in three sizes", {"strategy": "block", "block_structure": [1, 2, 3]}, ["block_structure", "[1, 2, 3]"]),
            ("in blocks of 0", {"strategy": "block", "block_structure": "0x8"}, ["block_structure", "0"]),
            ("as it runs", {"dynamic": True}, ["dynamic", "True"]),
            ("with an unknown key", {"odd": 1}, ["odd", "1"]),
            ("symmetric in words", {"symmetric": "yes"}, ["symmetric", "'yes'"]),
        )
    },
    "compressed, a pattern that is none": (
        compressed_config(weights(), config_groups={"a": {"targets": ["re:("], "weights": weights()}}),
        ["config_groups.a", "re:("],
    ),
    "compressed, no weights": (
        compressed_config(weights(), config_groups={"a": {"targets": ["Linear"], "weights": None}}),
        ["config_groups.a", "None"],
    ),
    "compressed, no targets": (
        compressed_config(weights(), config_groups={"a": {"targets": "Linear", "weights": weights()}}),
        ["config_groups.a", "'Linear'"],
    ),
}


@pytest.mark.parametrize(("value", "words"), BAD_QUANTIZATIONS.values(), ids=BAD_QUANTIZATIONS)
def test_quantizations_that_cannot_be_read_are_named(value, words):
    raw = {**CONFIG, "quantization_config": value}
    with pytest.raises(ValueError) as caught:
        read_format(raw)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert decoder_config(raw) == decoder_config(CONFIG)  # it says how tensors are stored, not what is computed


@pytest.mark.parametrize(
    ("name", "words"),
    {
        f"{UP}.weight.quant_state.bitsandbytes__nf4": ["bitsandbytes", "dequantize"],
        f"{UP}.SCB": ["bitsandbytes", "dequantize"],
        f"{UP}.qweight": ["quant_method 'gptq'", "quantize_config.json"],
        f"{UP}.weight_packed": ["quant_method 'compressed-tensors'"],
    }.items(),
)
def test_quantised_tensors_that_no_config_mentions(name, words, tmp_path):
    tensors = plain_tensors(np.random.default_rng(0))
    del tensors[f"{UP}.weight"]
    folder = write(tmp_path / "folder", CONFIG, tensors | {name: np.zeros((3, 4), np.int32)})
    with pytest.raises(ValueError) as caught:
        specjax.hf.open_weights(folder)
    for word in (name, *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
