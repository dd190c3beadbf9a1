"""Writing a folder that appears under its name only when it is complete."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, replace: bool = True) -> Iterator[Path]:
    """Yields a folder to fill, which takes the place of ``path`` when it is complete.

    Of a link, the folder that it leads to is written. If anything fails, the new folder is removed and ``path`` stays
    as it was. A killed process leaves a hidden folder next to the old one, whose name ends in ``.partial``.

    Raises:
      ValueError: ``path`` is a file or a link to itself; or with ``replace=False``, ``path`` exists when the folder is
        complete.
    """
    path = end_of_links(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a folder")
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if not os.path.lexists(path):
            partial.rename(path)
        elif not replace:
            raise ValueError(f"{path} has come to exist meanwhile; remove it or give another name")
        else:
            # A folder cannot be renamed onto a full one, so the old folder steps aside first.
            path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        _remove(partial)


def end_of_links(path: str | os.PathLike) -> Path:
    """Returns the absolute path; of a link, the path that it leads to."""
    path = Path(path).absolute()
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        raise ValueError(f"{path} is a link that leads to itself; remove it") from None


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of a save that failed may still be writing."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people and programs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
