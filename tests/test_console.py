"""The console command ``specjax``: help, unknown commands, and a model that is not given and not there."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specjax
from specjax.commands import __main__ as commands
from specjax.commands import places
from specjax.commands.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


def printed(capsys, *argv):
    """Returns the exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    return end.value.code, *capsys.readouterr()


def test_the_package_declares_the_command():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert declared == {"specjax": "specjax.commands.__main__:main"}


def test_help_lists_every_command(capsys):
    status, out, _ = printed(capsys, "--help")
    assert status == 0 and out.startswith("usage: specjax COMMAND")
    assert all(f"  {name} " in out and about in out for name, about in COMMANDS.items())
    assert printed(capsys, "--version")[:2] == (0, f"specjax {specjax.__version__}\n")


@pytest.mark.parametrize("argv", [(), ("tune",)])
def test_what_is_no_command_is_refused(argv, capsys):
    status, out, err = printed(capsys, *argv)
    assert (status, out) == (2, "") and "specjax: error: " in err
    assert not argv or all(name in err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_by_the_console_and_by_its_script(name, monkeypatch, capsys):
    """Both print the same help, by their own names. The script is a process, the console's entry point a call."""
    stem = name.replace("-", "_")
    (script,) = (file for file in (ROOT / "scripts").glob("*.py") if file.stem in (stem, f"{stem}_hf"))
    monkeypatch.setattr(commands, "_set_signals", lambda command: None)  # this process keeps its handlers
    status, console, _ = printed(capsys, name, "--help")
    pages = []
    for page, prog in ((helped(script), script.name), (console, f"specjax {name}")):
        assert page.startswith(f"usage: {prog} [-h]")
        pages.append("".join(page.replace(prog, "PROG").split()))
    assert status == 0 and pages[0] == pages[1]


def test_the_package_runs_as_a_module():
    assert helped("-m", "specjax.commands", "plan").startswith("usage: specjax plan [-h]")


def helped(*argv):
    """Returns the help of a command in a process of its own."""
    command = [sys.executable, *argv, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize("name", ["generate", "bench"])
def test_without_a_target_the_shipped_one_is_needed(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(places, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    command = importlib.import_module(f"specjax.commands.{name}")
    with pytest.raises(SystemExit) as end:
        command.main([])
    assert end.value.code == 2 and "--target is not given" in capfd.readouterr().err


def test_shipped_models_and_recipes_are_found(tmp_path, monkeypatch):
    """In the repository from anywhere, and in the current folder."""
    monkeypatch.chdir(tmp_path)
    assert places.shipped("py-14m") == ROOT / "checkpoints" / "py-14m"
    assert places.recipe_folder(Path("models/py-14m")) == ROOT / "models" / "py-14m"
    assert places.recipe_folder(Path("models/none")) == Path("models/none")
    (tmp_path / "checkpoints" / "own").mkdir(parents=True)
    assert places.shipped("own") == tmp_path / "checkpoints" / "own" and places.shipped("none") is None
