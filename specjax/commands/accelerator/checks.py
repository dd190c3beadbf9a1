"""Checks of text: the device's is the CPU's, twice, without a transfer, and the rule ``coupled`` keeps plain text."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import specjax
from specjax.commands.accelerator import pairs
from specjax.commands.accelerator.records import Recorder, read_records

RULES = {"token": specjax.verify.token, "block": specjax.verify.block, "coupled": specjax.verify.coupled}
REFERENCE = "reference"  # the step that writes the CPU's text
TEMPERATURES = (0.0, 1.0)
SMALL_ROWS = 2  # the most rows in place of 8, if models are to be small
MOST_THREADS = 8  # that trace and compile at the same time


class Case(NamedTuple):
    """A drafter, "none" for plain decoding, with a rule and a number of rows."""

    drafter: str
    rule: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.drafter} {self.rule} batch {self.rows}"


def plain(rows: int) -> Case:
    """Returns plain decoding, with which others of as many rows are compared at temperature 1."""
    return Case("none", "block", rows)


# Compiling is what these cases cost, so the shipped pair has only the pairs of drafter and rule that differ in code.
CASES = {
    "tiny": [Case(kind, rule, rows) for rows in (8, 1) for kind in ("ngram", "model") for rule in RULES],
    "shipped": [
        *(Case(kind, "block", 8) for kind in ("model", "eagle", "mtp", "medusa", "ngram")),
        *(Case(kind, "coupled", 1) for kind in ("model", "eagle", "ngram")),
        *(Case(kind, "token", 1) for kind in ("mtp", "medusa")),
    ],
}
FEW = {  # for other flags, and for a CPU
    "tiny": [Case("ngram", "block", 8), Case("model", "coupled", 8)],
    "shipped": [Case("eagle", "coupled", 1)],
}


def reference(record: Recorder, small: bool) -> None:
    """Writes the greedy text of each pair's target without a drafter. This step runs on the CPU."""
    rows = SMALL_ROWS if small else pairs.ROWS
    for name in pairs.PAIRS:
        pair = pairs.open_pair(name, with_drafters=False)
        (text,) = texts(pair, plain(rows), temperatures=(0.0,))
        record.write("text", name, tokens=text.tolist())


def run(record: Recorder, pair_name: str, cases: Iterable[Case]) -> None:
    """Writes a check for each case. Plain decoding comes first, then the others, several at a time."""
    pair = pairs.open_pair(pair_name)
    written = read_records(record.folder, REFERENCE, pair_name)
    expected = np.asarray(written[0]["tokens"], np.int32) if written else None
    cases = list(cases)
    plain_texts: dict[int, Any] = {}

    def check(case: Case) -> None:
        facts = {"pair": pair_name, "dtype": "float32", "batch": case.rows, "drafter": case.drafter, "rule": case.rule}
        if case.drafter not in (*pair.drafters, "none"):
            record.write("note", case.name, **facts, text="not shipped, so not checked")
            return
        # Whatever one case raises must not stop the others.
        try:
            found = compare(pair, case, expected, plain_texts)
        except Exception as error:
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        record.write("check", case.name, **facts, **found)

    for rows in dict.fromkeys(case.rows for case in cases):
        check(plain(rows))
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(check, cases))


def compare(pair: pairs.Pair, case: Case, expected: np.ndarray | None, plain_texts: dict[int, Any]) -> dict[str, Any]:
    """Returns what a check found, with ``passed``: whether all of it is as it should be.

    Args:
      pair: the models.
      case: the case.
      expected: int32 ``[ROWS, SLOTS]``, the CPU's greedy text; None if there is none, which is a failure.
      plain_texts: by number of rows, this device's plain text at temperature 1. Plain decoding adds its own.
    """
    facts: dict[str, Any] = {}
    first, again, warm, warm_again = texts(pair, case, twice=True, facts=facts)
    found: dict[str, Any] = {
        "tokens": int(case.rows * pairs.NEW_TOKENS),
        "not the CPU's": None if expected is None else differing(first, expected[: case.rows]),
        "not the first run's": differing(first, again) + differing(warm, warm_again),
        **facts,
    }
    if expected is None:
        found["error"] = f"the CPU's text is missing: run the step {REFERENCE}, too"
    if case.drafter == "none":
        plain_texts[case.rows] = warm
    elif case.rule == "coupled":
        own = plain_texts.get(case.rows)
        found["not plain's at temperature 1"] = None if own is None else differing(warm, own)
    wrong = [value for name, value in found.items() if name.startswith("not ") and value != 0]
    return found | {"passed": not wrong and "transfer" not in facts}


def texts(
    pair: pairs.Pair,
    case: Case,
    twice: bool = False,
    temperatures: Iterable[float] = TEMPERATURES,
    facts: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """Returns int32 ``[rows, SLOTS]`` for each temperature in turn, prompt and text; the seed of row i is i.

    Args:
      pair: the models.
      case: the drafter, the rule and the number of rows.
      twice: run a second time for each temperature, under a guard against transfers between host and device, and
        return that text, too. All arguments are on the device by then.
      temperatures: one run, or two, for each.
      facts: receives the numbers of drafts and of accepted drafts of the first run; and, as "transfer", what the guard
        raised.
    """
    facts = {} if facts is None else facts
    target, drafter = jax.device_put((pair.target, pair.drafters.get(case.drafter)))
    program = make_program(RULES[case.rule])
    rows = slice(case.rows)
    found = []
    for temperature in temperatures:
        seed_b = np.arange(case.rows, dtype=np.uint32)
        placed = pair.prompts_bt[rows], pair.length_b[rows], np.float32(temperature), seed_b
        arguments = jax.block_until_ready((target, drafter, *jax.device_put(placed)))
        generation = jax.block_until_ready(program(*arguments))
        found.append(np.asarray(generation.tokens))
        for name in ("drafted", "accepted"):
            facts.setdefault(name, int(getattr(generation.stats, name).sum()))
        if twice:
            try:
                with jax.transfer_guard("disallow"):
                    generation = jax.block_until_ready(program(*arguments))
            except Exception as error:  # the text is compared all the same
                facts["transfer"] = f"{type(error).__name__}: {error}"[:500]
                generation = jax.block_until_ready(program(*arguments))
            found.append(np.asarray(generation.tokens))
    return found


def make_program(rule: Any) -> Callable[..., specjax.Generation]:
    """Returns a jitted ``generate``, of which every argument is an array on the device."""

    # Made anew for each case: one jit for drafters of several classes may confuse them (docs/architecture.md).
    @jax.jit
    def program(target: Any, drafter: Any, prompts_bt: Array, length_b: Array, temperature: Array, seed_b: Array):
        return specjax.generate(
            target,
            prompts_bt,
            length_b,
            drafter=drafter,
            verify=rule,
            sampling=specjax.Sampling(temperature=temperature, seed=seed_b),
            max_new_tokens=pairs.NEW_TOKENS,
            slots=pairs.SLOTS,
            fixed=True,
        )

    return program


def differing(tokens_bs: np.ndarray, others_bs: np.ndarray) -> int:
    """Returns the number of slots in which two texts differ."""
    return int((tokens_bs != others_bs).sum())
