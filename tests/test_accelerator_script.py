"""scripts/accelerator.sh: steps that cannot harm each other, and its checks and figures."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import specjax
from specjax.commands.accelerator import checks, driver, pairs, speed, steps, summary, waits
from specjax.commands.accelerator.__main__ import main
from specjax.commands.accelerator.records import Recorder, read_records

SCRIPT = Path(__file__).parent.parent / "scripts" / "accelerator.sh"


# Steps in processes of their own.

CHILD = """
import json, pathlib, subprocess, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[3]
def write(kind, record, **facts):
    text = json.dumps({"step": name, "kind": kind, "name": record, **facts})
    (folder / f"{name}.{record}.json").write_text(text)
if name == "facts":
    write("fact", "machine", platform=PLATFORM, device="d", devices=1, python="3", packages={}, runtime="r")
write("check", "first", passed=name != "wrong")
if name == "hangs":
    write("note", "child", text=subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60"]).pid)
    time.sleep(60)
if name == "crashes":
    sys.exit("it crashed")
write("check", "last", passed=True, options=sys.argv[4:])
"""


def nothing(record, small):
    del record, small


def run_children(folder, named, seconds=20.0, platform="gpu"):
    command = [sys.executable, "-S", "-c", CHILD.replace("PLATFORM", repr(platform))]
    passed = driver.run_all(folder, named, time.monotonic() + seconds, folder / "cache", command=command)
    status = {record["step"]: record["status"] for record in read_records(folder, name="step")}
    return passed, status


def test_a_step_that_hangs_or_crashes_loses_no_other(tmp_path):
    named = {name: steps.Step(nothing, timeout=5, least=0) for name in ("facts", "crashes", "last")}
    named = {"hangs": steps.Step(nothing, timeout=1, least=0), **named}
    passed, status = run_children(tmp_path, named)
    assert status == {"hangs": "timed out", "facts": "done", "crashes": "failed", "last": "done"}
    assert passed, "no check failed, and no step that is required"
    written = {(record["step"], record["name"]) for record in read_records(tmp_path)}
    assert {(name, "first") for name in named} <= written, "what a step wrote before its end counts"
    assert "it crashed" in (tmp_path / "logs" / "crashes.log").read_text()
    assert "it crashed" in read_records(tmp_path, "crashes", "step")[0]["text"]
    assert json.loads((tmp_path / "summary.json").read_text()) == read_records(tmp_path)


def test_what_a_hanging_step_started_is_ended_too(tmp_path):
    run_children(tmp_path, {"hangs": steps.Step(nothing, timeout=1, least=0)})
    child = read_records(tmp_path, "hangs", "child")[0]["text"]
    deadline = time.monotonic() + 20  # a signal takes a moment, and the child would sleep for a minute
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(child)


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("wrong", steps.Step(nothing, timeout=5, least=0), False),
        ("hangs", steps.Step(nothing, timeout=1, least=0, required=True), False),
        ("crashes", steps.Step(nothing, timeout=5, least=0, required=True), False),
        ("later", steps.Step(nothing, timeout=5, least=30, required=True), False),
        ("later", steps.Step(nothing, timeout=5, least=30), True),
        ("fine", steps.Step(nothing, timeout=5, least=0, required=True), True),
    ],
)
def test_only_checks_and_required_steps_decide_the_status(tmp_path, name, step, expected):
    assert run_children(tmp_path, {name: step})[0] is expected


def test_nothing_starts_without_the_time_for_it_and_all_ends_in_time(tmp_path):
    named = {name: steps.Step(nothing, timeout=60, least=1) for name in ("hangs", "later", "last")}
    begin = time.monotonic()
    _, status = run_children(tmp_path, named, seconds=driver.MARGIN + 1.5)
    assert time.monotonic() - begin < driver.MARGIN + 1.5
    assert status == {"hangs": "timed out", "later": "skipped", "last": "skipped"}
    assert "s are left, and the step needs 1 s" in read_records(tmp_path, "later", "step")[0]["text"]


def test_an_earlier_runs_records_of_a_step_are_removed(tmp_path):
    Recorder(tmp_path, "last").write("check", "old", passed=False)
    Recorder(tmp_path, "other").write("check", "kept", passed=True)
    assert run_children(tmp_path, {"last": steps.Step(nothing, timeout=5, least=0)})[0]
    assert {record["name"] for record in read_records(tmp_path)} == {"first", "last", "step", "kept"}


@pytest.mark.parametrize(("platform", "small", "skipped"), [("cpu", True, False), ("tpu", False, True)])
def test_a_cpu_runs_small_models_and_a_tpu_none_of_a_gpus_flags(tmp_path, platform, small, skipped):
    named = {name: steps.Step(nothing, timeout=5, least=0) for name in ("facts", "last")}
    named["while"] = steps.Step(nothing, timeout=5, least=0, flags=(steps.WHILE,), required=True)
    passed, status = run_children(tmp_path, named, platform=platform)
    assert passed and status["while"] == ("skipped" if skipped else "done")
    assert read_records(tmp_path, "last", "last")[0]["options"] == (["--small"] if small else [])


def test_flags_are_added_to_those_that_are_given(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--given")
    step = steps.STEPS["waits+while"]
    variables = driver.environment(step, tmp_path, on_cpu=False)
    assert variables["XLA_FLAGS"] == f"--given {steps.TRACED} {steps.WHILE}"
    assert variables["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert driver.environment(steps.STEPS["reference"], tmp_path, on_cpu=False)["JAX_PLATFORMS"] == "cpu"
    assert driver.environment(steps.STEPS["facts"], tmp_path, on_cpu=False)["XLA_FLAGS"] == "--given"


# Checks of text.


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The tiny pair against its own text, in this process."""
    folder = tmp_path_factory.mktemp("checks")
    pair = pairs.open_pair("tiny", with_drafters=False)
    (text,) = checks.texts(pair, checks.plain(2), temperatures=(0.0,))
    Recorder(folder, checks.REFERENCE).write("text", "tiny", tokens=text.tolist())
    checks.run(Recorder(folder, "tiny"), "tiny", [checks.Case("model", "coupled", 2), checks.Case("eagle", "block", 2)])
    return folder


def test_a_sound_program_passes_all_checks(checked):
    found = {record["name"]: record for record in read_records(checked, "tiny")}
    assert found["eagle block batch 2"]["kind"] == "note"
    for name in ("none block batch 2", "model coupled batch 2"):
        assert found[name]["passed"] and found[name]["not the CPU's"] == 0
    drafted = found["model coupled batch 2"]
    assert 0 < drafted["accepted"] < drafted["drafted"], "both outcomes of verification are checked"
    assert drafted["not plain's at temperature 1"] == 0


@pytest.mark.parametrize("broken", range(4))
def test_any_text_that_differs_fails(monkeypatch, broken):
    """In turn: the greedy text against the CPU's, its second run, the text at temperature 1, its second run."""
    text = np.zeros((2, 4), np.int32)
    found = [text.copy() for _ in range(4)]
    found[broken][0, 1] = 1
    if not broken:
        found[1] = found[0]
    monkeypatch.setattr(checks, "texts", lambda *_, **__: found)
    case = checks.Case("model", "coupled", 2)
    assert not checks.compare(None, case, text, {2: text})["passed"]
    monkeypatch.setattr(checks, "texts", lambda *_, **__: [text] * 4)
    assert checks.compare(None, case, text, {2: text})["passed"]
    missing = checks.compare(None, case, None, {2: text})
    assert not missing["passed"] and "run the step reference, too" in missing["error"]
    assert not checks.compare(None, case, text, {})["passed"], "without plain text coupled is not shown"


def test_a_transfer_in_the_second_run_fails(monkeypatch, tmp_path):
    """Arguments that stay on the host are transferred at each call, which the guard forbids."""
    monkeypatch.setattr(jax, "device_put", lambda x: x)
    checks.run(Recorder(tmp_path, "tiny"), "tiny", [checks.Case("none", "block", 2)])
    (found,) = read_records(tmp_path, "tiny")
    assert not found["passed"] and "Disallowed host-to-device transfer" in found["transfer"]
    assert found["not the first run's"] == 0, "the text is compared all the same"


# Counts of host waits.


def profile(*events):
    """A trace with the given events: plane, line, name, how often."""
    planes = {}
    for plane, line, name, count in events:
        lines = planes.setdefault(plane, [])
        lines.append(SimpleNamespace(name=line, events=[SimpleNamespace(name=name)] * count))
    return SimpleNamespace(planes=[SimpleNamespace(name=name, lines=lines) for name, lines in planes.items()])


def trace(rounds, copies):
    device, host = "/device:GPU:0", "/host:CUPTI"
    return profile(
        (device, "Stream #13(Compute,MemcpyD2H)", "MemcpyD2H", 5 + copies * rounds),
        (device, "Stream #13(Compute,MemcpyD2H)", "fusion_1", 40 + 7 * rounds),
        (device, "XLA Ops", "MemcpyD2H", 1000 * rounds),
        (host, "12", "cuStreamSynchronize", 2 + copies * rounds),
        (host, "12", "cuLaunchKernel", 9 + 7 * rounds),
    )


@pytest.mark.parametrize("copies", [0, 3])
def test_waits_are_what_more_rounds_add(copies):
    few, many = (waits.count_events(trace(rounds, copies)) for rounds in (4, 20))
    found = waits.per_round(few, many, 16)
    assert found["waits_per_round"] == found["synchronisations_per_round"] == copies
    assert found["kernels_per_round"] == found["launches_per_round"] == 7


def test_without_a_gpus_plane_nothing_is_counted():
    found = waits.per_round(Counter(), Counter({("/host:CPU", "while"): 3}), 16)
    assert found["waits_per_round"] is None and "not counted" in found["text"]


# Figures.


def test_figures_of_a_small_shape(tmp_path, monkeypatch):
    """Each has what the tables show; plain and quantised are timed, and a missing quantize is a note."""
    monkeypatch.setattr(speed, "LITTLE", speed.Size(prompt=16, slots=64, rounds=2, repeats=1))
    quantize = getattr(specjax, "quantize", lambda model, kind: model)
    monkeypatch.delattr(specjax, "quantize", raising=False)
    bench = speed.prepare(Recorder(tmp_path, "1b", {"card": "a card"}), True, "1b")
    found = speed.drafting(bench, bench.drafters["model"], 1, 0.0)
    assert found["emitted_per_round"] == pytest.approx(1 + 0.8 + 0.8 * 0.7 + 0.8 * 0.7 * 0.6 + 0.8 * 0.7 * 0.6 * 0.5)
    assert found["round_over_plain"] == pytest.approx(found["round_ms"] / found["plain_ms"])
    assert found["speed_up"] == pytest.approx(found["tokens_per_second"] / found["plain_tokens_per_second"])
    # The least time of a round has the draft's weights in each of its g passes.
    assert found["round_ideal_ms"] > 2 * found["plain_ideal_ms"] > 0
    assert found["context"][0] == 16 < found["context"][1] and found["dtype"] == "float32"
    speed.quantisation(bench, "1b", 1)
    monkeypatch.setattr(specjax, "quantize", quantize, raising=False)
    bench.record.write("figure", "model", shape="1b", drafter="model", batch=1, temperature=0.0, **found)
    note, figure = read_records(tmp_path, "1b")
    assert note["text"] == "specjax.quantize is not built" and figure["card"] == "a card"
    speed.quantisation(bench, "1b", 1)
    (figure,) = read_records(tmp_path, "1b", "int8 batch 1")
    assert figure["plain_ms"] > 0 and figure["against"] == "float32"
    text = summary.markdown(read_records(tmp_path))
    assert "| 1b | default | model | float32 | 1 |" in text and "| 1b | 1 | 16 to 18 |" in text


def test_the_summary_shows_failures_and_survives_odd_records():
    records = [
        {"step": "tiny+while", "kind": "check", "name": "a", "passed": False, "error": "one | two\nthree"},
        {"step": "tiny", "kind": "check", "name": "b", "passed": True, "tokens": 5, "accepted": 1, "drafted": 2},
        {"step": "tiny", "kind": "step", "name": "step", "status": "timed out", "seconds": 1.0, "text": "ended"},
    ]
    text = summary.markdown(records)
    assert "1 of 2 checks passed" in text and "**failed** one / two three" in text and "timed out" in text
    assert "The machine is not known." in summary.markdown([])


# The command.


def test_it_runs_from_anywhere_without_an_installation(tmp_path):
    """One step in each of its processes, from another folder that holds a package of the same name."""
    (tmp_path / "specjax").mkdir()
    (tmp_path / "specjax" / "__init__.py").write_text("raise RuntimeError('another specjax')")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PYTHON"] = sys.executable
    done = subprocess.run(
        [SCRIPT, "out", "--steps", "facts"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    machine = read_records(tmp_path / "out", "facts", "machine")[0]
    assert machine["platform"] == jax.default_backend() and machine["packages"]["jax"] == jax.__version__
    assert read_records(tmp_path / "out", "facts", "bandwidth")[0]["bytes_per_second"] > 0
    assert done.stdout.rstrip().endswith((tmp_path / "out" / "summary.md").read_text().rstrip())


@pytest.mark.parametrize("passed", [True, False])
def test_the_exit_status_says_whether_all_checks_passed(tmp_path, monkeypatch, capsys, passed):
    def run_all(folder, named, deadline, cache, small):
        assert list(named) == ["facts", "tiny"] and small and deadline - time.monotonic() <= 60
        summary.write(folder)
        return passed

    monkeypatch.setattr(driver, "run_all", run_all)
    assert main([str(tmp_path), "--steps", "tiny", "--small", "--seconds", "60"]) == (0 if passed else 1)
    assert "The machine is not known." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR", "--steps", "2b"], "step '2b' is unknown; give some of: facts, "),
        (["DIR", "--seconds", "-1"], "--seconds is -1.0; give a number above 0"),
        (["FILE/inside"], "which cannot be made"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    (tmp_path / "FILE").write_text("")
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / arguments[0]), *arguments[1:]])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_python_without_jax_is_told(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    variables = {**os.environ, "PYTHON": str(tmp_path / "python")}
    done = subprocess.run([SCRIPT, tmp_path], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "set PYTHON=" in done.stderr


def test_the_most_wanted_steps_fit_into_the_time():
    """Even if each step before it takes all of its time, a shape's first figures are measured."""
    spent = 0.0
    for name, step in steps.STEPS.items():
        if name == "1b":
            break
        spent += step.timeout
    assert spent + steps.STEPS["1b"].least < 470
