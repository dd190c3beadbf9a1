"""The text for training and measuring the shipped models: the standard library of the running Python."""

import hashlib
import sysconfig
from pathlib import Path

# Folders of tests, tables of numbers or one generated string: little text in them reads like Python.
_SKIPPED = frozenset({"__pycache__", "site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})


def modules() -> dict[str, str]:
    """Returns the source of each standard-library module by dotted name, sorted by name.

    Tests, tables and generated modules are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts):
            try:
                sources[".".join(parts)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few old modules declare another encoding
                continue
    return dict(sorted(sources.items()))


def is_held_out(module: str, percent: int = 5) -> bool:
    """Returns whether a module is held out from training, about ``percent`` in 100 of all.

    A hash of the name decides, so machines and versions of Python agree.
    """
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100 < percent
