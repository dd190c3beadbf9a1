"""How parameters and rows are placed on a mesh of devices.

Parameters declare logical axes. One table (``RULES``) maps logical axes to the axes of the mesh, and the compiler
derives the placement of everything computed from them. Rows never look at each other's tokens. So each part of the
``data`` axis runs its own loop over rounds (``by_rows``). No round communicates along ``data``, and a part whose rows
are done waits for no other part.
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
"""Logical axis -> mesh axis. None keeps the axis whole, and so does a mesh axis that the mesh lacks."""

FULLY_SHARDED: Rules = MappingProxyType({**RULES, "embed": "data"})
"""Rules for training: the width of the residual stream is split over ``data`` as well. Nearly all parameters have this
axis, so each device holds only its part of parameters and optimiser state (Rajbhandari et al. 2020, ZeRO, section 5,
arXiv 1910.02054)."""

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()
"""How ``by_rows`` treats an array. ROWS: its first axis is rows and is split. WHOLE: each part gets the whole array."""

_MESH_AXES = ("data", "tensor", "expert")
# Models often have fewer key and value heads than devices. These parameters are small, so they may stay whole.
_MAY_STAY_WHOLE = ("kv_heads",)


def make_mesh(data: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh for ``shard`` and ``jax.set_mesh``.

    Args:
      data: parts that rows are split into.
      tensor: parts that attention heads, MLP widths and vocabularies are split into.
      expert: parts that the experts of mixtures are split into.
      devices: the first ``data * tensor * expert`` of these devices are used. None: those of ``jax.devices()``.

    Raises:
      ValueError: a size is below 1, or there are fewer devices than the mesh needs.
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

    ``specjax.generate`` and the other functions then run on the mesh under ``jax.set_mesh(mesh)``, without further
    arguments. A drafter may have other rules than its target: replicate a small one with ``rules={}``. On a mesh of
    several processes, every process must call ``shard`` with the same arrays; each keeps its own parts.

    Args:
      model: a ``LanguageModel`` or a drafter. Arrays outside of parameters that declare axes are replicated.
      mesh: a mesh with axes ``data``, ``tensor`` and ``expert``, or some of them, or those that ``rules`` name; see
        ``make_mesh``.
      rules: logical axis -> mesh axis. Logical axes that are missing or None stay whole. Key and value heads that do
        not divide over their mesh axis stay whole, too.

    Raises:
      TypeError: ``model`` is neither a model nor a drafter, or ``mesh`` or ``rules`` is of another type.
      ValueError: a rule names an unknown axis; the mesh has an axis that no rule uses, or one of type Explicit; the
        model declares no axes and ``rules`` would split it; or an axis does not divide over the devices.
    """
    return jax.tree.map(_put, model, shardings(model, mesh, rules))


def _put(array: Any, place: NamedSharding) -> jax.Array:
    if place.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, place)
    # device_put would send an array of this process to the others, which not all backends can.
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)


def shardings(model: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Returns the model with a ``NamedSharding`` in place of each array. Arguments and errors are as in ``shard``."""
    if isinstance(model, type) or not dataclasses.is_dataclass(model):
        raise TypeError(f"model is {model!r}; give a LanguageModel or a drafter")
    _check_mesh(mesh)
    _check_rules(mesh, rules)
    return _walk(model, mesh, rules)


def _walk(node: Any, mesh: Mesh, rules: Rules) -> Any:
    """Returns shardings for a model or drafter.

    Dataclasses are searched for those that hold ``params`` and declare axes. All other arrays are replicated.
    """
    if not dataclasses.is_dataclass(node):
        return jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), node)
    assert not isinstance(node, type)
    names = [field.name for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)]
    parts = {name: _walk(getattr(node, name), mesh, rules) for name in names}
    axes = getattr(node, "axes", None)
    if axes is not None:
        place = functools.partial(_place, mesh, rules)
        params = getattr(node, "params")  # noqa: B009
        parts["params"] = jax.tree_util.tree_map_with_path(place, params, axes(), is_leaf=_holds_several)
    elif hasattr(node, "forward") and any(rules.values()):
        raise ValueError("the model declares no axes; give LanguageModel(axes=...), or rules={} to replicate it")
    return dataclasses.replace(node, **parts)


def _holds_several(parameter: Any) -> bool:
    """Returns whether a parameter is a tree of arrays that knows the axes of each, such as a quantised kernel."""
    return hasattr(parameter, "split_axes")


def _place(mesh: Mesh, rules: Rules, path: Any, array: Any, axes: tuple[Axis, ...]) -> Any:
    if _holds_several(array):
        return jax.tree.map(functools.partial(_place, mesh, rules, path), array, array.split_axes(axes))
    name, shape = jax.tree_util.keystr(path), array.shape
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} is {shape} and declares the axes {axes}; declare one for each dimension")
    # A dimension stays whole if no rule splits it. A rule that cannot be followed is an error, since a parameter that
    # silently stayed whole might not fit into memory.
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
    """Returns a tree with whole NumPy arrays in every process.

    If one process holds all arrays, ``jax.device_get`` does the same. If several processes hold parts, every process
    must call ``gathered`` at the same point. Example: the result of ``generate`` under a mesh of several hosts.
    """

    def whole(x: Any) -> Any:
        apart = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if apart else x

    return jax.device_get(jax.tree.map(whole, tree))


def by_rows(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns ``function`` split over rows: each part of the mesh axis ``data`` runs it for its own rows.

    Returns ``function`` itself if the mesh has no ``data`` axis of more than one device, or if the caller is already
    inside a ``shard_map`` or ``pmap`` over ``data``. The compiler splits the other axes as usual.

    Args:
      function: takes positional arguments and treats them row by row.
      in_specs: ``ROWS`` or ``WHOLE`` for each argument, or a tree of them that is a prefix of the arguments' tree.
      out_specs: the same for the results.

    Raises:
      ValueError: the mesh has an axis of type Explicit. Calling the result raises ValueError, too, if the rows do not
        divide over the axis.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), "data"
    _check_types(mesh.axis_names, mesh.axis_types)
    count = open_parts(axis)
    if count == 1:
        return function

    def split(*args: Any) -> Any:
        rows = {x.shape[0] for x in _leaves_with_spec(ROWS, in_specs, args)}
        if any(size % count for size in rows):
            raise ValueError(
                f"{max(rows)} rows do not divide over the {count} parts of the mesh axis {axis!r}; give a multiple of "
                f"{count}, or make that axis smaller"
            )
        # check_vma=False: the specs say which arrays vary over rows, so types of intermediate values need not.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False)
        return jax.jit(mapped)(*args)

    return split


def open_parts(axis: str) -> int:
    """Returns the size of a mesh axis over which the caller may still split.

    The size is 1 if there is no such axis, or if the caller is already inside a ``shard_map`` over it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if axis in mesh.manual_axes else mesh.shape.get(axis, 1)


def _leaves_with_spec(spec: PartitionSpec, specs: Any, tree: Any) -> list[Any]:
    """Returns the leaves of ``tree`` to which the prefix ``specs`` assigns ``spec``."""
    spread = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)
    pairs = zip(jax.tree.leaves(spread, is_leaf=_is_spec), jax.tree.leaves(tree), strict=True)
    return [leaf for given, leaf in pairs if given == spec]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
