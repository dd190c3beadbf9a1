"""Values of a program that are known before it runs: which branch is taken, and how long a loop is.

A request's parameters are arrays with one entry per row. For a report all rows ask for the same, so such an array is
one number wherever it goes: through copies, broadcasts, reductions, in and out of fusions and loops. ``Frame`` follows
these numbers and gives up (None) on everything else.
"""

import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from specjax.aot.hlo import Computation, Instruction, Module

Number = float | int | bool
Argument = Callable[[int | None], Number | None]
"""The value of a parameter, or of one element of a parameter that is a tuple."""

LONGEST = 4096  # steps of a loop that are tried
LARGEST = 4096  # entries of an array that is followed: what decides a branch is small, and activations are not

_SAME = re.compile(
    "broadcast|reshape|bitcast|copy|transpose|slice|dynamic-slice|copy-start|copy-done|optimization-barrier|reverse"
)
_COMPARE = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_OTHER = re.compile("reduce|select|convert|compare|not|negate|clamp|concatenate|pad")


class Frame:
    """A computation as it is called once, with its arguments.

    Args:
      computation: what is called.
      arguments: its arguments by number. A missing one is unknown.
    """

    def __init__(self, computation: Computation, arguments: Mapping[int, Argument]):
        self.computation, self.arguments = computation, arguments
        self._kept: dict[tuple[str, int | None], Number | None] = {}

    @classmethod
    def entry(cls, module: Module, known: Mapping[str, Number]) -> "Frame":
        """Returns the program's entry. ``known`` has the values of arguments by JAX's name for them."""
        named = {i: known.get(parameter.op_name) for i, parameter in module.entry.parameters.items()}
        return cls(module.entry, {i: lambda _, value=value: value for i, value in named.items()})

    def value(self, name: str, index: int | None = None) -> Number | None:
        """Returns the number that all entries of a result have, or of one element of a tuple; None if not known."""
        if (name, index) not in self._kept:
            self._kept[name, index] = None  # what depends on itself is unknown
            self._kept[name, index] = self._compute(self.computation.instructions[name], index)
        return self._kept[name, index]

    def inside(self, instruction: Instruction, called: Computation, branch: int | None = None) -> "Frame":
        """Returns the frame of a computation that an instruction calls: a fusion, a branch, or a loop's first step."""
        names = instruction.operands if branch is None else (instruction.operands[branch + 1],)
        return Frame(called, {i: functools.partial(self.value, name) for i, name in enumerate(names)})

    def branch(self, conditional: Instruction) -> int | None:
        """Returns the branch that a conditional takes; None if not known."""
        index = self.value(conditional.operands[0])
        if index is None:
            return None
        return min(max(int(index), 0), len(conditional.branches) - 1)

    def operand_of(self, conditional: Instruction, branch: int) -> int:
        """Returns which operand, after the index, a branch gets: ``true_computation`` gets the first."""
        return branch if conditional.called("branch_computations") else 1 - branch

    def steps(self, loop: Instruction) -> int | None:
        """Returns how many steps a loop takes; None if not known."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated:
            return int(stated[1])
        (body,), (condition,) = loop.called("body"), loop.called("condition")
        carry: Argument = functools.partial(self.value, loop.operands[0])
        for step in range(LONGEST):
            goes_on = Frame(condition, {0: carry}).value(condition.root.name)
            if goes_on is None:
                return None
            if not goes_on:
                return step
            # All elements that are known are computed at once: a chain of frames would recurse once a step.
            after, count = Frame(body, {0: carry}), len(loop.shapes)
            known = {i: after.value(body.root.name, i) for i in range(count)}
            carry = lambda index, known=known: None if index is None else known.get(index)
        return None

    def _compute(self, i: Instruction, index: int | None) -> Number | None:
        op, operands = i.opcode, i.operands
        if op == "parameter":
            argument = self.arguments.get(int(i.literal))
            return None if argument is None else argument(index)
        if op == "constant":
            return _literal(i.literal)
        if op == "tuple":
            return None if index is None else self.value(operands[index])
        if op == "get-tuple-element":
            return self.value(operands[0], i.number("index")) if index is None else None
        if _SAME.fullmatch(op):
            return self.value(operands[0], None if op == "copy-start" else index)
        if op in ("fusion", "call"):
            (called,) = i.called("calls", "to_apply")
            return self.inside(i, called).value(called.root.name, index)
        if op == "conditional":
            taken = self.branch(i)
            if taken is None:
                return None
            called = i.branches[taken]
            return self.inside(i, called, self.operand_of(i, taken)).value(called.root.name, index)
        if index is not None or max(shape.elements for shape in i.shapes) > LARGEST:
            return None
        if op == "reduce":
            return self._reduce(i)
        followed = op in _BINARY or _OTHER.fullmatch(op)
        return _elementwise(i, [self.value(name) for name in operands]) if followed else None

    def _reduce(self, i: Instruction) -> Number | None:
        if len(i.operands) != 2:
            return None
        value, start = self.value(i.operands[0]), self.value(i.operands[1])
        combine = i.called("to_apply")[0].root.opcode
        if value is None or start is None or combine not in _BINARY:
            return None
        if combine in ("and", "or", "maximum", "minimum"):
            return _BINARY[combine](value, start)
        count = i.inputs[0].shapes[0].elements // max(i.shapes[0].elements, 1)
        return start + count * value if combine == "add" else None


def _elementwise(i: Instruction, values: list[Any]) -> Number | None:
    """Returns what an instruction makes of the numbers of its operands, some of which may be unknown."""
    op, dtype = i.opcode, i.shapes[0].dtype
    # False and anything is False, though the rest be unknown.
    if dtype == "pred" and op in ("and", "or") and any(x is not None and bool(x) == (op == "or") for x in values):
        return op == "or"
    if op == "select" and values[0] is not None:
        return values[1] if values[0] else values[2]
    if op in ("select", "concatenate", "pad"):
        chosen = set(values[1:] if op == "select" else values)
        return chosen.pop() if len(chosen) == 1 else None
    known: list[Any] = [x for x in values if x is not None]
    if len(known) < len(values):
        return None
    if op in _BINARY:
        return _BINARY[op](*known)
    if op == "convert":
        return {"p": bool, "s": int, "u": int}.get(dtype[0], float)(known[0])
    if op == "compare":
        direction = re.search(r"direction=(\w+)", i.attributes)
        return _COMPARE[direction[1]](*known) if direction else None
    if op == "clamp":
        return min(max(known[0], known[1]), known[2])
    if op == "negate":
        return -known[0]
    return not known[0] if dtype == "pred" else None  # not


def _literal(text: str) -> Number | None:
    """Returns the number of a constant whose entries are all the same."""
    entries = set(re.findall(r"true|false|[-+]?(?:inf|[\d.]+(?:e[-+]?\d+)?)", text.replace(",", " ")))
    if len(entries) != 1 or "..." in text:
        return None
    (entry,) = entries
    if entry in ("true", "false"):
        return entry == "true"
    return float(entry) if re.search(r"[.einf]", entry) else int(entry)
