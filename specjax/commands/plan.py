"""The command ``plan``: memory of a device, the least time of a round of g drafts, and the best g."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import sys
from pathlib import Path

from specjax.checkpoint.fetched import config_path
from specjax.commands.console import print_table
from specjax.hf.config import read_config
from specjax.planning import (
    BYTES,
    CONFIGS,
    HARDWARE,
    RESERVE,
    WARP,
    Hardware,
    Mesh,
    Model,
    Round,
    Setting,
    best,
    check_mesh,
    kept,
    memory,
    num_params,
    plan_round,
)
from specjax.transformer import DecoderConfig

FIGURES = ("bandwidth", "flops", "memory", "link", "latency")
LEAST, MOST = 1e-12, 1e30  # limits of a figure, so that times stay finite


ABOUT = """Plans speculative decoding on paper: memory, the least time of a round of g drafts, and the best g.

  %(prog)s llama-3.1-8b --draft llama-3.2-1b --hardware h100 --acceptance 0.8

TARGET and --draft are the name of a config that comes with specjax, or the path of a config.json or of its folder.
With one device, a table over g is printed. With several devices, each has one line, at its best g. docs/scaling.md
has the formulas, and lists the parts that they leave out.
"""


def main(argv: list[str] | None = None, prog: str = "plan.py") -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET", help=f"of {', '.join(names())}; or a path")
    parser.add_argument(
        "--draft", required=True, metavar="MODEL|C", help="a model, or the cost of a draft step in steps of the target"
    )
    parser.add_argument("--hardware", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(HARDWARE)}")
    parser.add_argument(
        "--device-figures",
        default="",
        metavar="KEY=X,...",
        help=f"{', '.join(FIGURES)}, in bytes, operations, seconds: replace --hardware's, or describe another device",
    )
    parser.add_argument("--no-overlap", action="store_true", help="devices read and compute in turn, as small CPUs do")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="data, tensor, expert; default: 1 of each")
    parser.add_argument(
        "--shard-draft", action="store_true", help="split the draft like the target, instead of copying"
    )
    # There are two options for the rates: the shares that bench prints are products of the probabilities.
    rates = parser.add_mutually_exclusive_group(required=True)
    rates.add_argument(
        "--acceptance",
        type=float,
        nargs="+",
        metavar="A",
        help="probability that a draft is accepted if all before it were: one for all positions, or one each",
    )
    rates.add_argument(
        "--by-position", type=float, nargs="+", metavar="P", help="share kept by position, as bench prints"
    )
    parser.add_argument("--batch", type=int, default=1, help="rows on all devices together; default: %(default)s")
    parser.add_argument("--context", type=int, default=4000, help="tokens of each row; default: %(default)s")
    parser.add_argument("--weights", choices=BYTES, default="bfloat16", help="default: %(default)s")
    caches = [name for name in BYTES if name != "int4"]
    parser.add_argument("--cache", choices=caches, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--sampling", choices=WARP, default="temperature", help="the most that any row asks for; default: %(default)s"
    )
    parser.add_argument("--max-draft", type=int, default=8, metavar="G", help="most drafts; default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw tokens per second over g there")
    args = parser.parse_args(argv)
    # All errors come before anything is printed.
    try:
        devices = choose_hardware(args.hardware, args.device_figures, not args.no_overlap)
        setting = make_setting(args)
        counts = range(len(setting.kept) + 1)
        for name, hardware in devices.items():
            check_fit(args.target, setting, name, hardware)
        plans = {name: [plan_round(setting, hardware, g) for g in counts] for name, hardware in devices.items()}
        if args.plot:
            plot(args.target, plans, args.plot)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    report(args.target, setting, devices, plans)
    return 0


def names() -> list[str]:
    """Returns the names of models whose configs are shipped."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def open_config(name: str) -> DecoderConfig:
    """Reads the config of a shipped name, or at a path of a file or folder; raises ValueError for others."""
    if name in names():
        return read_config(CONFIGS / f"{name}.json")[0]
    path = config_path(name)
    if not path.exists() and not os.path.exists(name):
        raise ValueError(f"{name!r} is no path, nor one of {', '.join(names())}; give one of these")
    return read_config(path)[0]


