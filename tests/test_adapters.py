"""LoRA adapters merged on load, against slow NumPy; and adapters that are damaged or of another kind."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from quantised_folders import gptq

import specjax
from specjax.commands import convert
from specjax.hf.config import decoder_config
from specjax.hf.families import sources

LLAMA = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 24, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
PHI3 = {**LLAMA, "model_type": "phi3", "num_hidden_layers": 1}
PHI3.pop("attention_bias")
MOE = {
    **PHI3,
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"


def plain_tensors(config, rng):
    wanted = sources(config["model_type"], decoder_config(config))
    return {name: (rng.normal(size=source.shape) * 0.3).astype(np.float32) for name, source in wanted.items()}


def write(folder, config, tensors, name="config.json"):
    folder.mkdir()
    (folder / name).write_text(json.dumps(config))
    specs = [
        specjax.hf.TensorSpec(name, tensor.dtype, tensor.shape, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    specjax.hf.write_tensors(folder, specs)
    return folder


def write_adapter(folder, config, tensors):
    """As peft does: names start with "base_model.model."."""
    write(
        folder,
        {"peft_type": "LORA", "base_model_name_or_path": "org/base", "inference_mode": True, **config},
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        "adapter_config.json",
    )
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


def product(b, a, scale):
    """``scale * b @ a`` in loops."""
    out = np.zeros((b.shape[0], a.shape[1]), np.float64)
    for i in range(b.shape[0]):
        for j in range(a.shape[1]):
            for k in range(a.shape[0]):
                out[i, j] += scale * float(b[i, k]) * float(a[k, j])
    return out


def parts(rng, out, columns, rank, dtype=np.float32):
    return rng.normal(size=(rank, columns)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype)


def same_model(folder, adapter, plain, config, tmp_path, **options):
    """Asserts that the folder with the adapter is the plain folder of these tensors, to float32's rounding."""
    ours = specjax.load(folder, "float32", adapter=adapter, **options)
    expected = specjax.load(write(tmp_path / "expected", config, plain), "float32")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours.params, expected.params)
    assert ours.forward is expected.forward
    return ours


def test_ranks_and_alphas_of_single_modules(tmp_path):
    rng = np.random.default_rng(0)
    plain = plain_tensors(LLAMA, rng)
    folder = write(tmp_path / "base", LLAMA, plain)
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"mlp.up_proj": 2, "o_proj": 7}}
    config["alpha_pattern"] = {r"layers\.0\.mlp.*": 3.5, "odd": 1}
    tensors = {}
    for module, rank, alpha in ((Q, 4, 6), (UP, 2, 6), (DOWN, 4, 3.5)):
        a, b = parts(rng, *plain[f"{module}.weight"].shape, rank, ml_dtypes.bfloat16)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        plain[f"{module}.weight"] = (plain[f"{module}.weight"] + product(b, a, alpha / rank)).astype(np.float32)
    same_model(folder, write_adapter(tmp_path / "adapter", config, tensors), plain, LLAMA, tmp_path)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scale_and_bias(rank_stabilised, with_bias, tmp_path):
    rng = np.random.default_rng(1)
    plain = plain_tensors(LLAMA, rng)
    folder = write(tmp_path / "base", LLAMA, plain)
    a, b = parts(rng, *plain[f"{Q}.weight"].shape, 9)
    scale = 5 / math.sqrt(9) if rank_stabilised else 5 / 9
    plain[f"{Q}.weight"] = (plain[f"{Q}.weight"] + product(b, a, scale)).astype(np.float32)
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    if with_bias:
        tensors[f"{Q}.lora_B.bias"] = rng.normal(size=32).astype(np.float32)
        plain[f"{Q}.bias"] = plain[f"{Q}.bias"] + np.float32(scale) * tensors[f"{Q}.lora_B.bias"]
    config = {"r": 9, "lora_alpha": 5, "use_rslora": rank_stabilised, "lora_bias": with_bias}
    same_model(folder, write_adapter(tmp_path / "adapter", config, tensors), plain, LLAMA, tmp_path)


