"""Measures what specjax costs here: ``python scripts/bench.py [width|round|slots|speed ...]``.

Everything is compared as a ratio of medians that were timed in turn in one run, after a warm-up that compiles.
``width``: a target pass over t tokens against one over 1. ``round``: a whole round against its drafter steps and
target pass alone. ``slots``: a step with many slots allocated against few, equally many in use. ``speed``: text per
second against plain decoding, on openings of held-out modules.
"""

import argparse
import functools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import specjax
from specjax import training

ROOT = Path(__file__).resolve().parent.parent
LOOP = 20  # rounds or passes inside one timed call, so that dispatch from the host does not count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    parser.add_argument("--target", type=Path, default=ROOT / "checkpoints" / "py-14m")
    parser.add_argument("--draft", type=Path, default=ROOT / "checkpoints" / "py-14m-draft")
    parser.add_argument("--num-draft", type=int, nargs="+", default=[5], metavar="G")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="for speed")
    parser.add_argument("--prompts", type=int, default=8, help="for speed; rounded up to whole batches")
    parser.add_argument("--new-tokens", type=int, default=192, help="for speed")
    parser.add_argument("--repeats", type=int, default=15, help="timings whose median is taken")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    try:
        args.model = specjax.load(args.target)
        args.drafters = {g: specjax.load_drafter(args.draft, args.model, g) for g in args.num_draft}
    except ValueError as error:
        parser.error(str(error))
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}\n")
    figures = {what: BENCHMARKS[what](args) for what in args.what or BENCHMARKS}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Returns each call's median seconds; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in times.items()}


