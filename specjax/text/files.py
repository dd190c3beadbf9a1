"""Small text files of a model's folder. A byte order mark at their beginning is left out."""

import json
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """Returns the text of a file.

    Raises:
      ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({error}); copy it again") from None


def read_lines(file: Path) -> list[tuple[str, str]]:
    """Returns the lines of a JSONL file that are not blank, each after what messages call it: "FILE, line 3".

    Raises:
      ValueError: as for ``read_text``.
    """
    # Not splitlines: JSON texts may hold other separators of lines.
    lines = enumerate(read_text(file).split("\n"), 1)
    return [(f"{file}, line {number}", line) for number, line in lines if line.strip()]


def check_characters(name: str, text: str) -> None:
    """Raises ValueError if a text holds half of a surrogate pair, which is no character and which no tokenizer reads.

    JSON can hold one, such as an emoji that was cut in two.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at place {error.start}, which is half of a character; leave it out"
        ) from None


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds, or an empty dict if there is no such file.

    Raises:
      ValueError: the file cannot be read, or holds something else.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; it must hold one JSON object")
    return value