def parse_figures(text: str, known: tuple[str, ...], option: str) -> dict[str, float]:
    """Reads ``key=number,...``; raises ValueError for unknown keys and for numbers that are not from LEAST to MOST."""
    figures = {}
    for part in filter(None, text.split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known or key in figures:
            raise ValueError(
                f"{option} has {part!r}; give each of {', '.join(known)} once at most, such as {known[0]}=2"
            )
        try:
            figures[key] = float(value)
        except ValueError:
            figures[key] = math.nan  # no comparison holds for it, so the error below names it
        if not LEAST <= figures[key] <= MOST:
            raise ValueError(f"{option} has {part!r}; give a number from {LEAST:g} to {MOST:g}")
    return figures


def parse_mesh(text: str) -> Mesh:
    """Reads ``axis=n,...``; raises ValueError for other text."""
    sizes = parse_figures(text, tuple(field.name for field in dataclasses.fields(Mesh)), "--mesh")
    for axis, size in sizes.items():
        if not size.is_integer():
            raise ValueError(f"--mesh has {axis}={size}; give a whole number of devices")
    return Mesh(**{axis: int(size) for axis, size in sizes.items()})


def describe(mesh: Mesh) -> str:
    """Returns the mesh as text for ``--mesh``."""
    return ",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1) or "one device"


def choose_hardware(chosen: list[str], text: str, overlaps: bool = True) -> dict[str, Hardware]:
    """Returns the devices by name.

    Args:
      chosen: keys of ``HARDWARE``. Without any, there is one device, described by ``text`` alone.
      text: figures that replace those of all chosen devices, such as "bandwidth=2e10,flops=1e11".
      overlaps: whether devices read and compute at the same time.

    Raises:
      ValueError: a name or figure is unknown, or no device is described.
    """
    if unknown := [name for name in chosen if name not in HARDWARE]:
        raise ValueError(
            f"--hardware has {unknown[0]!r}; choose from {', '.join(HARDWARE)}, or describe it with --device-figures"
        )
    figures: dict = parse_figures(text, FIGURES, "--device-figures")
    if not chosen and not {"bandwidth", "flops"} <= figures.keys():
        raise ValueError("no device; give --hardware, or --device-figures with bandwidth and flops at least")
    if "flops" in figures:
        figures["flops"] = dict.fromkeys(BYTES, figures["flops"])
    if not chosen:
        return {"device": Hardware(**figures, island=sys.maxsize, overlaps=overlaps)}
    return {name: dataclasses.replace(HARDWARE[name], **figures, overlaps=overlaps) for name in chosen}


def make_setting(args: argparse.Namespace) -> Setting:
    """Returns the setting of the arguments; raises ValueError if an argument is out of its range."""
    # Each number by itself.
    for option, most in (("batch", 2**31 - 1), ("context", 2**31 - 1), ("max_draft", 100)):
        if not 1 <= getattr(args, option) <= most:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; give 1 to {most}")
    for rate in args.acceptance or args.by_position:
        if not 0 <= rate <= 1:
            raise ValueError(f"a rate of acceptance is {rate}; give shares of 1, from 0 to 1")
    # The mesh must divide rows and models. A draft that is not split is whole on each part of the rows.
    mesh = parse_mesh(args.mesh)
    if args.batch % mesh.data:
        raise ValueError(f"data={mesh.data} does not divide --batch {args.batch}; choose a divisor, or another batch")
    rates = args.by_position or (args.acceptance if len(args.acceptance) > 1 else args.acceptance * args.max_draft)
    target = Model(open_config(args.target), args.weights, args.cache)
    check_mesh(target.config, mesh)
    draft, draft_mesh = parse_draft(args), mesh if args.shard_draft else Mesh(mesh.data)
    for model in (target, draft):
        if isinstance(model, Model) and args.context > model.config.max_position_embeddings:
            raise ValueError(f"--context is {args.context}; the model serves {model.config.max_position_embeddings}")
    if isinstance(draft, Model):
        try:
            check_mesh(draft.config, draft_mesh)
        except ValueError as error:
            raise ValueError(f"the draft on the mesh: {error}, or leave out --shard-draft") from None
    # The plan needs the probability that a draft is kept, which --by-position has and --acceptance multiplies up to.
    survive = (tuple(rates) if args.by_position else kept(rates))[: args.max_draft]
    return Setting(target, mesh, args.batch, args.context, survive, draft, draft_mesh, args.sampling)


def parse_draft(args: argparse.Namespace) -> Model | float:
    """Reads ``--draft``: a number is a cost, anything else names a model."""
    try:
        cost = float(args.draft)
    except ValueError:
        return Model(open_config(args.draft), args.weights, args.cache)
    if not 0 <= cost < math.inf:
        raise ValueError(f"--draft is {args.draft}; give a model, or a cost of at least 0 steps of the target")
    return cost


def check_fit(target: str, setting: Setting, name: str, hardware: Hardware) -> None:
    """Raises ValueError if a device cannot hold its part. The message names the smallest mesh that would do, if any."""
    room, needed = hardware.memory * (1 - RESERVE), memory(setting, len(setting.kept))
    if sum(needed) <= room:
        return
    # Only tensor and expert make a device's part of the weights smaller. Each is doubled until 256 times as wide.
    cure, mesh = "lower --batch, --context or --weights, or split the rows over data", setting.mesh
    times = itertools.product([2**i for i in range(9)], repeat=2)
    wider = (Mesh(mesh.data, mesh.tensor * tensor, mesh.expert * expert) for tensor, expert in times)
    for other in sorted(wider, key=lambda mesh: (mesh.devices, mesh.tensor)):
        with contextlib.suppress(ValueError):
            check_mesh(setting.target.config, other)
            if sum(memory(dataclasses.replace(setting, mesh=other), len(setting.kept))) <= room:
                cure = f"{describe(other)} would do"
                break
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in needed._asdict().items())
    raise ValueError(
        f"{target} needs {sum(needed) / 1e9:.1f} GB ({parts}) on each {name}, which has {room / 1e9:.1f} "
        f"({hardware.memory / 1e9:g} less {RESERVE:.0%} for activations and the runtime): {cure}"
    )


