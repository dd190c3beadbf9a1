"""The figures of a generation: for ``--json``, for the closing table, and for the trace page."""

import argparse
from typing import Any

from jax.sharding import Mesh

import specjax
from specjax.checkpoint.spec import short_name
from specjax.commands.transcript import COUNTS, Transcript

ACCEPTANCE = (
    "draft acceptance rate",
    "mean acceptance length",
    "drafts",
    "draft tokens",
    "accepted tokens",
    "per-position acceptance rate",
)
COMPARED_RUNS = 5  # timed runs of --compare, with the drafter and without
# Sampling parameters, and their defaults, which have no effect.
IDLE = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": None,
    "presence_penalty": None,
    "frequency_penalty": None,
}


def results(transcripts: list[Transcript], seconds: float) -> dict[str, Any]:
    """Returns the content of ``--json``: figures of each prompt, and of all prompts together.

    Args:
      transcripts: of all prompts; all done.
      seconds: time of all rounds together.
    """
    # "tokens" has all emitted tokens, while "text" ends at a stop string.
    prompts = [
        {
            "prompt": transcript.prompt,
            "messages": transcript.messages,
            "text": transcript.text,
            "stopped": transcript.stopped,
            "tokens": transcript.ids,
            **transcript.counts,
        }
        for transcript in transcripts
    ]
    # Rates are computed from summed counts: a mean of the prompts' rates would weigh short prompts too much.
    total = {name: sum(prompt[name] for prompt in prompts) for name in COUNTS}
    places = {
        name: [sum(counts) for counts in zip(*(prompt[name] for prompt in prompts), strict=True)]
        for name in ("drafted_at", "accepted_at")
    }
    return {
        **total,
        **places,
        "emitted_per_round": total["emitted"] / total["rounds"],
        "tokens_per_second": total["emitted"] / seconds,
        "prompts": prompts,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the closing table of figures, one line each."""
    lines = [
        ("tokens", f"{result['emitted']} in {result['rounds']} rounds"),
        ("emitted per round", f"{result['emitted_per_round']:.2f}  (plain decoding: 1)"),
        ("tokens per second", f"{result['tokens_per_second']:.1f}  (streamed; compilation excluded)"),
    ]
    if result["drafted"]:
        lines.append(("drafts accepted", f"{result['accepted']} of {result['drafted']}"))
    for place, (drafted, accepted) in enumerate(zip(result["drafted_at"], result["accepted_at"], strict=True), 1):
        share = accepted / drafted if drafted else 0
        lines.append((f"  at position {place}", f"{share:4.0%}  {'#' * round(20 * share)}"))
    # Only --compare has plain decoding to compare with.
    if "speedup" in result:
        speeds = result["comparison"]
        rates = f"{speeds['with_drafter']:.1f} against {speeds['plain']:.1f} tokens/s"
        times = f"{result['speedup']:.2f} times plain decoding"
        lines.append(("speed-up", f"{times}  ({rates}, medians of {COMPARED_RUNS} runs)"))
    return "\n".join(f"{name:<20} {value}".rstrip() for name, value in lines) + "\n"


def acceptance(stats: specjax.Stats) -> dict[str, Any]:
    """Returns what was drafted and accepted, by vLLM's names and definitions.

    A draft is one row's proposal in one round, of at least one token. Example, 3 drafts of 4 tokens, of which 4, 1 and
    0 were accepted: draft acceptance rate 5 / 12, mean acceptance length 1 + 5 / 3, and per-position acceptance rate
    2 / 3, 1 / 3, 1 / 3, 1 / 3. The last is divided by all drafts, also by those with no token at the position.

    Args:
      stats: of all rows, as NumPy arrays.
    """
    drafts, accepted_at = int(stats.drafted_at[:, 0].sum()), stats.accepted_at.sum(0)
    drafted, accepted = int(stats.drafted.sum()), int(stats.accepted.sum())
    rate, length = accepted / max(drafted, 1), 1 + accepted / max(drafts, 1)
    by_position = " ".join(f"{count / max(drafts, 1):.3f}" for count in accepted_at)
    return dict(zip(ACCEPTANCE, (rate, length, drafts, drafted, accepted, by_position), strict=True))


def settings(args: argparse.Namespace, spec: str, mesh: Mesh | None) -> dict[str, str]:
    """Returns the settings of the text by name, without sampling parameters that have no effect."""
    chosen = {"target": args.target.resolve().name, "drafter": short_name(spec)}
    if spec != "none":
        drafts = str(args.num_draft) if args.tree is None else f"{args.tree} in a tree of depth {args.num_draft}"
        drafts = drafts if args.fixed else f"at most {drafts}"
        chosen |= {"drafts per round": drafts, "verify": args.verify}
    for name in ("quantize", "quantize_draft"):
        if getattr(args, name) is not None:
            chosen[name.replace("_", " ")] = getattr(args, name)
    chosen["temperature"] = f"{args.temperature:g}" if args.temperature else "0 (greedy)"
    for name, idle in IDLE.items():
        if getattr(args, name) != idle:
            chosen[name.replace("_", " ")] = f"{getattr(args, name):g}"
    if args.stop:
        chosen["stop strings"] = ", ".join(map(repr, args.stop))
    if mesh is not None:
        chosen["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return chosen | ({"seed": str(args.seed)} if args.temperature else {})


def large(result: dict[str, Any]) -> dict[str, str]:
    """Returns the figures that a trace page shows large."""
    shown = {
        "tokens per round (plain decoding: 1)": f"{result['emitted_per_round']:.2f}",
        "tokens emitted": str(result["emitted"]),
        "rounds": str(result["rounds"]),
    }
    if result["drafted"]:
        shown["of drafts accepted"] = f"{result['accepted'] / result['drafted']:.0%}"
    shown["tokens per second"] = f"{result['tokens_per_second']:.0f}"
    if "speedup" in result:
        shown["speed-up over plain decoding"] = f"{result['speedup']:.2f}\u00d7"
    return shown
