"""The command ``bench``: measures drafters, rounds and speed on this machine."""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import specjax
from specjax.checkpoint.spec import short_name
from specjax.commands import (
    adapted,
    bench_page,
    compilation_cache,
    figures,
    hosts,
    machine,
    measure,
    models,
    passes,
    peers,
    prompt_files,
    repeats,
    rollback,
    rollouts,
    sweep,
)
from specjax.commands.console import add_dtype, add_quantize, print_table
from specjax.commands.drafter_spec import add_tree, check_tree_options
from specjax.commands.prompts import bench_prompts

# Drafters of the shipped target. The target's folder replaces {0}.
SHIPPED = (
    "model:{0}-draft",
    "mtp:{0}-mtp",
    "eagle:{0}-eagle",
    "block:{0}-dspark",
    "medusa:{0}-medusa",
    "early-exit:4",
    "ngram",
    "cascade:ngram,eagle:{0}-eagle",
)
SHIPPED_FOR_ROLLOUTS = ("eagle:{0}-eagle",)
SHIPPED_FOR_REPEATS = ("ngram", "suffix", "eagle:{0}-eagle", "cascade:suffix,eagle:{0}-eagle")
EXCERPTS = 4  # costs are means over this many texts
ABOUT = """Measures specjax on this machine: %(prog)s [WHAT ...].

Figures are ratios of medians. The medians are timed in turn in one run, after a warm-up that compiles.

These run by default:
  width       a target pass over t tokens against a pass over 1 token
  round       a round against its drafter steps and its target pass: each alone, and both in turn in one loop, where
              each evicts the other's weights from the CPU's caches
  slots       a step with many slots allocated against a step with few, with equally many in use
  speed       tokens per second against plain decoding, on excerpts of held-out modules: all drafts in every round
              ("speed-up"), and as many drafts as pay ("adaptive speed-up")
  drafters    the same for every drafter, one row of text at a time, and the speed-up that acceptance and costs allow:
              emitted / (g c + w), with c the cost of a draft and w of a pass over g + 1 tokens, in passes over 1 token
These run when they are named:
  sweep       decoding by batch and context: tokens per second and speed-up, fixed and adaptive, and the share of the
              floor, the least time that bandwidth and arithmetic of this machine allow
  startup     time to first token, compile time and peak memory
  acceptance  draft acceptance rate and mean acceptance length, by vLLM's definitions
  rollback    of a target with recurrent layers: the target's pass with and without rollback,
              and the memory that a round keeps for it
  peer        other libraries with the same weights and prompts in the same run; needs --peer
  adapted     models of other packages through specjax.adapt, beside the packages' own samplers: random weights,
              greedy; needs --package (docs/your_model.md)
  repeats     prompts that come again and again: a file that is edited, and the same prompt sampled several times.
              Suffix drafters remember the answers (docs/drafters.md); that time counts, too
  rollouts    a policy that learns a toy reward for --updates: its rollouts by plain decoding, by a draft that stays
              as it is, and by one that is trained on the rollouts (docs/rollouts.md). --batch rows run at once
  prompts     the prompts of --prompts FILE ..., laid out by the target's chat template and answered turn by turn:
              acceptance, tokens per second and speed-up of each drafter, by category, also beside --peer transformers.
              Each prompt is answered once by each drafter and by plain decoding, in turn; compilation does not count

speed also runs over a mesh, on one host or several (docs/distributed.md). The others run on one device.
"""
DEFAULT = ("width", "round", "slots", "speed", "drafters")


