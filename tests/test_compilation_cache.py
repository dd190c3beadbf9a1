"""Where commands keep compiled programs: the options, the order of precedence, and what a second process finds."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import save_tiny

from specjax.commands import compilation_cache, hosts
from specjax.engine import kept

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


def settings():
    return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """JAX without a folder, and an empty place for the default one; both as before afterwards."""
    before = settings()
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    kept.keep_programs(None)


def set_up(*argv):
    parser = argparse.ArgumentParser()
    compilation_cache.add_options(parser)
    hosts.add_mesh_options(parser)
    compilation_cache.set_up(parser.parse_args(argv))
    return settings()


def changes(before, after):
    return {name: after[name] for name in SETTINGS if after[name] != before[name]}


def test_the_default_folder_is_bounded_and_takes_all_programs(fresh):
    before = settings()
    assert changes(before, set_up()) == {
        "jax_compilation_cache_dir": str(fresh / "xdg" / "specjax"),
        "jax_compilation_cache_max_size": 2**30,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    assert (fresh / "xdg" / "specjax").stat().st_mode & 0o777 == 0o700
    assert list((fresh / "xdg" / "specjax").iterdir()) == []


@pytest.mark.parametrize("given", ["", "relative"])
def test_without_an_absolute_xdg_folder_the_default_is_in_the_home(given, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert compilation_cache.cache_folder() == Path.home() / ".cache" / "specjax"


def test_a_folder_that_is_named_wins_and_has_no_bound(fresh):
    jax.config.update("jax_compilation_cache_dir", str(fresh / "environment"))
    before = settings()
    assert changes(before, set_up("--compilation-cache", str(fresh / "mine"))) == {
        "jax_compilation_cache_dir": str(fresh / "mine"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    assert (fresh / "mine").is_dir()


def test_a_folder_that_jax_has_wins_over_the_default(fresh):
    jax.config.update("jax_compilation_cache_dir", str(fresh / "environment"))
    before = settings()
    assert changes(before, set_up()) == {}
    assert list(fresh.iterdir()) == []


def test_several_processes_use_no_default_folder(fresh):
    before = settings()
    assert changes(before, set_up("--distributed")) == {}
    named = ["--compilation-cache", str(fresh / "shared")]
    assert set_up("--distributed", *named)["jax_compilation_cache_dir"] == str(fresh / "shared")


def test_no_folder_at_all(fresh):
    before = settings()
    assert changes(before, set_up("--no-compilation-cache")) == {"jax_enable_compilation_cache": False}
    assert list(fresh.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_no_error(fresh, monkeypatch, capsys):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    before = settings()
    assert changes(before, set_up()) == {} and capsys.readouterr().err == ""
    assert changes(before, set_up("--compilation-cache", str(fresh / "file" / "x"))) == {}
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and str(fresh / "file" / "x") in note and "Not a directory" in note


def test_programs_without_a_time_of_use_get_one(fresh):
    """Otherwise JAX 0.10 writes no program any more."""
    folder = fresh / "xdg" / "specjax"
    folder.mkdir(parents=True)
    for name in ("one-cache", "two-cache", "two-atime"):
        (folder / name).write_bytes(b"12345678")
    set_up()
    assert (folder / "one-atime").read_bytes() == bytes(8) and (folder / "two-atime").read_bytes() == b"12345678"


COUNTS = """
import json, sys
import jax
import specjax
names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_max_size")
untouched = [getattr(jax.config, name) for name in names] == [None, 1.0, -1]
events = []
jax.monitoring.register_event_listener(lambda event, **about: events.append(event.split("/")[-1]))
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: traced.append(about["fun_name"]) if event.endswith("jaxpr_trace_duration") else None
)
from specjax.commands.__main__ import main
main(sys.argv[1:])
print(json.dumps({"untouched": untouched, "written": events.count("cache_misses"), "traced": traced}))
"""


def test_a_second_process_finds_all_programs(tmp_path):
    """It traces none of them, and measures no costs. To import specjax changes none of JAX's settings."""
    save_tiny(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    argv = ["generate", "--target", tmp_path / "model", "--drafter", "ngram", "--prompt", "abcabc", "--num-draft", "1"]
    command = [sys.executable, "-c", COUNTS, *argv, "--max-new-tokens", "20"]
    runs, costs = [], []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        file = tmp_path / "specjax" / "specjax_costs.json"  # none if the machine is so busy that nothing pays
        costs.append(file.stat().st_mtime_ns if file.exists() else None)
    assert runs[0]["untouched"] and runs[0]["written"] > 2
    assert runs[1]["written"] == 0 and costs[0] in (None, costs[1])
    first, second = ([name for name in run["traced"] if name.endswith("_program")] for run in runs)
    assert {"prefill_program", "rounds_program"} <= set(first) and second == []
