"""Output that commands share: one-line errors, tables, whole files."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.quantized import KINDS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())}\n")


def print_table(title: str, rows: list[dict[str, Any]], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints rows as a Markdown table and returns them. ``columns``: those to print; None prints all."""
    columns = list(rows[0]) if columns is None else list(columns)
    shown = [[_cell(row[name]) for name in columns] for row in rows]
    print(f"### {title}\n")
    for line in (columns, ["---"] * len(columns), *shown):
        print("| " + " | ".join(line) + " |")
    print(flush=True)
    return rows


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: readers see the old content or all of the new. Of a link, the target is written."""
    path = path.resolve() if path.is_symlink() else path
    # A rename within a folder is atomic. The process's number keeps two writers apart.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def add_quantize(parser: Any) -> None:
    """Adds ``--quantize`` and ``--quantize-draft`` to a parser, or to a group of its options."""
    for name, what in (("--quantize", "target"), ("--quantize-draft", "drafter")):
        parser.add_argument(name, choices=KINDS, help=f"quantise the weights of the {what} (docs/quantization.md)")


def add_dtype(parser: Any, what: str = "models") -> None:
    """Adds ``--dtype`` to a parser, or to a group of its options. ``what``: the models."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"dtype of {what} (default: bfloat16, and float32 on a CPU)",
    )


def add_adapter(parser: Any, what: str) -> None:
    """Adds ``--adapter`` to a parser, or to a group of its options. ``what``: the model that it is merged into."""
    parser.add_argument("--adapter", type=Path, metavar="DIR", help=f"merge the LoRA adapter in DIR into {what}")


def add_ignored_keys(parser: Any) -> None:
    """Adds ``--ignore-config-key`` to a parser, or to a group of its options."""
    parser.add_argument(
        "--ignore-config-key",
        dest="ignore_config_keys",
        action="append",
        default=[],
        metavar="KEY",
        help="read config.json without this key, if the key is refused; may be repeated",
    )