def test_dora(tmp_path):
    rng = np.random.default_rng(2)
    plain = plain_tensors(LLAMA, rng)
    folder = write(tmp_path / "base", LLAMA, plain)
    tensors = {}
    for module, end in ((Q, ".weight"), (UP, "")):  # older versions of peft write no end
        a, b = parts(rng, *plain[f"{module}.weight"].shape, 4)
        length = rng.uniform(1, 2, plain[f"{module}.weight"].shape[0]).astype(np.float32)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        tensors[f"{module}.lora_magnitude_vector{end}"] = length
        rows = plain[f"{module}.weight"] + product(b, a, 2.0)
        for i, row in enumerate(rows):
            rows[i] = row * length[i] / math.sqrt(sum(x * x for x in row))
        plain[f"{module}.weight"] = rows.astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4, "lora_alpha": 8, "use_dora": True}, tensors)
    same_model(folder, adapter, plain, LLAMA, tmp_path)


def test_gpt2_stores_its_kernels_the_other_way_round(tmp_path):
    rng = np.random.default_rng(3)
    plain = plain_tensors(GPT2, rng)
    folder = write(tmp_path / "base", GPT2, plain)
    tensors = {}
    for module in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):  # the second is square
        columns, out = plain[f"{module}.weight"].shape
        a, b = parts(rng, out, columns, 3)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        plain[f"{module}.weight"] = (plain[f"{module}.weight"] + product(b, a, 1.0).T).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 3, "lora_alpha": 3, "fan_in_fan_out": True}, tensors)
    same_model(folder, adapter, plain, GPT2, tmp_path)


@pytest.mark.parametrize(
    ("config", "module"),
    [(PHI3, "model.layers.0.self_attn.qkv_proj"), (MOE, "model.layers.0.mlp.experts.1.down_proj")],
    ids=["a fused projection", "an expert"],
)
def test_fused_projections_and_experts(config, module, tmp_path):
    rng = np.random.default_rng(4)
    plain = plain_tensors(config, rng)
    folder = write(tmp_path / "base", config, plain)
    a, b = parts(rng, *plain[f"{module}.weight"].shape, 4)
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    plain[f"{module}.weight"] = (plain[f"{module}.weight"] + product(b, a, 1.0)).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4, "lora_alpha": 4}, tensors)
    same_model(folder, adapter, plain, config, tmp_path)


def test_modules_that_were_trained_whole(tmp_path):
    """And the copy of an embedding under an adapter of its own, as peft names it."""
    rng = np.random.default_rng(5)
    plain = plain_tensors(LLAMA, rng)
    folder = write(tmp_path / "base", LLAMA, plain)
    plain |= {f"{name}.weight": rng.normal(size=(24, 32)).astype(np.float32) for name in (TABLE, HEAD)}
    a, b = parts(rng, 32, 24, 2)
    tensors = {
        f"{HEAD}.weight": plain[f"{HEAD}.weight"],
        f"{TABLE}.base_layer.weight": plain[f"{TABLE}.weight"],
        f"{TABLE}.lora_embedding_A": a,
        f"{TABLE}.lora_embedding_B": b,
        "model.norm.modules_to_save.weight": (norm := np.full(32, 3, np.float32)),
    }
    plain["model.norm.weight"] = norm
    plain[f"{TABLE}.weight"] = (plain[f"{TABLE}.weight"] + product(b, a, 4.0).T).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 2, "lora_alpha": 8, "modules_to_save": [HEAD, "norm"]}, tensors)
    same_model(folder, adapter, plain, LLAMA, tmp_path)


