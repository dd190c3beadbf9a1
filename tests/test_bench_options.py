"""scripts/bench.py: sweep, startup, acceptance, peers, the page, and the options that are refused. Never its times."""

import argparse
import functools
import importlib
import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
import tiny

import specjax
from specjax import training
from specjax.commands import adapted, bench_page, figures, machine, measure, models, peers, plots, stdlib
from specjax.hf.config import decoder_config
from specjax.testing import table_model
from specjax.transformer.decoder import init_params

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(200))
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
RAW = {"model_type": "llama", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
RAW |= SIZES | {"num_key_value_heads": 1, "rope_theta": 1e4}
HYBRID = RAW | {"model_type": "qwen3_5_text", "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 512}
HYBRID |= {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 3}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID |= {"linear_key_head_dim": 3, "linear_value_head_dim": 5}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}
FACTS = {
    "device": "cpu",
    "devices": 1,
    "instruction set": "AVX2",
    "cores": 2,
    "jax": "1",
    "python": "3",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny target and draft, and a config.json alone."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = training.train_tokenizer([TEXT], 262)
    raw = RAW | {"vocab_size": tokenizer.get_vocab_size()}
    for seed, name in enumerate(("target", "draft")):
        specjax.save(place / name, raw, init_params(decoder_config(raw), jax.random.key(seed)), tokenizer, {})
    (place / "config.json").write_text(json.dumps(RAW | {"vocab_size": 32}))
    (place / "hybrid.json").write_text(json.dumps(HYBRID))
    config = decoder_config(HYBRID)
    specjax.save(place / "hybrid", HYBRID, init_params(config, jax.random.key(0)), tiny.spelling_tokenizer(), {})
    return place


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs the command, as small as may be, and returns what is written as JSON, and the page."""
    bench = importlib.import_module("specjax.commands.bench")
    held_out = next(f"m{i}" for i in range(999) if stdlib.is_held_out(f"m{i}"))
    monkeypatch.setattr(stdlib, "modules", lambda: {held_out: TEXT})
    monkeypatch.setattr(machine, "ARRAY_BYTES", 2**16)
    monkeypatch.setattr(machine, "SQUARE", 32)
    machine.measured_hardware.cache_clear()
    measure.held_out_tokens.cache_clear()

    def main(*argv):
        files = ["--json", tmp_path / "out.json", "--html", tmp_path / "out.html"]
        common = ["--num-draft", 1, "--prompts", 2, "--new-tokens", 6, "--repeats", 1]
        assert bench.main([str(value) for value in (*argv, *common, *files)]) == 0
        return json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.html").read_text()

    return main


class Checker(HTMLParser):
    """Raises AssertionError unless every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def finite(rows):
    """Whether all numbers of rows are finite."""
    return all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_sweep_startup_and_acceptance_of_random_weights(run, folder, capsys):
    """A config.json is enough, and contexts may be longer than its positions."""
    sizes = ["--batch", 1, 2, "--context", 200, "--forced-acceptance", 1]
    found, page = run("sweep", "acceptance", "--target", folder / "config.json", *sizes)
    assert list(found) == ["machine", "sweep", "acceptance"]
    assert {*FACTS, "bandwidth GB/s", "GFLOP/s"} == found["machine"].keys()
    assert [(row["batch"], row["context"]) for row in found["sweep"]] == [(1, 200), (2, 200)]
    for row in found["sweep"]:
        np.testing.assert_allclose(row["fixed speed-up"], row["fixed tokens/s"] / row["plain tokens/s"])
        np.testing.assert_allclose(row["adaptive speed-up"], row["adaptive tokens/s"] / row["plain tokens/s"])
        np.testing.assert_allclose(row["round share of floor"], row["round floor ms"] / row["round ms"])
        assert row["emitted per round"] == 2  # all drafts are accepted
    for row in found["acceptance"]:
        assert (row["draft acceptance rate"], row["mean acceptance length"]) == (1, 2)
        assert row["per-position acceptance rate"] == "1.000"
    assert finite(found["sweep"])
    tags = Checker(page).seen
    assert tags.count("svg") == 4 and tags.count("table") == 2
    assert "acceptance forced to [1.0]" in capsys.readouterr().out


def test_batches_that_do_not_fit_are_left_out(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1.0)
    with pytest.raises(SystemExit, match="no batch fits into memory; give smaller --batch or --context"):
        run("sweep", "--target", folder / "config.json", "--batch", 1)
    assert "batch 1, context 256: left out, caches need" in capsys.readouterr().out


def test_rollback(run, folder, monkeypatch):
    """Bytes are counted by hand; no draft is needed."""
    monkeypatch.setattr(measure, "LOOP", 1)
    found, page = run("rollback", "--target", folder / "hybrid")
    assert Checker(page).seen.count("table") == 1 and finite(found["rollback"])
    state = 4 * (2 * 3 * 2 * 5 + 2 * (6 + 6 + 20))  # one layer's matrices, and the last two inputs of its convolutions
    place = 4 * (6 + 20 + 4 + 6 + 6 + 20)  # a key, a write and a decay, and the inputs
    for width, row in enumerate(found["rollback"], 1):
        assert (row["batch"], row["places"]) == (1, width)
        assert (row["state, MB"], row["kept in the round, MB"]) == (state / 1e6, width * place / 1e6)
        assert row["a state per place, MB"] == width * state / 1e6
        np.testing.assert_allclose(row["ratio"], row["with rollback, ms"] / row["without rollback, ms"])


def test_timed_rounds_of_hybrid_targets_are_traced(folder):
    args = argparse.Namespace(model=specjax.load(folder / "hybrid"))
    drafter, prompt = specjax.NGramDrafter(1), np.ones((1, 4), np.int32)
    state = jax.eval_shape(lambda: measure.ready(args, drafter, 0.0, prompt, 32))
    run = functools.partial(measure.parts, args.model, drafter, with_target=True)
    assert jax.eval_shape(run, state)[2] == state.cache


def test_startup(run, folder):
    before = jax.config.jax_enable_compilation_cache
    found, _ = run("startup", "--target", folder / "target", "--draft", folder / "draft", "--context", 16)
    assert jax.config.jax_enable_compilation_cache == before
    rows = found["startup"]
    assert [row["decoding"] for row in rows] == ["plain", "fixed", "adaptive"]
    assert finite(rows) and all(row["compile s"] > 0 and row["peak memory MB"] > 0 for row in rows)
    assert rows[0]["memory is"] == "the program's arguments, outputs and temporaries"


def test_transformers_beside_specjax(run, folder):
    """The texts of the same weights are equal, token by token."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found, page = run("--peer", "transformers", "--target", folder / "target", "--draft", folder / "draft")
    assert list(found) == ["machine", "peer"] and "transformers" in found["machine"]["peers"][0]
    rows = found["peer"]
    assert [row["library"] for row in rows] == ["specjax"] * 4 + ["transformers"] * 4
    assert {row["text equal"] for row in rows} == {"2 of 2"} and rows[0]["specjax / this"] is None
    np.testing.assert_allclose(rows[4]["specjax / this"], rows[0]["tokens/s"] / rows[4]["tokens/s"])
    np.testing.assert_allclose(rows[5]["specjax / this"], rows[2]["tokens/s"] / rows[5]["tokens/s"])
    assert Checker(page).seen.count("svg") == 1


def test_keras_hub_beside_specjax(run, folder, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras_hub")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, _ = run("--peer", "keras-hub", "--target", folder / "target", "--draft", folder / "draft")
    rows = [row for row in found["peer"] if row["library"] == "keras-hub"]
    assert [row["text equal"] for row in rows] == ["2 of 2"] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "--batch", "0"], "--batch: '0' is not allowed; give an integer of at least 1"),
        (["sweep", "--context", "x"], "--context: 'x' is not allowed"),
        (["slow"], "unknown benchmark slow; choose from width"),
        (["rollback", "--target", "{}/target"], "no layer of --target is recurrent"),
        (["--peer", "vllm"], "--peer: invalid choice: 'vllm'"),
        (["peer"], "peer is asked for without --peer; give --peer with one of transformers, keras-hub"),
        (["adapted"], "adapted is asked for without --package; give --package with one of tunix, keras-hub, gemma"),
        (["speed", "--package", "tunix"], "--package tunix is for the benchmark adapted; name it"),
        (["prompts"], "prompts is asked for without files; give --prompts FILE.jsonl"),
        (
            ["speed", "--prompts", "a.jsonl"],
            "--prompts a.jsonl is for the benchmark prompts; name it, or give a number",
        ),
        (["--prompts", "a.jsonl", "--peer", "keras-hub"], "prompts compares with transformers alone"),
        (["--prompts", "a.jsonl", "--peer", "transformers", "--temperature", "1"], "give --temperature 0, too"),
        (["--prompts", "{}/none.jsonl"], "none.jsonl cannot be read"),
        (["speed", "--prompts", "0"], "--prompts: '0' is not allowed; give an integer of at least 1"),
        (["speed", "--temperature", "nan"], "--temperature: 'nan' is not allowed; give a number of at least 0"),
        (["speed", "--forced-acceptance", "1.5"], "--forced-acceptance has 1.5; give rates from 0 to 1"),
        (["speed", "--forced-acceptance", "nan"], "--forced-acceptance has nan; give rates from 0 to 1"),
        (["speed", "--forced-acceptance", "0.5", "0.5"], "has 2 rates for --num-draft 4; give 1 rate or 4"),
        (["--peer", "transformers", "--forced-acceptance", "0.5"], "leave one out"),
        (["drafters", "--random-weights"], "drafters needs trained weights; give --target DIR without"),
        (["sweep", "--context", "120", "--target", "{}/target", "--draft", "{}/draft"], "more than the 128 positions"),
        (["sweep", "--target", "{}/config.json", "--draft", "{}/draft"], "a vocabulary of 262, and --target one of 32"),
        (["speed", "--tree", "8"], "--tree is 8 and is for drafters and prompts; name one of them"),
        (["drafters", "--siblings", "paths"], "--siblings is paths and there is no --tree"),
        (["drafters", "--tree", "8", "--forced-acceptance", "0.5"], "--forced-acceptance is for chains"),
    ],
)
def test_what_is_refused(argv, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # every peer is there
    bench = importlib.import_module("specjax.commands.bench")
    with pytest.raises(SystemExit) as end:
        bench.main([value.format(folder) for value in argv])
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_peer_that_is_missing_has_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package transformers, which is not installed; install it with"):
        peers.check("transformers")
    with pytest.raises(ValueError, match="pip install keras-hub"):
        peers.check("keras-hub")


def test_a_package_that_is_missing_has_its_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'specjax\[keras\]'"):
        adapted.check(["keras-hub"], asked=True)


def test_adapted_models_stand_beside_their_own_samplers(monkeypatch):
    """The model repeats each row's last token; so does the sampler, but for one token of the first row."""
    vocab = 5
    monkeypatch.setattr(adapted, "VOCAB", vocab)

    def own(prompts, count):
        texts = np.repeat(prompts[:, -1:], count, axis=1)
        texts[0, 2] += 1
        return texts

    repeats = table_model(np.broadcast_to(9 * np.eye(vocab, dtype=np.float32), (vocab, vocab, vocab)))
    made = adapted.Adapted("a package", own, {"mapped": repeats})
    monkeypatch.setitem(adapted.PACKAGES, "tunix", lambda slots: made)
    args = argparse.Namespace(package=["tunix"], batch=[2], num_draft=[2], new_tokens=8, repeats=1)
    found = adapted.bench_adapted(args)
    assert [row["decoding"] for row in found] == ["own sampler", "mapped, plain", "mapped, n-grams"]
    assert [row["text equal"] for row in found] == ["2 of 2", "1 of 2", "1 of 2"]
    assert found[0]["beside own sampler"] == 1 and found[2]["tokens per pass"] > found[1]["tokens per pass"] == 1


def test_acceptance_by_definition():
    """Three drafts of 4 tokens, of which 4, 1 and 0 are accepted, and a round without a draft."""
    accepted_at = np.asarray([[2, 1, 1, 1], [0, 0, 0, 0]])
    drafted_at = np.asarray([[2, 2, 2, 2], [1, 1, 1, 1]])
    stats = specjax.Stats(
        rounds=np.asarray([2, 2]),
        drafted=drafted_at.sum(1),
        accepted=accepted_at.sum(1),
        emitted=np.asarray([7, 2]),
        drafted_at=drafted_at,
        accepted_at=accepted_at,
    )
    found = figures.acceptance(stats)
    assert found["draft acceptance rate"] == 5 / 12 and found["mean acceptance length"] == 1 + 5 / 3
    assert (found["drafts"], found["draft tokens"], found["accepted tokens"]) == (3, 12, 5)
    assert found["per-position acceptance rate"] == "0.667 0.333 0.333 0.333"


def test_instruction_sets(tmp_path):
    file = tmp_path / "cpuinfo"
    for flags, name in (("fpu avx avx2 avx512f", "AVX-512"), ("fpu avx avx2", "AVX2"), ("avx", "AVX")):
        file.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        assert machine.instruction_set(file) == name
    assert machine.instruction_set(tmp_path / "none")
    assert "AVX2, 2 cores" in machine.heading(FACTS)


def test_first_differences():
    a = np.asarray([1, 2, 3])
    assert peers.first_difference(a, a) == -1
    assert peers.first_difference(a, np.asarray([1, 5, 3])) == 1
    assert peers.first_difference(a, a[:2]) == 2


def test_the_page_escapes():
    row = {"library": "<b>", "decoding": "a & b", "tokens/s": 1.0, "text equal": "1 of 1"}
    page = bench_page.render({"machine": FACTS | {"device": "<script>", "peers": ["A.", "B."]}, "peer": [row]})
    assert "<b>A. B.</b>" in page and "<script" not in page and "<b>:" not in page and "a &amp; b" in page
    Checker(page)


def test_plots_are_well_formed():
    """Also of one point, of equal values and of a wide range; all places are inside the view box."""
    for points in ([(1.0, 2.0)], [(1.0, 5.0), (64.0, 5.0)], [(1.0, 1e-3), (1e4, 1e4)]):
        text = plots.lines("x < y", "ms", {"a & b": points}, log_x=True, log_y=True, guides={"bound": points})
        root = ElementTree.fromstring(f"<div>{text}</div>")
        for circle in root.iter("circle"):
            assert plots.LEFT <= float(circle.get("cx")) <= plots.WIDTH - plots.RIGHT + 1e-6
            assert plots.TOP <= float(circle.get("cy")) <= plots.HEIGHT - plots.BOTTOM + 1e-6
    ElementTree.fromstring(plots.bars({"<": 1.0, "b": 2.0}, "tokens/s"))


def test_trees(folder):
    """Drafters draft trees, verified by the rule for them, and their steps can be timed."""
    opened = specjax.open(folder / "target")
    args = argparse.Namespace(
        opened=opened, model=opened.model, dtype=None, drafters=["ngram", f"model:{folder / 'draft'}"]
    )
    args.num_draft, args.tree, args.siblings, args.tree_rule, args.quantize_draft = [3], 6, None, None, None
    (_, copied), (_, drawn) = models.named_drafters(args)
    assert (copied.num_draft, drawn.num_draft, drawn.tree_depth) == (6, 6, 3)
    assert models.rule(args, copied) is specjax.verify.walk and models.rule(args, drawn) is specjax.verify.traversal
    args.tree_rule = "recursive"
    assert models.rule(args, drawn) is specjax.verify.recursive
    for temperature in (0.0, 1.0):
        state = measure.ready(args, drawn, temperature, np.ones((1, 9), np.int32), 64)
        tokens_bs, _, _ = measure.parts(opened.model, drawn, state, with_target=False)
        assert tokens_bs.shape == (1, 64)


def test_rates_for_each_draft():
    args = type("Args", (), {"forced_acceptance": [0.5]})
    assert models.rule(args, specjax.NGramDrafter(3)).acceptance == (0.5, 0.5, 0.5)
    args.forced_acceptance = [0.9, 0.5, 0.2]
    assert models.rule(args, specjax.NGramDrafter(2)).acceptance == (0.9, 0.5)
    args.forced_acceptance = None
    assert models.rule(args, specjax.NGramDrafter(2)) is specjax.verify.block


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_target_and_drafters_have_the_dtype_that_is_given(folder, dtype):
    bench = importlib.import_module("specjax.commands.bench")
    argv = ["--target", folder / "target", "--drafters", f"model:{folder / 'draft'}", "--dtype", dtype]
    args = bench._parser("bench.py").parse_args([str(value) for value in argv])
    models.open_all(args, ["prompts"], None)
    opened = models.named_drafters(args)
    dtypes = {x.dtype for x in jax.tree.leaves((args.model.params, opened[0][1]))}
    assert dtypes == {np.dtype(dtype)}
