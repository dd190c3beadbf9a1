"""JSON objects whose keys are taken one by one.

A key that was never taken is refused, or named in a warning. So no key of a config is ignored in silence.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specjax.checks import check_integer, check_positive
from specjax.transformer.config import MAX_SIZE

_LOG = logging.getLogger(__name__)
_REQUIRED = object()
CONFIG = "config.json"
ROPES = ("rope_parameters", "rope_scaling")  # two names of one object


class Keys:
    """Hands out the values of an object, and knows which keys were never taken."""

    def __init__(self, raw: Mapping[str, Any], name: str):
        """Starts with all keys of ``raw``; messages call the object ``name``."""
        self._left, self._name = dict(raw), name

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def peek(self, key: str) -> Any:
        """Returns the value of a key without taking the key; None if it is absent or was taken."""
        return self._left.get(key)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a key, which then counts as understood.

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
        """Takes an integer from ``least`` to ``most``, or null if ``optional``.

        Raises:
          ValueError: the key is missing and has no default, or it has another value.
        """
        value = self.take(key, default)
        if value is not None or not optional:
            check_integer(key, value, least, most)
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, optional: bool = False) -> Any:
        """Takes a number above 0, or null if ``optional``; raises as ``integer`` does."""
        value = self.take(key, default)
        check_positive(key, value, optional)
        return value

    def flag(self, key: str, default: bool, *, optional: bool = False) -> bool:
        """Takes true or false; raises as ``integer`` does.

        Null is false, if false is the default or the key is ``optional``: so transformers 4 reads all such keys.
        """
        value = self.take(key, default)
        if value is None and (optional or not default):
            return False
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Takes a key of which only the values ``allowed`` can be computed. The key may be absent.

        Null is allowed, too, if the first of them is false, empty or zero.

        Raises:
          ValueError: the key has another value.
        """
        # In Python 1 == True, in a config they are different values.
        value = self._left.pop(key, allowed[0])
        if value is None and not allowed[0]:
            return
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(
                f"{self._name} key {key!r} is {value!r}; this decoder computes only {choices}{self._switch(key)}"
            )

    def ignore(self, *keys: str) -> None:
        """Takes keys that do not change what the model computes."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raises ValueError if a key was never taken."""
        self._refuse(self._left)

    def unknown(self, defaults: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of keys that were never taken and are not in ``defaults``.

        Args:
          defaults: keys that may change the model, each with the value that changes nothing.

        Raises:
          ValueError: a key of ``defaults`` was never taken and has another value, as in ``only``.
        """
        for key in sorted(self._left.keys() & defaults.keys()):
            self.only(key, defaults[key])
        return tuple(sorted(self._left))

    def switched_off(self) -> tuple[str, ...]:
        """Returns the names of keys that were never taken, if none of them can switch anything on.

        This is the rule for draft heads and recipes, whose keys no transformers class lists. A key that is null, false
        or text counts as off.

        Raises:
          ValueError: a key that was never taken has another value.
        """
        on = {
            key: value
            for key, value in self._left.items()
            if not (value is None or value is False or isinstance(value, str))
        }
        self._refuse(on)
        return tuple(sorted(self._left))

    def _refuse(self, left: Mapping[str, Any]) -> None:
        if left:
            left = {key: left[key] for key in sorted(left)}
            raise ValueError(f"{self._name} keys {left} are unknown and might change the model{self._switch(*left)}")

    def _switch(self, *keys: str) -> str:
        return switch(*(key if self._name.startswith(CONFIG) else f"{self._name}.{key}" for key in keys))


def switch(*keys: str) -> str:
    """Returns the end of a message that refuses keys: how to read ``config.json`` without them."""
    options = " ".join(f"--ignore-config-key {key}" for key in keys)
    return f". To open it as if the config did not say so, give ignore_config_keys={keys!r}, or {options}"


def key_names(ignore_config_keys: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of keys as a tuple, which can be read several times.

    Raises:
      TypeError: the names are one string.
    """
    if isinstance(ignore_config_keys, str):
        raise TypeError(f"ignore_config_keys is the string {ignore_config_keys!r}; give a tuple of names of keys")
    return tuple(ignore_config_keys)


def without_keys(raw: Mapping[str, Any], ignore_config_keys: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of a config without some keys.

    Args:
      raw: the content of a ``config.json``.
      ignore_config_keys: names of keys at the top level or in ``text_config``. They need not be there. A dot names a
        key inside an object: "rope_scaling.factor".

    Raises:
      TypeError: ``ignore_config_keys`` is a string.
    """
    # 1. The top level. A name with a dot may be that of a key here, too: "transformers.js_config".
    names = key_names(ignore_config_keys)
    kept = {key: value for key, value in raw.items() if key not in names}
    # 2. Keys inside objects.
    for key, value in kept.items():
        if not isinstance(value, Mapping):
            continue
        spellings = ROPES if key in ROPES else (key,)
        inner = {name.removeprefix(f"{at}.") for at in spellings for name in names if name.startswith(f"{at}.")}
        if key == "text_config":
            kept[key] = without_keys(value, {*names, *inner})
        elif inner:
            # One level further down, too: Gemma 3's rope_parameters have an object for each layer type.
            kept[key] = {
                name: without_keys(part, inner) if isinstance(part, Mapping) else part
                for name, part in value.items()
                if name not in inner
            }
    return kept


def warn_unknown(where: Any, unknown: Iterable[str]) -> None:
    """Logs one warning that names all unknown keys of the file ``where``, if there are any."""
    names = ", ".join(map(repr, unknown))
    if names:
        _LOG.warning('%s: unknown keys are ignored (docs/huggingface.md, "Config keys"): %s', where, names)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
      ValueError: the file is missing, cannot be read, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint folder must hold one") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, or a number with too many digits
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; it must hold a JSON object")
    return raw
