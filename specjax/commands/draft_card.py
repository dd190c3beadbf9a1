"""What a draft that ``train-draft`` trained is worth, and its card, README.md."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import specjax
from specjax.commands.console import print_table
from specjax.commands.train import acceptance

WHAT = {
    "eagle": "An EAGLE-3 draft head",
    "dflash": "A DFlash draft head, which drafts a block in one pass",
    "dspark": "A DSpark draft head, which drafts a block in one pass",
    "mtp": "A multi-token prediction module",
    "medusa": "Medusa heads",
    "model": "A draft model",
}
SPEC_KINDS = {"dflash": "block", "dspark": "block"}
"""The kind in the text that ``load_drafter`` takes, where the name is another."""


def measure(
    target: specjax.LanguageModel,
    prompts: Sequence[np.ndarray],
    ends: tuple[int, ...],
    drafter: specjax.Drafter,
    temperature: float,
    count: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Returns the acceptance of a drafter over text after the first ``count`` prompts, each of its own length."""
    positions = target.max_positions or sys.maxsize
    generation = specjax.generate(
        target,
        [prompt.tolist() for prompt in prompts[:count]],
        drafter=drafter,
        sampling=specjax.Sampling(temperature=temperature),
        max_new_tokens=np.asarray([min(new_tokens, positions - len(prompt)) for prompt in prompts[:count]]),
        stop_tokens=ends,
        fixed=True,
    )
    return acceptance(jax.device_get(generation.stats))


def show(figures: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Prints the acceptance of drafters."""
    rows = [
        {
            "drafter": drafter,
            "sampling": sampling,
            "tokens per round": each["emitted_per_round"],
            "accepted, by position": ", ".join(f"{x:.0%}" for x in each["by_position"]),
        }
        for drafter, by_sampling in figures.items()
        for sampling, each in by_sampling.items()
    ]
    print_table("after prompts of held-out documents", rows)


def card(metrics: dict[str, Any], target: str, output: Path, command: str, chat: bool) -> str:
    """Returns the card as Markdown.

    Args:
      metrics: the content of ``metrics.json``.
      target: the target as it was given.
      output: the draft's folder.
      command: the command that trained it.
      chat: whether the target is a chat model.
    """
    kind, name = metrics["kind"], metrics["target"]
    text = f"{metrics['sampled_tokens']:,} tokens that the target wrote"
    text += ", users' turns and answers" if chat else ", from the beginnings of texts"
    if metrics["data_tokens"]:
        text += f", and {metrics['data_tokens']:,} tokens of other text"
    losses = "; ".join(
        f"{stage['loss']}, {stage['steps']} steps of {stage['rows']} windows of {stage['sequence']} tokens: "
        f"{_mean(stage['losses'][:10]):.3f} at first, {_mean(stage['losses'][-10:]):.3f} at last"
        for stage in metrics["stages"]
    )
    facts = {
        "kind": f"`{kind}`, {metrics['parameters']:,} parameters",
        "text": text,
        "tokens seen": f"{metrics['tokens_seen']:,}",
        "hours": f"{metrics['sampling_hours']:.2f} of sampling, {metrics['training_hours']:.2f} of training",
        "losses": losses,
        "command": f"`{command}`",
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    figures = "".join(
        f"| `{drafter}` | {sampling} | {each['emitted_per_round']:.2f} "
        f"| {', '.join(f'{x:.0%}' for x in each['by_position'])} |\n"
        for drafter, by_sampling in metrics["held_out_acceptance"].items()
        for sampling, each in by_sampling.items()
    )
    talk, spec = " --chat" if chat else "", f"{SPEC_KINDS.get(kind, kind)}:{output}"
    return f"""# {output.name}

{WHAT[kind]} of {name}, trained by `specjax train-draft` on the target's own text.

| | |
|---|---|
{rows}
After prompts of {metrics["measured_documents"]} documents of the target's own that were held out. Plain decoding has 1
token per round.

| drafter | sampling | tokens per round | drafts accepted, by position |
|---|---|---|---|
{figures}
Use it: `specjax generate --target {target} --drafter {spec}{talk}`. `metrics.json` has all losses.
"""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
