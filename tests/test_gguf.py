"""GGUF files against the Hugging Face folders that they were made of, and against transformers' own reading."""

import collections
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import add_tokens, fill, gguf, load_folder, their_reading, write
from jitted import jit
from parity import make_model
from parity_cases import GEMMA3_ROPE, LLAMA3, LONGROPE, MOE, TIED, VOCAB, WIDE, WINDOW, YARN, rope

import specjax
from specjax.checkpoint.text_parts import open_text_parts
from specjax.commands import convert
from specjax.hf.gguf.architectures import config_of
from specjax.hf.gguf.file import Header, Stored
from specjax.hf.weights import open_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LENGTH = 34
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}
GEMMA = {"head_dim": 256, **WINDOW, **TIED, "query_pre_attn_scalar": 256}
LONG = {**LONGROPE, "original_max_position_embeddings": 64, "pad_token_id": 0}
SIX_TO_ONE = {**GEMMA, "num_hidden_layers": 7}
# In the models of 27 billion parameters, known by their 46 layers, the scale of attention is that of narrower heads.
LARGE = {**GEMMA, **WIDE, "num_hidden_layers": 46, "query_pre_attn_scalar": 6}
# For each case: transformers' class, its settings, and what transformers leaves out as it reads the GGUF file.
CASES = {
    "llama": ("Llama", {}, ""),
    "llama-tied-wide": ("Llama", {**TIED, **WIDE}, ""),
    "llama-biases": ("Llama", {"attention_bias": True}, "biases"),
    "llama-3": ("Llama", LLAMA3, "rope_freqs.weight"),
    "llama-linear": ("Llama", rope("linear", factor=4.0), "rope.scaling"),
    "llama-yarn": ("Llama", YARN, "rope.scaling"),
    "mixtral": ("Mixtral", MOE, "experts of an architecture that is called llama"),
    "qwen2": ("Qwen2", {}, ""),
    "qwen3": ("Qwen3", {"head_dim": 128}, ""),  # another width would be left out
    "qwen3-moe": ("Qwen3Moe", {**QWEN_MOE, **WIDE}, "expert_feed_forward_length"),
    "gemma2": ("Gemma2", GEMMA, ""),
    "gemma2-large": ("Gemma2", LARGE, "the scale of attention"),
    "gemma3": ("Gemma3Text", SIX_TO_ONE, ""),
    "gemma3-linear": ("Gemma3Text", {**SIX_TO_ONE, "rope_parameters": GEMMA3_ROPE}, "rope.scaling"),
    "phi3": ("Phi3", {"pad_token_id": 0}, ""),
    "phi3-window": ("Phi3", {**WINDOW, "pad_token_id": 0}, "attention.sliding_window"),
    "phi3-long": ("Phi3", LONG, "rope_factors_long.weight"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A folder, and the GGUF file that was made of it."""
    kind, settings, left_out = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_model(kind, settings).save_pretrained(folder)
    config, tensors = load_folder(folder)
    (folder / "gguf").mkdir()
    write(folder / "gguf" / "tiny.gguf", config, tensors)
    return folder, folder / "gguf" / "tiny.gguf", left_out


def read(params):
    return jax.tree.map(lambda x: x.read(jnp.float32), params, is_leaf=lambda x: hasattr(x, "read"))


def test_a_file_is_the_folder_that_it_was_made_of(case):
    """Config and parameters are equal, bit by bit. Rotary frequencies were rounded to float32 in the file, and so were
    Gemma's norms, with 1 added.
    """
    folder, file, _ = case
    ours, theirs = open_weights(file), open_weights(folder)
    rounding = 1.2e-7 if ours.config.norm == "rms_one_plus" else 0
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=rounding)
    jax.tree.map(same, read(ours.params), read(theirs.params))
    one, other = (vars(weights.config) | {"layers": None} for weights in (ours, theirs))
    assert one == other
    for one, other in zip(ours.config.each_layer, theirs.config.each_layer, strict=True):
        assert dataclasses.replace(one, rope=None) == dataclasses.replace(other, rope=None)
        np.testing.assert_allclose(one.rope.frequencies, other.rope.frequencies, rtol=1e-6)
        assert one.rope.scale == pytest.approx(other.rope.scale)


@jit
def forward(model, tokens_bt):
    rows, length = tokens_bt.shape
    feed = specjax.Feed(tokens_bt, jnp.zeros(rows, jnp.int32), jnp.full(rows, length, jnp.int32))
    return model.forward(model.params, feed, model.init_cache(rows, length)).logits_btv


def logits(model, tokens):
    return np.asarray(forward(model, jnp.asarray([tokens], jnp.int32))[0])


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].float().numpy()


def test_logits_are_those_of_transformers_reading(case):
    """Where transformers leaves something out as it reads the file, its reading of the folder is the reference."""
    folder, file, left_out = case
    if left_out == "the scale of attention":
        pytest.skip("46 layers take long to compile, and the test above has compared them")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder) if left_out else their_reading(file)
    tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
    difference = np.abs(logits(specjax.load(file, "float32"), tokens) - their_logits(theirs, tokens)).max()
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE


QUANTISED = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
KINDS = {
    "attn_q": ("Q4_K", "Q2_K"),
    "attn_k": ("Q5_K", "Q3_K"),
    "attn_v": ("Q6_K", "IQ4_NL"),
    "attn_output": ("Q8_0", "IQ4_XS"),
    "ffn_gate": ("Q4_0", "F16"),
    "ffn_up": ("Q4_1", "BF16"),
    "ffn_down": ("Q5_0", "F32"),
    "token_embd": ("Q5_1", "Q6_K"),
    "output": ("BF16", "Q4_K"),
}
"""The types of the tensors in two files. Between them, each type is there, some in permuted projections."""


@pytest.fixture(scope="module", params=(0, 1))
def quantised_file(request, tmp_path_factory):
    """A file with tensors of many types, and the model of the numbers that they stand for."""
    folder = tmp_path_factory.mktemp("quantised")
    model = make_model("Llama", QUANTISED)
    model.save_pretrained(folder)
    config, tensors = load_folder(folder)
    kinds = {name: pair[request.param] for name, pair in KINDS.items()}
    values = write(folder / "x.gguf", config, tensors, lambda name: kinds[name.split(".")[-2]])
    for name, tensor in model.named_parameters():
        theirs = name.replace("model.layers.0", "blk.0")
        for ours, other in NAMES.items():
            theirs = theirs.replace(ours, other)
        value, heads = values[theirs], {"attn_q": 4, "attn_k": 2}.get(theirs.split(".")[-2])
        if heads:  # undo ``permuted``
            value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        tensor.data = torch.from_numpy(value.copy())
    return folder, model


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "ffn",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}


def test_each_type_stands_for_the_packages_numbers(quantised_file, tmp_path):
    """Every parameter bit by bit, whole and in parts; a conversion has them in the dtype of their scales."""
    folder, model = quantised_file
    model.save_pretrained(tmp_path)
    ours, theirs = open_weights(folder / "x.gguf"), open_weights(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read(ours.params), read(theirs.params))
    gate = ours.params["layers"][0]["mlp"]["gate_proj"]["kernel"]
    query = ours.params["layers"][0]["self_attn"]["q_proj"]["kernel"]
    part = (slice(3, 200), slice(17, 91))
    for kernel in (gate, query):
        np.testing.assert_array_equal(kernel.read(jnp.float32, part), kernel.read(jnp.float32)[part])
    specjax.convert_hf(folder / "x.gguf", folder / "converted")
    converted = specjax.load(folder / "converted", "float32").params["layers"][0]["mlp"]["gate_proj"]["kernel"]
    np.testing.assert_array_equal(converted, gate.read(jnp.float32).astype(gate.dtype))


def test_the_command_converts(quantised_file, tmp_path, capsys):
    """And does not compare with transformers, which may read the file otherwise."""
    file = str(quantised_file[0] / "x.gguf")
    assert convert.main([file, str(tmp_path / "x"), "--dtype", "float32"]) == 0
    assert "1 x lm_head.weight -> lm_head.kernel" in capsys.readouterr().out
    ours, theirs = (specjax.load(path, "float32").params for path in (tmp_path / "x", file))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(SystemExit):
        convert.main([file, str(tmp_path / "y"), "--verify"])
    assert "no folder; give a folder, or omit --verify" in capsys.readouterr().err


def test_quantised_logits_are_those_of_transformers_reading(quantised_file):
    file = quantised_file[0] / "x.gguf"
    tokens = np.random.default_rng(1).integers(0, QUANTISED["vocab_size"], LENGTH).tolist()
    difference = np.abs(logits(specjax.load(file, "float32"), tokens) - their_logits(their_reading(file), tokens)).max()
    print(f"largest difference {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("stacked", [True, False])
def test_quantised_experts(tmp_path, stacked):
    """Each expert is a part of a stack, or in files before 2024-04 a tensor of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, **MOE}
    make_model("Mixtral", sizes).save_pretrained(tmp_path)
    kinds = lambda name: "Q8_0" if name.startswith("blk.0.ffn") and "inp" not in name else "F32"
    values = write(tmp_path / "x.gguf", *load_folder(tmp_path), kinds, stacked=stacked)
    experts = open_weights(tmp_path / "x.gguf").params["layers"][0]["mlp"]["experts"]
    for ours, theirs in (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
        names = [f"blk.0.{theirs}_exps.weight"] if stacked else [f"blk.0.{theirs}.{e}.weight" for e in range(5)]
        expected = values[names[0]] if stacked else np.stack([values[name] for name in names])
        np.testing.assert_array_equal(experts[ours].read(jnp.float32), expected.swapaxes(1, 2))
        np.testing.assert_array_equal(experts[ours].read(jnp.float32, (slice(2, 4),)), expected.swapaxes(1, 2)[2:4])


def test_the_types_that_are_tested_are_all_that_are_read():
    from specjax.hf.gguf.tensors import QUANTISED as READ

    assert {kind for pair in KINDS.values() for kind in pair} == {*READ, "F32", "F16", "BF16"}


def test_an_adapter_is_merged_into_quantised_weights(quantised_file, tmp_path):
    """A LoRA of rank 1 on a query projection, whose rows the file has in another order."""
    rng, name = np.random.default_rng(0), "model.layers.0.self_attn.q_proj"
    one, other = rng.normal(size=(1, 256)).astype(np.float32), rng.normal(size=(256, 1)).astype(np.float32)
    parts = {f"base_model.model.{name}.lora_{end}.weight": part for end, part in (("A", one), ("B", other))}
    specjax.hf.write_tensors(
        tmp_path, [specjax.hf.TensorSpec(key, x.dtype, x.shape, lambda x=x: x) for key, x in parts.items()]
    )
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    folder, model = quantised_file
    ours = specjax.load(folder / "x.gguf", "float32", adapter=tmp_path)
    expected = model.get_submodule(name).weight.data.numpy() + 2 * other @ one
    kernel = ours.params["layers"][0]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_allclose(np.asarray(kernel).T, expected, rtol=1e-5, atol=1e-6)


# Damage and mistakes.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config and the tensors of a tiny Llama of one layer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("Llama", {"num_hidden_layers": 1}).save_pretrained(folder)
    return load_folder(folder)


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        specjax.load(path)
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba'; supported: llama, qwen2"),
        ({"llama.block_count": 2}, "llama.block_count is 2, and the file holds 1 layers"),
        ({"llama.context_length": None}, "llama lacks the key 'context_length'"),
        ({"llama.context_length": "long"}, "context_length must be an integer of at least 1, got 'long'"),
        ({"llama.feed_forward_length": 30}, r"tensor .* is \(.*\); the metadata ask for .*; the file is damaged"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4, and attention heads are 6 wide"),
        ({"llama.rope.scaling.type": "spiral"}, "rope.scaling.type is 'spiral'; supported: none, linear, yarn"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5, which is unknown and might change"),
        ({"llama.attention.value_length": 7, "llama.attention.key_length": 6}, "'attention.value_length' is 7"),
        *(({"split.count": value}, "split.count is .* and must be a whole number") for value in (2.0, "2", [2], -2)),
        ({"split.count": 2, "split.no": "0"}, "split.no is '0' and must be a whole number"),
        ({"llama.expert_count": [4, 5]}, "expert_count must be an integer of at least 1, got .4, 5."),
    ],
)
def test_metadata_that_are_not_supported(tiny, tmp_path, change, match):
    config, tensors = tiny
    path = tmp_path / "x.gguf"
    write(path, config, tensors)
    rewrite(path, change)
    refused(path, match)


def rewrite(path, change, tensors=None):
    """Writes a file again with other metadata: values by keys, None for a key that is left out; and more tensors."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} | change
    writer = gguf.GGUFWriter(path.with_suffix(".new"), fields.pop("general.architecture"))
    for key, value in fields.items():
        add = {str: writer.add_string, int: writer.add_int32, float: writer.add_float32, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in {
        **{tensor.name: np.array(tensor.data) for tensor in reader.tensors},
        **(tensors or {}),
    }.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


def test_a_refused_key_can_be_left_out(tiny, tmp_path, caplog):
    """By every function that opens the file. Each gives one warning about keys that nobody knows."""
    path = tmp_path / "x.gguf"
    write(path, *tiny, more=add_tokens)
    rewrite(path, {"llama.attention.scale": 0.5, "llama.strange": 1, "tokenizer.ggml.eos_token_id": 5})
    ignored = ("llama.attention.scale",)
    opened = specjax.open(path, "float32", ignore_config_keys=iter(ignored))
    assert caplog.text.count("unknown keys are ignored") == 1 and "llama.strange" in caplog.text
    assert opened.stop_tokens == (5,)
    specjax.load_drafter(f"cascade:ngram,model:{path}", opened, 2, ignore_config_keys=iter(ignored))
    specjax.convert_hf(path, tmp_path / "converted", ignore_config_keys=iter(ignored))
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["eos_token_id"] == [5]
    with pytest.raises(ValueError, match=r"config.json of the metadata lacks the key 'hidden_size'"):
        specjax.load(path, ignore_config_keys=(*ignored, "hidden_size"))


def test_a_vocabulary_that_is_damaged_is_refused_where_it_is_wanted(tiny, tmp_path):
    path = tmp_path / "x.gguf"
    write(path, *tiny)
    rewrite(path, {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1]})
    assert specjax.load(path, "float32").vocab_size == VOCAB
    with pytest.raises(ValueError, match=r"there are 2 tokens and 1 types of tokens"):
        specjax.open(path)


def test_tables_of_rotary_positions_that_are_not_read(tiny, tmp_path):
    """One of two tables, tables of both kinds, and a table of a layer. Frequencies that files once had are left out."""
    path = tmp_path / "x.gguf"
    for names, match in (
        (["rope_factors_short"], "the tables of rotary positions are rope_factors_short.weight; supported: rope_freqs"),
        (["rope_factors_short", "rope_factors_long", "rope_freqs"], "are rope_factors_short.weight, rope_factors_long"),
        (["blk.0.rope_freqs"], "1 tensors are unknown, such as 'blk.0.rope_freqs.weight'"),
    ):
        write(path, *tiny)
        rewrite(path, {}, {f"{name}.weight": np.ones(3, np.float32) for name in names})
        refused(path, match)
    write(path, *tiny)
    rewrite(path, {}, {"blk.0.attn_rot_embd.weight": np.ones(3, np.float32)})
    open_weights(path)


def config_by_keys(architecture, layers=2, **change):
    """The config of a file without data that has these keys."""
    keys = {"embedding_length": 24, "feed_forward_length": 40, "context_length": 64, "attention.head_count": 4}
    keys |= {"block_count": layers, "attention.layer_norm_rms_epsilon": 1e-5} | change
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    names = ["token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(layers))]
    tensors = {name: Stored(Path("x"), name, 0, (8, 24), 0) for name in names}
    return config_of(Header(Path("x"), {"general.architecture": architecture, **metadata}, tensors))


def test_scalings_of_rotary_positions():
    def scaling(**keys):
        return config_by_keys("llama", **{f"rope.{key}": value for key, value in keys.items()}).get("rope_scaling")

    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaling(**{"scaling.factor": 4.0}) == scaling(scale_linear=4.0) == linear  # as llama.cpp reads it
    assert scaling(**{"scaling.type": "linear", "scaling.factor": 4.0}) == linear
    assert scaling(**{"scaling.type": "none", "scaling.factor": 4.0}) is None
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0}
    assert scaling(**yarn, **{"scaling.yarn_attn_factor": 1.5})["attention_factor"] == 1.5
    assert scaling(**yarn, **{"scaling.attn_factor": 1.5})["attention_factor"] == 1.5 * (1 + 0.1 * np.log(4))


@pytest.mark.parametrize(
    ("layers", "length", "key_heads", "window"),
    [
        (32, 4096, 4, 2047),
        (40, 4096, 4, 2047),
        (32, 131072, 32, 262144),
        (40, 131072, 4, 131072),
        (32, 131072, 4, None),
    ],
)
def test_windows_of_phi3_in_older_files(layers, length, key_heads, window):
    """As llama.cpp knew them by the models' sizes. Since 2024-08 files have the key, and 0 is none."""
    keys = {"context_length": length, "attention.head_count_kv": key_heads}
    if window is None:
        with pytest.raises(ValueError, match=r"phi3 lacks the key 'attention.sliding_window'"):
            config_by_keys("phi3", layers, **keys)
    else:
        assert config_by_keys("phi3", layers, **keys)["sliding_window"] == window
    assert config_by_keys("phi3", layers, **keys, **{"attention.sliding_window": 0})["sliding_window"] is None


def test_a_part_of_each_attention_head_that_rotates():
    """The file has a number of entries and the config their share: 44 * (30 / 44) is less than 30."""
    keys = {"attention.head_count": 1, "attention.key_length": 44, "rope.dimension_count": 30}
    config = specjax.hf.decoder_config(config_by_keys("phi3", **keys, **{"attention.sliding_window": 0}))
    assert len(config.each_layer[0].rope.frequencies) == 15


def test_a_gemma3_without_windows():
    """The converter leaves the window out if every layer has full attention."""
    for keys, windows in (({}, {None}), ({"attention.sliding_window": 16}, {None, 16})):
        config = specjax.hf.decoder_config(config_by_keys("gemma3", 6, **keys))
        assert {layer.window for layer in config.each_layer} == windows


def test_experts_in_numbers_of_layers():
    """Keys may have a value for each layer."""
    assert config_by_keys("llama", expert_count=np.asarray([0, 0]))["model_type"] == "llama"


def test_tensors_that_are_not_the_models(tiny, tmp_path):
    config, tensors = tiny
    path = tmp_path / "x.gguf"
    name = "model.layers.0.mlp.up_proj.weight"
    write(path, config, tensors | {name: tensors[name][:, :-2]})
    refused(path, "tensor 'model.layers.0.mlp.up_proj.weight' is .40, 22.; the metadata ask for .40, 24.")
    write(path, config, {key: value for key, value in tensors.items() if key != name})
    refused(path, "1 tensors are missing, such as 'model.layers.0.mlp.up_proj.weight'")
    write(path, config, tensors | {"model.layers.0.input_layernorm.bias": np.ones(24, np.float32)})
    refused(path, "1 tensors are unknown, such as 'model.layers.0.input_layernorm.bias'")


def test_a_type_that_is_not_read(tmp_path):
    config = {"hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
    make_model("Llama", config).save_pretrained(tmp_path)
    path = tmp_path / "x.gguf"
    write(path, *load_folder(tmp_path), lambda name: "TQ1_0" if name == "output.weight" else "F32")
    refused(path, "tensor 'output.weight' is TQ1_0; supported: F64, F32, F16, BF16, Q4_0")


def test_files_that_are_not_gguf(tiny, tmp_path):
    path = tmp_path / "x.gguf"
    refused(path, "cannot be read .No such file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, "Git LFS pointer")
    path.write_bytes(b"ggjt" + bytes(100))
    refused(path, "does not begin with the bytes GGUF")
    write(path, *tiny)
    with pytest.raises(ValueError, match=r"is a file, not a folder; the tokenizer of a GGUF file is specjax.open"):
        specjax.text.load_tokenizer(path)
    with pytest.raises(ValueError, match=r"x.gguf holds a language model, not an EAGLE head; give it as the target"):
        specjax.load_drafter(f"eagle:{path}", specjax.load(path), 2)
    with pytest.raises(ValueError, match=r"^eagle:absent.gguf names .*absent.gguf, which is not a folder"):
        specjax.load_drafter("eagle:absent.gguf", specjax.load(path), 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    refused(path, "is GGUF version 1; supported: 2 and 3")
    path.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    refused(path, "of the other byte order")
    path.write_bytes(whole[:-200])
    refused(path, "tensor .* ends at byte .* and the file at")
    (tmp_path / "model").mkdir()
    path.rename(tmp_path / "model" / "x.gguf")
    refused(tmp_path / "model", "a GGUF file opens by its own path")


def test_without_the_package(tiny, tmp_path, monkeypatch):
    write(tmp_path / "x.gguf", *tiny)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"need the package gguf .*pip install 'specjax.gguf.'"):
        specjax.load(tmp_path / "x.gguf")


def test_a_model_in_several_files(tiny, tmp_path):
    """Parts open from the first; a part that is missing, another part and another name are refused."""
    config, tensors = tiny
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=5)
    fill(writer, config, tensors)
    first, *others = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(others) > 1
    write(tmp_path / "whole.gguf", config, tensors)
    whole, parts = (read(open_weights(path).params) for path in (tmp_path / "whole.gguf", first))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    refused(others[0], f"is not the first of {len(others) + 1} files; give tiny-00001-of-")
    first.rename(tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "name it like x-00001-of-")
    (tmp_path / "renamed.gguf").rename(first)
    others[0].unlink()
    refused(first, "tiny-00002-of-.* does not exist, and the model is in")


def test_fuzz(tiny, tmp_path):
    """Damaged files open within their bounds, or are refused with a ValueError that names them."""
    path, rng, tried = tmp_path / "x.gguf", np.random.default_rng(0), collections.Counter()

    def more(writer):
        add_tokens(writer)
        for key, value in (("no", 0), ("count", 1), ("tensors.count", 12)):
            writer.add_int32(f"split.{key}", value)

    write(path, *tiny, more=more)
    whole = path.read_bytes()
    header = len(whole) - sum(4 * tensor.size for tensor in tiny[1].values())
    damages = [whole, *(whole[:end] for end in range(0, len(whole), max(1, len(whole) // 150)))]
    for _ in range(600):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            damaged[place] ^= 1 << rng.integers(8)
        damages.append(bytes(damaged))
    for number in (0, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1):  # in place of every count and length
        for place in range(8, 64, 8):
            damages.append(whole[:place] + number.to_bytes(8, "little") + whole[place + 8 :])
    for key in (b"split.no", b"split.count", b"split.tensors.count"):  # every type and other numbers
        at = whole.index(key) + len(key)
        damages += [whole[:at] + bytes([kind]) + whole[at + 1 :] for kind in range(14)]
        damages += [whole[: at + 4] + bytes([number]) + whole[at + 5 :] for number in range(4)]
    start = time.perf_counter()
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            read(open_weights(path).params)
            open_text_parts(path)
            tried["opened"] += 1
        except ValueError as error:
            tried["refused"] += 1
            assert str(path) in str(error) and len(str(error)) < 2000, error
    print(f"{dict(tried)} in {time.perf_counter() - start:.1f} s")
    assert tried["refused"] > 250 and tried["opened"] > 1
