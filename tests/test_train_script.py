"""scripts/train.py, run in this process on a few lines of text: a target, its draft, resuming, errors."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import specjax
from specjax import training
from specjax.commands import stdlib
from specjax.hf.config import decoder_config
from specjax.text.tokenizer import load_tokenizer
from specjax.transformer.decoder import decoder_model, init_params

ROOT = Path(__file__).parent.parent
MODULES = {f"m{i}": "".join(f"def f{j}(x):\n    return x + {i * j}\n\n\n" for j in range(30)) for i in range(80)}
LAYER = """
vocab_size = 270
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 112
"""
ARCHITECTURE = "[architecture]" + LAYER
STAGE = """
[[stages]]
loss = "{loss}"
text = "{text}"
steps = {steps}
rows = 2
sequence = 32
peak_learning_rate = 1e-2
warmup_steps = 1
"""
TARGET = ARCHITECTURE + STAGE.format(loss="next_token", text="corpus", steps=5)
DRAFT = (
    'seed = 1\ndrafts_for = "target"\nsample_tokens = 500\n'
    + TARGET
    + STAGE.format(loss="total_variation", text="both", steps=4)
    + STAGE.format(loss="kl", text="on_policy", steps=2)
)
HEADS = {
    "mtp": "chain_steps = 2\n" + ARCHITECTURE,
    "eagle": """chain_steps = 3
[architecture]
speculators_model_type = "eagle3"
draft_vocab_size = 90
norm_before_residual = false
eagle_aux_hidden_state_layer_ids = [0, 1, 2]
[architecture.transformer_layer_config]
model_type = "llama"
"""
    + LAYER,
    "medusa": "[architecture]\nmedusa_num_heads = 3\n",
    "dspark": """[architecture]
speculators_model_type = "dspark"
draft_vocab_size = 270
block_size = 3
mask_token_id = 269
markov_rank = 4
aux_hidden_state_layer_ids = [0, 1]
[architecture.transformer_layer_config]
model_type = "qwen3"
num_key_value_heads = 1
head_dim = 16
"""
    + LAYER,
}


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("specjax.commands.train")


@pytest.fixture(autouse=True, scope="module")
def settings():
    """A small corpus; standard promotion, since optax raises a decay rate to the power of a step count."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(stdlib, "modules", lambda: MODULES)
        yield


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """A folder with a trained target of two layers, for tests to copy."""
    folder = tmp_path_factory.mktemp("trained") / "all"
    recipes(folder, TARGET.replace("num_hidden_layers = 1", "num_hidden_layers = 2"))
    assert run(script, folder, "target") == 0
    return folder


def recipes(folder, target=TARGET):
    for name, text in (("target", target), ("draft", DRAFT)):
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "recipe.toml").write_text(text)


def run(script, folder, name, runs="runs", *options):
    places = ["--checkpoints", str(folder / "checkpoints"), "--runs", str(folder / runs), "--save-every", "2"]
    return script.main([str(folder / "models" / name), *places, *options])


def interrupt():
    raise KeyboardInterrupt


def stopped(count, stop=interrupt):
    """Returns ``training.fit`` that calls ``stop`` behind so many steps, those of earlier stages included."""
    fit, calls = training.fit, []

    def fit_until(*args, on_step, **kwargs):
        def step(done, loss):
            on_step(done, loss)
            calls.append(done)
            if len(calls) == count:
                stop()

        return fit(*args, on_step=step, **kwargs)

    return fit_until


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_script as test
from specjax.commands import train
test.stdlib.modules = lambda: test.MODULES
test.training.fit = test.stopped(int(sys.argv[4]), lambda: os.kill(os.getpid(), signal.SIGKILL))
test.run(train, Path(sys.argv[2]), sys.argv[3], "others")
"""


def killed(folder, name, steps):
    """Runs the script in a process that is killed behind so many steps; it compiles as this one does."""
    argv = [sys.executable, "-c", KILLED, Path(__file__).parent, folder, name, str(steps)]
    assert subprocess.run(argv, capture_output=True, timeout=900).returncode == -signal.SIGKILL


def saved(run):
    """Returns what each stage saved last: parameters, the optimiser's state, and all losses."""
    found = []
    for folder in sorted(run.glob("stage-*")):
        with ocp.CheckpointManager(folder) as manager:
            parts = ocp.args.Composite(state=ocp.args.StandardRestore(), history=ocp.args.JsonRestore())
            found.append(dict(manager.restore(manager.latest_step(), args=parts)))
    return found


