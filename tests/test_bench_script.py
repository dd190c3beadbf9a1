"""scripts/bench.py, run in this process on a tiny random model: each benchmark's rows and columns, never its times."""

import contextlib
import importlib
import io
import json
import math

import jax
import numpy as np
import pytest

import specjax
from specjax import training
from specjax.commands import measure, repeats, stdlib
from specjax.hf.config import decoder_config
from specjax.transformer.decoder import init_params

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(200))
COLUMNS = {
    "width": "tokens | ms | ratio",
    "round": "num_draft | temperature | round ms | drafter ms | target ms | in turn ms | round / (drafter + target) "
    "| round / in turn",
    "slots": "drafter | 512 slots, ms | 4096 slots, ms | ratio",
    "speed": "batch | temperature | num_draft | tokens/s | plain tokens/s | speed-up | adaptive tokens/s "
    "| adaptive speed-up | emitted per round | accepted by position",
    "drafters": "drafter | g | temperature | accepted by position | emitted per round | c | w | promised | speed-up "
    "| adaptive speed-up",
    "repeats": "repeats | temperature | decoding | draft acceptance rate | tokens per round | speed-up",
}
DRAFTERS = ("ngram", "suffix", "first 1 layers")
ROWS = {
    "width": [(t,) for t in range(1, 10)],
    "round": [(1, 0.0), (1, 1.0)],
    "slots": [("plain",), ("g = 1",)],
    "speed": [(2, 0.0, 1), (2, 1.0, 1)],
    "drafters": [(name, 1, temperature) for name in DRAFTERS for temperature in (0.0, 1.0)],
    "repeats": [
        (*setting, name)
        for setting in repeats.SETTINGS
        for name in ("plain", *(f"{each}, 1 drafts" for each in DRAFTERS))
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a target and a draft."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = training.train_tokenizer([TEXT], 262)
    raw = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512}
    raw |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for seed, name in enumerate(("target", "draft")):
        params = init_params(decoder_config(raw), jax.random.key(seed))
        specjax.save(folder / name, raw, params, tokenizer, {})
    return folder


def held_out(patch):
    """Makes ``TEXT`` the one module from which excerpts are taken."""
    name = next(f"m{i}" for i in range(999) if stdlib.is_held_out(f"m{i}"))
    patch.setattr(stdlib, "modules", lambda: {name: TEXT})


@pytest.fixture(scope="module")
def figures(folder):
    """All benchmarks in one run, as small as may be; standard output, and what is written as JSON."""
    out = io.StringIO()
    argv = ["--target", folder / "target", "--draft", folder / "draft", "--json", folder / "out.json"]
    argv += ["--num-draft", 1, "--batch", 2, "--prompts", 1, "--new-tokens", 8, "--repeats", 1]
    argv += ["--drafters", "ngram", "suffix", "early-exit:1"]
    with pytest.MonkeyPatch.context() as patch:
        bench = importlib.import_module("specjax.commands.bench")
        patch.setattr(measure, "LOOP", 1)
        patch.setattr(repeats, "TIMES", 2)
        patch.setattr(bench, "EXCERPTS", 1)
        held_out(patch)
        with contextlib.redirect_stdout(out):
            assert bench.main([*COLUMNS, *(str(value) for value in argv)]) == 0
    return out.getvalue().splitlines(), json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_all_benchmarks_run_in_order(figures):
    assert list(figures[1]) == ["machine", *COLUMNS]
    assert figures[1]["machine"]["instruction set"] in figures[0][0]


@pytest.mark.parametrize("what", COLUMNS)
def test_a_benchmark_has_its_rows_and_columns(figures, what):
    """In JSON and, in the same order, in a Markdown table; all figures are finite."""
    out, written = figures
    rows = written[what]
    assert [" | ".join(row) for row in rows] == [COLUMNS[what]] * len(ROWS[what])
    assert [tuple(row.values())[: len(key)] for row, key in zip(rows, ROWS[what], strict=True)] == ROWS[what]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    top = out.index(f"| {COLUMNS[what]} |")
    assert out[top + 1] == "| " + " | ".join(["---"] * len(rows[0])) + " |"
    printed = [line.strip("| ").split(" | ") for line in out[top + 2 : top + 2 + len(rows)]]
    assert [(len(line), line[0]) for line in printed] == [(len(rows[0]), str(key[0])) for key in ROWS[what]]


def test_what_follows_from_others_does(figures):
    """Ratios of the columns beside them, and shares that are shares."""
    written = figures[1]
    base = written["width"][0]["ms"]
    np.testing.assert_allclose(
        [row["ratio"] for row in written["width"]], [row["ms"] / base for row in written["width"]]
    )
    for row in written["round"]:
        np.testing.assert_allclose(row["round / in turn"], row["round ms"] / row["in turn ms"])
    for row in written["speed"]:
        np.testing.assert_allclose(row["speed-up"], row["tokens/s"] / row["plain tokens/s"])
        np.testing.assert_allclose(row["adaptive speed-up"], row["adaptive tokens/s"] / row["plain tokens/s"])
        assert 1 <= row["emitted per round"] <= 2
        assert all(0 <= float(share) <= 1 for share in row["accepted by position"].split())
    for row in written["drafters"]:
        np.testing.assert_allclose(row["promised"], row["emitted per round"] / (row["c"] + row["w"]))


def test_rollouts_of_a_policy_in_training(folder, monkeypatch, capsys):
    """The draft that keeps up and the one that does not write the texts of plain decoding; others are refused."""
    held_out(monkeypatch)
    main = importlib.import_module("specjax.commands.bench").main
    argv = ["rollouts", "--target", folder / "target", "--json", folder / "rollouts.json", "--prompts", 2]
    argv += ["--updates", 6, "--new-tokens", 6, "--num-draft", 1, "--batch", 3, "--drafters"]
    with jax.numpy_dtype_promotion("standard"):  # optax raises a decay rate to the power of a step count
        assert main([str(value) for value in [*argv, f"model:{folder / 'draft'}"]]) == 0
    rows = json.loads((folder / "rollouts.json").read_text(encoding="utf-8"))["rollouts"]
    assert [row["updates"] for row in rows] == ["1 to 2", "3 to 3", "4 to 4", "5 to 5", "6 to 6"]
    for row in rows:
        assert row["same texts"] == 1 and 0 <= row["reward"] <= 1
        assert 1 <= row["tokens per pass, frozen"] <= 2 and 1 <= row["refreshed"] <= 2
        assert row["with training"] < row["speed-up, refreshed"]
        assert all(0 <= row[f"resting, {which}"] < 1 for which in ("all rows", "replaced"))
    with pytest.raises(SystemExit, match="drafter is a NGramDrafter, for which there is no training"):
        main([str(value) for value in [*argv, "ngram"]])
