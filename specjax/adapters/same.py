"""Functions and static values that compare equal by content, so that what is compiled for one serves the other."""

import dis
import functools
import types
from collections.abc import Hashable
from typing import Any


class Same:
    """Holds a value, and equals another one that holds the same content.

    Two functions have the same content if they have the same code in the same module, the values that they close over
    have, and the globals that they read are equal. A lambda that is written once and made anew in each step is one
    function. An array is the same as itself alone, and so is what holds one.
    """

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        self._key = _key(value, ())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._key == other._key


class _Unhashable:
    """Equals the holder of an equal value that read the same when it was held: a configuration that was changed in
    place since then is another one. An array equals itself alone."""

    __slots__ = ("_text", "value")

    def __init__(self, value: Any):
        self.value = value
        self._text = str(id(value)) if hasattr(value, "__array__") else repr(value)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Unhashable) or self._text != other._text:
            return False
        try:
            return self.value is other.value or bool(self.value == other.value)
        except Exception:  # such as a tuple of arrays, which has no truth value
            return False


def _key(value: Any, outer: tuple[Any, ...]) -> Hashable:
    """Returns what stands for a value. ``outer`` are the functions that hold it: one may close over itself."""
    if any(value is each for each in outer):
        return ("outer", len(outer))
    part = functools.partial(_key, outer=(*outer, value))
    if isinstance(value, functools.partial):
        named = tuple((name, part(each)) for name, each in sorted(value.keywords.items()))
        return ("partial", part(value.func), tuple(map(part, value.args)), named)
    if isinstance(value, types.MethodType):
        return ("method", part(value.__func__), part(value.__self__))
    if isinstance(value, types.FunctionType):
        defaults = tuple(map(part, value.__defaults__ or ()))
        named = tuple((name, part(each)) for name, each in sorted((value.__kwdefaults__ or {}).items()))
        read = _cells(value, part), _globals(value)
        return ("function", value.__code__, id(value.__globals__), defaults, named, *read)
    return _plain(value)


def _plain(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return _Unhashable(value)
    return (type(value), value)


def _globals(function: types.FunctionType) -> Hashable:
    """Returns what stands for the globals that a function reads, by name. Functions among them are themselves alone."""
    names, codes = set(), [function.__code__]
    for code in codes:
        names |= {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    known = function.__globals__
    return tuple((name, _plain(known[name])) for name in sorted(names) if name in known)


def _cells(function: types.FunctionType, part: Any) -> Hashable:
    try:
        return tuple(part(cell.cell_contents) for cell in function.__closure__ or ())
    except ValueError:  # a variable that has no value yet
        return id(function)