def main(argv: list[str] | None = None, prog: str = "bench.py") -> int:
    """Runs the benchmarks and returns the exit status."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    compilation_cache.set_up(args)
    # Benchmarks take what they need from args, so that each is one function of one argument.
    args.prog, args.notes = prog, []
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # timed parts return less than they get
    with contextlib.ExitStack() as stack:
        try:
            _check(args)
            mesh = stack.enter_context(hosts.run(args))
            args.dtype = args.dtype or str(specjax.default_dtype())
            # Over a mesh, only `speed` can run, and `data` must divide the batches.
            chosen = _chosen(args, mesh)
            parts = 1 if mesh is None else mesh.shape["data"]
            args.speed_batch = args.batch or [batch for batch in (1, 4, 8) if batch % parts == 0] or [parts]
            check_mesh(mesh, chosen, args.speed_batch)
            if args.peer:
                peers.check_device()
            if "prompts" in chosen:
                args.file_prompts = prompt_files.read(args.files, args.limit)
            models.open_all(args, chosen, mesh)
            if "rollback" in chosen:
                rollback.check(args.model)
            of_one = {"repeats": SHIPPED_FOR_REPEATS, "rollouts": SHIPPED_FOR_ROLLOUTS}
            known = of_one.get(chosen[0], SHIPPED) if len(chosen) == 1 else SHIPPED
            shipped = [spec.format(args.target) for spec in known]
            args.drafters = args.drafters or (shipped if Path(f"{args.target}-draft").is_dir() else ["ngram"])
        except ValueError as error:
            parser.error(hosts.describe(error))
        facts = machine.facts(args.dtype)
        over = "" if mesh is None else f", mesh {dict(mesh.shape)}"
        print(f"{machine.heading(facts)}{over}\n")
        found = {what: BENCHMARKS[what](args) for what in chosen}
        if "sweep" in found:
            facts |= machine.roof(args.dtype)
        if args.notes:
            facts["peers"] = args.notes
        if hosts.is_first():
            _write(args, {"machine": facts, **found})
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHMARKS)}; default: the first {len(DEFAULT)}")
    add("--target", type=Path, metavar="DIR", help="or a config.json: random weights. Default: the shipped py-14m")
    add("--draft", type=Path, metavar="DIR", help="or a config.json. Default: the shipped py-14m-draft")
    add(
        "--random-weights",
        action="store_true",
        help="read only the config.json of target and draft, and take as many positions as the contexts need",
    )
    add_quantize(parser)
    add_dtype(parser)
    add("--num-draft", type=_count, nargs="+", default=[4], metavar="G")
    add(
        "--forced-acceptance",
        type=float,
        nargs="+",
        metavar="R",
        help="accept drafts at these rates, whatever they are (specjax.testing.ForcedAcceptance, vLLM's synthetic "
        "acceptance): the probability of each draft, given that the drafts before it were accepted. One number counts "
        "for all. For speed, drafters, sweep, startup, acceptance and prompts; the text has no meaning then",
    )
    add("--batch", type=_count, nargs="+", metavar="B", help="default: 1 4 8 for speed, 1 to 64 for sweep, else 1")
    add("--context", type=_count, nargs="+", default=[256], metavar="T", help="for sweep and startup: prompt tokens")
    add(
        "--prompts",
        type=_prompts,
        nargs="+",
        default=[],
        metavar="N|FILE",
        help="for prompts: JSONL files with turns, messages, prompt or question in each line (docs/performance.md). "
        "For the others: how many excerpts, rounded up to whole batches; default: 8",
    )
    add("--limit", type=_count, metavar="N", help="for prompts: at most N of each category of a file, evenly spread")
    add("--temperature", type=_temperature, nargs="+", default=[0.0, 1.0], metavar="T", help="default: 0 1")
    add("--new-tokens", type=_count, default=192, metavar="N", help="tokens that each row emits, at most")
    add("--updates", type=_count, default=50, metavar="N", help="for rollouts: steps of the policy; default: 50")
    add("--learning-rate", type=_temperature, default=3e-4, metavar="R", help="for rollouts: of the policy")
    add("--repeats", type=_count, default=15, metavar="N", help="number of timings of each median")
    add("--peer", choices=peers.PEERS, nargs="+", default=[], help="for peer")
    add("--package", choices=adapted.PACKAGES, nargs="+", default=[], help="for adapted")
    add("--torch-threads", type=_count, default=os.cpu_count() or 1, metavar="N", help="for peer; default: all cores")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--html", type=Path, metavar="FILE", help="also write a page with plots there")
    add("--drafters", nargs="+", metavar="SPEC", help="as for generate; default: all shipped ones, or ngram")
    add_tree(parser)
    compilation_cache.add_options(parser)
    hosts.add_mesh_options(parser)
    return parser


def _count(text: str) -> int:
    """Reads an integer of at least 1; a type of ``argparse``."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give an integer of at least 1")
    return int(text)


def _prompts(text: str) -> int | Path:
    """Reads a number of prompts, or the path of a file; a type of ``argparse``."""
    return _count(text) if text.isdecimal() else Path(text)