def table(title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints rows as a Markdown table and returns them."""
    shown = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    print(f"### {title}\n")
    for line in (list(rows[0]), ["---"] * len(rows[0]), *shown):
        print("| " + " | ".join(line) + " |")
    print(flush=True)
    return rows


@functools.partial(jax.jit, static_argnames="width")
def target_passes(target: specjax.LanguageModel, cache: Any, start_b: Array, *, width: int) -> Array:
    """Runs ``LOOP`` target passes of ``width`` tokens, each fed the argmax of the last."""

    def one(_, carry):
        tokens_bt, cache = carry
        output = target.forward(target.params, tokens_bt, cache, start_b)
        return jnp.argmax(output.logits_btv, -1).astype(jnp.int32), output.cache

    tokens_bt = jnp.ones((start_b.shape[0], width), jnp.int32)
    return lax.fori_loop(0, LOOP, one, (tokens_bt, cache))[0]


@jax.jit
def drafter_steps(target: specjax.LanguageModel, drafter: Any, state: specjax.State) -> Array:
    """Runs ``LOOP`` proposals from a state, drawn greedily or by temperature as the state asks, no more than that."""

    def draw(logits_bv, prefix_bi):
        greedy_b = jnp.argmax(logits_bv, -1).astype(jnp.int32)
        sampled = jnp.any(state.request.sampling.temperature > 0)
        key = jax.random.fold_in(jax.random.key(0), prefix_bi.sum())

        def sample():
            token_b = jax.random.categorical(key, logits_bv, axis=-1).astype(jnp.int32)
            return token_b, jax.nn.softmax(logits_bv, -1)

        one_hot = lambda: (greedy_b, jax.nn.one_hot(greedy_b, logits_bv.shape[-1]))
        return lax.cond(sampled, sample, one_hot)

    def one(_, carry):
        tokens_bs, draft = carry
        context = specjax.Context(target, None, tokens_bs, state.length_b)
        proposal, draft = drafter.propose(draft, context, draw)
        # The next proposal depends on this one, so that none can be left out.
        return tokens_bs.at[:, 0].set(proposal.tokens_bg[:, -1]), draft

    return lax.fori_loop(0, LOOP, one, (state.tokens_bs, state.draft))[0]


@functools.partial(jax.jit, static_argnames="verify")
def rounds(target: specjax.LanguageModel, drafter: Any, state: specjax.State, *, verify=specjax.verify.block) -> Any:
    """Runs ``LOOP`` rounds."""
    body = lambda _, state: specjax.step(target, state, drafter=drafter, verify=verify)
    return lax.fori_loop(0, LOOP, body, state).length_b


def ready(target: specjax.LanguageModel, drafter: Any, temperature: float, length: int, slots: int) -> specjax.State:
    """Returns the state of one row of ``length`` tokens."""
    prompt = held_out_openings(length, 1)
    room = min(target.max_positions or slots, slots - 16) - length
    sampling = specjax.Sampling(temperature=temperature)
    return specjax.prefill(target, prompt, drafter=drafter, sampling=sampling, max_new_tokens=room, slots=slots)


@functools.cache
def held_out_tokens(tokenizer_folder: Path) -> np.ndarray:
    """Returns the tokens of the standard-library modules kept from training."""
    tokenizer = specjax.load_tokenizer(tokenizer_folder)
    texts = [text for name, text in training.stdlib_modules().items() if training.is_held_out(name)]
    return training.encode_texts(tokenizer, texts)


def held_out_openings(length: int, count: int) -> np.ndarray:
    """Returns ``count`` windows of ``length`` tokens from held-out modules."""
    return training.Windows(held_out_tokens(ROOT / "checkpoints" / "py-14m"), length, count, seed=0).batch(0)


def bench_width(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Target passes by width, at 300 tokens of context."""
    start_b = jnp.asarray([300], jnp.int32)
    cache = args.model.init_cache(1, 512)
    widths = range(1, 10)
    calls = {str(t): functools.partial(target_passes, args.model, cache, start_b, width=t) for t in widths}
    seconds = medians(calls, args.repeats)
    return table(
        "Target pass by width",
        [{"tokens": t, "ms": seconds[str(t)] / LOOP * 1e3, "ratio": seconds[str(t)] / seconds["1"]} for t in widths],
    )


def bench_round(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A round against the sum of its parts."""
    rows = []
    for g, drafter in args.drafters.items():
        for temperature in (0.0, 1.0):
            state = ready(args.model, drafter, temperature, 200, 512)
            calls = {
                "round": functools.partial(rounds, args.model, drafter, state),
                "drafter": functools.partial(drafter_steps, args.model, drafter, state),
                "target": functools.partial(target_passes, args.model, state.cache, state.length_b - 1, width=g + 1),
                "plain": functools.partial(target_passes, args.model, state.cache, state.length_b - 1, width=1),
            }
            seconds = medians(calls, args.repeats)
            milliseconds = {name: value / LOOP * 1e3 for name, value in seconds.items()}
            alone = milliseconds["drafter"] + milliseconds["target"]
            rows.append(
                {"num_draft": g, "temperature": temperature}
                | {f"{name} ms": value for name, value in milliseconds.items()}
                | {"round / (drafter + target)": milliseconds["round"] / alone}
            )
    return table("A round against its parts", rows)


def bench_slots(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step at 300 tokens in use, by slots allocated."""
    rows = []
    for name, drafter in {"plain": None, **{f"g = {g}": d for g, d in args.drafters.items()}}.items():
        states = {str(slots): ready(args.model, drafter, 0.0, 300, slots) for slots in (512, 4096)}
        calls = {slots: functools.partial(rounds, args.model, drafter, state) for slots, state in states.items()}
        seconds = medians(calls, args.repeats)
        rows.append(
            {"drafter": name}
            | {f"{slots} slots, ms": value / LOOP * 1e3 for slots, value in seconds.items()}
            | {"ratio": seconds["4096"] / seconds["512"]}
        )
    return table("300 slots in use, by slots allocated", rows)


def bench_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Speculative against plain decoding."""
    rows = []
    for batch in args.batch:
        count = -(-args.prompts // batch)
        prompts = held_out_openings(64, count * batch).reshape(count, batch, 64)
        for temperature in (0.0, 1.0):
            rows += [speed(args, g, temperature, prompts) for g in args.drafters]
    return table("Speed-up over plain decoding on held-out modules", rows)


def speed(args: argparse.Namespace, g: int, temperature: float, prompts: np.ndarray) -> dict[str, Any]:
    """Times batches of prompts with the draft of ``g`` tokens and without."""
    sampling = specjax.Sampling(temperature=temperature)
    run = functools.partial(specjax.generate, args.model, sampling=sampling, max_new_tokens=args.new_tokens)
    speculative, plain, stats = 0.0, 0.0, []
    for prompt in prompts:
        calls = {
            "speculative": functools.partial(run, prompt, drafter=args.drafters[g]),
            "plain": functools.partial(run, prompt),
        }
        seconds = medians(calls, max(3, args.repeats // 5))
        speculative, plain = speculative + seconds["speculative"], plain + seconds["plain"]
        stats.append(jax.device_get(calls["speculative"]().stats))
    emitted = sum(int(s.emitted_b.sum()) for s in stats)
    accepted = sum(s.accepted_at_bg.sum(0) for s in stats) / sum(s.drafted_at_bg.sum(0) for s in stats)
    return {
        "batch": prompts.shape[1],
        "temperature": temperature,
        "num_draft": g,
        "tokens/s": emitted / speculative,
        "plain tokens/s": emitted / plain,
        "speed-up": plain / speculative,
        "emitted per round": emitted / sum(int(s.rounds_b.sum()) for s in stats),
        "accepted by position": " ".join(f"{x:.2f}" for x in accepted),
    }


BENCHMARKS = {"width": bench_width, "round": bench_round, "slots": bench_slots, "speed": bench_speed}

if __name__ == "__main__":
    sys.exit(main())
