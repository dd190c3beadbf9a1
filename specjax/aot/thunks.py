"""Reads the sequence of thunks that XLA:GPU's runtime executes: how often the host waits for the device.

Outside of a command buffer (a CUDA graph), a conditional and a loop of unknown length copy a value to the host and wait
for it. Inside of one, the device decides. A loop of known length waits for nothing.
"""

import dataclasses
import re
from collections.abc import Iterator

from specjax.aot.rounds import Rounds, TakenPath
from specjax.aot.values import Frame

_THUNK = re.compile(r"( *)\d+: (k\w+)")
_HEADING = re.compile(r"( *)(branch_\d+|true_branch|false_branch|condition|body):\s*$")
_FLOW = {"kConditional": "conditional", "kWhile": "while"}


@dataclasses.dataclass
class Thunk:
    """One thunk.

    Attributes:
      kind: such as "kWhile".
      depth: spaces before it.
      parts: thunks inside of it: by branch, "condition" and "body", or "" for those of a command buffer.
    """

    kind: str
    depth: int
    parts: dict[str, list["Thunk"]] = dataclasses.field(default_factory=dict)


def parse(text: str) -> list[Thunk]:
    """Returns the thunks of the file ``*.thunk_sequence_after_thunk_passes.txt`` that XLA dumps."""
    top = Thunk("", -1, {"": []})
    stack, labels = [top], {id(top): ""}
    for line in text.splitlines():
        if found := _THUNK.match(line):
            depth = len(found[1])
            while stack[-1].depth >= depth:
                stack.pop()
            thunk, parent = Thunk(found[2], depth), stack[-1]
            parent.parts.setdefault(labels[id(parent)], []).append(thunk)
            stack.append(thunk)
            labels[id(thunk)] = ""
        elif found := _HEADING.search(line):
            # XLA does not indent the heading "condition", which follows its loop at once.
            while found[2] != "condition" and stack[-1].depth >= len(found[1]):
                stack.pop()
            labels[id(stack[-1])] = found[2]
            stack[-1].parts[found[2]] = []  # a branch may have no thunks
    return top.parts[""]


def host_waits(text: str, entry: Frame, rounds: Rounds, path: TakenPath) -> float:
    """Returns how often the host waits for the device in a round, on the path that is taken.

    Args:
      text: the sequence of thunks.
      entry: the entry of the same program's optimised HLO. The thunks of a computation come in the order of its
        instructions, so the n-th conditional among the thunks is the n-th of the computation.
      rounds: the loop over rounds.
      path: decides branches.

    Raises:
      ValueError: thunks and HLO do not correspond.
    """
    for instruction, thunk, guarded in _pairs(parse(text), entry):
        if instruction is rounds.loop:
            if guarded:
                return 0
            body = entry.inside(rounds.loop, rounds.loop.called("body")[0])
            return (1 + _waits(thunk.parts.get("body", []), body, path)) / rounds.block
    raise ValueError("the sequence of thunks has no loop over rounds; give the one of the same program")


def _waits(thunks: list[Thunk], frame: Frame, path: TakenPath) -> float:
    total = 0.0
    for instruction, thunk, guarded in _pairs(thunks, frame):
        if guarded:
            continue
        if thunk.kind == "kConditional":
            taken = path.taken(frame, instruction)
            # By order: XLA names the branch of a true condition, which comes first, "false_branch".
            order = frame.operand_of(instruction, taken)
            inner = frame.inside(instruction, instruction.branches[taken], order)
            total += 1 + _waits(list(thunk.parts.values())[order], inner, path)
        else:
            steps = frame.steps(instruction)
            inner = frame.inside(instruction, instruction.called("body")[0])
            each = _waits(thunk.parts.get("body", []), inner, path)
            total += 1 + each if steps is None else steps * each
    return total


def _pairs(thunks: list[Thunk], frame: Frame) -> Iterator[tuple]:
    """Yields (instruction, thunk, whether in a command buffer) for the control flow of a computation."""
    flow = list(_control_flow(thunks, False))
    instructions = [i for i in frame.computation if i.opcode in _FLOW.values()]
    kinds = [_FLOW[thunk.kind] for thunk, _ in flow]
    if kinds != [i.opcode for i in instructions]:
        raise ValueError(
            f"the thunks of {frame.computation.name} are {kinds} and its instructions "
            f"{[i.opcode for i in instructions]}; give both of the same program"
        )
    for instruction, (thunk, guarded) in zip(instructions, flow, strict=True):
        yield instruction, thunk, guarded


def _control_flow(thunks: list[Thunk], guarded: bool) -> Iterator[tuple[Thunk, bool]]:
    for thunk in thunks:
        if thunk.kind in _FLOW:
            yield thunk, guarded
        else:
            for part in thunk.parts.values():
                yield from _control_flow(part, guarded or thunk.kind == "kCommandBuffer")
