"""What an instruction of a scheduled program costs: bytes of the device's main memory, kernels, estimated cycles.

The bytes are a model of the program, not a measurement: operands and results that live in main memory, padded by their
tiles. Of an array that is only sliced, the slice counts; of one that is updated in place, the update.
"""

import re
from collections.abc import Callable

from specjax.aot.hlo import Computation, Instruction, Shape

# Instructions that move nothing: they name, group or allocate, or end what an earlier one started.
_FREE = re.compile(
    "parameter|tuple|get-tuple-element|bitcast|constant|iota|after-all|optimization-barrier|partition-id|replica-id|"
    ".*-done|async-update|while|conditional|call"
)
_BOOKKEEPING = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "async-call-start", "async-call-done")
_VIEWS = ("bitcast", "reshape", "optimization-barrier")


def is_free(i: Instruction) -> bool:
    """Returns whether an instruction runs nothing on the device."""
    return bool(_FREE.fullmatch(i.opcode)) or (
        i.opcode == "custom-call" and any(f'"{name}' in i.attributes for name in _BOOKKEEPING)
    )


def is_kernel(i: Instruction, gpu: bool) -> bool:
    """Returns whether an instruction is a kernel that a GPU launches, or on a TPU a fusion or a kernel of its own."""
    if is_free(i):
        return False
    return gpu or i.opcode in ("fusion", "custom-call") or cycles(i) > 0


def cycles(i: Instruction) -> int:
    """Returns XLA:TPU's estimate of an instruction's cycles; 0 where it makes none, as for asynchronous copies."""
    return i.number("estimated_cycles") or 0


def moved(i: Instruction, share: Callable[[Shape], float] = lambda shape: 1.0) -> tuple[int, int]:
    """Returns the bytes of main memory that an instruction reads and writes.

    Args:
      i: an instruction that is no control flow.
      share: how much of an array a custom call reads, of which the program's text says nothing.
    """
    if is_free(i):
        return 0, 0
    # A computation that a fusion or an asynchronous start wraps says which part of each operand is read.
    wrapped = i.called("calls") if i.opcode in ("fusion", "async-start") else []
    read = 0
    for number, operand in enumerate(i.inputs):
        whole = sum(shape.padded_bytes for shape in operand.shapes if shape.space == 0)
        if wrapped and not operand.is_tuple and whole:
            whole = min(whole, _read_inside(wrapped[0], number))
        elif i.opcode == "custom-call":
            whole = int(sum(shape.padded_bytes * share(shape) for shape in operand.shapes if shape.space == 0))
        elif number == 0 and i.opcode in ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"):
            whole = min(whole, _made(i).bytes)
        elif number == 0 and i.opcode in ("dynamic-update-slice", "scatter"):
            whole = 0
        read += whole
    return read, _written(i)


def _made(i: Instruction) -> Shape:
    """Returns the array that an instruction makes. The result of an asynchronous start names its operands as well."""
    if i.opcode == "copy-start" or not i.opcode.endswith("-start"):
        return i.shapes[0]  # of a copy-start: destination, source, flag
    sources = sum(len(operand.shapes) for operand in i.inputs)
    return i.shapes[min(sources, len(i.shapes) - 1)]


def _written(i: Instruction) -> int:
    results = [shape for shape in i.shapes if shape.space == 0]
    if i.opcode.endswith("-start"):
        return _made(i).padded_bytes if _made(i).space == 0 else 0
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return sum(s.bytes for s in i.inputs[1 if i.opcode == "dynamic-update-slice" else -1].shapes) if results else 0
    whole = sum(shape.padded_bytes for shape in results)
    if i.opcode == "custom-call" and "output_to_operand_aliasing" in i.attributes:
        return 0  # updated in place, by a part that the text does not say
    if i.opcode != "fusion":
        return whole
    root = i.called("calls")[0].root
    parts = root.inputs if root.opcode == "tuple" else (root,)
    return min(whole, sum(_written_inside(part) for part in parts))


def _written_inside(part: Instruction) -> int:
    """Returns the bytes of one result of a fusion; of one that updates an operand in place, the update's."""
    update = in_place(part)
    if update is not None:
        return sum(shape.bytes for shape in update.shapes)
    return sum(shape.padded_bytes for shape in part.shapes)


def in_place(root: Instruction) -> Instruction | None:
    """Returns what a fusion's result writes into an operand; None if the result is a new array."""
    while root.opcode in _VIEWS:
        root = root.inputs[0]
    if root.opcode == "fusion":
        return in_place(root.called("calls")[0].root)
    if root.opcode == "dynamic-update-slice":
        return root.inputs[1]
    return root.inputs[-1] if root.opcode == "scatter" else None


def _read_inside(computation: Computation, number: int) -> int:
    """Returns the bytes that a fusion reads of an argument, through views and slices of it."""
    parameter = computation.parameters.get(number)
    if parameter is None:
        return 0
    whole, total = sum(shape.padded_bytes for shape in parameter.shapes), 0
    names, waiting = {parameter.name}, [parameter]
    while waiting:
        source = waiting.pop()
        if source is computation.root:
            return whole
        for user in computation.users[source.name]:
            places = [place for place, name in enumerate(user.operands) if name in names]
            if user.opcode in _VIEWS or (user.opcode == "fusion" and _passes(user, places[0])):
                if user.name not in names:
                    names.add(user.name)
                    waiting.append(user)
            elif user.opcode == "fusion":
                total += sum(_read_inside(user.called("calls")[0], place) for place in places)
            elif places == [0] and user.opcode in ("slice", "dynamic-slice", "gather"):
                total += user.shapes[0].bytes
            elif places != [0] or user.opcode not in ("dynamic-update-slice", "scatter"):
                return whole
    return min(total, whole)


def _passes(fusion: Instruction, number: int) -> bool:
    """Returns whether a fusion only views one of its arguments."""
    root = fusion.called("calls")[0].root
    while root.opcode in _VIEWS:
        root = root.inputs[0]
    return root.opcode == "parameter" and int(root.literal) == number