def _temperature(text: str) -> float:
    """Reads a temperature; a type of ``argparse``."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number of at least 0")


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError if options do not fit each other."""
    if unknown := set(args.what) - BENCHMARKS.keys():
        raise ValueError(f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    check_tree_options(args)
    if args.tree is not None and not {"drafters", "prompts"}.intersection(args.what):
        raise ValueError(f"--tree is {args.tree} and is for drafters and prompts; name one of them")
    if args.tree is not None and args.forced_acceptance:
        raise ValueError("--forced-acceptance is for chains and --tree is given; leave one out")
    args.files = [each for each in args.prompts if isinstance(each, Path)]
    args.prompts = next((each for each in args.prompts if isinstance(each, int)), 8)
    if args.files and args.what and "prompts" not in args.what:
        raise ValueError(f"--prompts {args.files[0]} is for the benchmark prompts; name it, or give a number")
    if "prompts" in args.what and not args.files:
        raise ValueError("prompts is asked for without files; give --prompts FILE.jsonl")
    if args.batch and (args.what or ["prompts"] if args.files else []) == ["prompts"]:
        raise ValueError("prompts answers one prompt at a time; leave out --batch")
    if args.files and set(args.peer) - {"transformers"}:
        raise ValueError("prompts compares with transformers alone; leave out the other --peer")
    if args.files and args.peer and 0 not in args.temperature:
        raise ValueError("prompts compares greedy answers with --peer; give --temperature 0, too")
    if "peer" in args.what and not args.peer:
        raise ValueError(f"peer is asked for without --peer; give --peer with one of {', '.join(peers.PEERS)}")
    adapted.check(args.package, asked="adapted" in args.what)
    if args.peer and args.forced_acceptance:
        raise ValueError("--peer compares texts, and --forced-acceptance makes text without meaning; leave one out")
    if args.peer and (args.quantize or args.quantize_draft):
        raise ValueError("--peer compares the same weights, and the peers have no quantised ones; leave one out")
    for num_draft in args.num_draft:
        models.rates_of(args, num_draft)
    for name in args.peer:
        peers.check(name)


def _chosen(args: argparse.Namespace, mesh: Mesh | None) -> list[str]:
    """Returns the benchmarks to run, in order."""
    if args.what:
        return [*args.what, *(["peer"] if args.peer and not {"peer", "prompts"}.intersection(args.what) else [])]
    if args.files:
        return ["prompts"]
    if args.peer:
        return ["peer"]
    return list(DEFAULT) if mesh is None else ["speed"]


def _write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes the files that are asked for."""
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.html:
        args.html.write_text(bench_page.render(found), encoding="utf-8")


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


def bench_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times speculative against plain decoding."""
    rows = []
    for batch in args.speed_batch:
        count = -(-args.prompts // batch)
        prompts = models.prompts(args, 64, count * batch).reshape(count, batch, 64)
        for temperature in args.temperature:
            rows += [speed(args, drafter, temperature, prompts) for drafter in args.drafts.values()]
    return print_table("Speed-up over plain decoding on held-out modules", rows)


def bench_drafters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every drafter: acceptance, costs, the speed-up that these allow, and the measured speed-up."""
    prompts = models.prompts(args, 64, args.prompts)[:, None]
    # All drafters are opened first, so that a wrong spec is an error before the first measurement.
    try:
        opened = models.named_drafters(args)
    except ValueError as error:
        sys.exit(f"{args.prog}: error: {error}")
    rows = []
    for spec, drafter in tqdm(opened, unit="drafter"):
        for temperature in args.temperature:
            found = speed(args, drafter, temperature, prompts)
            c, w = costs(args, drafter, temperature)
            rows.append(
                {"drafter": short_name(spec), "g": drafter.num_draft, "temperature": temperature}
                | {name: found[name] for name in ("accepted by position", "emitted per round")}
                | {"c": c, "w": w, "promised": found["emitted per round"] / (drafter.num_draft * c + w)}
                | {name: found[name] for name in ("speed-up", "adaptive speed-up")}
            )
    return print_table("Drafters on held-out modules, one row of text at a time", rows)


def bench_acceptance(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Counts drafts and acceptance, with all drafts in every round, by vLLM's definitions."""
    prompts, rows = models.prompts(args, 64, args.prompts), []
    for g, drafter in args.drafts.items():
        for temperature in args.temperature:
            generation = specjax.generate(
                args.model,
                prompts,
                drafter=drafter,
                verify=models.rule(args, drafter),
                sampling=specjax.Sampling(temperature=temperature),
                max_new_tokens=args.new_tokens,
                fixed=True,
            )
            stats = specjax.sharding.gathered(generation.stats)
            rows.append({"num_draft": g, "temperature": temperature, **figures.acceptance(stats)})
    return print_table("Acceptance by vLLM's definitions", rows)


def costs(args: argparse.Namespace, drafter: Any, temperature: float) -> tuple[float, float]:
    """Returns the cost of one draft, and of a target pass over g + 1 tokens, in passes over one token.

    The costs are means over several texts, since the cost of a cascade depends on the text.
    """
    prompts = models.prompts(args, 200, EXCERPTS)[:, None]
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
    speculative, adaptive, plain, stats = 0.0, 0.0, 0.0, []
    # Each batch is timed all ways in turn, so that a change of the machine's load touches all.
    for prompt in prompts:
        drafting = functools.partial(run, prompt, drafter=drafter, verify=models.rule(args, drafter))
        calls: dict[str, Callable[[], Any]] = {
            "speculative": functools.partial(drafting, fixed=True),
            "adaptive": drafting,
            "plain": functools.partial(run, prompt),
        }
        seconds = measure.medians(calls, max(3, args.repeats // 5))
        speculative, plain = speculative + seconds["speculative"], plain + seconds["plain"]
        adaptive += seconds["adaptive"]
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
        "adaptive tokens/s": emitted / adaptive,
        "adaptive speed-up": plain / adaptive,
        "emitted per round": emitted / sum(int(s.rounds.sum()) for s in stats),
        "accepted by position": " ".join(f"{x:.2f}" for x in accepted / drafted),
    }


BENCHMARKS = {
    "width": passes.bench_width,
    "round": passes.bench_round,
    "slots": passes.bench_slots,
    "speed": bench_speed,
    "drafters": bench_drafters,
    "sweep": sweep.bench_sweep,
    "startup": sweep.bench_startup,
    "acceptance": bench_acceptance,
    "rollback": rollback.bench_rollback,
    "peer": peers.bench_peer,
    "adapted": adapted.bench_adapted,
    "repeats": repeats.bench_repeats,
    "rollouts": rollouts.bench_rollouts,
    "prompts": bench_prompts,
}
