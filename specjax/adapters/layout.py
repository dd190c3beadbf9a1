"""Which axes of a foreign cache are rows and slots, and which leaves are its write index."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

InitForeign = Callable[[int, int], Any]
"""``cache(rows, slots)`` returns the model's own empty cache."""

_FEW, _MORE, _MANY = 256, 512, 32768
"""Slots that are asked for. Some models round up to a multiple of 128. A ring of less than the last shows."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a foreign cache.

    Attributes:
      name: where it is in the cache, such as "['layer_0']['k']".
      shape: its shape with one row and one slot.
      dtype: its dtype.
      rows: the axis of the rows, or None.
      slots: the axis of the slots, or None.
      index: whether it is a write index, which the library sets.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    rows: int | None
    slots: int | None
    index: bool

    def sized(self, rows: int, slots: int) -> tuple[int, ...]:
        """Returns the shape for so many rows and slots."""
        sizes = {self.rows: rows, self.slots: slots}
        return tuple(sizes.get(axis, size) for axis, size in enumerate(self.shape))

    @property
    def row_axis(self) -> int:
        """The axis of the rows of an array that has one."""
        assert self.rows is not None
        return self.rows

    @property
    def slots_kept(self) -> int:
        """The axis of the slots once the rows are the first axis."""
        assert self.rows is not None and self.slots is not None
        return self.slots + (self.slots < self.rows)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The structure of a foreign cache.

    The cache that specjax keeps is a tuple of the leaves that are no write index, rows first. So slots are zero at
    first, whatever the model's own empty cache holds there: what is past a row's end is never seen.

    Attributes:
      tree: the structure of the foreign cache.
      leaves: its arrays.
    """

    tree: Any
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, cache: InitForeign, index: Sequence[str] | None, max_positions: int | None) -> "Layout":
        """Finds the axes by asking for caches of different sizes; computes nothing.

        Raises:
          ValueError: an array has no axis of its own for rows or for slots, or ``index`` names no array.
        """
        more = min(_MORE, max_positions or _MORE)
        size = min(_FEW, max(more // 2, 1))
        few, rows, slots = (_shapes(cache, *sizes) for sizes in ((3, size), (5, size), (3, more)))
        if len({jax.tree.structure(x) for x in (few, rows, slots)}) > 1:
            raise ValueError("cache(rows, slots) has another structure for other sizes; return one structure")
        named = jax.tree_util.tree_leaves_with_path(few)
        others = zip(jax.tree.leaves(rows), jax.tree.leaves(slots), strict=True)
        leaves = tuple(_leaf(path, x, *y, size, index) for (path, x), y in zip(named, others, strict=True))
        layout = cls(jax.tree.structure(few), leaves)
        layout._check(index)
        layout._check_long(cache, min(_MANY, max_positions or _MANY))
        return layout

    def _check(self, index: Sequence[str] | None) -> None:
        names = ", ".join(leaf.name for leaf in self.leaves)
        if lacking := [x for x in index or () if not any(leaf.name.endswith(_ends(x)) for leaf in self.leaves)]:
            raise ValueError(f"index names {lacking[0]!r}, and the cache has {names}; give the name of a write index")
        for leaf in self.leaves:
            if leaf.index:
                continue
            where = f"the cache has {leaf.shape} and {leaf.dtype} at {leaf.name}"
            if leaf.slots is None:
                raise ValueError(
                    f"{where}, which does not grow with the slots. If it is a ring (shorter than the row), give it "
                    "all the slots, since rejected drafts overwrite what a ring still needs. If it is a write index, "
                    "name it: index=. If it is a recurrent state, write the LanguageModel by hand, with commit"
                )
            if leaf.rows is None:
                raise ValueError(f"{where}, which all rows share; give each row its own")

    def _check_long(self, cache: InitForeign, many: int) -> None:
        for leaf, long in zip(self.leaves, jax.tree.leaves(_shapes(cache, 3, many)), strict=True):
            if not leaf.index and long.shape != leaf.sized(3, many):
                raise ValueError(
                    f"the cache has {long.shape} at {leaf.name} for {many} slots: a ring (shorter than the row), in "
                    "which rejected drafts overwrite what is still needed; give this array all the slots"
                )

    def init(self, rows: int, slots: int) -> tuple[Array, ...]:
        """Returns an empty cache as specjax keeps it."""
        return self.kept(jax.tree.unflatten(self.tree, [jnp.zeros(x.sized(rows, slots), x.dtype) for x in self.leaves]))

    def kept(self, cache: Any) -> tuple[Array, ...]:
        """Returns the arrays that specjax keeps of a foreign cache, rows first."""
        return tuple(
            jnp.moveaxis(x, leaf.row_axis, 0)
            for leaf, x in zip(self.leaves, jax.tree.leaves(cache), strict=True)
            if not leaf.index
        )

    def foreign(self, kept: tuple[Array, ...], index_b: Array) -> Any:
        """Returns the foreign cache, with its write indices set.

        Args:
          kept: the arrays as ``kept`` returns them.
          index_b: int32, for each row. An index that has no rows gets the first row's.
        """
        arrays = iter(kept)
        leaves = [
            _index(leaf, index_b) if leaf.index else jnp.moveaxis(next(arrays), 0, leaf.row_axis)
            for leaf in self.leaves
        ]
        return jax.tree.unflatten(self.tree, leaves)

    @property
    def kept_leaves(self) -> tuple[Leaf, ...]:
        """The leaves that are no write index."""
        return tuple(leaf for leaf in self.leaves if not leaf.index)


def _shapes(cache: InitForeign, rows: int, slots: int) -> Any:
    try:
        return jax.eval_shape(lambda: cache(rows, slots))
    except Exception as error:
        raise ValueError(
            f"cache({rows}, {slots}) raised {type(error).__name__}: {error}. Give a function that returns an empty "
            "cache of so many rows and slots, and max_positions if the model has a limit"
        ) from error


def _ends(name: str) -> tuple[str, ...]:
    """Returns how a path ends at a key or field of this name."""
    return f"[{name!r}]", f".{name}"


def _leaf(path: Any, few: Any, rows: Any, slots: Any, size: int, index: Sequence[str] | None) -> Leaf:
    name = jax.tree_util.keystr(path)
    by_rows, by_slots = _grows(name, few, rows, 3, "rows"), _grows(name, few, slots, size, "slots")
    integer = jnp.issubdtype(few.dtype, jnp.integer)
    is_index = any(name.endswith(_ends(x)) for x in index) if index is not None else integer and by_slots is None
    if is_index and not integer:
        raise ValueError(f"index names {name}, which is {few.dtype}; a write index is an integer")
    shape = tuple(1 if axis in (by_rows, by_slots) else size for axis, size in enumerate(few.shape))
    return Leaf(name, shape, few.dtype, by_rows, by_slots, is_index)


def _grows(name: str, few: Any, more: Any, size: int, what: str) -> int | None:
    """Returns the axis that has other sizes in two caches."""
    axes = [axis for axis, pair in enumerate(zip(few.shape, more.shape, strict=True)) if pair[0] != pair[1]]
    if len(axes) > 1 or any(few.shape[axis] != size for axis in axes):
        raise ValueError(
            f"the cache has {few.shape} at {name}, and {more.shape} for more {what}; give the {what} an axis of their "
            "own"
        )
    return axes[0] if axes else None


def _index(leaf: Leaf, index_b: Array) -> Array:
    index_b = index_b.astype(leaf.dtype)
    if leaf.rows is None:
        return jnp.broadcast_to(index_b[0], leaf.shape)
    shape = tuple(index_b.shape[0] if axis == leaf.rows else 1 for axis in range(len(leaf.shape)))
    return jnp.broadcast_to(index_b.reshape(shape), leaf.sized(index_b.shape[0], 1))
