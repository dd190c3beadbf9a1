"""The packages of the library import one way, scripts see public names only, and nothing runs at import."""

import ast
import gc
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specjax

REPOSITORY = Path(__file__).parent.parent
LIBRARY = REPOSITORY / "specjax"


def read_table():
    """Returns the table "Packages of the library" of docs/architecture.md as package -> packages that it may import."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Packages of the library")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {re.findall(r"`(\w+)`", row[0])[0]: set(re.findall(r"`(\w+)`", row[-1])) for row in rows}


ALLOWED = read_table()
FILES = sorted(LIBRARY.rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))
COMMANDS = [file for file in FILES if file.relative_to(LIBRARY).parts[0] == "commands"]


def name_of(file):
    return str(file.relative_to(REPOSITORY))


def room_of(file):
    return file.relative_to(LIBRARY).with_suffix("").parts[0]


def parse(file):
    """CPython before 3.11.9 raises SystemError if garbage is collected in the midst of it (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def imported(file):
    """Yields the full dotted name of every import of the package in a file, those inside functions included."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "specjax")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_keep_to_the_table(file):
    """A folder may also import itself; ``__init__.py`` may import all. Commands import the package, as users do."""
    room = room_of(file)
    if room == "__init__":
        return
    allowed = ALLOWED[room] | ({room} if (LIBRARY / room).is_dir() else set())
    for name in imported(file):
        parts = name.split(".")
        if room == "commands" and name == "specjax":
            continue
        assert len(parts) > 1 and parts[1] in ALLOWED, f"{file} imports {name}, which is no room of the table"
        assert parts[1] in allowed, f"{room} must not import {parts[1]}"


def test_the_table_lists_the_rooms_that_there_are():
    assert set(ALLOWED) == {room_of(file) for file in FILES} - {"__init__"}


def test_the_contracts_import_nothing_and_the_engine_knows_no_model():
    """What the table must keep saying, whatever is added to it."""
    assert ALLOWED["types"] == set()
    assert ALLOWED["platforms"] == ALLOWED["rows"] == set()
    for room in ("sharding", "verify", "testing"):
        assert ALLOWED[room] == {"types"}
    assert ALLOWED["cache"] == {"types", "platforms"} and ALLOWED["filters"] == {"platforms", "sharding"}
    assert ALLOWED["sampling"] == {"types", "filters", "search"}
    assert ALLOWED["engine"] == {"types", "platforms", "rows", "sampling", "sharding", "verify", "cache"}
    for room in ("transformer", "drafters", "checkpoint"):
        assert ALLOWED[room].isdisjoint({"engine", "training"})


def test_the_table_has_no_cycles():
    """Rooms can be ordered so that each imports only those before it."""
    done, left = set(), dict(ALLOWED)
    while left:
        ready = [room for room, imports in left.items() if imports <= done]
        assert ready, f"{sorted(left)} import each other"
        done |= set(ready)
        for room in ready:
            del left[room]


def test_the_table_would_catch_a_wrong_import(tmp_path):
    file = tmp_path / "engine.py"
    file.write_text("def f():\n    from specjax.transformer import decoder\n    from specjax import drafters as d\n")
    assert sorted(imported(file)) == ["specjax.drafters", "specjax.transformer.decoder"]


@pytest.mark.parametrize("file", SCRIPTS, ids=name_of)
def test_scripts_run_commands_and_are_thin(file):
    assert set(imported(file)) == {"specjax.commands.__main__.run"}
    assert len(file.read_text(encoding="utf-8").splitlines()) < 150


def test_nothing_imports_the_commands():
    """Commands import the package, so that the package must not import them."""
    for room, rooms in ALLOWED.items():
        assert "commands" not in rooms, room
    assert not any(name.startswith("specjax.commands") for name in imported(LIBRARY / "__init__.py"))


@pytest.mark.parametrize("file", [*SCRIPTS, *COMMANDS], ids=name_of)
def test_scripts_and_commands_use_public_names_only(file):
    """``specjax.X`` with X in ``__all__``, by any spelling, and the rooms that are public too but not imported with
    the package: ``checkpoint``, ``training``, ``planning``, ``aot`` and ``commands``."""
    public = {*specjax.__all__, "checkpoint", "training", "planning", "aot", "commands", "__version__", "__file__"}
    for name in imported(file):
        parts = name.split(".")
        assert len(parts) == 1 or parts[1] in public, f"{file} imports {name}"
        if len(parts) > 2 and parts[1] != "commands":
            assert_public_member(file, parts[1], parts[2])
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "specjax":
            assert node.attr in public, f"{file}:{node.lineno} uses specjax.{node.attr}"


def assert_public_member(file, module, name):
    assert not name.startswith("_"), f"{file} imports specjax.{module}.{name}"
    assert hasattr(importlib.import_module(f"specjax.{module}"), name)


PROGRAM = """
import json, os, sys
sys.modules.update(torch=None, transformers=None)  # an import of them raises
import jax
settings, environment = dict(jax.config.values), dict(os.environ)
import specjax
heavy = {"specjax.commands", "specjax.planning", "specjax.aot", "specjax.training", "tqdm", "matplotlib"}
heavy &= set(sys.modules)
sys.modules.update(matplotlib=None)
import specjax.training
from jax._src import xla_bridge
early = xla_bridge.backends_are_initialized()
jax.devices()
facts = {
    "heavy": sorted(heavy),
    "settings": [name for name, value in settings.items() if jax.config.values[name] != value],
    "environment": dict(os.environ) == environment,
    "backends": [early, xla_bridge.backends_are_initialized()],
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def found():
    """What a process that imports specjax and specjax.training finds. It has no torch, transformers and matplotlib,
    which are for tests of parity and for figures."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_specjax_prints_nothing(found):
    assert found.count("\n") == 1 and found.startswith("{")


def test_importing_specjax_starts_no_backend(found):
    """A backend would take the accelerator, and forbid jax.distributed and flags, before the user has said a word."""
    assert json.loads(found)["backends"] == [False, True]


def test_importing_specjax_leaves_jaxs_settings_alone(found):
    facts = json.loads(found)
    assert facts["settings"] == [] and facts["environment"]


def test_importing_specjax_stays_light(found):
    """The commands and what they need are imported by the commands alone."""
    assert json.loads(found)["heavy"] == []


# Public names.


def test_every_public_name_exists_once_and_in_order():
    assert len(set(specjax.__all__)) == len(specjax.__all__)
    assert specjax.__all__ == sorted(specjax.__all__)
    for name in specjax.__all__:
        assert getattr(specjax, name, None) is not None, name


def test_every_public_import_is_in_all():
    """``from x import y as y`` is how type checkers see a re-export; both lists name the same things."""
    tree = parse(LIBRARY / "__init__.py")
    reexported = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert reexported == set(specjax.__all__)


def definitions():
    """Returns every public function and class by file and name."""
    return {
        f"{name_of(file)}:{node.name}": node
        for file in FILES
        for node in parse(file).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_module_says_what_it_is(file):
    assert ast.get_docstring(parse(file))


@pytest.mark.parametrize("node", definitions().values(), ids=definitions().keys())
def test_every_public_function_and_class_has_a_docstring(node):
    assert ast.get_docstring(node)


@pytest.mark.parametrize("name", sorted(set(specjax.__all__)))
def test_every_public_name_is_documented(name):
    value = getattr(specjax, name)
    doc = inspect.getdoc(value)
    assert doc
    assert not doc.startswith(f"{name}("), "a dataclass without a docstring documents its signature alone"
