"""The benchmark ``repeats``: texts that come again and again, and drafters that remember what was generated."""

import argparse
import dataclasses
import sys
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import specjax
from specjax.checkpoint.spec import short_name
from specjax.commands import models
from specjax.commands.console import print_table
from specjax.commands.drafter_spec import parts_of

TIMES, LENGTH = 8, 128  # how often each prompt comes, and its tokens
# The same file, edited a little each time; and the same prompt, sampled several times as in reinforcement learning.
SETTINGS = (("edits", 0.0), ("samples", 0.6), ("samples", 1.0))


@dataclasses.dataclass
class Way:
    """One way to decode, and what it took so far.

    Attributes:
      drafter: with what it remembers; None decodes plainly.
      seconds: of all answers, and of remembering them.
      stats: of each answer.
    """

    drafter: Any = None
    seconds: float = 0.0
    stats: list[specjax.Stats] = dataclasses.field(default_factory=list)

    def count(self, name: str) -> int:
        """Returns a count of all answers together."""
        return sum(int(getattr(stats, name).sum()) for stats in self.stats)

    def remember(self, texts: list[Any]) -> None:
        """Lets a drafter with a memory remember texts."""
        if any(isinstance(part, specjax.SuffixDrafter) for part in parts_of(self.drafter)):
            begin = time.perf_counter()
            self.drafter = jax.block_until_ready(specjax.remember(self.drafter, texts))
            self.seconds += time.perf_counter() - begin


def bench_repeats(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers each prompt several times with each drafter, and returns a row for each kind of repeat and drafter."""
    try:
        opened = models.named_drafters(args)
    except ValueError as error:
        sys.exit(f"{args.prog}: error: {error}")
    rows = []
    for kind, temperature in SETTINGS:
        ways = {"plain": Way()}
        for spec, drafter in opened:
            ways[f"{short_name(spec)}, {drafter.num_draft} drafts"] = Way(drafter)
        _answer_all(args, kind, temperature, ways)
        plain = ways["plain"].count("emitted") / ways["plain"].seconds
        for name, way in ways.items():
            emitted = way.count("emitted")
            rows.append(
                {"repeats": kind, "temperature": temperature, "decoding": name}
                | {"draft acceptance rate": way.count("accepted") / max(way.count("drafted"), 1)}
                | {"tokens per round": emitted / way.count("rounds"), "speed-up": emitted / way.seconds / plain}
            )
    return print_table(f"Prompts that come {TIMES} times; remembering counts", rows)


def _answer_all(args: argparse.Namespace, kind: str, temperature: float, ways: dict[str, Way]) -> None:
    """Answers all prompts ``TIMES`` times, each by all ways in turn. Then drafters remember the answers."""
    prompts = models.prompts(args, LENGTH, args.prompts)
    # 1. What compiles does not count.
    for way in ways.values():
        texts = [_answer(args, way, prompts[0], temperature, 0)] * len(prompts)
        warm = dataclasses.replace(way)
        warm.remember(texts)
        way.seconds, way.stats = 0.0, []
    # 2. A file has one more edit each time: a token of its first half becomes another one of it.
    edits = np.random.default_rng(0)
    for turn in tqdm(range(TIMES), desc=f"{kind}, temperature {temperature}", unit="turn"):
        texts = {name: [] for name in ways}
        for number, prompt in enumerate(prompts):
            for name, way in ways.items():
                texts[name].append(_answer(args, way, prompt, temperature, turn * len(prompts) + number))
        for name, way in ways.items():
            way.remember(texts[name])
        if kind == "edits":
            places, sources = edits.integers(0, (LENGTH // 2, LENGTH), (len(prompts), 2)).T
            prompts = prompts.copy()
            row = np.arange(len(prompts))
            prompts[row, places] = prompts[row, sources]


def _answer(args: argparse.Namespace, way: Way, prompt: np.ndarray, temperature: float, seed: int) -> np.ndarray:
    """Returns the text of a prompt and its answer; adds what they took."""
    drafting = {} if way.drafter is None else {"drafter": way.drafter, "verify": models.rule(args, way.drafter)}
    sampling = specjax.Sampling(temperature, seed=seed)
    begin = time.perf_counter()
    out = specjax.generate(
        args.model, prompt[None], sampling=sampling, max_new_tokens=args.new_tokens, fixed=True, **drafting
    ).to_host()
    way.seconds += time.perf_counter() - begin
    way.stats.append(out.stats)
    return out.rows()[0]
