"""The summary of a folder of records: ``summary.json``, and ``summary.md`` for docs/performance.md."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specjax.commands.accelerator.records import SUMMARY, read_records
from specjax.commands.console import write_whole

# Columns of the tables: the heading, and the field of the record.
SPEED = {
    "shape": "shape",
    "flags": "flags",
    "drafter": "drafter",
    "dtype": "dtype",
    "batch": "batch",
    "context": "context",
    "temperature": "temperature",
    "plain, ms": "plain_ms",
    "by bytes, ms": "plain_ideal_ms",
    "share of bandwidth": "share_of_bandwidth",
    "round, ms": "round_ms",
    "round by bytes, ms": "round_ideal_ms",
    "round / plain": "round_over_plain",
    "emitted per round": "emitted_per_round",
    "tokens/s": "tokens_per_second",
    "speed-up": "speed_up",
}
INT8 = {name: SPEED[name] for name in ("shape", "batch", "context", "plain, ms", "by bytes, ms", "share of bandwidth")}
INT8 |= {"against": "against", "against, ms": "against_ms", "speed-up": "speed_up"}
WAITS = {
    "drafter": "drafter",
    "flags": "flags",
    "host waits per round": "waits_per_round",
    "synchronisations": "synchronisations_per_round",
    "launches": "launches_per_round",
    "kernels": "kernels_per_round",
    "": "text",
}
CHECKS = {
    "check": "check",
    "tokens": "tokens",
    "not the CPU's": "not the CPU's",
    "not the first run's": "not the first run's",
    "not plain's at temperature 1": "not plain's at temperature 1",
    "accepted of drafted": "accepted of drafted",
    "": "outcome",
}
STEPS = {"step": "step", "": "status", "seconds": "seconds", "why": "text"}


def write(folder: Path) -> None:
    """Writes both files anew from all records of a folder."""
    records = read_records(folder)
    write_whole(folder / f"{SUMMARY}.json", json.dumps(records, indent=1) + "\n")
    write_whole(folder / f"{SUMMARY}.md", markdown(records))


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns the records as a section of Markdown: the machine, tables of figures, checks, and what is missing."""
    records = [{**record, **_derived(record)} for record in records]

    def some(kind: str, *fields: str) -> list[dict[str, Any]]:
        return [record for record in records if record["kind"] == kind and all(name in record for name in fields)]

    parts = [_machine(some("fact"), some("figure", "bytes_per_second"))]
    if speed := some("figure", "round_ms"):
        rates = ", ".join(map(str, speed[0]["acceptance"]))
        parts += [
            f"Random weights, {speed[0]['num_draft']} drafts per round, accepted with probability {rates}, each given "
            "that the drafts before it were. Medians of runs in turn; compilation and prompts are excluded. "
            '"By bytes" is the least time at the bandwidth of a copy.',
            table(SPEED, speed),
        ]
    parts += [table(INT8, some("figure", "against_ms")), table(WAITS, some("figure", "waits_per_round"))]
    checks = some("check")
    if checks:
        passed = sum(check["passed"] for check in checks)
        parts += [f"{passed} of {len(checks)} checks passed.", table(CHECKS, checks)]
    parts += [f"- {record['step']}, {record['name']}: {record['text']}" for record in some("note")]
    parts.append(table(STEPS, some("step")))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Mapping[str, str], rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table, or nothing for no rows. A field that a row lacks is empty."""
    if not rows:
        return ""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_shown(row.get(field)) for field in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(facts: list[dict[str, Any]], bandwidth: list[dict[str, Any]]) -> str:
    if not facts:
        return "The machine is not known."
    found = facts[0]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    copied = f" A copy moves {bandwidth[0]['bytes_per_second'] / 1e9:.0f} GB/s." if bandwidth else ""
    runtime = _shown(found["runtime"])
    return f"One {found['device']} of {found['devices']}, Python {found['python']}, {packages}, {runtime}.{copied}"


def _derived(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields that the tables show and the records spell otherwise."""
    derived: dict[str, Any] = {"flags": "+WHILE" if record["step"].endswith("+while") else "default"}
    if record["kind"] == "check":
        derived["check"] = f"{record['step']}: {record['name']}"
        derived["outcome"] = (
            "passed" if record["passed"] else f"**failed** {record.get('error', record.get('transfer', ''))}"
        )
        derived["accepted of drafted"] = f"{record.get('accepted', '')} of {record.get('drafted', '')}"
    if "context" in record:
        derived["context"] = "{} to {}".format(*record["context"])
    return derived


def _shown(value: Any) -> str:
    """Returns a value as a cell of one line, shortened."""
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= 200 else f"... {text[-196:]}"
