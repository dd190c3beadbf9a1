"""The command ``bench``: measures drafters, rounds and speed on this machine."""

import argparse
import contextlib
import functools
import json
import platform
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import specjax
from specjax.checkpoint.drafters import short_name
from specjax.commands import hosts, measure
from specjax.commands.console import add_quantize, print_table
from specjax.commands.drafter_spec import named_drafter
from specjax.commands.places import folder_or_shipped

# Drafters of the shipped target. The target's folder replaces {0}.
SHIPPED = (
    "model:{0}-draft",
    "mtp:{0}-mtp",
    "eagle:{0}-eagle",
    "medusa:{0}-medusa",
    "early-exit:4",
    "ngram",
    "cascade:ngram,eagle:{0}-eagle",
)
EXCERPTS = 4  # costs are means over this many texts
ABOUT = """Measures drafters, rounds and speed on this machine: %(prog)s [width|round|slots|speed|drafters ...].

Figures are ratios of medians. The medians are timed in turn in one run, after a warm-up that compiles.

width     a target pass over t tokens against a pass over 1 token
round     a round against its drafter steps and its target pass: each alone, and both in turn in one loop, where
          each evicts the other's weights from the CPU's caches
slots     a step with many slots allocated against a step with few, with equally many in use
speed     tokens per second against plain decoding, on excerpts of held-out modules
drafters  the same for every drafter, one row of text at a time, and the speed-up that acceptance and costs allow:
          emitted / (g c + w), with c the cost of a draft and w of a pass over g + 1 tokens, in passes over 1 token

speed also runs over a mesh, on one host or several (docs/distributed.md). The others run on one device.
"""


def main(argv: list[str] | None = None, prog: str = "bench.py") -> int:
    """Runs the benchmarks and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--target", type=Path, metavar="DIR", help="default: the shipped py-14m")
    parser.add_argument("--draft", type=Path, metavar="DIR", help="default: the shipped py-14m-draft")
    add_quantize(parser)
    parser.add_argument("--num-draft", type=int, nargs="+", default=[4], metavar="G")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="B",
        help="for speed; default: 1 4 8, if they divide",
    )
    parser.add_argument("--prompts", type=int, default=8, help="for speed; rounded up to whole batches")
    parser.add_argument("--new-tokens", type=int, default=192, help="for speed")
    parser.add_argument("--repeats", type=int, default=15, help="number of timings of each median")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--drafters", nargs="+", metavar="SPEC", help="as for generate; default: all shipped ones")
    hosts.add_mesh_options(parser)
    args = parser.parse_args(argv)
    # Benchmarks take what they need from args, so that each is one function of one argument.
    args.prog = prog
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # timed parts return less than they get
    if unknown := set(args.what) - BENCHMARKS.keys():
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    with contextlib.ExitStack() as stack:
        try:
            mesh = stack.enter_context(hosts.run(args))
            # Over a mesh, only `speed` can run, and `data` must divide the batches.
            chosen = args.what or (BENCHMARKS if mesh is None else ["speed"])
            if args.batch is None:
                parts = 1 if mesh is None else mesh.shape["data"]
                args.batch = [batch for batch in (1, 4, 8) if batch % parts == 0] or [parts]
            check_mesh(mesh, chosen, args.batch)
            # Models are loaded once for all benchmarks. The draft is small, so it is whole on each device.
            args.target = folder_or_shipped(args.target)
            args.draft = folder_or_shipped(args.draft, "py-14m-draft", "--draft")
            args.drafters = args.drafters or [spec.format(args.target) for spec in SHIPPED]
            hosts.check_same_folders(args.target, args.draft)
            args.model = specjax.load(args.target, mesh=mesh, quantize=args.quantize)
            args.drafts = {
                g: specjax.load_drafter(f"model:{args.draft}", args.model, g, mesh=mesh, quantize=args.quantize_draft)
                for g in args.num_draft
            }
        except ValueError as error:
            parser.error(hosts.describe(error))
        over = "" if mesh is None else f", mesh {dict(mesh.shape)}"
        print(f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}{over}\n")
        figures = {what: BENCHMARKS[what](args) for what in chosen}
        if args.json and hosts.is_first():
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def check_mesh(mesh: Mesh | None, chosen: Collection[str], batches: list[int]) -> None:
    """Raises ValueError unless the benchmarks can run over the mesh, and its ``data`` axis divides the batches."""
    if mesh is None:
        return
    if others := sorted(set(chosen) - {"speed"}):
        raise ValueError(f"{others[0]} runs on one device; with --mesh or --distributed, only speed runs")
    parts = mesh.shape["data"]
    if odd := [batch for batch in batches if batch % parts]:
        raise ValueError(
            f"--batch {odd[0]} does not divide over the {parts} parts of the mesh axis data; give a multiple"
        )


def bench_width(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times target passes by width, at 300 tokens of context."""
    start_b = jnp.asarray([300], jnp.int32)
    cache = args.model.init_cache(1, 512)
    widths = range(1, 10)
    calls = {str(t): functools.partial(measure.target_passes, args.model, start_b, width=t) for t in widths}
    seconds = measure.medians(calls, args.repeats, dict.fromkeys(calls, cache))
    return print_table(
        "Target pass by width",
        [
            {"tokens": t, "ms": seconds[str(t)] / measure.LOOP * 1e3, "ratio": seconds[str(t)] / seconds["1"]}
            for t in widths
        ],
    )


