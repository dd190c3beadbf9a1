"""Standard streams that are closed or full, byte order marks, links in the way of files, and plain terminals."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import specjax
from specjax.checkpoint.new_folder import new_folder
from specjax.commands import generate, streams
from specjax.commands.console import write_whole
from specjax.hf.keys import read_json
from specjax.hf.safetensors import open_tensors
from specjax.training.recipe import read_recipe

ROOT = Path(__file__).parent.parent
BOM = "\ufeff".encode()
LOST = "error: standard output cannot be written to: "
STREAMS = {
    "output closed": (">&-", "--help", 1, f"{LOST}it is closed\n"),
    "output full": (">/dev/full", "--help", 1, f"{LOST}No space left on device\n"),
    "errors closed": ("2>&-", "--help", 0, ""),
    "errors full": ("2>/dev/full", "--unknown", 2, ""),
}


@pytest.mark.parametrize(("redirection", "argument", "status", "error"), STREAMS.values(), ids=STREAMS)
def test_a_stream_that_cannot_be_written_to(redirection, argument, status, error):
    """One line says why output was lost. Without standard error, only the status can."""
    command = f"'{sys.executable}' -m specjax.commands plan {argument} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (status, error)
    assert done.stdout.startswith("usage: specjax plan") == (redirection == "2>&-")


def test_a_command_goes_on_when_its_output_is_lost(monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as file:
        full = streams._text(streams.Sink(file.fileno(), closed=False), None)
        monkeypatch.setattr(sys, "stdout", full)
        for _ in range(3):
            print("x" * 100_000, flush=True)
        assert streams.end(None) == 1 and streams.end(2) == 2
    assert capsys.readouterr().err == f"{LOST}No space left on device\n" * 2


def test_output_that_is_not_lost_changes_no_status(capsys):
    assert [streams.end(status) for status in (None, 0, 2, "text")] == [None, 0, 2, "text"]
    assert capsys.readouterr().err == ""


TERMINALS = {
    "as usual": ({"TERM": "xterm"}, True, True),
    "an empty NO_COLOR": ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
    "NO_COLOR": ({"TERM": "xterm", "NO_COLOR": "0"}, True, False),
    "a dumb terminal": ({"TERM": "dumb"}, False, False),
}


@pytest.mark.parametrize(("variables", "escapes", "colours"), TERMINALS.values(), ids=TERMINALS)
def test_escape_codes_follow_the_conventions(variables, escapes, colours, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    assert not streams.has_escapes(terminal) and not streams.has_colours(terminal)
    terminal.isatty = lambda: True
    assert (streams.has_escapes(terminal), streams.has_colours(terminal)) == (escapes, colours)


# Byte order marks.


def test_byte_order_marks_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(BOM + b"x = 1\n")
    assert generate.text_file(tmp_path / "prompt") == "x = 1"
    with open(tmp_path / "prompt", encoding="ascii") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert generate.piped_text() == "x = 1"


def test_json_and_recipes_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(BOM + b'{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    index = json.dumps({"weight_map": {"a": "x.safetensors"}}).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(BOM + index)
    assert list(open_tensors(tmp_path)) == ["a"]
    shipped = ROOT / "models" / "py-14m-draft"
    (tmp_path / shipped.name).mkdir()
    (tmp_path / shipped.name / "recipe.toml").write_bytes(BOM + (shipped / "recipe.toml").read_bytes())
    assert read_recipe(tmp_path / shipped.name) == read_recipe(shipped)


# Standard input.


@pytest.mark.parametrize("stdin", ["absent", "empty"])
def test_the_built_in_prompt_is_not_taken_in_silence(stdin, monkeypatch, capsys):
    with open(os.devnull) as empty:
        monkeypatch.setattr(sys, "stdin", None if stdin == "absent" else empty)
        assert generate.piped_text() == ""
    assert capsys.readouterr().err == "nothing was piped in, so the prompt is the built-in one\n"


def test_input_that_is_not_text_is_named(tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(b"x\xff")
    with open(tmp_path / "binary") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        with pytest.raises(ValueError, match="standard input is not UTF-8 text"):
            generate.piped_text()


# Links.


def fill(path):
    with new_folder(path) as folder:
        (folder / "new").touch()


def names(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_of_a_link_the_folder_that_it_leads_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "ahead").symlink_to(tmp_path / "later")
    fill(tmp_path / "link")
    fill(tmp_path / "ahead")
    assert names(tmp_path) == ["ahead", "later", "later/new", "link", "real", "real/new"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "ahead").is_symlink()


def test_what_is_no_folder_is_not_replaced_by_one(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("file", "is a file"), ("link", "is a file"), ("loop", "leads to itself")):
        with pytest.raises(ValueError, match=message):
            fill(tmp_path / name)
    assert names(tmp_path) == ["file", "link", "loop"] and (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    rename = Path.rename

    def refusing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path / "model")
    assert names(tmp_path) == ["model", "model/old"]


def test_a_checkpoint_is_saved_through_a_link(tmp_path):
    opened = specjax.open(ROOT / "checkpoints" / "py-14m-draft")
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        specjax.save(tmp_path / "model", opened.config, opened.model.params)
    assert (tmp_path / "model").is_symlink() and os.listdir(tmp_path / "disk") == ["model"]
    assert specjax.load(tmp_path / "model").vocab_size == opened.model.vocab_size


def test_a_file_is_written_through_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["far", "far/file", "link"]
    assert (tmp_path / "link").read_text() == "text"