@pytest.mark.parametrize("changed", [TABLE, HEAD, "both", None])
def test_tied_embeddings_stay_tied_unless_the_adapter_changes_one(changed, tmp_path):
    rng = np.random.default_rng(6)
    tied = {**LLAMA, "tie_word_embeddings": True}
    plain = plain_tensors(tied, rng)
    folder = write(tmp_path / "base", tied, plain)
    trained = rng.normal(size=(24, 32)).astype(np.float32)
    names = {"both": (TABLE, HEAD), None: ()}.get(changed, (changed,))
    tensors = {f"{name}.weight": trained for name in names} | {"model.norm.weight": np.ones(32, np.float32)}
    plain["model.norm.weight"] = tensors["model.norm.weight"]
    if changed in (TABLE, HEAD):
        plain[f"{HEAD}.weight"] = plain[f"{TABLE}.weight"]
    plain |= {f"{name}.weight": trained for name in names if f"{name}.weight" in plain}
    expected = {**tied, "tie_word_embeddings": changed not in (TABLE, HEAD)}
    adapter = write_adapter(tmp_path / "adapter", {"modules_to_save": [*names, "norm"]}, tensors)
    same_model(folder, adapter, plain, expected, tmp_path)
    specjax.convert_hf(folder, tmp_path / "ours", adapter=adapter)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] == (
        changed not in (TABLE, HEAD)
    )


def test_a_quantised_base(tmp_path):
    rng = np.random.default_rng(7)
    plain = plain_tensors(LLAMA, rng)
    stored = dict(plain)
    packed, plain[f"{Q}.weight"] = gptq(rng, 32, 32)
    del stored[f"{Q}.weight"]
    stored |= {f"{Q}.{end}": part for end, part in packed.items()}
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    folder = write(tmp_path / "base", {**LLAMA, "quantization_config": quantization}, stored)
    a, b = parts(rng, 32, 32, 4)
    plain[f"{Q}.weight"] = (plain[f"{Q}.weight"] + product(b, a, 2.0)).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4}, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b})
    same_model(folder, adapter, plain, LLAMA, tmp_path)


def test_names_of_a_model_without_its_output_head(tmp_path):
    """As peft writes them for an AutoModel: without "model."."""
    rng = np.random.default_rng(8)
    plain = plain_tensors(LLAMA, rng)
    folder = write(tmp_path / "base", LLAMA, plain)
    a, b = parts(rng, 32, 32, 4)
    short = Q.removeprefix("model.")
    tensors = {f"{short}.lora_A.weight": a, f"{short}.lora_B.weight": b}
    plain[f"{Q}.weight"] = (plain[f"{Q}.weight"] + product(b, a, 2.0)).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4}, tensors)
    same_model(folder, adapter, plain, LLAMA, tmp_path)


@pytest.mark.parametrize("with_vision", [False, True])
def test_the_vision_part_of_an_adapter_is_left_out_with_a_warning(with_vision, tmp_path, caplog):
    """As of the base model, whether or not its folder holds vision weights."""
    rng = np.random.default_rng(10)
    text = {key: value for key, value in PHI3.items() if key != "model_type"}
    text |= {"num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6}  # the classes have other defaults
    config = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", **text}}
    plain = plain_tensors({"model_type": "qwen2", **text}, rng)
    named = {name.replace("model.", "model.language_model."): tensor for name, tensor in plain.items()}
    patches = {"model.visual.patch_embed.proj.weight": np.ones((4, 3, 2, 2, 2), np.float32)} if with_vision else {}
    folder = write(tmp_path / "base", config, named | patches)
    a, b = parts(rng, 32, 32, 4)
    ours = Q.replace("model.", "model.language_model.")
    tensors = {f"{ours}.lora_A.weight": a, f"{ours}.lora_B.weight": b}
    tensors |= {
        f"model.visual.patch_embed.proj.lora_{part}.weight": np.ones((4, 4, 1, 1, 1), np.float32) for part in "AB"
    }
    tensors["model.visual.merger.modules_to_save.mlp.0.weight"] = np.ones((4, 4), np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4}, tensors)
    plain[f"{Q}.weight"] = (plain[f"{Q}.weight"] + product(b, a, 2.0)).astype(np.float32)
    same_model(folder, adapter, plain, {"model_type": "qwen2", **text}, tmp_path)
    assert "changes the vision part, which text does not need; the change is left out" in caplog.text


