"""Benchmarks of ``bench`` by batch and context: ``sweep`` and ``startup``."""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

import specjax
from specjax.commands import machine, measure, models
from specjax.commands.console import print_table
from specjax.planning import Mesh, Model, Pass, cache_bytes, forward, seconds

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SPEEDS = (
    "batch",
    "context",
    "num_draft",
    "plain tokens/s",
    "fixed tokens/s",
    "adaptive tokens/s",
    "fixed speed-up",
    "adaptive speed-up",
    "emitted per round",
)
FLOORS = (
    "batch",
    "context",
    "num_draft",
    "plain ms",
    "plain floor ms",
    "plain share of floor",
    "round ms",
    "round floor ms",
    "round share of floor",
    "plain FLOP/byte",
    "round FLOP/byte",
    "plain GFLOP/s",
    "round GFLOP/s",
)
GREEDY = specjax.Sampling(temperature=0.0)
Call = Callable[..., Any]


def bench_sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times decoding by batch and context: plain, with all drafts in every round, and with as many as pay.

    Prompts are read before the timing begins.
    """
    hardware = machine.measured_hardware(args.dtype)
    rows = []
    for context in args.context:
        for batch in args.batch or BATCHES:
            if fits(args, batch, context):
                rows += [sweep_row(args, drafter, batch, context) for drafter in args.drafts.values()]
    if not rows:
        raise SystemExit(f"{args.prog}: error: no batch fits into memory; give smaller --batch or --context")
    forced = f", acceptance forced to {args.forced_acceptance}" if args.forced_acceptance else ""
    weights = ", random weights" if args.random_weights else ""
    print_table(f"Decoding by batch and context, greedy{weights}{forced}", rows, SPEEDS)
    bound = f"{hardware.bandwidth / 1e9:.3g} GB/s, {hardware.flops[args.dtype] / 1e9:.3g} GFLOP/s, measured"
    return print_table(f"A step and a round against the floor ({bound})", rows, FLOORS)


def fits(args: argparse.Namespace, batch: int, context: int) -> bool:
    """Returns whether the caches of a row of the table fit into free memory, with a note if they do not."""
    # Three states are kept, and one more runs.
    model = Model(args.config, cache=args.dtype)
    needed = 4 * cache_bytes(model, batch, _slots(args, context))
    free = machine.free_bytes()
    if needed > free:
        print(f"batch {batch}, context {context}: left out, caches need {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB\n")
    return needed <= free


def sweep_row(args: argparse.Namespace, drafter: Any, batch: int, context: int) -> dict[str, Any]:
    """Returns a row of the table: ``batch`` prompts of ``context`` tokens, ``args.new_tokens`` new ones."""
    prompts = models.prompts(args, context, batch)
    start = functools.partial(
        specjax.prefill,
        args.model,
        prompts,
        sampling=GREEDY,
        max_new_tokens=args.new_tokens,
        slots=_slots(args, context),
    )
    states = {"plain": start(), "fixed": start(drafter=drafter, fixed=True), "adaptive": start(drafter=drafter)}
    drafting = {"drafter": drafter, "verify": models.rule(args, drafter)}
    runs: dict[str, Call] = {
        "plain": functools.partial(specjax.run, args.model),
        "fixed": functools.partial(specjax.run, args.model, **drafting),
        "adaptive": functools.partial(specjax.run, args.model, **drafting),
    }
    # The caches of a state are large, and a run donates what it gets. So one state at a time is copied.
    stats = {name: _stats(runs[name], states[name]) for name in runs}
    spent = measure.medians(runs, max(3, args.repeats // 5), states)
    rates = {name: int(stats[name].emitted.sum()) / spent[name] for name in runs}
    steps = {name: int(stats[name].rounds.max()) for name in runs}
    row = {"batch": batch, "context": context, "num_draft": drafter.num_draft}
    row |= {f"{name} tokens/s": rate for name, rate in rates.items()}
    row |= {f"{name} speed-up": rates[name] / rates["plain"] for name in ("fixed", "adaptive")}
    row["emitted per round"] = float(stats["fixed"].emitted.sum() / stats["fixed"].rounds.sum())
    return row | floors(args, row, spent["plain"] / steps["plain"], spent["fixed"] / steps["fixed"])


def _slots(args: argparse.Namespace, context: int) -> int:
    """Returns a power of two of slots: for the prompt, the new tokens and the drafts of the last round."""
    return 1 << (context + args.new_tokens + max(args.num_draft) + models.SPARE // 2).bit_length()


def _stats(run: Call, state: specjax.State) -> specjax.Stats:
    """Returns what happened in a run, which compiles it."""
    return specjax.sharding.gathered(run(jax.tree.map(jax.numpy.copy, state)).stats)


def floors(args: argparse.Namespace, row: dict[str, Any], plain_s: float, round_s: float) -> dict[str, float]:
    """Returns the floor of a plain step and of a round, and how near the measured times come.

    The floor is the longer of two times: weights, keys and values over the measured bandwidth, and operations over the
    measured arithmetic. It leaves out caches of the CPU, sampling and verification. The share of the floor is the
    floor over the measured time, at most 1 but for caches.

    Args:
      args: of the command.
      row: has ``batch``, ``context`` and ``num_draft``.
      plain_s: measured seconds of a plain step.
      round_s: measured seconds of a round with all drafts.
    """
    used = row["context"] + args.new_tokens // 2
    works = {"plain": [_pass(args, args.config, row["batch"], 1, used)]}
    # The first draft step feeds two tokens: the last draft may be new to the draft model.
    widths = [2] + [1] * (row["num_draft"] - 1)
    works["round"] = [_pass(args, args.config, row["batch"], row["num_draft"] + 1, used)]
    works["round"] += [_pass(args, args.draft_config, row["batch"], width, used) for width in widths]
    hardware, found = machine.measured_hardware(args.dtype), {}
    for name, measured in (("plain", plain_s), ("round", round_s)):
        floor = sum(seconds(work, hardware, args.dtype).total for work in works[name])
        read, flops = sum(work.read for work in works[name]), sum(work.flops for work in works[name])
        found[f"{name} ms"] = measured * 1e3
        found[f"{name} floor ms"] = floor * 1e3
        found[f"{name} share of floor"] = floor / measured
        found[f"{name} FLOP/byte"] = flops / read
        found[f"{name} GFLOP/s"] = flops / measured / 1e9
    return found


def _pass(
    args: argparse.Namespace, config: specjax.transformer.DecoderConfig, rows: int, tokens: int, used: int
) -> Pass:
    kind = args.quantize if config is args.config else args.quantize_draft
    weights = "float8" if kind == "fp8" else kind or args.dtype
    return forward(Model(config, weights=weights, cache=args.dtype), Mesh(), rows, tokens, used)


def bench_startup(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the first token and compilation, and measures peak memory."""
    rows = []
    for context in args.context:
        for batch in args.batch or (1,):
            for drafter in args.drafts.values():
                modes = {"plain": {}, "fixed": {"drafter": drafter, "fixed": True}, "adaptive": {"drafter": drafter}}
                for name, options in modes.items():
                    options |= {"verify": models.rule(args, drafter)} if options else {}
                    row = {"batch": batch, "context": context, "num_draft": drafter.num_draft, "decoding": name}
                    with no_kept_programs():
                        rows.append(row | startup(args, batch, context, options))
    table = print_table("Time to first token, compilation and memory", rows)
    print(f"Peak memory: {rows[-1]['memory is']}. Peak resident set: {machine.resident_bytes() / 1e6:.0f} MB.\n")
    return table


