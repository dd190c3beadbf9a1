"""Compiled programs in a folder, which later processes load without tracing anything.

JAX's own folder (``jax_compilation_cache_dir``) is keyed by the lowered program, so a process must trace and lower
before it finds one there. That takes longer than to load it. Here the key is all that a trace depends on: the source of
this package, versions, JAX's configuration, the device, static values, shapes, and the functions of models with what
they close over. Where any of that cannot be told, as for functions of other packages, nothing is kept.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
import re
import types
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import serialize_executable

from specjax.platforms import processor

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]  # of the package's source
BOUND = 2**29  # bytes of programs in the folder; the ones that were not used for the longest time go first

_folder: Path | None = None


def keep_programs(folder: str | Path | None) -> None:
    """Keeps the programs of ``generate``, ``stream`` and their parts in a folder, where later processes load them.

    A later process traces nothing, unlike with JAX's own folder (``jax_compilation_cache_dir``), beside which this one
    may be used. Programs for several devices are not kept, nor are those of models or drafters with functions of other
    packages.

    Args:
      folder: made when it is first needed. A program is code that runs: let nobody else write there. It has at most
        512 MiB; what was not used for the longest time goes first. None keeps no more programs, as at the start.
    """
    global _folder
    _folder = None if folder is None else Path(folder)


class Kept:
    """A jitted function whose programs are kept. Static arguments are given by name."""

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        functools.update_wrapper(self, jitted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __call__(self, *args: Any, **static: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        if _folder is None or not _on_first_device(leaves):
            return self._jitted(*args, **static)
        told = tuple(sorted(static.items(), key=lambda item: item[0]))
        here = structure, tuple(map(_type, leaves)), told, _context()
        if here not in self._programs:
            self._programs[here] = self._program(_folder, args, static)
        return self._programs[here](*args)

    def key(self, args: Any, static: dict[str, Any]) -> str:
        """Returns the name of the program for these arguments; raises ``UntoldError`` if it has none."""
        leaves, structure = jax.tree.flatten(args)
        # A hash of classes differs between processes; the classes themselves are a part of the structure.
        told = {name: value for name, value in static.items() if name != "classes"}
        parts = (self._jitted.__qualname__, told, _structure(structure), list(map(_type, leaves)), _context())
        return hashlib.sha256(f"{environment()} {_text(parts)}".encode()).hexdigest()

    def _program(self, folder: Path, args: Any, static: dict[str, Any]) -> Callable[..., Any]:
        """Returns the program for these arguments, from the folder if it is there."""
        try:
            path = folder / self.key(args, static)
        except UntoldError:
            return functools.partial(self._jitted, **static)
        try:
            payload, out = pickle.loads(path.read_bytes())
            structure = jax.tree.structure((args, {}))
            program = serialize_executable.deserialize_and_load(payload, structure, out)
            path.touch()
            return program
        except Exception:  # not there yet, or not whole: then it is compiled, and written anew
            found: list[str] = []
            with _listening(found):
                program = self._jitted.lower(*args, **static).compile()
            # XLA for CPUs cannot serialise what it has itself read from JAX's folder: the copy lacks functions.
            if _HIT not in found:
                _write(path, program)
        return program


_HIT = "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def _listening(found: list[str]) -> Iterator[None]:
    """Collects the names of JAX's events meanwhile."""

    def listen(event: str, **_: Any) -> None:
        found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _write(path: Path, program: Any) -> None:
    try:
        payload, _, out = serialize_executable.serialize(program)
        whole = pickle.dumps((payload, out))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = sorted((x for x in path.parent.iterdir()), key=lambda x: x.stat().st_mtime)
        size = len(whole) + sum(x.stat().st_size for x in others)
        while others and size > BOUND:
            size -= others[0].stat().st_size
            others.pop(0).unlink()
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(whole)
        part.replace(path)
    except Exception:  # a later process compiles again, no more: a full disk, or a program that cannot be serialised
        pass


class UntoldError(Exception):
    """A part of the key that no text tells."""


def _on_first_device(leaves: list[Any]) -> bool:
    """Returns whether a call runs on the first of one process's devices, outside of the caller's ``jit`` and mesh.

    Other programs depend on how arrays lie on devices, and processes must agree on what they compile.
    """
    if jax.process_count() > 1 or jax.sharding.get_abstract_mesh().axis_names:
        return False
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    first = {jax.devices()[0]}
    return not any(isinstance(x, Tracer) for x in arrays) and all(x.devices() == first for x in arrays)


def _context() -> tuple[str, ...]:
    """Returns those of JAX's settings that a trace depends on and that may change in a process, also in a ``with``."""
    names = ("default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "default_prng_impl", "debug_nans")
    return tuple(str(getattr(jax.config, f"jax_{name}")) for name in (*names, "threefry_partitionable"))


def _type(leaf: Any) -> tuple[Any, ...]:
    """Returns what programs on one device depend on; ``jax.typeof`` also tells apart places that are the same there."""
    aval = jax.typeof(leaf)
    return aval.shape, str(aval.dtype), aval.weak_type


def _structure(structure: Any) -> str:
    data = structure.node_data()
    if data is None:
        return "*"
    return _text((*data, [_structure(x) for x in structure.children()]))


def _text(value: Any) -> str:
    """Returns a text that is the same in all processes, for values that differ in nothing; raises ``UntoldError``."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | np.dtype():
            return repr(value)
        case tuple() | list() | dict():
            items = value.items() if isinstance(value, dict) else value
            return f"{type(value).__name__}({', '.join(map(_text, items))})"
        case type() if value.__module__.partition(".")[0] in (PACKAGE, "builtins"):
            return f"{value.__module__}.{value.__qualname__}"
        case functools.partial():
            return f"partial{_text((value.func, value.args, value.keywords))}"
        case types.FunctionType() if value.__module__.partition(".")[0] == PACKAGE:
            try:
                closed = [cell.cell_contents for cell in value.__closure__ or ()]
            except ValueError:  # a cell that is still empty
                raise UntoldError(repr(value)) from None
            code = value.__code__
            parts = (value.__module__, value.__qualname__, code.co_firstlineno, code.co_code)
            return f"function{_text((*parts, value.__defaults__, value.__kwdefaults__, closed))}"
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            return _text((type(value), fields))
    raise UntoldError(repr(value))


@functools.cache
def environment() -> str:
    """Returns a digest of what all programs of this process depend on."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    device = jax.devices()[0]
    config = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    flags = {name: value for name, value in os.environ.items() if re.search("XLA|LIBTPU|SPECJAX", name)}
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
    parts = (platform.python_version(), versions, device.device_kind, device.client.platform_version)
    digest.update(repr((parts, sorted(map(str, config.items())), sorted(flags.items()), processor())).encode())
    return digest.hexdigest()
