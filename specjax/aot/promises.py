"""What a compiled ``generate`` promises of its structure, and whether a program keeps it.

A promise is about the program alone: nothing here depends on a device's speed. All branches of a round count, also
those that a request does not take.
"""

import dataclasses
import re
from collections.abc import Iterable

from specjax.aot.cost import in_place
from specjax.aot.hlo import Instruction, Module
from specjax.aot.rounds import Caches, Rounds, everything, scheduled
from specjax.aot.values import Frame

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(-start)?"
)
_HOST = re.compile(r"callback|host", re.IGNORECASE)
# A GPU's TopK is one kernel that selects a few entries.
_SORT = re.compile(r'custom_call_target="(?!__gpu\$TopK")[^"]*(sort|topk)', re.IGNORECASE)
_SHORT = 1024  # entries of a row; so many are sorted in no time
# What may have a whole cache as its result without being a write: it passes the cache on.
_PASSES = re.compile(
    "parameter|tuple|get-tuple-element|bitcast|optimization-barrier|while|conditional|call|dynamic-update-slice|scatter|"
    ".*-(start|done|update)|copy|transpose"  # copies are counted by themselves
)
MOST_MOVES = 2


@dataclasses.dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
      name: what is promised.
      holds: whether the program keeps it.
      detail: what was found.
    """

    name: str
    holds: bool
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program is held to; None holds it to nothing.

    Attributes:
      moves: whole caches that a round moves between the memories of the device.
      waits: times that the host waits for the device in a round.
    """

    moves: int | None = MOST_MOVES
    waits: float | None = None


def check(
    module: Module,
    source: str,
    rounds: Rounds,
    caches: Caches,
    count: int,
    devices: int,
    waits: float,
    limits: Limits = Limits(),
) -> list[Promise]:
    """Returns all promises.

    Args:
      module: the optimised program.
      source: the text of the program before XLA optimised it.
      rounds: the loop over rounds.
      caches: the cache arrays of one device.
      count: how many cache arrays there are.
      devices: how many devices the program is for.
      waits: how often the host waits for the device in a round.
      limits: what the program is held to.
    """
    body = list(everything(rounds.body))
    carried = caches.carried(rounds.loop)
    padded = sum(shape.padded_bytes - shape.bytes for shape in carried)
    copies, rewrites = cache_copies(body, caches), cache_rewrites(rounds, caches)
    moves = cache_moves(body, caches)
    found = [
        _none("one loop over rounds", other_loops(module, rounds)),
        Promise("every cache is in the loop's carry", len(carried) >= count, f"{len(carried)} of {count}"),
        Promise("no cache is padded", padded == 0, f"{padded} bytes of padding"),
        _none("no cache is copied or transposed in a round", _names(copies)),
        _none("caches are written in place", _names(rewrites)),
        _none("loops in a round have a known length", unknown_loops(rounds.frame)),
        _none("a round does not talk to the host", _names(host_exchanges(body))),
        _none("no sort", _names(i for i in body if _is_sort(i))),
        # XLA:TPU rewrites float64, so the optimised program does not show it.
        _none("nothing is in float64", re.findall(r"stablehlo\.\w+[^\n]*xf64>|tensor<f64>", source)[:1]),
        _collectives(body, devices),
    ]
    if limits.moves is not None:
        name = f"at most {limits.moves} caches move between memories"
        found.append(Promise(name, len(moves) <= limits.moves, f"{len(moves)} move"))
    if limits.waits is not None:
        name = f"the host waits at most {limits.waits:g} times a round"
        found.append(Promise(name, waits <= limits.waits, f"{waits:g} times"))
    return found


def _none(name: str, found: Iterable[str]) -> Promise:
    found = list(found)
    return Promise(name, not found, ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""))


def _names(instructions: Iterable[Instruction]) -> list[str]:
    return [i.name for i in instructions]


def other_loops(module: Module, rounds: Rounds) -> list[str]:
    """Returns the loops of unknown length beside the one over rounds. A loop of known length may read the prompts."""
    entry = Frame(module.entry, {})
    return [i.name for i in module.entry if i.opcode == "while" and i is not rounds.loop and entry.steps(i) is None]


