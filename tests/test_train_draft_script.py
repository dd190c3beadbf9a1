"""scripts/train_draft.py, run in this process on a tiny target: each kind, what is resumed, what is refused."""

import dataclasses
import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_train_script import assert_same_bits, stopped  # noqa: F401  (the killed process stops by it)

import specjax
from specjax import training
from specjax.training import sizes

AMOUNT = ("--tokens", "1500", "--save-every", "4")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("specjax.commands.train_draft")


@pytest.fixture(autouse=True, scope="module")
def settings(script):
    """Few and short documents; standard promotion, since optax raises a decay rate to the power of a step count."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        small(script, patch.setattr)
        yield


def small(script, set_value=setattr):
    few = {"DOCUMENT": 63, "ON_CPU": (8, 2), "NEW_TOKENS": 16, "GLANCE_TOKENS": 16, "PASSES": 2, "NUM_DRAFT": 2}
    for name, value in few.items():
        set_value(script, name, value)
    for name in ("CHAIN_STEPS", "MEDUSA_HEADS", "BLOCK_DRAFTS"):  # a step of the chain is most of a program
        set_value(sizes, name, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a target and its own text, for tests to copy."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save_tiny(folder / "tiny")
    return folder


def run(script, folder, kind, *options, runs="runs", output=None):
    output = folder / "checkpoints" / f"tiny-{kind}" if output is None else output
    places = ["--target", str(folder / "tiny"), "--runs", str(folder / runs), "--output", str(output)]
    return script.main([*places, "--kind", kind, *(options or AMOUNT)])


@pytest.mark.parametrize("kind", training.KINDS)
def test_a_draft_of_each_kind_is_trained_and_drafts(kind, script, folder, capsys):
    """All kinds learn from one text, which is sampled once."""
    shards = folder / "runs" / "tiny-text" / "shards"
    before = {file.name: file.stat().st_mtime_ns for file in shards.glob("*")}
    assert run(script, folder, kind) == 0
    assert all((shards / name).stat().st_mtime_ns == time for name, time in before.items())
    output = folder / "checkpoints" / f"tiny-{kind}"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["sampled_tokens"] >= 1500 and metrics["tokens_seen"] > 0.5 * metrics["train_tokens"]
    losses = [loss for stage in metrics["stages"] for loss in stage["losses"]]
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])
    for figures in metrics["held_out_acceptance"].values():
        assert set(figures) == {"temperature 0", "temperature 1"}
        assert all(1 <= each["emitted_per_round"] <= 3 for each in figures.values())
    card, out = (output / "README.md").read_text(), capsys.readouterr().out
    for text in ("own text", f"{metrics['sampled_tokens']:,} tokens", f"--kind {kind} --tokens 1500", "`ngram`"):
        assert text in card
    spec = f"{'block' if kind in ('dflash', 'dspark') else kind}:{output}"
    assert f"--drafter {spec} --chat" in out and f"--drafter {spec} --chat" in card
    assert "| ngram | temperature 1 |" in out

    opened = specjax.open(folder / "tiny")
    drafter = specjax.load_drafter(spec, opened, 2)
    greedy = {"sampling": specjax.Sampling(temperature=0), "max_new_tokens": 12}
    drafted = specjax.generate(opened.model, [[1, 5, 9], [1, 7]], drafter=drafter, fixed=True, **greedy)
    plain = specjax.generate(opened.model, [[1, 5, 9], [1, 7]], **greedy)
    assert [row.tolist() for row in drafted.rows()] == [row.tolist() for row in plain.rows()]
    assert int(drafted.stats.drafted.sum()) > 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_draft_script as test
from specjax.commands import train_draft as script
test.small(script)
folder, die = Path(sys.argv[2]), lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "sampling":
    take, taken = test.training.OwnText.take, []
    test.training.OwnText.take = lambda own: die() if own.shards == 1 else take(own)
else:
    test.training.fit = test.stopped(6, die)
test.run(script, folder, sys.argv[4], runs="others", output=folder / "outputs" / f"killed-{sys.argv[4]}")
"""


