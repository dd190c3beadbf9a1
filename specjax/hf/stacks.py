"""Stacks of experts, read as the tensors of each expert.

Some published folders of a family hold each expert's projections as tensors of their own, others hold one tensor for
all experts, as transformers 5 computes them. Tables name the former.

Example: ``mlp.experts.gate_up_proj`` of shape [e, 2f, d] holds, for each expert, the f rows of
``mlp.experts.0.gate_proj.weight``, then the f rows of ``mlp.experts.0.up_proj.weight``, and so on for the next one.
The scales of float8 stacks, ``mlp.experts.gate_up_proj_scale_inv``, are split in the same way.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from specjax.hf.safetensors import Tensor

# The projections that a stack holds, by their names in the tables of the families.
_HELD = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_SCALES = ("_scale_inv", "_scale")


def split_stacks(
    found: Mapping[str, Tensor],
    wanted: Collection[str],
    table_names: Callable[[Iterable[str]], Mapping[str, str]],
    block: int | None = None,
) -> dict[str, Tensor]:
    """Returns a folder's tensors, with the tensors of each expert in place of stacks.

    No data are read: a part of a stack is a tensor at a later byte of the same file. A stack is left as it is if the
    model does not need the tensors of its experts, or the folder holds one of them as well.

    Args:
      found: the folder's tensors, by their own names.
      wanted: the tensors that the model needs, by their names in the family's table.
      table_names: returns the name that each tensor has in the table.
      block: rows of a stack that share a scale, if scales are of blocks.

    Raises:
      ValueError: rows of two projections share a scale.
    """
    known, split = table_names(found), {}
    for name, tensor in found.items():
        block_name, _, last = name.rpartition(".")
        end = next((end for end in _SCALES if last.endswith(end)), "")
        first = known[name].removesuffix(last) + "0."
        held = (parts for parts in _HELD.get(last.removesuffix(end), ()) if f"{first}{parts[0]}.weight" in wanted)
        parts = next(held, ())
        experts = _split(block_name, tensor, parts, end) if parts else {}
        split |= experts if experts and not experts.keys() & found.keys() else {name: tensor}
        if experts and len(parts) > 1 and not end:
            scales = [found[name + scale].shape for scale in _SCALES if name + scale in found]
            _check_blocks(name, tensor.shape[1] // len(parts), scales, block)
    return split


def _check_blocks(name: str, rows: int, scales: list[tuple[int, ...]], block: int | None) -> None:
    """Raises ValueError if rows of two projections share a scale, or may do so."""
    shared = any(len(shape) == 3 and shape[1] < 2 * rows for shape in scales)
    if shared and (block is None or rows % block):
        share = "an unknown number of" if block is None else block
        raise ValueError(
            f"tensor {name!r} holds projections of {rows} rows, and {share} rows share a scale, which may be rows of "
            "two projections; open a folder that has a tensor for each expert, or one of plain floats"
        )


def _split(block: str, tensor: Tensor, parts: tuple[str, ...], end: str) -> dict[str, Tensor]:
    """Returns the tensors of all experts by their names, or no tensor if the shape is none of a stack."""
    if len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
        return {}
    rows, width = tensor.shape[1] // len(parts), tensor.shape[2]
    names = [f"{block}.{e}.{part}.weight{end}" for e in range(tensor.shape[0]) for part in parts]
    size = rows * width * tensor.dtype.itemsize
    return {
        name: dataclasses.replace(tensor, name=name, shape=(rows, width), offset=tensor.offset + i * size)
        for i, name in enumerate(names)
    }