# What is refused.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("folders") / "base", LLAMA, plain_tensors(LLAMA, np.random.default_rng(9)))


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
SOUND = {A: np.ones((4, 32), np.float32), B: np.ones((32, 4), np.float32)}


def refusal(base, adapter):
    with pytest.raises(ValueError) as caught:
        specjax.hf.open_weights(base, adapter=adapter)
    assert str(adapter) in str(caught.value)
    return str(caught.value)


BAD_CONFIGS = {
    **{f"of the kind {kind}": ({"peft_type": kind}, [repr(kind), "'LORA'"]) for kind in ("IA3", "LOHA", "OFT", None)},
    **{
        f"{key} {value}": ({key: value}, [key, repr(value), "peft"])
        for key, value in (
            ("target_parameters", ["mlp.experts.gate_up_proj"]),
            ("layer_replication", [[0, 1], [0, 1]]),
            ("trainable_token_indices", [1, 2]),
            ("alora_invocation_tokens", [5]),
            ("use_qalora", True),
            ("ensure_weight_tying", True),
            ("megatron_config", {"a": 1}),
            ("arrow_config", {"top_k": 3}),
            ("init_lora_weights", "pissa_niter_4"),
            ("init_lora_weights", "olora"),
            ("a_new_variant", {"on": 1}),
            ("use_new_variant", True),
        )
    },
    "no rank": ({"r": 0}, ["r must be", "0"]),
    "a rank in words": ({"r": "4"}, ["'4'"]),
    "alpha null": ({"lora_alpha": None}, ["lora_alpha", "None"]),
    "ranks in a list": ({"rank_pattern": [4]}, ["rank_pattern", "[4]"]),
    "a rank of a module": ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern.q_proj", "0"]),
    "an alpha of a module": ({"alpha_pattern": {"q_proj": "a"}}, ["alpha_pattern.q_proj", "'a'"]),
    "a pattern that is none": ({"alpha_pattern": {"(": 3}}, ["alpha_pattern", "'('", "no pattern"]),
    "dora in words": ({"use_dora": "yes"}, ["use_dora", "'yes'"]),
    "a rank that is not the tensors'": ({"r": 8}, [Q, "lora_A", "(4, 32)", "(8, 32)"]),
    "dora without magnitudes": ({"use_dora": True}, [Q, "lora_magnitude_vector", "missing", "(32,)"]),
}


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configs_that_cannot_be_merged(config, words, base, tmp_path):
    message = refusal(base, write_adapter(tmp_path / "adapter", {"r": 4, **config}, SOUND))
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


