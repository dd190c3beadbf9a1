"""Where parameters and rows go on a mesh of devices.

Parameters are split by one table from the logical axes that they declare to the axes of the mesh, and what is computed
from them follows. Rows never look at each other, so the ``data`` axis runs a loop of its own in each of its parts
(``by_rows``): no round communicates along it, and a part whose rows are done waits for no other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from specjax.types import Axis

Rules = Mapping[str, str | None]
T = TypeVar("T")

RULES: Rules = MappingProxyType(
    {
        "embed": None,
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "experts": "expert",
    }
)
"""Logical axis -> mesh axis; None keeps it whole. One that the mesh lacks splits nothing."""

FULLY_SHARDED: Rules = MappingProxyType({**RULES, "embed": "data"})
"""Rules for training: the width of the residual stream, which nearly all parameters have, is split over ``data`` also.
Each device holds its part alone of parameters and optimiser state (Rajbhandari et al. 2020, ZeRO, section 5)."""

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()
"""How ``by_rows`` treats an array: rows come first in it, or every part of the data axis gets it whole."""

_MESH_AXES = ("data", "tensor", "expert")
_MAY_STAY_WHOLE = ("kv_heads",)  # fewer key and value heads than devices is common, and they are small


def make_mesh(data: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh for ``shard`` and ``jax.set_mesh``.

    Args:
      data: parts that rows are split into.
      tensor: parts that heads, MLP widths and vocabularies are split into.
      expert: parts that the experts of mixtures are split into.
      devices: the devices, of which the first ``data * tensor * expert`` are taken; None: all that there are.

    Raises:
      ValueError: a size is below 1, or there are fewer devices.
    """
    sizes = (data, tensor, expert)
    for name, size in zip(_MESH_AXES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"the mesh axis {name} is {size!r}; give an integer of at least 1")
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes)
    if needed > len(devices):
        raise ValueError(
            f"a mesh of {data} x {tensor} x {expert} (data, tensor, expert) needs {needed} devices and there are "
            f"{len(devices)}: make it smaller"
        )
    return jax.make_mesh(sizes, _MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def shard(model: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Returns the model or drafter with its parameters on the mesh.

    Then ``specjax.generate`` and the others run on it under ``jax.set_mesh(mesh)``, without further arguments. A
    drafter may be split otherwise than its target: a small one is best replicated, by ``rules={}``. On a mesh of
    several processes, all call it, with the same arrays, of which each keeps its parts.

    Args:
      model: a ``LanguageModel`` or a drafter. What belongs to no parameter that declares its axes is replicated.
      mesh: its axes are ``data``, ``tensor`` and ``expert``, or some of them, or those that ``rules`` name; see
        ``make_mesh``.
      rules: logical axis -> mesh axis. Logical axes that it lacks, or gives None, stay whole; so do key and value heads
        that do not divide over their axis.

    Raises:
      TypeError, ValueError: an argument is of another kind; a rule names an axis that there is not; the mesh has one
        that no rule uses; a model declares no axes and is not to be replicated; an axis does not divide.
    """
    return jax.tree.map(_put, model, shardings(model, mesh, rules))


def _put(array: Any, place: NamedSharding) -> jax.Array:
    if place.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, place)
    whole = np.asarray(array)  # device_put would send an array of this process alone to the others, which not all can
    return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)


def shardings(model: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Returns the model with a ``NamedSharding`` for each array; arguments and errors are those of ``shard``."""
    if isinstance(model, type) or not dataclasses.is_dataclass(model):
        raise TypeError(f"model is {model!r}; give a LanguageModel or a drafter")
    _check_mesh(mesh)
    _check_rules(mesh, rules)
    return _walk(model, mesh, rules)


def _walk(node: Any, mesh: Mesh, rules: Rules) -> Any:
    """Goes through the dataclasses in a model or drafter to those that hold ``params`` and declare their axes."""
    if not dataclasses.is_dataclass(node):
        return jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), node)
    assert not isinstance(node, type)
    names = [field.name for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)]
    parts = {name: _walk(getattr(node, name), mesh, rules) for name in names}
    axes = getattr(node, "axes", None)
    if axes is not None:
        place = functools.partial(_place, mesh, rules)
        parts["params"] = jax.tree_util.tree_map_with_path(place, getattr(node, "params"), axes())  # noqa: B009
    elif hasattr(node, "forward") and any(rules.values()):
        raise ValueError("the model declares no axes; give LanguageModel(axes=...), or rules={} to replicate it")
    return dataclasses.replace(node, **parts)


