"""From the stored tensors of a folder to the tensors that a plain folder would hold."""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import numpy as np

from specjax.hf.computed import Computed, Readable
from specjax.hf.formats.parts import Parts
from specjax.hf.safetensors import Tensor


class Format(Protocol):
    """How quantised weights are stored."""

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them; None otherwise."""
        ...

    def weight(self, parts: Parts) -> Computed:
        """Returns the weight that some tensors stand for, and takes these tensors from ``parts``.

        Raises:
          ValueError: a tensor is missing, or has another dtype or shape than it must have.
        """
        ...

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None if there is no reason."""
        ...


def decode(tensors: Mapping[str, Tensor], form: Format) -> dict[str, Readable]:
    """Returns the tensors that a plain folder would hold, and the tensors that belong to no quantised weight.

    Args:
      tensors: a folder's tensors, by their names.
      form: how the quantised weights among them are stored.

    Raises:
      ValueError: the tensors of a weight do not fit together, or a weight is there twice.
    """
    decoded: dict[str, Readable] = {}
    taken: set[str] = set()
    for tensor in tensors.values():
        base = form.base(tensor)
        if base is None:
            continue
        parts = Parts(tensors, base)
        weight = form.weight(parts)
        taken |= parts.taken
        decoded[weight.name] = weight
    rest = {name: tensor for name, tensor in tensors.items() if name not in taken}
    if twice := sorted(decoded.keys() & rest.keys()):
        raise ValueError(f"tensor {twice[0]!r} is there as it is and quantised, too; remove one of the two")
    return decoded | rest


# Ends of names of tensors that describe what is quantised as a model runs. Here, states stay in floating point.
_OF_STATES = (
    *(
        f".{what}_{part}"
        for what in ("input", "output")
        for part in ("scale", "zero_point", "global_scale", "scale_ub")
    ),
    *(".activation_scale", ".input_scale_inv"),
)
_OF_CACHES = tuple(f".{what}_{part}" for what in ("q", "k", "v", "kv", "prob") for part in ("scale", "zero_point"))


def why_left_out(name: str) -> str | None:
    """Returns why a tensor next to quantised weights is not needed, in any format, or None."""
    if name.endswith(_OF_STATES):
        return "a scale of states, which are not quantised here"
    if name.endswith(_OF_CACHES):
        return "a scale of the cache or of attention, which are not quantised here"
    return None


def is_plain(tensors: Mapping[str, Tensor], wanted: Iterable[str], floats: Collection[np.dtype]) -> bool:
    """Returns whether no tensor that a model needs is quantised: all that are there are plain floats without scales.

    Args:
      tensors: a folder's tensors, by their names in the family's table.
      wanted: names of the tensors that the model needs.
      floats: the dtypes of plain floats.
    """
    there = [name for name in wanted if name in tensors]
    if any(tensors[name].dtype not in floats or any(name + end in tensors for end in _SCALES) for name in there):
        return False
    # A tensor that is not there may be packed under other names.
    return set(there).issuperset(wanted) or all(tensor.dtype in floats for tensor in tensors.values())


_SCALES = ("_scale", "_scale_inv", "_packed")