BAD_TENSORS = {
    "without B": ({B: None}, [Q, "lora_B", "missing", "(32, 4)"]),
    "without A": ({A: None}, [Q, "lora_A", "missing"]),
    "A of other inputs": ({A: np.ones((4, 31), np.float32)}, ["lora_A", "(4, 31)", "(4, 32)"]),
    "B of other outputs": ({B: np.ones((33, 4), np.float32)}, ["lora_B", "(33, 4)", "(32, 4)"]),
    "B of another rank": ({B: np.ones((32, 5), np.float32)}, ["lora_B", "(32, 5)"]),
    "A of one axis": ({A: np.ones(128, np.float32)}, ["lora_A", "(128,)"]),
    "A empty": ({A: np.ones((0, 32), np.float32)}, ["lora_A", "(0, 32)"]),
    "A of integers": ({A: np.ones((4, 32), np.int32)}, [A, "int32"]),
    "magnitudes without dora": (
        {f"{Q}.lora_magnitude_vector.weight": np.ones(32, np.float32)},
        ["lora_magnitude_vector", "(32,)", "none"],
    ),
    "a layer too many": (
        {A.replace("layers.0", "layers.2"): SOUND[A], B.replace("layers.0", "layers.2"): SOUND[B]},
        ["'model.layers.2.self_attn.q_proj.weight'", "does not have"],
    ),
    "a bias where there is none": (
        {f"{UP}.lora_A.weight": SOUND[A], f"{UP}.lora_B.weight": np.ones((40, 4), np.float32)}
        | {f"{UP}.lora_B.bias": np.ones(40, np.float32)},
        [f"'{UP}.bias'", "does not have"],
    ),
    "a norm": (
        {"model.norm.lora_A.weight": SOUND[A], "model.norm.lora_B.weight": SOUND[B]},
        ["model.norm", "(32,)", "matrices"],
    ),
    "a larger vocabulary": (
        {f"{TABLE}.weight": np.ones((25, 32), np.float32)},
        [TABLE, "(25, 32)", "(24, 32)", "vocabulary"],
    ),
    "an unknown part": ({f"{Q}.lora_C.weight": SOUND[A]}, [f"{Q}.lora_C.weight", "does not have"]),
    "an embedding's parts by half": ({f"{Q}.lora_embedding_A": SOUND[A]}, [Q, "lora_A", "none"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_damaged_tensors(changes, words, base, tmp_path):
    tensors = {name: tensor for name, tensor in {**SOUND, **changes}.items() if tensor is not None}
    message = refusal(base, write_adapter(tmp_path / "adapter", {"r": 4}, tensors))
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def test_dora_of_kernels_the_other_way_round(tmp_path):
    folder = write(tmp_path / "base", GPT2, plain_tensors(GPT2, np.random.default_rng(0)))
    module = "transformer.h.0.attn.c_proj"
    tensors = {f"{module}.{name.removeprefix(Q + '.')}": tensor for name, tensor in SOUND.items()}
    tensors[f"{module}.lora_magnitude_vector.weight"] = np.ones(32, np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"r": 4, "use_dora": True}, tensors)
    assert "use_dora is true, and transformer.h.0.attn.c_proj" in refusal(folder, adapter)


def test_folders_that_are_no_adapters(base, tmp_path):
    assert "has no adapter_config.json" in refusal(base, base)
    pickled = write_adapter(tmp_path / "pickled", {}, SOUND)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert re.search(r"adapter_model\.safetensors does not exist.*save_pretrained", refusal(base, pickled))
    cut = write_adapter(tmp_path / "cut", {"r": 4}, SOUND)
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-9])
    assert "damaged, cut short" in refusal(base, cut)


def test_an_adapter_given_as_a_model_names_its_base(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", {}, SOUND)
    for call in (specjax.load, specjax.open, lambda path: specjax.convert_hf(path, tmp_path / "ours")):
        with pytest.raises(ValueError, match=rf"{adapter} is an adapter of 'org/base', no model.*adapter='{adapter}'"):
            call(adapter)


def test_an_adapter_for_a_checkpoint_folder(base, tmp_path):
    specjax.convert_hf(base, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"adapter is 'anywhere'.*params/.*convert that again with the adapter"):
        specjax.load(tmp_path / "ours", adapter="anywhere")


def test_the_command_converts_with_an_adapter(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", {"r": 4}, SOUND)
    assert convert.main([str(base), str(tmp_path / "ours"), "--adapter", str(adapter)]) == 0
    expected = specjax.load(base, "float32", adapter=adapter).params
    jax.tree.map(np.testing.assert_array_equal, specjax.load(tmp_path / "ours", "float32").params, expected)
    with pytest.raises(SystemExit):
        convert.main([str(base), str(tmp_path / "other"), "--adapter", str(adapter), "--verify"])
    assert "without --adapter" in capsys.readouterr().err
