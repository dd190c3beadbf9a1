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
from specjax.commands.console import print_table, write_whole
from specjax.transformer import DecoderConfig

_KEY = ("target", "topology", "tensor", "drafter", "rows", "sampling", "layers")


def table(
    path: Path, topology: str, tensor: int, name: str, target: DecoderConfig, rows: list[int], depths: list[int]
) -> int:
    """Compiles all programs of a target and prints them.

    Layers are alike, so a figure is a constant and a part for each layer: two depths give both, and from them the
    figure at all layers. That holds for a GPU. On a TPU, more layers leave less VMEM to each: with estimates of 2 and 4
    layers, 16 layers seem a third slower than they are.

    Args:
      path: one JSON object per line for each program, sampling and depth. Lines that are there are not made again.
      topology, tensor: where to compile for.
      name: the target's name in the lines.
      target: the target.
      rows: sizes of the batch.
      depths: one number of layers, or two that are extrapolated to all layers of the target.

    Returns:
      The exit status: 1 if a program breaks a promise.

    Raises:
      ValueError: ``depths`` are neither one number nor two different ones, or not depths of the target.
    """
    if len(depths) not in (1, 2) or len(set(depths)) < len(depths):
        raise ValueError(f"--depths has {depths}; give one number of layers, or two different ones to extrapolate from")
    lines = _read(path)
    for depth, batch, drafter in itertools.product(depths, rows, DRAFTERS):
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
    shown, status = [], 0
    for batch, drafter, sampling in itertools.product(rows, DRAFTERS, SAMPLING):
        made = [lines[name, topology, tensor, drafter, batch, sampling, depth] for depth in depths]
        status |= bool(list(itertools.chain(*map(broken, made))))
        shown.append(_row(made[0], made[-1], target.num_hidden_layers if len(depths) == 2 else depths[0]))
    title = f"{depths[0]} layers"
    if len(depths) == 2:
        title = f"extrapolated from {depths[0]} and {depths[1]} to {target.num_hidden_layers} layers"
    print_table(f"{name} on {topology}, tensor={tensor}, {title}", shown)
    return status


def _read(path: Path) -> dict[tuple, dict[str, Any]]:
    """Returns the lines of a table. A last line that was cut off is removed from the file."""
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    write_whole(path, whole + "\n" if whole else "")
    made = [json.loads(line) for line in whole.splitlines()]
    return {tuple(of[part] for part in _KEY): of for of in made}


def extrapolate(first: float, second: float, depths: tuple[int, int], layers: int) -> float:
    """Returns a figure at ``layers`` layers from those at two depths, on a line. One depth twice is that depth."""
    low, high = depths
    return first if low == high else first + (second - first) * (layers - low) / (high - low)


def _row(first: dict[str, Any], second: dict[str, Any], layers: int) -> dict[str, Any]:
    depths = first["layers"], second["layers"]

    def of(name: str) -> float:
        return extrapolate(first[name], second[name], depths, layers)

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
        "collectives": f"{extrapolate(total(first), total(second), depths, layers):.0f}",
    }
