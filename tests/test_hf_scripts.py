"""scripts/export_hf.py and convert_hf.py: the shipped models run by transformers, and what a user sees of bad input."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import specjax
from specjax.checkpoint.generation import load_stop_tokens
from specjax.commands import stdlib
from specjax.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 48, 64


@pytest.fixture(scope="module")
def scripts():
    return importlib.import_module("specjax.commands.export"), importlib.import_module("specjax.commands.convert")


@pytest.fixture(scope="module", params=["py-14m", "py-14m-draft"])
def exported(request, scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / request.param
    assert scripts[0].main([str(ROOT / "checkpoints" / request.param), str(folder)]) == 0
    return folder


def held_out_prompts(tokenizer):
    """The beginnings of the modules that are kept from training, as rows of one length."""
    modules = [text for name, text in stdlib.modules().items() if stdlib.is_held_out(name)]
    rows = [tokenizer.encode(text[:2000]).ids[:PROMPT_TOKENS] for text in modules]
    rows = [row for row in rows if len(row) == PROMPT_TOKENS][:PROMPTS]
    assert len(rows) == PROMPTS
    return np.asarray(rows, np.int32)


def test_transformers_writes_the_same_text(exported):
    """Greedily, 64 tokens behind each of 20 held-out prompts, drafted by n-grams on our side."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    original = ROOT / "checkpoints" / exported.name
    tokenizer = load_tokenizer(original)
    prompts = held_out_prompts(tokenizer)
    generation = specjax.generate(
        specjax.load(original, "float32"),
        prompts,
        drafter=specjax.NGramDrafter(num_draft=3),
        fixed=True,
        sampling=specjax.Sampling(temperature=0.0),
        max_new_tokens=NEW_TOKENS,
    )
    ours = np.asarray(generation.tokens)[:, : PROMPT_TOKENS + NEW_TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    theirs = model.generate(
        torch.tensor(prompts, dtype=torch.long),
        attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(theirs.numpy(), ours)
    text = "class A:\n    def f(self, x):\n        return x ** 2  # é, ∑\n"
    fast = transformers.AutoTokenizer.from_pretrained(exported)
    assert fast(text)["input_ids"] == tokenizer.encode(text).ids
    assert fast.decode(fast(text)["input_ids"]) == text


def test_an_exported_folder_converts_back(exported, scripts, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert scripts[1].main([str(exported), str(tmp_path / "back"), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "verified over 48 random tokens: largest logit difference" in printed
    assert "x model.embed_tokens.weight -> embed_tokens.weight" in printed
    original = ROOT / "checkpoints" / exported.name
    for name in ("tokenizer.json",):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()
    assert load_stop_tokens(tmp_path / "back") == load_stop_tokens(original) == (0,)


def test_verify_fails_where_the_models_differ(exported, scripts, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert scripts[1].main([str(exported), str(tmp_path / "back")]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    (tmp_path / "back" / "config.json").write_text(json.dumps({**config, "rope_theta": 9000.0}))
    assert scripts[1].verify(exported, tmp_path / "back") == 1


BAD_CALLS = {
    "no source": (["nowhere", "out"], "nowhere"),
    "a source without weights": (["empty", "out"], "holds neither model.safetensors"),
    "a dtype that is none": (["empty", "out", "--dtype", "int4"], "int4"),
    "a destination that exists": (["empty", "empty"], "exists; remove it"),
}


@pytest.mark.parametrize("which", [0, 1], ids=["export_hf", "convert_hf"])
@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_end_in_one_line(call, which, scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    argv, message = BAD_CALLS[call]
    if call == "a dtype that is none":
        argv = [str(ROOT / "checkpoints" / "py-14m-draft"), *argv[1:]]
    if which == 0 and call == "a source without weights":
        message = "has no params/"
    assert scripts[which].main(argv) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()