def _place(mesh: Mesh, rules: Rules, path: Any, array: Any, axes: tuple[Axis, ...]) -> NamedSharding:
    name, shape = jax.tree_util.keystr(path), array.shape
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} is {shape} and declares the axes {axes}; declare one for each dimension")
    split: list[str | None] = []
    for dimension, axis in zip(shape, axes, strict=True):
        logical, parts = axis if isinstance(axis, tuple) else (axis, dimension)
        over = None if logical is None else rules.get(logical)
        count = mesh.shape.get(over, 1)
        if count == 1 or (parts % count and logical in _MAY_STAY_WHOLE):
            over = None
        elif parts % count:
            raise ValueError(
                f"parameter {name} has {parts} {logical}, which do not divide over the {count} devices of the mesh "
                f"axis {over!r}; make that axis a divisor of {parts}, or keep them whole: "
                f"rules={{**specjax.sharding.RULES, {logical!r}: None}}"
            )
        elif over in split:
            raise ValueError(f"rules split parameter {name} twice over the mesh axis {over!r}; give {logical!r} None")
        split.append(over)
    return NamedSharding(mesh, PartitionSpec(*split))


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh is {mesh!r}; give a jax.sharding.Mesh, as specjax.make_mesh returns it")
    _check_types(mesh.axis_names, mesh.axis_types)


def _check_types(names: Sequence[str], types: Sequence[AxisType]) -> None:
    explicit = [name for name, kind in zip(names, types, strict=True) if kind == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"the mesh axes {explicit} are of type Explicit, but specjax leaves the shardings of intermediate values "
            "to the compiler; make the mesh with specjax.make_mesh, or with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(names)}"
        )


def _check_rules(mesh: Mesh, rules: Any) -> None:
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules are {rules!r}; give a mapping from logical axes to mesh axes, or to None")
    for logical, over in rules.items():
        if logical not in RULES:
            raise ValueError(f"rules name the logical axis {logical!r}; there are {', '.join(RULES)}")
        if over is not None and over not in (*_MESH_AXES, *mesh.axis_names):
            raise ValueError(f"rules give {logical!r} the axis {over!r}; the mesh has {', '.join(mesh.axis_names)}")
    idle = [name for name in mesh.axis_names if name not in (*_MESH_AXES, *rules.values())]
    if idle:
        raise ValueError(
            f"the mesh has an axis {idle[0]!r}, which no rule uses; name the axes {', '.join(_MESH_AXES)}, or give "
            "rules that map logical axes to it"
        )


def gathered(tree: T) -> T:
    """Returns a tree's arrays as NumPy arrays, whole in every process.

    ``jax.device_get`` does where one process holds them. Where several hold parts, as of what ``generate`` returns
    under a mesh of several hosts, all of them must call this, at the same point.
    """

    def whole(x: Any) -> Any:
        apart = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if apart else x

    return jax.device_get(jax.tree.map(whole, tree))


def by_rows(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns ``function`` such that each part of the mesh's data axis runs it for its rows alone.

    It is ``function`` itself where no mesh with a data axis of more than one device is set, and in a ``shard_map`` or
    ``pmap`` of the caller's over that axis. The other axes are the compiler's as before.

    Args:
      function: of positional arguments, which it treats row by row.
      in_specs: a prefix of the tree of arguments, of ``ROWS`` and ``WHOLE``.
      out_specs: the same of what it returns.

    Raises:
      ValueError: the mesh is of another kind, or the rows do not divide over the axis.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), "data"
    _check_types(mesh.axis_names, mesh.axis_types)
    count = open_parts(axis)
    if count == 1:
        return function

    def split(*args: Any) -> Any:
        rows = {x.shape[0] for x in _under(ROWS, in_specs, args)}
        if any(size % count for size in rows):
            raise ValueError(
                f"{max(rows)} rows do not divide over the {count} parts of the mesh axis {axis!r}; give a multiple of "
                f"{count}, or make that axis smaller"
            )
        # What varies over the rows is known here: the types of intermediate values need not say it.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False)
        return jax.jit(mapped)(*args)

    return split


def open_parts(axis: str) -> int:
    """Returns how many parts the mesh that is set has along an axis; 1 where it has none or is split already."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if axis in mesh.manual_axes else mesh.shape.get(axis, 1)


def _under(spec: PartitionSpec, specs: Any, tree: Any) -> list[Any]:
    """Returns the leaves of ``tree`` for which the prefix ``specs`` says ``spec``."""
    spread = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)
    pairs = zip(jax.tree.leaves(spread, is_leaf=_is_spec), jax.tree.leaves(tree), strict=True)
    return [leaf for given, leaf in pairs if given == spec]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