@pytest.mark.parametrize(
    ("kind", "moments"),
    [("medusa", ("sampling", "training")), *((kind, ("training",)) for kind in ("eagle", "dflash", "dspark"))],
)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(kind, moments, script, folder):
    """It is killed after a shard of the text, and again in the training. Once done, the command ends at once."""
    argv = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)]
    for moment in moments:
        process = subprocess.run([*argv, moment, kind], capture_output=True, timeout=900)
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    whole, killed = folder / "outputs" / f"whole-{kind}", folder / "outputs" / f"killed-{kind}"
    assert run(script, folder, kind, runs="others", output=killed) == 0
    assert run(script, folder, kind, output=whole) == 0
    for file in (folder / "runs" / "tiny-text" / "shards").glob("*"):
        assert file.read_bytes() == (folder / "others" / "tiny-text" / "shards" / file.name).read_bytes()
    assert_same_bits(folder / "runs" / whole.name, folder / "others" / killed.name)
    name = "medusa_lm_head.safetensors" if kind == "medusa" else "model.safetensors"
    weights = [(output / name).read_bytes() for output in (whole, killed)]
    assert weights[0] == weights[1]


def test_own_texts_and_a_time_are_taken(script, folder, monkeypatch, capsys):
    """What the time allows is decided once. A folder of another run is not replaced."""
    (folder / "data.txt").write_text("abc xyz " * 200)
    (folder / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    monkeypatch.setattr(script, "step_seconds", lambda *args: (1.0, 0.0))
    monkeypatch.setattr(script, "MOST_PASSES", 1)
    options = ("--minutes", "1", "--data", str(folder / "data.txt"), str(folder / "data.jsonl"))
    monkeypatch.setattr(script, "SAMPLING_SHARE", 1e-9)
    output = folder / "outputs" / "timed"
    assert run(script, folder, "medusa", *options, output=output) == 0
    assert "1 minutes leave time for" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["data_tokens"] == 1600 + 7 and metrics["train_tokens"] > metrics["data_tokens"]
    kept = json.loads((folder / "runs" / "timed" / "state.json").read_text())
    assert kept["shards"] >= 1 and kept["steps"] == sum(len(stage["losses"]) for stage in metrics["stages"]) > 1
    monkeypatch.setattr(script, "step_seconds", None)  # nothing is measured again
    assert run(script, folder, "medusa", *options, output=output) == 0
    assert json.loads((output / "metrics.json").read_text())["stages"] == metrics["stages"]
    # A draft whose run is elsewhere, such as one that is shipped, is not replaced by the command that made it.
    shutil.rmtree(folder / "runs" / "timed")
    assert run(script, folder, "medusa", *options, output=output) == 2
    assert "exists and is not of the run in" in capsys.readouterr().err


def test_a_run_or_output_of_something_else_is_not_touched(script, folder, capsys):
    other = folder / "outputs" / "other"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    assert run(script, folder, "medusa", output=other) == 2
    assert "exists and is not of the run in" in capsys.readouterr().err
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
    assert run(script, folder, "medusa", output=folder / "runs" / "same") == 2
    assert "is the folder of the run as well" in capsys.readouterr().err
    config = folder / "runs" / "changed"
    config.mkdir(parents=True)
    (config / "origin.json").write_text("{}")
    assert run(script, folder, "medusa", output=folder / "outputs" / "changed") == 2
    assert "is a run of another --target and --kind" in capsys.readouterr().err


BAD = {
    "no target": (("--kind", "eagle"), "the following arguments are required: --target"),
    "no such target": (("--target", "absent", "--kind", "eagle"), "absent is not a folder or GGUF file; give a folder"),
    "not fetched": (("--target", "smollm2", "--kind", "eagle"), "smollm2 is not there: run `specjax fetch smollm2`"),
    "another kind": (("--target", "tiny", "--kind", "ngram"), "invalid choice: 'ngram' (choose from"),
    "no tokens": (("--target", "tiny", "--kind", "mtp", "--tokens", "0"), "--tokens is 0; give at least 1"),
    "negative time": (("--target", "tiny", "--kind", "mtp", "--minutes", "-1"), "--minutes is -1; give a number above"),
    "no time": (("--target", "tiny", "--kind", "mtp", "--minutes", "nan"), "--minutes is nan; give a number above 0"),
    "both": (("--target", "tiny", "--kind", "mtp", "--minutes", "1", "--tokens", "9"), "not allowed with argument"),
    "a mesh": (("--target", "tiny", "--kind", "mtp", "--mesh", "data=2"), "train-draft runs on one device"),
    "no data": (("--target", "tiny", "--kind", "mtp", "--data", "absent.txt"), "absent.txt cannot be read"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(argv, message, script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    try:
        assert script.main(list(argv)) == 2
    except SystemExit as error:
        assert error.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and len(lines) == 1
    assert not (folder / "checkpoints" / "tiny-ngram").exists()


def test_a_target_that_lacks_what_a_draft_reads_is_refused(script, folder, monkeypatch, capsys):
    opened = specjax.open(folder / "tiny")
    bare = dataclasses.replace(opened, model=dataclasses.replace(opened.model, embed=None))
    monkeypatch.setattr(specjax, "open", lambda *args, **options: bare)
    for kind in ("eagle", "dflash", "dspark", "mtp", "medusa"):
        assert run(script, folder, kind, output=folder / "outputs" / "bare") == 2
        assert "embed" in capsys.readouterr().err
    assert not (folder / "runs" / "bare").exists()


def test_a_target_that_repeats_itself_ends_the_sampling(script, folder, monkeypatch, capsys):
    same = [training.Document(np.asarray([1, 2, 0, 2, 5], np.int32), 4)]
    monkeypatch.setattr(training, "write_documents", lambda *args, **options: same)
    assert run(script, folder, "medusa", runs="repeats", output=folder / "outputs" / "repeats") == 2
    assert "48 documents of the target are empty or repeat earlier ones, after 5 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 100])
def test_an_eagle_head_starts_with_the_output_head_of_its_target(folder, size):
    """Less what all tokens have in common, each dimension times the size of the target's states there.

    The norm makes logits smaller than that, to a standard deviation of 1, and never larger.
    """
    target = specjax.open(folder / "tiny").model
    own = size * target.params["lm_head"]["kernel"]
    target = dataclasses.replace(target, params=target.params | {"lm_head": {"kernel": own}})
    text = np.repeat(np.arange(target.vocab_size), np.arange(target.vocab_size) + 1)[::-1]
    fresh = {"lm_head": {"kernel": np.zeros((16, 20), np.float32)}, "norm": {"weight": np.full(16, 8.0)}}
    started = training.with_targets_head(fresh, target, text)
    kernel_du, own_du = np.asarray(started["lm_head"]["kernel"]), np.asarray(own[:, -20:])
    ratio_du = kernel_du / (own_du - own_du.mean(1, keepdims=True))
    assert (ratio_du > 0).all()
    np.testing.assert_allclose(ratio_du, np.broadcast_to(ratio_du[:, :1], (16, 20)), rtol=1e-3)
    spread = np.sqrt(np.square(kernel_du).sum(0).mean())  # of logits, where the states' entries have size 1
    assert (spread > 1) == (size == 100)
    np.testing.assert_allclose(started["norm"]["weight"], np.full(16, 8 / max(spread, 1)), rtol=1e-5)


def test_the_target_computes_in_another_dtype(script, folder, tmp_path):
    """The draft is stored as always."""
    output = tmp_path / "draft"
    assert run(script, folder, "eagle", *AMOUNT, "--dtype", "bfloat16", runs="runs-16", output=output) == 0
    dtypes = {x.dtype for x in jax.tree.leaves(specjax.load_drafter(f"eagle:{output}", specjax.open(folder / "tiny")))}
    assert np.dtype("float32") in dtypes
    assert run(script, folder, "eagle", *AMOUNT, runs="runs-16", output=output) == 2
