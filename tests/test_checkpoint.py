"""Checkpoint folders: what goes in comes out, and a folder that is not whole is refused with its path and a cure."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import specjax
from specjax.checkpoint import models as checkpoint
from specjax.hf import decoder_config
from specjax.text.tokenizer import load_tokenizer
from specjax.training import data
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

# A damaged folder leaves reads of its other arrays behind, whose exceptions Python reports when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RAW = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
CONFIG = decoder_config(RAW)
METRICS = {"seed": 0, "losses": [5.5, 4.25]}


def same_bits(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), one, other)
    )


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["def f(x):\n    return x\n"] * 20, 300)


@pytest.fixture(scope="module")
def folder(params, tokenizer, tmp_path_factory):
    """A whole checkpoint; tests copy it."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoint.save(path, RAW, params, tokenizer, METRICS)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def assert_refused(function, *words):
    with pytest.raises(ValueError) as caught:
        function()
    for word in words:
        assert str(word) in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


# Round trips.


def test_float32_parameters_come_back_bit_for_bit(folder, params):
    model = specjax.load(folder, "float32")
    assert same_bits(model.params, params)
    assert (model.vocab_size, model.max_positions) == (300, 64)
    assert model.forward is decoder_model(CONFIG, params).forward, "another function would compile another loop"


def test_the_model_that_comes_back_computes_the_same(folder, params):
    def logits(model):
        tokens_bt = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
        return model.forward(model.params, whole_feed(tokens_bt), model.init_cache(1, 8)).logits_btv

    run = jax.jit(logits)
    np.testing.assert_array_equal(run(specjax.load(folder, "float32")), run(decoder_model(CONFIG, params)))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")], ids=repr)
