"""What a folder says about generation: stop tokens from every file that names one, and defaults of sampling."""

import json
import shutil

import numpy as np
import pytest
from tiny import CONFIG, save_tiny

import specjax
from specjax.checkpoint.generation import load_generation_defaults, load_stop_tokens

VOCAB = CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that names no stop token."""
    path = save_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")
    config = json.loads((path / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change(folder, **files):
    """Changes keys of JSON files."""
    for name, keys in files.items():
        file = folder / f"{name}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | keys))


# Stop tokens. Ids 0, 1 and 2 are special, 3 is "a", 4 is "b" and so on.

NAMED = {
    "nowhere": ({}, ()),
    "generation config": ({"generation_config": {"eos_token_id": 3}}, (3,)),
    "generation config, a list": ({"generation_config": {"eos_token_id": [4, 3, 4]}}, (4, 3)),
    "config": ({"config": {"eos_token_id": [5, 6]}}, (5, 6)),
    "both": ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": [5, 3]}}, (3, 5)),
    "null in one": ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 5}}, (5,)),
    "text_config": ({"config": {"text_config": {"eos_token_id": 7}}}, (7,)),
    "text_config beside the top": ({"config": {"eos_token_id": 5, "text_config": {"eos_token_id": [7, 5]}}}, (5, 7)),
    "decoder": ({"config": {"decoder": {"eos_token_id": 8}}}, (8,)),
    "generator": ({"config": {"generator": {"eos_token_id": 8}, "text_config": None}}, (8,)),
    "tokenizer config": ({"tokenizer_config": {"eos_token": "<|end|>"}}, (0,)),
    "tokenizer config, an object": (
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<|user|>", "special": True}}},
        (1,),
    ),
    "special tokens map": ({"special_tokens_map": {"eos_token": {"content": "<|assistant|>"}}}, (2,)),
    "all": (
        {
            "generation_config": {"eos_token_id": [9]},
            "config": {"eos_token_id": 5, "text_config": {"eos_token_id": 7}},
            "tokenizer_config": {"eos_token": "<|end|>"},
        },
        (9, 5, 7, 0),
    ),
    "ids that cannot occur": ({"generation_config": {"eos_token_id": [2, 128009, -1]}}, (2,)),
    "only such ids": ({"config": {"eos_token_id": VOCAB}, "tokenizer_config": {"eos_token": "<|new|>"}}, ()),
}


@pytest.mark.parametrize("case", NAMED)
def test_stop_tokens_are_all_that_the_files_name(copy, case):
    files, wanted = NAMED[case]
    change(copy, **files)
    keys = [key for key in ("text_config", "decoder", "generator") if key in files.get("config", {})]
    opened = specjax.open(copy, ignore_config_keys=keys)
    assert opened.stop_tokens == wanted
    if wanted:
        assert opened.config["eos_token_id"] == list(wanted)


@pytest.mark.parametrize(
    ("where", "value"), [("config", "</s>"), ("config", [2, 3.0]), ("generation_config", [True]), ("config", {"a": 1})]
)
def test_stop_tokens_that_are_none(copy, where, value):
    change(copy, **{where: {"eos_token_id": value}})
    with pytest.raises(ValueError, match=rf"{where}.json: eos_token_id is .*; it must be a token id or a list"):
        load_stop_tokens(copy)


@pytest.mark.parametrize("eos", [None, 3, [3, 5]])
def test_stop_tokens_include_those_of_transformers(tmp_path, eos):
    """A folder that transformers wrote, with and without its generation config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, eos_token_id=eos)
    config.save_pretrained(tmp_path)
    for write in (False, True):
        if write:
            transformers.GenerationConfig(eos_token_id=[7, 3]).save_pretrained(tmp_path)
            wanted = transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id
        else:
            wanted = transformers.GenerationConfig.from_model_config(config).eos_token_id
        wanted = set(wanted if isinstance(wanted, list) else [wanted]) - {None}
        assert wanted <= set(load_stop_tokens(tmp_path))


