"""The table of programs that ``aot --table`` makes, in pieces that a later run goes on with."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

from specjax.aot.programs import DRAFTERS, SAMPLING, Setting, lowered, with_layers
from specjax.aot.promises import Limits
from specjax.aot.report import Program, broken, compile_program, report
from specjax.aot.topology import choose
from specjax.commands.console import print_table
from specjax.transformer import DecoderConfig

DEPTHS = (2, 4)
_KEY = ("target", "topology", "tensor", "drafter", "rows", "sampling", "layers")


def table(path: Path, topology: str, tensor: int, name: str, target: DecoderConfig, rows: list[int]) -> int:
    """Compiles all programs of a target and prints them, extrapolated to all of its layers.

    Layers are alike, so that each figure is a constant and a part per layer. Two depths give both.

    Args:
      path: one JSON object per line for each program, sampling and depth. Lines that are there are not made again.
      topology, tensor: where to compile for.
      name: the target's name in the lines.
      target: the target.
      rows: sizes of the batch.

    Returns:
      The exit status: 1 if a program breaks a promise.
    """
    lines = _read(path)
    for depth, batch, drafter in itertools.product(DEPTHS, rows, DRAFTERS):
        # Requests that differ in their values alone share a program.
        programs: dict[str, Program] = {}
        for sampling in SAMPLING:
            key = (name, topology, tensor, drafter, batch, sampling, depth)
            if key in lines:
                continue
            setting = Setting(
                with_layers(target, depth), choose(topology, tensor), drafter, sampling, batch, tensor=tensor
            )
            begun = time.perf_counter()
            text = (source := lowered(setting)).as_text()
            if text not in programs:
                programs[text] = compile_program(setting, source)
            made = {"target": name} | report(setting, programs[text], Limits(moves=None))
            lines[key] = made
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made) + "\n")
            print(f"{key}: {time.perf_counter() - begun:.0f} s {broken(made) or ''}", flush=True)
    shown = []
    for batch, drafter, sampling in itertools.product(rows, DRAFTERS, SAMPLING):
        first, second = (lines[name, topology, tensor, drafter, batch, sampling, depth] for depth in DEPTHS)
        shown.append(_row(first, second, target.num_hidden_layers))
    print_table(f"{name} on {topology}, tensor={tensor}, extrapolated to {target.num_hidden_layers} layers", shown)
    return int(any(broken(made) for made in lines.values()))


def _read(path: Path) -> dict[tuple, dict[str, Any]]:
    if not path.exists():
        return {}
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {tuple(of[part] for part in _KEY): of for of in made}


def extrapolate(first: float, second: float, layers: int) -> float:
    """Returns a figure at ``layers`` layers from those at the two ``DEPTHS``."""
    low, high = DEPTHS
    return first + (second - first) * (layers - low) / (high - low)


def _row(first: dict[str, Any], second: dict[str, Any], layers: int) -> dict[str, Any]:
    def of(name: str) -> float:
        return extrapolate(first[name], second[name], layers)

    def total(made: dict[str, Any]) -> int:
        return sum(made["collectives"].values())

    return {
        "rows": first["rows"],
        "drafter": first["drafter"],
        "sampling": first["sampling"],
        "MB moved": f"{of('bytes') / 1e6:.0f}",
        "ideal MB": f"{of('ideal_bytes') / 1e6:.0f}",
        "ideal ms": f"{of('ideal_ms'):.2f}",
        "estimated ms": "" if first["estimated_ms"] is None else f"{of('estimated_ms'):.2f}",
        "kernels": f"{of('kernels'):.0f}",
        "host waits": f"{of('host_waits'):.3g}",
        "cache copies": f"{of('cache_copies'):.0f}",
        "cache moves": f"{of('cache_moves'):.0f}",
        "collectives": f"{extrapolate(total(first), total(second), layers):.0f}",
    }
