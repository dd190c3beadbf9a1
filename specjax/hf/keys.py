"""JSON objects whose keys are taken one by one: what is left over is refused, never ignored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax.checks import check_integer, check_positive
from specjax.transformer.config import MAX_SIZE

_REQUIRED = object()


class Keys:
    """Hands out the values of an object and knows which were never asked for."""

    def __init__(self, raw: Mapping[str, Any], name: str):
        self._left, self._name = dict(raw), name

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def peek(self, key: str) -> Any:
        """Returns the value of a key that is still to be taken, or None."""
        return self._left.get(key)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a key, which counts as understood.

        Raises:
          ValueError: the key is missing and has no default.
        """
        value = self._left.pop(key, default)
        if value is _REQUIRED:
            raise ValueError(f"{self._name} lacks the key {key!r}")
        return value

    def integer(
        self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = MAX_SIZE, optional: bool = False
    ) -> Any:
        """Takes an integer, or null where it is optional.

        Raises:
          ValueError: the key is missing and has no default, or its value is another.
        """
        value = self.take(key, default)
        if value is not None or not optional:
            check_integer(key, value, least, most)
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, optional: bool = False) -> Any:
        """Takes a number above 0, or null where it is optional; raises as ``integer`` does."""
        value = self.take(key, default)
        check_positive(key, value, optional)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Takes true or false; raises as ``integer`` does."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Takes a key that changes the model, of which only these values are computed; absent is allowed.

        Raises:
          ValueError: it has another value.
        """
        value = self._left.pop(key, allowed[0])
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{self._name} key {key!r} is {value!r}; this decoder computes only {choices}")

    def ignore(self, *keys: str) -> None:
        """Takes keys that do not change what the model computes."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raises ValueError if a key was never taken."""
        if self._left:
            left = {key: self._left[key] for key in sorted(self._left)}
            raise ValueError(
                f"{self._name} keys {left} are unknown and might change the model; remove them if they do not"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: the file is absent or is not a JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint folder must hold one") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: of UTF-8, of JSON, and of numbers that are too long
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; it must hold a JSON object")
    return raw