def test_a_stop_token_that_cannot_occur_does_not_refuse_the_run(copy):
    change(copy, generation_config={"eos_token_id": [2, 128009]})
    result = specjax.Session(copy, fixed=True).complete("a b", 4, temperature=0.0)
    assert 1 <= len(result.tokens) <= 4
    # An id that the caller gives is an error, since the caller can mend it.
    opened = specjax.open(copy)
    with pytest.raises(ValueError, match=r"stop_tokens are \[2, 128009\]; the target's ids are 0 to"):
        specjax.generate(opened.model, [[3]], max_new_tokens=2, stop_tokens=(2, 128009))


# Defaults of sampling.

SAID = {
    "nothing": ({"eos_token_id": 2}, {}),
    "all": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05},
    ),
    "greedy": ({"do_sample": False, "top_k": 20}, {"temperature": 0.0, "top_k": 20}),
    "greedy, whatever the temperature": ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    "numbers as others write them": (
        {"top_k": 50.0, "top_p": 1, "temperature": 1, "repetition_penalty": 1.0},
        {"top_k": 50, "top_p": 1, "temperature": 1},
    ),
    "nulls": ({"do_sample": None, "temperature": None, "top_k": 5, "top_p": None}, {"top_k": 5}),
}


@pytest.mark.parametrize("case", SAID)
def test_defaults_of_a_generation_config(tmp_path, case):
    said, wanted = SAID[case]
    assert load_generation_defaults(tmp_path) == {}
    change(tmp_path, generation_config=said)
    assert load_generation_defaults(tmp_path) == wanted
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    for name, value in wanted.items():
        assert getattr(theirs, name) == value or (name == "temperature" and theirs.do_sample is False and value == 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", -0.1), ("temperature", float("nan")), ("top_k", -2), ("top_k", 2.5), ("top_p", 0)],
        *[("top_k", float("inf")), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0)],
        *[("do_sample", "false"), ("do_sample", 0), ("temperature", "hot")],
    ],
)
def test_defaults_out_of_range_name_the_file(tmp_path, name, value):
    change(tmp_path, generation_config={name: value})
    with pytest.raises(ValueError, match=rf"generation_config.json: {name} is .*; it must be .*: correct the file"):
        load_generation_defaults(tmp_path)
    change(tmp_path, generation_config={"do_sample": False, name: value})
    with pytest.raises(ValueError, match=name):
        load_generation_defaults(tmp_path)


def test_a_top_k_below_0_keeps_all_tokens(tmp_path):
    """As vLLM has it; transformers refuses it as it generates."""
    change(tmp_path, generation_config={"top_k": -1, "top_p": 0.9})
    assert load_generation_defaults(tmp_path) == {"top_k": 0, "top_p": 0.9}


@pytest.mark.parametrize("value", ["hot", True, [0.6], {}])
def test_defaults_that_are_no_numbers(copy, value):
    change(copy, generation_config={"temperature": value})
    with pytest.raises(ValueError, match=r"generation_config.json: temperature is .*; it must be a number"):
        specjax.Session(copy, generation_defaults=True)
    specjax.Session(copy)  # by default these are not read


def test_a_session_takes_the_defaults_that_a_call_does_not_give(copy):
    change(copy, generation_config={"do_sample": False, "top_k": 7, "eos_token_id": 2})
    plain = specjax.Session(copy, fixed=True, slots=64)
    session = specjax.Session(plain.opened, fixed=True, slots=64, generation_defaults=True)
    bias = np.where(np.arange(VOCAB) < 3, -np.inf, 0.0)
    greedy = plain.complete("a", 8, temperature=0.0, top_k=7, logit_bias=bias)
    assert session.complete("a", 8, logit_bias=bias) == greedy
    sampled = {"temperature": 1.5, "seed": 3, "logit_bias": bias}
    assert session.complete("a", 8, **sampled) == plain.complete("a", 8, top_k=7, **sampled)
    assert session.complete("a", 8, **sampled) != greedy
