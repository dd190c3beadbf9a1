"""Reads optimised HLO, the text of a compiled program (``jax.stages.Compiled.as_text``).

XLA does not promise the form of this text. The reader knows what XLA of jaxlib 0.10 to 0.12 writes for TPUs and GPUs:
one instruction a line, operands by name, and each called computation by its name in an attribute.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.-]+) = (.*)$")
_NAME = re.compile(r"%([\w.-]+)")
# Attributes that name computations, in the order in which `Instruction.called` returns these.
_CALLS = ("calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name, such as "bf16".
      dims: sizes.
      minor_to_major: the order of the dimensions in memory, the fastest first; empty if the text does not say.
      tile: sizes of a tile over the slowest ... fastest dimensions; empty without tiles.
      space: the memory: 0 is the device's main memory (HBM), 1 a TPU's vector memory (VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return math.ceil(self.elements * _bits(self.dtype) / 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory. Example: bf16 ``[5, 64]`` in tiles of 8 x 128 takes 2 * 8 * 128 bytes."""
        if not self.tile or len(self.minor_to_major) < len(self.tile):
            return self.bytes
        physical = [self.dims[axis] for axis in reversed(self.minor_to_major)]
        for i, size in enumerate(reversed(self.tile), 1):
            physical[-i] = -(-physical[-i] // size) * size
        return math.ceil(math.prod(physical) * _bits(self.dtype) / 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    size = re.match(r"[a-z]+(\d+)", dtype)
    return int(size[1]) if size else 0


@functools.lru_cache(maxsize=2**16)
def shapes_in(text: str) -> tuple[Shape, ...]:
    """Returns the arrays that a type's text names, in order; a tuple's text names several."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        order, _, rest = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Shape(dtype, _ints(dims), _ints(order), _ints(tile[1]) if tile else (), int(space[1]) if space else 0)
        )
    return tuple(found)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x.strip().isdigit())


@dataclasses.dataclass(eq=False)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      type: the text of the result's type.
      opcode: such as "fusion".
      operands: names of instructions of the same computation.
      literal: the text between the parentheses: a constant's value, a parameter's number.
      attributes: the text after the operands.
      computation: where the instruction stands.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    computation: "Computation" = dataclasses.field(repr=False)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result: one, or those of a tuple."""
        return shapes_in(self.type)

    @property
    def is_tuple(self) -> bool:
        return self.type.startswith("(")

    @property
    def inputs(self) -> "tuple[Instruction, ...]":
        """The operands."""
        return tuple(self.computation.instructions[name] for name in self.operands)

    def called(self, *attributes: str) -> list["Computation"]:
        """Returns the computations that the attributes name; without arguments, all that the instruction calls."""
        found = []
        for attribute in attributes or _CALLS:
            named = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.attributes)
            names = re.findall(r"[\w.-]+", named[1]) if named else []
            found += [self.computation.module.computations[name] for name in names]
        return found

    @property
    def branches(self) -> list["Computation"]:
        """The branches of a conditional, in the order of its index; 0 and 1 stand for false and true."""
        return self.called("branch_computations") or self.called("false_computation", "true_computation")

    def number(self, key: str) -> int | None:
        """Returns an integer attribute such as ``index=3`` or ``"estimated_cycles":"12"``; None without it."""
        found = re.search(rf'\b{key}"?[=:]"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """JAX's name for where the instruction comes from; of an entry's parameter, the argument's name."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(eq=False)
class Computation:
    """A named list of instructions, in the order in which a scheduled program runs them."""

    name: str
    module: "Module" = dataclasses.field(repr=False)
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict, repr=False)
    root: Instruction = dataclasses.field(init=False, repr=False)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by their number."""
        return {int(i.literal): i for i in self if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(eq=False)
class Module:
    """A program: its computations by name, and the one that it starts with."""

    computations: dict[str, Computation] = dataclasses.field(default_factory=dict)
    entry: Computation = dataclasses.field(init=False)


def parse(text: str) -> Module:
    """Returns the program of a text.

    Raises:
      ValueError: the text has no entry computation, so it is no HLO that this reader knows.
    """
    module, current = Module(), None
    for line in text.splitlines():
        if not line.startswith(" "):
            heading = _COMPUTATION.match(line)
            current = Computation(heading[2], module) if heading else None
            if heading and current:
                module.computations[current.name] = current
                if heading[1]:
                    module.entry = current
        elif current is not None and (found := _INSTRUCTION.match(line.strip())):
            instruction = _instruction(found[2], found[3], current)
            if instruction:
                current.instructions[instruction.name] = instruction
                if found[1]:
                    current.root = instruction
    if not hasattr(module, "entry"):
        raise ValueError("the text has no line that starts with ENTRY; give the optimised HLO of a compiled program")
    return module


def _instruction(name: str, rest: str, computation: Computation) -> Instruction | None:
    """Splits ``TYPE opcode(OPERANDS), ATTRIBUTES``; a type may be a tuple with spaces."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 1:
        return None
    stop = _closing(rest, start)
    opcode, literal, attributes = rest[:start], rest[start + 1 : stop], rest[stop + 1 :]
    operands = () if opcode in ("parameter", "constant") else tuple(_NAME.findall(literal))
    return Instruction(name, type_, opcode, operands, literal.strip(), attributes, computation)


def _closing(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
