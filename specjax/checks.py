"""Checks of numbers, with messages that name the value and the limit; and messages that name a file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError unless the value is an integer of at least ``least`` (and at most ``most``)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be an integer of at most {most}, got {value!r}")


def check_positive(name: str, value: Any, optional: bool = False) -> None:
    """Raises ValueError unless the value is a float32 number above 0 (or None, where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2.0**128:
        raise ValueError(f"{name} must be a number above 0 that float32 holds, got {value!r}")


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Context manager that puts a path before the message of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