@contextlib.contextmanager
def no_kept_programs() -> Iterator[None]:
    """Forgets compiled programs, and neither loads nor keeps any until the end. ``keep_programs`` stays off."""
    specjax.keep_programs(None)
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def startup(args: argparse.Namespace, batch: int, context: int, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of a program's beginning, and its memory.

    ``first call s`` is the first call of ``generate`` in a process less a later call: tracing, compiling and, with
    adaptive drafts, measuring costs, unless another context was measured. ``compile s`` is XLA's part.
    """
    prompts = models.prompts(args, context, batch)
    options = {"sampling": GREEDY, "slots": _slots(args, context), **options}
    run = functools.partial(specjax.generate, args.model, prompts, **options)
    first = _seconds(lambda: run(max_new_tokens=args.new_tokens))
    calls: dict[str, Call] = {
        "first token": lambda: run(max_new_tokens=1),
        "all": lambda: run(max_new_tokens=args.new_tokens),
    }
    later = measure.medians(calls, max(3, args.repeats // 5))
    # Models are arguments, as in the program of ``generate``: as constants they would be compiled in.
    drafter = options.pop("drafter", None)

    @jax.jit
    def program(model, drafter, prompts):
        return specjax.generate(model, prompts, drafter=drafter, max_new_tokens=args.new_tokens, **options)

    begin = time.perf_counter()
    lowered = program.lower(args.model, drafter, prompts)
    traced = time.perf_counter() - begin
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begin - traced
    peak, meaning = machine.peak_memory(compiled)
    return {
        "first token ms": later["first token"] * 1e3,
        "first call s": first - later["all"],
        "trace s": traced,
        "compile s": compile_s,
        "peak memory MB": peak / 1e6,
        "memory is": meaning,
    }


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