def bench_round(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a round against its parts."""
    rows, prompt = [], measure.held_out_excerpts(args.target, 200, 1)
    for g, drafter in args.drafts.items():
        for temperature in (0.0, 1.0):
            state = measure.ready(args, drafter, temperature, prompt, 512)
            calls = {
                "round": functools.partial(measure.rounds, args.model, drafter),
                "drafter": functools.partial(measure.parts, args.model, drafter, with_target=False),
                "target": functools.partial(measure.target_passes, args.model, state.length_b - 1, width=g + 1),
                "in turn": functools.partial(measure.parts, args.model, drafter, with_target=True),
            }
            inputs = dict.fromkeys(calls, state) | {"target": state.cache}
            milliseconds = {k: v / measure.LOOP * 1e3 for k, v in measure.medians(calls, args.repeats, inputs).items()}
            rows.append(
                {"num_draft": g, "temperature": temperature}
                | {f"{name} ms": value for name, value in milliseconds.items()}
                | {
                    "round / (drafter + target)": milliseconds["round"]
                    / (milliseconds["drafter"] + milliseconds["target"]),
                    "round / in turn": milliseconds["round"] / milliseconds["in turn"],
                }
            )
    return print_table("A round against its parts", rows)


def bench_slots(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a step by slots allocated, with 300 tokens in use."""
    rows, prompt = [], measure.held_out_excerpts(args.target, 300, 1)
    for name, drafter in {"plain": None, **{f"g = {g}": d for g, d in args.drafts.items()}}.items():
        states = {str(slots): measure.ready(args, drafter, 0.0, prompt, slots) for slots in (512, 4096)}
        seconds = measure.medians(
            dict.fromkeys(states, functools.partial(measure.rounds, args.model, drafter)), args.repeats, states
        )
        rows.append(
            {"drafter": name}
            | {f"{slots} slots, ms": value / measure.LOOP * 1e3 for slots, value in seconds.items()}
            | {"ratio": seconds["4096"] / seconds["512"]}
        )
    return print_table("300 slots in use, by slots allocated", rows)


def bench_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times speculative against plain decoding."""
    rows = []
    for batch in args.batch:
        count = -(-args.prompts // batch)
        prompts = measure.held_out_excerpts(args.target, 64, count * batch).reshape(count, batch, 64)
        for temperature in (0.0, 1.0):
            rows += [speed(args, drafter, temperature, prompts) for drafter in args.drafts.values()]
    return print_table("Speed-up over plain decoding on held-out modules", rows)


def bench_drafters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every drafter: acceptance, costs, the speed-up that these allow, and the measured speed-up."""
    tokenizer = specjax.open(args.target).need_tokenizer()
    prompts = measure.held_out_excerpts(args.target, 64, args.prompts)[:, None]
    # All drafters are opened first, so that a wrong spec is an error before the first measurement.
    try:
        opened = [
            (spec, named_drafter(spec, args.model, tokenizer, g, quantize=args.quantize_draft))
            for spec in args.drafters
            for g in args.num_draft
        ]
    except ValueError as error:
        sys.exit(f"{args.prog}: error: {error}")
    rows = []
    for spec, drafter in tqdm(opened, unit="drafter"):
        for temperature in (0.0, 1.0):
            found = speed(args, drafter, temperature, prompts)
            c, w = costs(args, drafter, temperature)
            rows.append(
                {"drafter": short_name(spec), "g": drafter.num_draft, "temperature": temperature}
                | {name: found[name] for name in ("accepted by position", "emitted per round")}
                | {"c": c, "w": w, "promised": found["emitted per round"] / (drafter.num_draft * c + w)}
                | {"speed-up": found["speed-up"]}
            )
    return print_table("Drafters on held-out modules, one row of text at a time", rows)


def costs(args: argparse.Namespace, drafter: Any, temperature: float) -> tuple[float, float]:
    """Returns the cost of one draft, and of a target pass over g + 1 tokens, in passes over one token.

    The costs are means over several texts, since the cost of a cascade depends on the text.
    """
    prompts = measure.held_out_excerpts(args.target, 200, EXCERPTS)[:, None]
    states = [measure.ready(args, drafter, temperature, prompt, 512) for prompt in prompts]
    caches = [state.cache for state in states]

    def passes(width: int) -> Callable[[Any], Any]:
        run = functools.partial(measure.target_passes, args.model, jnp.asarray([199]), width=width)
        return lambda caches: [run(cache) for cache in caches]

    calls = {
        "drafter": lambda states: [measure.parts(args.model, drafter, state, with_target=False) for state in states],
        "target": passes(drafter.num_draft + 1),
        "plain": passes(1),
    }
    seconds = measure.medians(calls, args.repeats, {"drafter": states, "target": caches, "plain": caches})
    return seconds["drafter"] / seconds["plain"] / drafter.num_draft, seconds["target"] / seconds["plain"]


def speed(args: argparse.Namespace, drafter: Any, temperature: float, prompts: np.ndarray) -> dict[str, Any]:
    """Times batches ``[count, batch, length]`` of prompts, with the drafter and without, and returns a table's row."""
    sampling = specjax.Sampling(temperature=temperature)
    run = functools.partial(specjax.generate, args.model, sampling=sampling, max_new_tokens=args.new_tokens)
    speculative, plain, stats = 0.0, 0.0, []
    # Each batch is timed both ways in turn, so that a change of the machine's load touches both.
    for prompt in prompts:
        calls: dict[str, Callable[[], Any]] = {
            "speculative": functools.partial(run, prompt, drafter=drafter),
            "plain": functools.partial(run, prompt),
        }
        seconds = measure.medians(calls, max(3, args.repeats // 5))
        speculative, plain = speculative + seconds["speculative"], plain + seconds["plain"]
        stats.append(specjax.sharding.gathered(calls["speculative"]().stats))
    # Counts are added over batches before they are divided: batches differ in length.
    emitted = sum(int(s.emitted.sum()) for s in stats)
    accepted = np.sum([s.accepted_at.sum(0) for s in stats], axis=0)
    drafted = np.sum([s.drafted_at.sum(0) for s in stats], axis=0)
    return {
        "batch": prompts.shape[1],
        "temperature": temperature,
        "num_draft": drafter.num_draft,
        "tokens/s": emitted / speculative,
        "plain tokens/s": emitted / plain,
        "speed-up": plain / speculative,
        "emitted per round": emitted / sum(int(s.rounds.sum()) for s in stats),
        "accepted by position": " ".join(f"{x:.2f}" for x in accepted / drafted),
    }


BENCHMARKS = {
    "width": bench_width,
    "round": bench_round,
    "slots": bench_slots,
    "speed": bench_speed,
    "drafters": bench_drafters,
}
