"""Compiles a program ahead of time and reports what it is."""

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from specjax.aot import promises as promises_lib
from specjax.aot.cost import cycles, is_kernel, moved
from specjax.aot.hlo import Instruction, Shape, parse
from specjax.aot.programs import Setting, caches, held_bytes, ideal_bytes, lowered
from specjax.aot.promises import Limits
from specjax.aot.rounds import Caches, TakenPath, find_rounds
from specjax.aot.thunks import host_waits
from specjax.aot.values import Frame
from specjax.transformer.attend import attention_windows


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      source: its text before XLA optimised it.
      hlo: its optimised text.
      thunks: the sequence of thunks that a GPU's runtime executes; None on a TPU.
      memory: bytes on one device: arguments, results, intermediate values and code.
      seconds: how long it took to compile.
    """

    source: str
    hlo: str
    thunks: str | None
    memory: int
    seconds: float


def compile_program(setting: Setting, program: jax.stages.Lowered | None = None) -> Program:
    """Compiles a program. ``specjax.aot.topology.prepare`` must have been called.

    Args:
      setting: what to compile.
      program: the lowered program, if there is one already.

    Raises:
      ValueError: the model does not fit the memory of the topology's devices.
    """
    check_memory(setting, int(held_bytes(setting)), "parameters and caches alone")
    program = lowered(setting) if program is None else program
    begun, gpu = time.perf_counter(), setting.topology.gpu
    with tempfile.TemporaryDirectory(prefix="specjax-aot-") as folder:
        # Autotuning would need a device: XLA chooses kernels by its cost model.
        options = {"xla_gpu_autotune_level": 0, "xla_dump_to": folder, "xla_dump_hlo_as_text": True} if gpu else None
        try:
            compiled = program.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise ValueError(_too_large(setting, _needed(str(error)))) from None
            raise
        seconds = time.perf_counter() - begun
        thunks = _read_thunks(folder) if gpu else None
    sizes: Any = compiled.memory_analysis()
    memory = (
        sum(getattr(sizes, f"{part}_size_in_bytes") for part in ("argument", "output", "temp", "generated_code"))
        - sizes.alias_size_in_bytes
    )
    check_memory(setting, memory, "the compiled program")
    return Program(program.as_text(), compiled.as_text() or "", thunks, memory, seconds)


def _read_thunks(folder: str) -> str:
    files = list(Path(folder).glob("*generate*thunk_sequence_after_thunk_passes.txt"))
    if len(files) != 1:
        raise ValueError(f"XLA wrote {len(files)} sequences of thunks; give a jax whose XLA dumps one for each program")
    return files[0].read_text(encoding="utf-8")


def check_memory(setting: Setting, needed: int, what: str) -> None:
    """Raises ValueError if a device of the topology has less memory than is needed."""
    if needed > setting.topology.figures.memory:
        raise ValueError(_too_large(setting, f"{what} needs {needed / 1e9:.1f} GB"))


def _too_large(setting: Setting, needed: str) -> str:
    topology = setting.topology
    has = f"a device of {topology.name} has {topology.figures.memory / 1e9:g} GB"
    cure = "--rows, --slots or --layers lower" + (", or --tensor higher" if topology.devices > setting.tensor else "")
    return f"the model does not fit: {needed} and {has}: set {cure}"


def _needed(error: str) -> str:
    """Returns how much XLA says that a program needs. Example: "Used 20.1G of 15.8G hbm"."""
    found = re.search(r"Used ([\d.]+\w) of", error)
    return f"the compiled program needs {found[1]}B" if found else "the compiled program needs more than there is"


def report(setting: Setting, program: Program, limits: Limits = Limits()) -> dict[str, Any]:
    """Returns what a program is, in values that JSON has.

    All counts are of one round, on the path through its branches that ``setting.sampling`` and ``setting.used`` take.
    ``docs/accelerators.md`` explains each entry.
    """
    module, topology = parse(program.hlo), setting.topology
    entry = Frame.entry(module, setting.known)
    arrays, count = caches(setting)
    rounds = find_rounds(module, entry, arrays)
    share = _share_in_use(setting, arrays)
    path = TakenPath(attention_windows(setting.slots), setting.used, lambda i: sum(moved(i, share)))
    runs = list(path.runs(rounds.frame))
    pairs = [(run.instruction, run.times) for run in runs]
    read = sum(moved(i, share)[0] * times for i, times in pairs)
    written = sum(moved(i, share)[1] * times for i, times in pairs)
    waits: float = len(promises_lib.host_exchanges(i for i, _ in pairs))
    if program.thunks is not None:
        waits += host_waits(program.thunks, entry, rounds, path)
    ideal = ideal_bytes(setting)
    made = promises_lib.check(module, program.source, rounds, arrays, count, setting.tensor, waits, limits)
    body = list(promises_lib.everything(rounds.body))
    return {
        **_described(setting),
        "host_waits": int(waits) if waits == int(waits) else waits,
        "kernels": sum(times for i, times in pairs if is_kernel(i, topology.gpu)),
        "bytes": read + written,
        "bytes_read": read,
        "bytes_written": written,
        "ideal_bytes": int(ideal),
        "ideal_ms": 1e3 * ideal / topology.figures.bandwidth,
        "estimated_ms": _estimated_ms(setting, pairs),
        "cache_copies": len(promises_lib.cache_copies(body, arrays)) + len(promises_lib.cache_rewrites(rounds, arrays)),
        "cache_moves": len(promises_lib.cache_moves(body, arrays)),
        "collectives": promises_lib.collectives(pairs),
        "control_flow": dict(collections.Counter(i.opcode for i in body if i.opcode in ("while", "conditional"))),
        "rounds_per_block": rounds.block,
        "undecided": path.undecided,
        "memory_needed": program.memory,
        "memory_available": int(topology.figures.memory),
        "compile_seconds": round(program.seconds, 1),
        "promises": {promise.name: {"holds": promise.holds, "detail": promise.detail} for promise in made},
    }


def _described(setting: Setting) -> dict[str, Any]:
    names = ("drafter", "sampling", "rows", "slots", "used", "num_draft", "tree", "tensor", "quantize")
    return {
        "topology": setting.topology.name,
        "layers": setting.target.num_hidden_layers,
        **{name: getattr(setting, name) for name in names},
        "jax": jax.__version__,
    }


def _estimated_ms(setting: Setting, pairs: list[tuple[Instruction, int]]) -> float | None:
    if setting.topology.clock is None:
        return None
    return 1e3 * sum(cycles(i) * times for i, times in pairs) / setting.topology.clock


def _share_in_use(setting: Setting, arrays: Caches) -> Callable[[Shape], float]:
    """Returns how much of an array a kernel of our own is taken to read: of a cache, the slots in use."""

    def share(shape: Shape) -> float:
        return setting.used / setting.slots if arrays.holds(shape) else 1.0

    return share


def broken(made: dict[str, Any]) -> list[str]:
    """Returns the promises of a report that the program breaks, each with what was found."""
    return [f"{name}: {of['detail']}" for name, of in made["promises"].items() if not of["holds"]]
