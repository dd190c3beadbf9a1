"""Finds the loop over rounds in a program, and what a round runs: all of it, or the branches that are taken."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from specjax.aot.hlo import Computation, Instruction, Module, Shape
from specjax.aot.values import Frame
from specjax.filters import SELDOM


@dataclasses.dataclass(frozen=True)
class Caches:
    """The cache arrays of target and drafter, as one device holds them.

    Attributes:
      arrays: XLA's dtype and the sizes of each array, as (dtype, dims).
    """

    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    def holds(self, shape: Shape) -> bool:
        """Returns whether an array is a whole cache, whatever the order of its dimensions."""
        return (shape.dtype, tuple(sorted(shape.dims))) in self._sorted

    def carried(self, loop: Instruction) -> list[Shape]:
        """Returns the caches among what a loop carries."""
        return [shape for shape in loop.shapes if (shape.dtype, shape.dims) in self.arrays]

    @property
    def _sorted(self) -> set[tuple[str, tuple[int, ...]]]:
        return {(dtype, tuple(sorted(dims))) for dtype, dims in self.arrays}


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The loop over rounds.

    Attributes:
      loop: the ``while`` of the entry that runs until all rows are done.
      frame: the body of one round. Its values are those of the first round.
      block: rounds that the device runs before the loop's condition is looked at: 1, or the length of an inner loop.
    """

    loop: Instruction
    frame: Frame
    block: int

    @property
    def body(self) -> Computation:
        return self.frame.computation


def find_rounds(module: Module, entry: Frame, caches: Caches) -> Rounds:
    """Returns the loop over rounds: the loop of the entry that carries the most caches, and the most arrays at all.

    If the loop's body is in essence another loop of known length that carries as many caches, rounds run in blocks, and
    that inner loop's body is the round.

    Raises:
      ValueError: the entry has no loop.
    """
    loops = [i for i in module.entry if i.opcode == "while"]
    if not loops:
        raise ValueError("the program has no loop over rounds; give a program of generate")

    def weight(loop: Instruction) -> tuple[int, int]:
        return len(caches.carried(loop)), len(loop.shapes)

    loop = max(loops, key=weight)
    frame = entry.inside(loop, loop.called("body")[0])
    inner = [i for i in frame.computation if i.opcode == "while" and weight(i)[0] == weight(loop)[0] > 0]
    length = frame.steps(inner[0]) if len(inner) == 1 else None
    if length is None:
        return Rounds(loop, frame, 1)
    return Rounds(loop, frame.inside(inner[0], inner[0].called("body")[0]), length)


def everything(computation: Computation, seen: set[str] | None = None) -> Iterator[Instruction]:
    """Yields every instruction that a computation may run: those of all branches, loops and fusions, each once."""
    seen = set() if seen is None else seen
    seen.add(computation.name)
    for instruction in computation:
        yield instruction
        for called in instruction.called():
            if called.name not in seen:
                yield from everything(called, seen)


def scheduled(computation: Computation) -> Iterator[Instruction]:
    """Yields the instructions of a computation and of its branches and loops, without entering fusions."""
    for instruction in computation:
        yield instruction
        if instruction.opcode in ("while", "conditional", "call"):
            for called in instruction.called():
                yield from scheduled(called)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that a round runs.

    Attributes:
      instruction: not control flow itself.
      times: how often, in one round.
    """

    instruction: Instruction
    times: int


class TakenPath:
    """The path of a round through its branches, when all rows ask for the same.

    A conditional takes the branch that the request's values give (``specjax.aot.values``). If they do not say, it takes
    the shorter branch in the scope ``filters.SELDOM``; and if there is a branch for each attention window, the smallest
    window that holds the tokens in use. Elsewhere it takes the branch of most cost, and its name is listed in
    ``undecided``.

    Args:
      windows: the attention windows, ascending.
      used: tokens in use, of each row.
      cost: compares branches that nothing decides.
    """

    def __init__(self, windows: Sequence[int], used: int, cost: Callable[[Instruction], float]):
        self.windows, self.used, self.cost = windows, used, cost
        self.undecided: list[str] = []
        self.unknown_loops: list[str] = []

    def runs(self, frame: Frame, times: int = 1) -> Iterator[Run]:
        """Yields what a computation runs, in order, without entering fusions."""
        for i in frame.computation:
            if i.opcode == "conditional":
                taken = self.taken(frame, i)
                yield from self.runs(frame.inside(i, i.branches[taken], frame.operand_of(i, taken)), times)
            elif i.opcode == "while":
                steps = frame.steps(i)
                if steps is None:
                    self.unknown_loops.append(i.name)
                yield from self.runs(frame.inside(i, i.called("body")[0]), times * (1 if steps is None else steps))
            elif i.opcode == "call":
                yield from self.runs(frame.inside(i, i.called("to_apply")[0]), times)
            else:
                yield Run(i, times)

    def taken(self, frame: Frame, conditional: Instruction) -> int:
        """Returns the index of the branch that is taken."""
        known = frame.branch(conditional)
        if known is not None:
            return known
        branches = conditional.branches
        # XLA may merge the conditional's own name with others; those of what it runs stay.
        if any(f"/{SELDOM}/cond/" in i.op_name for branch in branches for i in branch):
            sizes = [len(list(scheduled(branch))) for branch in branches]
            return sizes.index(min(sizes))
        if len(branches) == len(self.windows):
            return next(i for i, window in enumerate(self.windows) if window >= self.used)
        self.undecided.append(conditional.name)
        costs = [sum(map(self.cost, scheduled(branch))) for branch in branches]
        return max(range(len(costs)), key=costs.__getitem__)