def cache_copies(body: Iterable[Instruction], caches: Caches) -> list[Instruction]:
    """Returns the copies and transposes of whole caches, also those inside of fusions."""

    def copies(i: Instruction) -> bool:
        if i.opcode == "copy-start":  # to another memory it is a move
            return caches.holds(i.shapes[0]) and i.shapes[0].space == i.shapes[1].space
        return i.opcode in ("copy", "transpose") and any(map(caches.holds, i.shapes))

    return list(filter(copies, body))


def cache_moves(body: Iterable[Instruction], caches: Caches) -> list[Instruction]:
    """Returns the moves of whole caches between memories of the device; a TPU keeps small arrays in its VMEM."""

    def moves(i: Instruction) -> bool:
        if i.opcode == "copy-start":
            return caches.holds(i.shapes[0]) and i.shapes[0].space != i.shapes[1].space
        # A large array moves in slices, which a ConcatBitcast then names as one.
        return i.opcode == "custom-call" and '"ConcatBitcast"' in i.attributes and caches.holds(i.shapes[0])

    return list(filter(moves, body))


def cache_rewrites(rounds: Rounds, caches: Caches) -> list[Instruction]:
    """Returns the instructions that make a whole cache anew instead of writing into the one that is there."""
    return [i for i in scheduled(rounds.body) if any(map(caches.holds, i.shapes)) and not _passes(i, caches)]


def _passes(i: Instruction, caches: Caches) -> bool:
    if _PASSES.fullmatch(i.opcode):
        return True
    if i.opcode == "custom-call":  # a kernel of our own says which operand it updates
        return bool(re.search(r"output_to_operand_aliasing|AllocateBuffer|ConcatBitcast", i.attributes))
    if i.opcode != "fusion":
        return False
    root = i.called("calls")[0].root
    parts = root.inputs if root.opcode == "tuple" else (root,)
    # A copy within a fusion is counted as a copy.
    return all(
        in_place(part) is not None or part.opcode in ("copy", "transpose", "parameter", "bitcast")
        for part in parts
        if any(map(caches.holds, part.shapes))
    )


def unknown_loops(frame: Frame) -> list[str]:
    """Returns the loops, in any branch, whose number of steps is not known when the round begins."""
    found = []
    for i in frame.computation:
        if i.opcode == "while":
            found += [i.name] if frame.steps(i) is None else []
            found += unknown_loops(frame.inside(i, i.called("body")[0]))
        elif i.opcode == "conditional":
            for number, branch in enumerate(i.branches):
                found += unknown_loops(frame.inside(i, branch, frame.operand_of(i, number)))
        elif i.opcode == "call":
            found += unknown_loops(frame.inside(i, i.called("to_apply")[0]))
    return found


def host_exchanges(body: Iterable[Instruction]) -> list[Instruction]:
    """Returns what waits for the host: infeeds, outfeeds, sends, receipts and callbacks."""
    found = []
    for i in body:
        target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
        if i.opcode in ("infeed", "outfeed", "send", "recv") or (target and _HOST.search(target[1])):
            found.append(i)
    return found


def collectives(body: Iterable[tuple[Instruction, int]]) -> dict[str, int]:
    """Returns the number of collectives by kind, of instructions with their times."""
    counts: dict[str, int] = {}
    for i, times in body:
        if found := _COLLECTIVE.fullmatch(i.opcode):
            counts[found[1]] = counts.get(found[1], 0) + times
    return counts


def _is_sort(i: Instruction) -> bool:
    """Returns whether an instruction sorts rows of more than ``_SHORT`` entries."""
    if i.opcode != "sort" and not _SORT.search(i.attributes):
        return False
    return any(max(shape.dims, default=1) > _SHORT for shape in (*i.shapes, *(x.shapes[0] for x in i.inputs)))


def _collectives(body: list[Instruction], devices: int) -> Promise:
    counts = collectives((i, 1) for i in body)
    if devices == 1:
        return Promise("one device communicates with none", not counts, str(counts or "none"))
    other = counts.keys() - {"all-reduce", "all-gather"}
    return Promise("devices only reduce and gather", not other, str(counts or "none"))