def test_parameters_are_rounded_to_the_dtype_asked_for(dtype, folder, params):
    model = specjax.load(folder, dtype)
    assert same_bits(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert {x.dtype for x in jax.tree.leaves(model.init_cache(1, 8))} == {jnp.dtype("bfloat16")}


def test_the_default_dtype_follows_the_backend(folder):
    wanted = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    assert checkpoint.default_dtype() == wanted
    assert jax.tree.leaves(specjax.load(folder).params)[0].dtype == wanted


def test_parameters_saved_in_bfloat16_come_back(params, tokenizer, tmp_path):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    checkpoint.save(tmp_path / "x", RAW, rounded, tokenizer, METRICS)
    assert same_bits(specjax.load(tmp_path / "x", "bfloat16").params, rounded)


def test_narrow_parameters_open_in_a_wider_dtype_with_the_least_memory(params, tokenizer, tmp_path, monkeypatch):
    """Orbax counts the bytes of the dtype that is asked for against the buffer that it is given."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    checkpoint.save(tmp_path / "x", RAW, rounded, tokenizer, METRICS)
    monkeypatch.setattr(checkpoint, "_LEAST_BUFFER", 0)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert same_bits(specjax.load(tmp_path / "x", "float32").params, wide)


def test_the_folder_holds_config_metrics_and_tokenizer(folder, tokenizer):
    assert json.loads((folder / "config.json").read_text()) == RAW
    assert json.loads((folder / "metrics.json").read_text()) == METRICS
    text = "def g(y):\n    return y"
    again = load_tokenizer(folder)
    assert again.encode(text).ids == tokenizer.encode(text).ids
    assert again.decode(again.encode(text).ids) == text
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "metrics.json", "params", "tokenizer.json"]
    assert [x.name for x in folder.parent.iterdir()] == [folder.name], "something was left beside the folder"


def test_paths_may_be_text_and_relative(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert specjax.load(folder.name).vocab_size == specjax.load(str(folder)).vocab_size == 300
    assert load_tokenizer(folder.name).get_vocab_size() == load_tokenizer(str(folder)).get_vocab_size()


def test_a_save_replaces_what_was_there(copy, params, tokenizer):
    other = jax.tree.map(lambda x: x + 1, params)
    (copy / "stray.txt").write_text("of the old checkpoint")
    checkpoint.save(copy, RAW, other, tokenizer, {"seed": 1})
    assert same_bits(specjax.load(copy, "float32").params, other)
    assert json.loads((copy / "metrics.json").read_text()) == {"seed": 1}
    assert not (copy / "stray.txt").exists()


# Saves of what does not belong together.

BAD_PARAMS = {
    "a parameter missing": (lambda params: {k: v for k, v in params.items() if k != "norm"}, ["norm", "missing"]),
    "a parameter too many": (lambda params: {**params, "extra": np.zeros(3)}, ["extra", "(3,)", "none"]),
    "another shape": (lambda params: {**params, "norm": {"weight": np.ones(17)}}, ["norm", "(17,)", "(16,)"]),
    "nothing": (lambda params: {}, ["missing"]),
}


@pytest.mark.parametrize(("change", "words"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_parameters_that_are_not_those_of_the_config_are_not_saved(change, words, copy, params, tokenizer, tmp_path):
    for path in (tmp_path / "new", copy):
        bad = change(params)
        assert_refused(lambda path=path, bad=bad: checkpoint.save(path, RAW, bad, tokenizer, {}), "config.json", *words)
    assert sorted(x.name for x in tmp_path.iterdir()) == [copy.name], "something was left behind"
    assert same_bits(specjax.load(copy, "float32").params, params)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({**RAW, "model_type": "bert"}, ["model_type", "bert"]),
        ({**RAW, "hidden_size": "16"}, ["hidden_size", "'16'"]),
        ({**RAW, "hidden_size": 32}, ["(300, 16)", "(300, 32)"]),
        ({**RAW, "tie_word_embeddings": True}, ["lm_head", "none"]),
        ({}, ["lacks the key"]),
    ],
    ids=["another kind", "no size", "another width", "tied", "empty"],
)
def test_a_config_of_another_model_is_not_saved(raw, words, params, tokenizer, tmp_path):
    assert_refused(lambda: checkpoint.save(tmp_path / "new", raw, params, tokenizer, {}), *words)
    assert not list(tmp_path.iterdir())


def test_parameters_may_have_dtypes_of_their_own(params, tokenizer, tmp_path):
    mixed = {**params, "norm": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["norm"])}
    checkpoint.save(tmp_path / "x", RAW, mixed, tokenizer, METRICS)
    assert same_bits(specjax.load(tmp_path / "x", "float32").params, params), "norms are ones, in any dtype"


# Saves that are interrupted.


class FailingTokenizer:
    def to_str(self, pretty):
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_old_checkpoint(copy, params, tokenizer):
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(copy, RAW, other, FailingTokenizer(), {"seed": 1})
    assert same_bits(specjax.load(copy, "float32").params, params)
    assert json.loads((copy / "metrics.json").read_text()) == METRICS
    checkpoint.save(copy, RAW, other, tokenizer, {"seed": 1})  # what the first left behind is not in the way
    assert same_bits(specjax.load(copy, "float32").params, other)
    assert [x.name for x in copy.parent.iterdir()] == [copy.name]


def test_an_interrupted_first_save_leaves_no_checkpoint(tmp_path, params):
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "new", RAW, params, FailingTokenizer(), METRICS)
    assert_refused(lambda: specjax.load(tmp_path / "new"), tmp_path / "new", "folder")


@pytest.mark.parametrize("metrics", [{"loss": object()}, {("a", "b"): 1}], ids=["no JSON value", "no JSON key"])
def test_metrics_that_are_not_json_leave_the_old_checkpoint(metrics, copy, params, tokenizer):
    with pytest.raises(TypeError):
        checkpoint.save(copy, RAW, params, tokenizer, metrics)
    assert same_bits(specjax.load(copy, "float32").params, params)


# Folders that are not whole.


def test_a_folder_that_is_not_there(tmp_path):
    assert_refused(lambda: specjax.load(tmp_path / "nowhere"), tmp_path / "nowhere", "config.json and params/")
    file = tmp_path / "nowhere" / "tokenizer.json"
    assert_refused(lambda: load_tokenizer(tmp_path / "nowhere"), file, "must hold one")


def test_a_file_instead_of_a_folder(copy):
    assert_refused(lambda: specjax.load(copy / "config.json"), copy / "config.json", "not a folder", "give")


NEITHER = {
    "an empty folder": (lambda folder: None, "", "holds neither model.safetensors nor"),
    "a config alone": (lambda folder: (folder / "config.json").write_text(json.dumps(RAW)), "", "download it again"),
    "a checkpoint without parameters": (
        lambda folder: [(folder / name).write_text(json.dumps(RAW)) for name in ("config.json", "metrics.json")],
        "params",
        "incomplete",
    ),
    "parameters without a config": (lambda folder: (folder / "params").mkdir(), "config.json", "does not exist"),
    "pickled weights": (
        lambda folder: [
            (folder / "config.json").write_text(json.dumps(RAW)),
            (folder / "pytorch_model.bin").write_bytes(b"PK"),
        ],
        "",
        "safetensors",
    ),
    "safetensors of no size": (
        lambda folder: [
            (folder / "config.json").write_text(json.dumps(RAW)),
            (folder / "model.safetensors").write_bytes(b""),
        ],
        "model.safetensors",
        "download it again",
    ),
}


@pytest.mark.parametrize(("fill", "file", "reason"), NEITHER.values(), ids=NEITHER)
def test_folders_that_are_neither_checkpoints_nor_of_hugging_face(fill, file, reason, tmp_path, params):
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(folder)
    assert_refused(lambda: specjax.load(folder), folder / file, reason)
    assert_refused(
        lambda: specjax.load_drafter(f"model:{folder}", decoder_model(CONFIG, params)), folder / file, reason
    )


DAMAGE = {
    "cut to half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "absent": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_config(damage, copy):
    file = copy / "config.json"
    damage(file)
    assert_refused(lambda: specjax.load(copy), file, "write it again" if file.exists() else "must hold one")


@pytest.mark.parametrize("text", [b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"model_type": "llama"}'])
def test_a_config_that_describes_no_model(text, copy):
    (copy / "config.json").write_bytes(text)
    assert_refused(lambda: specjax.load(copy), copy / "config.json")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tokenizer(damage, copy):
    file = copy / "tokenizer.json"
    damage(file)
    assert_refused(lambda: load_tokenizer(copy), file, "copy it again" if file.exists() else "must hold one")
    specjax.load(copy)  # the model does not need it


@pytest.mark.parametrize("text", [b"{}", b"[]", b'{"version": "1.0"}', b"\xff\xfe\x00"])
def test_a_tokenizer_file_that_holds_none(text, copy):
    (copy / "tokenizer.json").write_bytes(text)
    assert_refused(lambda: load_tokenizer(copy), copy / "tokenizer.json", "copy it again")


def test_no_parameters(copy):
    shutil.rmtree(copy / "params")
    assert_refused(lambda: specjax.load(copy), copy / "params", "incomplete", "copy or convert it again")


def test_an_empty_parameter_folder(copy):
    shutil.rmtree(copy / "params")
    (copy / "params").mkdir()
    assert_refused(lambda: specjax.load(copy), copy / "params", "truncated", "copy or convert it again")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_parameter_files_never_pass_for_others(damage, folder, params, tmp_path):
    """Each file under ``params/`` in turn: the load is refused, or the file did not matter and every bit is right."""
    files = sorted(x.relative_to(folder) for x in (folder / "params").rglob("*") if x.is_file())
    refused = []
    for i, file in enumerate(files):
        copy = shutil.copytree(folder, tmp_path / str(i))
        damage(copy / file)
        try:
            model = specjax.load(copy, "float32")
        except ValueError as error:
            refused.append(file)
            for word in (str(copy / "params"), "truncated", "copy or convert it again"):
                assert word in str(error), f"{file}: {word!r} is not in {str(error)!r}"
        else:
            assert same_bits(model.params, params), f"{file} was damaged and other parameters were loaded"
        shutil.rmtree(copy)
    assert "_METADATA" in {file.name for file in refused}
    assert any(file.parent.name == "d" for file in refused), "a file under d/ holds the numbers"


OTHER_CONFIGS = {
    "smaller vocabulary": {"vocab_size": 299},
    "larger vocabulary": {"vocab_size": 301},
    "narrower": {"hidden_size": 8},
    "wider MLP": {"intermediate_size": 30},
    "one layer less": {"num_hidden_layers": 1},
    "one layer more": {"num_hidden_layers": 3},
    "fewer key heads": {"num_key_value_heads": 1},
    "wider heads": {"head_dim": 6},
    "tied": {"tie_word_embeddings": True},
    "without biases": {"attention_bias": False},
    "MLP biases": {"mlp_bias": True},
}


@pytest.mark.parametrize("changed", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS.keys())
def test_parameters_of_another_config(changed, copy):
    (copy / "config.json").write_text(json.dumps({**RAW, **changed}))
    assert_refused(
        lambda: specjax.load(copy), copy / "params", "config.json", "another model", "copy or convert it again"
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", jnp.float16, np.dtype("float32")], ids=repr)
def test_the_dtypes_that_parameters_may_have(dtype, folder, params):
    assert same_bits(specjax.load(folder, dtype).params, jax.tree.map(lambda x: x.astype(dtype), params))


@pytest.mark.parametrize("dtype", ["int8", "float999", 3, jnp.int32, "complex64", "float8_e4m3fn", [], ""], ids=repr)
def test_a_dtype_that_holds_no_parameters(dtype, folder, params):
    target = decoder_model(CONFIG, params)
    for load in (
        specjax.load,
        lambda *arguments, **named: specjax.load_drafter(f"model:{arguments[0]}", target, **named),
    ):
        with pytest.raises(ValueError, match=r"dtype is .*; give float32, bfloat16 or float16"):
            load(folder, dtype=dtype)


# Drafters.


def test_a_checkpoint_opens_as_a_drafter(folder, params):
    target = decoder_model(CONFIG, params)
    drafter = specjax.load_drafter(f"model:{folder}", target, num_draft=3, dtype="float32")
    assert isinstance(drafter, specjax.ModelDrafter)
    assert (drafter.num_draft, drafter.vocab_size, drafter.max_positions) == (3, 300, 64)
    assert same_bits(drafter.model.params, params)
    assert jax.tree.leaves(specjax.load_drafter(f"model:{folder}", target, dtype="bfloat16"))[0].dtype == jnp.bfloat16


def test_a_drafter_of_another_vocabulary(folder):
    target = specjax.testing.table_model(np.zeros((8, 8)))
    assert_refused(lambda: specjax.load_drafter(f"model:{folder}", target), folder, "300", "8", "tokenizer")


@pytest.mark.parametrize("num_draft", [0, -1, 1.5, True, None])
def test_a_drafter_that_drafts_nothing(num_draft, folder, params):
    target = decoder_model(CONFIG, params)
    with pytest.raises((ValueError, TypeError), match=rf"num_draft.*{num_draft}"):
        specjax.load_drafter(f"model:{folder}", target, num_draft)


def test_a_drafter_folder_that_is_not_whole(copy, params):
    shutil.rmtree(copy / "params")
    assert_refused(
        lambda: specjax.load_drafter(f"model:{copy}", decoder_model(CONFIG, params)), copy / "params", "incomplete"
    )


def test_tokenizer_files_are_plain(folder):
    """Any program that reads Hugging Face tokenizers reads ours."""
    assert isinstance(Tokenizer.from_str((folder / "tokenizer.json").read_text()), Tokenizer)