def short(value: float) -> str:
    """Returns a number with three digits, or without decimals from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def report(target: str, setting: Setting, devices: dict[str, Hardware], plans: dict[str, list[Round]]) -> None:
    """Prints the table of memory, and a table over g, or for several devices one at the best g."""
    # Memory is that of the longest drafts, the most that any line below needs.
    needed = memory(setting, len(setting.kept))
    size = f"{num_params(setting.target.config) / 1e9:.3g}B parameters"
    title = f"{target} ({size}), batch {setting.batch}, context {setting.context}, {describe(setting.mesh)}"
    gigabytes = {f"{part}, GB": short(size / 1e9) for part, size in needed._asdict().items()}
    print_table(f"{title}: memory of each device", [gigabytes | {"all, GB": short(sum(needed) / 1e9)}])
    if len(plans) > 1:
        print_table(
            f"{title}: at the best g", [best_row(name, devices[name], rounds) for name, rounds in plans.items()]
        )
        return
    ((name, rounds),) = plans.items()
    print_table(f"{title}, {name}: a round", [round_row(plan, rounds[0]) for plan in rounds])
    chosen = best(rounds)
    print(f"best: g = {chosen.num_draft}, {short(chosen.tokens_per_second)} tokens/s")


def round_row(plan: Round, plain: Round) -> dict[str, str]:
    """Returns a line of the table over g."""
    milliseconds = {
        "read, ms": plan.target.memory,
        "compute, ms": plan.target.arithmetic,
        "all-reduce, ms": plan.target.collectives,
        "draft, ms": plan.drafting,
        "round, ms": plan.seconds,
    }
    return {
        "g": str(plan.num_draft),
        "emitted": f"{plan.emitted:.2f}",
        "GB read": short(plan.read / 1e9),
        "all-reduces": str(plan.collectives),
        "MB sent": short(plan.sent / 1e6),
        **{column: short(value * 1e3) for column, value in milliseconds.items()},
        "tokens/s": short(plan.tokens_per_second),
        "speed-up": f"{plan.tokens_per_second / plain.tokens_per_second:.2f}",
    }


def best_row(name: str, hardware: Hardware, rounds: list[Round]) -> dict[str, str]:
    """Returns a device's line of the table at the best g."""
    row = round_row(best(rounds), rounds[0])
    columns = ("g", "emitted", "GB read", "all-reduces", "MB sent", "round, ms", "tokens/s", "speed-up")
    memory_of = {"memory, GB": f"{hardware.memory / 1e9:g}"}
    return {"hardware": name} | memory_of | {column: row[column] for column in columns}


def plot(target: str, plans: dict[str, list[Round]], file: Path) -> None:
    """Draws tokens per second over g, if matplotlib is installed.

    Raises:
      ValueError: the file cannot be written.
    """
    # A plot is an extra, so its package may be missing. Agg needs no screen.
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot (pip install 'specjax[plot]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # One line for each device, with a dot at the best g.
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, rounds in plans.items():
        (line,) = axis.plot([r.num_draft for r in rounds], [r.tokens_per_second for r in rounds], label=name)
        axis.plot(best(rounds).num_draft, best(rounds).tokens_per_second, "o", color=line.get_color())
    axis.set(title=target, xlabel="drafts per round", ylabel="tokens per second", ylim=(0, None))
    axis.legend()
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise ValueError(f"--plot {file} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