def assert_same_bits(run, other):
    """Asserts that two runs saved the same, in float32."""
    for first, second in zip(saved(run), saved(other), strict=True):
        assert {"params", "opt_state"} <= first["state"].keys() and len(set(first["history"]["losses"])) > 1
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(first["state"]["params"])} == {"float32"}
        chex.assert_trees_all_equal_shapes_and_dtypes(first["state"], second["state"])
        chex.assert_trees_all_equal(first["state"], second["state"])
        assert first["history"] == second["history"]


def test_a_pair_is_trained_resumed_and_guarded(script, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert run(script, tmp_path, "draft") == 0
    metrics = json.loads((tmp_path / "checkpoints" / "draft" / "metrics.json").read_text())
    assert [len(stage["losses"]) for stage in metrics["stages"]] == [5, 4, 2]
    assert np.isfinite(metrics["held_out_loss"])
    for figures in metrics["held_out_acceptance"].values():
        assert len(figures["by_position"]) == figures["num_draft"] and 1 <= figures["emitted_per_round"] <= 6
    assert (tmp_path / "checkpoints" / "draft" / "loss.png").read_bytes().startswith(b"\x89PNG")

    # Killed in the second stage, the same command goes on from the last save and ends with the same bits.
    killed(tmp_path, "draft", 8)
    assert [len(stage["history"]["losses"]) for stage in saved(tmp_path / "others" / "draft")] == [5, 2]
    assert run(script, tmp_path, "draft", "others") == 0
    assert_same_bits(tmp_path / "runs" / "draft", tmp_path / "others" / "draft")

    # Every second row of the text on policy is what the draft, as the second stage left it, says greedily.
    rows = np.load(tmp_path / "runs" / "draft" / "on-policy-2.npy").reshape(-1, 112)[1:8:2]
    state = saved(tmp_path / "runs" / "draft")[1]["state"]
    config = decoder_config({"model_type": "llama", **tomllib.loads(DRAFT)["architecture"]})
    tree = jax.tree.structure(init_params(config, jax.random.key(0)))  # Orbax makes strings of the layers' numbers
    draft = decoder_model(config, jax.tree.unflatten(tree, jax.tree.leaves(state["params"])))
    greedy = specjax.Sampling(temperature=0)
    np.testing.assert_array_equal(
        specjax.generate(draft, rows[:, :64], sampling=greedy, max_new_tokens=48).tokens[:, :112], rows
    )

    # A run is not taken for that of a changed recipe.
    file = tmp_path / "models" / "draft" / "recipe.toml"
    file.write_text(file.read_text().replace("1e-2", "2e-2"))
    capsys.readouterr()
    assert run(script, tmp_path, "draft") == 2
    assert "another recipe; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_trained_resumed_and_drafts(kind, script, trained, tmp_path, monkeypatch):
    """The folder that is written opens as the drafter that was measured."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "head").mkdir()
    stages = STAGE.format(loss="next_token", text="corpus", steps=4) + STAGE.format(loss="kl", text="both", steps=4)
    opening = f'head = "{kind}"\ndrafts_for = "target"\nsample_tokens = 500\n'
    (tmp_path / "models" / "head" / "recipe.toml").write_text(opening + HEADS[kind] + stages)
    assert run(script, tmp_path, "head") == 0
    folder = tmp_path / "checkpoints" / "head"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [len(stage["losses"]) for stage in metrics["stages"]] == [4, 4] and np.isfinite(metrics["held_out_loss"])
    model = specjax.load(tmp_path / "checkpoints" / "target")
    spec = f"{'block' if kind == 'dspark' else kind}:{folder}"
    opened = specjax.load_drafter(spec, model, 3)
    prompts = np.random.default_rng(0).integers(0, 270, (2, 9)).astype(np.int32)
    greedy = {"sampling": specjax.Sampling(temperature=0), "max_new_tokens": 12}
    drafted = specjax.generate(model, prompts, drafter=opened, fixed=True, **greedy)
    np.testing.assert_array_equal(drafted.tokens, specjax.generate(model, prompts, **greedy).tokens)
    assert int(drafted.stats.drafted.sum()) > 0

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", stopped(7))
        assert run(script, tmp_path, "head", "others") == 130
    assert [len(stage["history"]["losses"]) for stage in saved(tmp_path / "others" / "head")] == [4, 2]
    assert run(script, tmp_path, "head", "others") == 0
    assert_same_bits(tmp_path / "runs" / "head", tmp_path / "others" / "head")
    chex.assert_trees_all_equal(specjax.load_drafter(spec, model, 3).params, opened.params)


BAD_HEADS = {
    "an MTP layer of another width": (HEADS["mtp"].replace("hidden_size = 16", "hidden_size = 8"), "hidden_size 8"),
    "windows shorter than the chain": ("chain_steps = 31\n" + ARCHITECTURE, "for 31 drafts give at least 33 tokens"),
    "more Medusa heads than can be read": ("[architecture]\nmedusa_num_heads = 101\n", "at most 100"),
    "EAGLE-1 with two layers": (
        '[architecture]\narchitectures = ["EagleLlamaForCausalLM"]\n'
        + LAYER.replace("num_hidden_layers = 1", "num_hidden_layers = 2"),
        "EAGLE-1 heads have one layer",
    ),
}


@pytest.mark.parametrize(("architecture", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_heads_that_could_not_be_written_are_refused_before_training(
    architecture, message, script, tmp_path, monkeypatch, capsys
):
    recipes(tmp_path)
    target = decoder_config(tomllib.loads(ARCHITECTURE)["architecture"])
    params = init_params(target, jax.random.key(0))
    tokenizer = training.train_tokenizer(list(MODULES.values()), target.vocab_size)
    raw = {"model_type": "llama", **tomllib.loads(ARCHITECTURE)["architecture"]}
    specjax.save(tmp_path / "checkpoints" / "target", raw, params, tokenizer, {})
    kind = "medusa" if "medusa" in architecture else "eagle" if "Eagle" in architecture else "mtp"
    (tmp_path / "models" / "head").mkdir()
    text = f'head = "{kind}"\ndrafts_for = "target"\n' + architecture + STAGE.format(loss="kl", text="corpus", steps=4)
    (tmp_path / "models" / "head" / "recipe.toml").write_text(text)
    monkeypatch.setattr(training, "fit", None)  # nothing is trained
    assert run(script, tmp_path, "head") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "head").exists()


def test_a_draft_of_another_vocabulary_is_refused(script, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    draft = tmp_path / "models" / "draft" / "recipe.toml"
    draft.write_text(draft.read_text().replace("vocab_size = 270", "vocab_size = 260"))
    assert run(script, tmp_path, "draft") == 2
    assert "vocab_size is 260 and that of target 270" in capsys.readouterr().err


def test_errors_are_one_line(script, tmp_path, capsys):
    recipes(tmp_path)
    assert run(script, tmp_path, "absent") == 2
    assert run(script, tmp_path, "draft") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "recipe.toml does not exist" in lines[0] and "target is not a folder" in lines[1] and len(lines) == 2


def test_options_of_a_mesh_that_cannot_be_are_refused(script, tmp_path, capsys):
    recipes(tmp_path)
    assert run(script, tmp_path, "target", "runs", "--fully-sharded") == 2
    assert run(script, tmp_path, "target", "runs", "--mesh", f"data={jax.device_count() + 1}") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "give --mesh data=N" in lines[0] and "make it smaller" in lines[1] and len(lines) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", sorted(folder.name for folder in (ROOT / "models").iterdir()))
def test_the_shipped_checkpoints_are_those_of_their_recipes(name):
    metrics = json.loads((ROOT / "checkpoints" / name / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["recipe"] == training.read_recipe(ROOT / "models" / name).digest
    for file in (ROOT / "checkpoints" / name).rglob("*"):
        assert not file.is_file() or b"/checkpoints/" not in file.read_bytes(), f"{file} names a path"


GREEDY = {"sampling": specjax.Sampling(temperature=0), "max_new_tokens": 24}


@pytest.fixture(scope="module")
def shipped():
    """The shipped target, its tokenizer, a prompt, and the greedy text after the prompt."""
    folder = ROOT / "checkpoints" / "py-14m"
    target, tokenizer = specjax.load(folder), load_tokenizer(folder)
    prompt = tokenizer.encode("def __init__(self, name):\n        self.").ids
    return target, tokenizer, prompt, specjax.generate(target, [prompt], **GREEDY).tokens


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("py-14m-draft", "model"),
        ("py-14m-mtp", "mtp"),
        ("py-14m-eagle", "eagle"),
        ("py-14m-medusa", "medusa"),
        ("py-14m-dspark", "block"),
    ],
)
def test_the_shipped_drafts_draft_greedy_text_of_their_target(name, kind, shipped):
    target, tokenizer, prompt, plain_bs = shipped
    drafter = specjax.load_drafter(f"{kind}:{ROOT / 'checkpoints' / name}", target)
    drafted = specjax.generate(target, [prompt], drafter=drafter, fixed=True, **GREEDY)
    np.testing.assert_array_equal(drafted.tokens, plain_bs)
    assert drafted.stats.rounds[0] < 24
    assert tokenizer.decode(drafted.tokens[0, len(prompt) :].tolist()).startswith("name")
