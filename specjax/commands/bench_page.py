"""The HTML page of ``bench --html``: plots and tables of the figures, in one file."""

from collections.abc import Mapping
from html import escape
from typing import Any

from specjax.commands import plots

Rows = list[dict[str, Any]]
TITLES = {
    "width": "Target pass by width",
    "round": "A round against its parts",
    "slots": "300 slots in use, by slots allocated",
    "speed": "Speed-up over plain decoding on held-out modules",
    "drafters": "Drafters on held-out modules",
    "sweep": "Decoding by batch and context",
    "startup": "Time to first token, compilation and memory",
    "acceptance": "Acceptance by vLLM's definitions",
    "rollback": "The target's pass with and without rollback",
    "peer": "Beside other libraries",
    "prompts": "Prompts of files",
}
MODES = ("fixed", "adaptive")


def render(found: Mapping[str, Any]) -> str:
    """Returns a self-contained page.

    Args:
      found: the content of ``--json``: the facts of the machine, and the rows of each benchmark that ran.
    """
    facts = "".join(f"<span>{escape(name)} <b>{_value(value)}</b></span>" for name, value in found["machine"].items())
    sections = "".join(
        f"<section><h2>{TITLES[what]}</h2>{_plots(what, rows, found['machine'])}{_table(rows)}</section>\n"
        for what, rows in found.items()
        if what != "machine"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>specjax bench</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>specjax bench</h1>
<p class="facts">{facts}</p>
{sections}</body>
</html>
"""


def _plots(what: str, rows: Rows, machine: Mapping[str, Any]) -> str:
    """Returns the figures of a benchmark; "" for a benchmark that has only a table."""
    if what == "sweep":
        made = {
            "Speed-up by batch": _speed_ups(rows, " speed-up"),
            "Time of a step and a round against the floor, by batch": _times(rows),
            "Roofline: arithmetic by intensity": _roofline(rows, machine),
        }
    elif what == "speed":
        made = {"Speed-up by batch": _speed_by_batch(rows)}
    elif what == "acceptance":
        named = {f"g = {row['num_draft']}, temperature {row['temperature']:g}": row for row in rows}
        made = {"Acceptance rate by position of the draft": _by_position(named)}
    elif what == "width":
        points = [(row["tokens"], row["ms"]) for row in rows]
        made = {"Milliseconds by tokens of a pass": plots.lines("tokens", "ms", {"target pass": points})}
    elif what == "peer":
        rates = {f"{row['library']}: {row['decoding']}": row["tokens/s"] for row in rows if row["tokens/s"]}
        made = {"Tokens per second": plots.bars(rates, "tokens/s")}
    elif what == "prompts":
        made = _by_category(rows)
    else:
        return ""
    figures = (f"<figure><figcaption>{escape(name)}</figcaption>{plot}</figure>" for name, plot in made.items())
    return f'<div class="plots">{"".join(figures)}</div>'


def _grouped(rows: Rows, *names: str) -> dict[str, Rows]:
    """Returns rows by their values in columns, under names such as "context 256, g = 4".

    A column with the same value in all rows is left out of the names.
    """
    shown = [name for name in names if len({row[name] for row in rows}) > 1]
    groups: dict[str, Rows] = {}
    for row in rows:
        key = ", ".join(f"{name.replace('num_draft', 'g =')} {row[name]:g}" for name in shown)
        groups.setdefault(key, []).append(row)
    return groups


def _named(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _speed_ups(rows: Rows, column: str) -> str:
    series = {
        _named(mode, key): [(row["batch"], row[f"{mode}{column}"]) for row in group]
        for key, group in _grouped(rows, "context", "num_draft").items()
        for mode in MODES
    }
    return plots.lines("batch", "speed-up over plain", series, log_x=True, guides=_level(rows))


def _level(rows: Rows) -> dict[str, plots.Points]:
    batches = [row["batch"] for row in rows]
    return {"plain decoding": [(min(batches), 1.0), (max(batches), 1.0)]}


def _speed_by_batch(rows: Rows) -> str:
    series = {
        _named(mode, key): [(row["batch"], row[column]) for row in group]
        for key, group in _grouped(rows, "temperature", "num_draft").items()
        for mode, column in (("fixed", "speed-up"), ("adaptive", "adaptive speed-up"))
    }
    return plots.lines("batch", "speed-up over plain", series, log_x=True, guides=_level(rows))


def _times(rows: Rows) -> str:
    series, guides = {}, {}
    for key, group in _grouped(rows, "context", "num_draft").items():
        for name in ("plain", "round"):
            series[_named(name, key)] = [(row["batch"], row[f"{name} ms"]) for row in group]
            guides[_named(f"floor of {name}", key)] = [(row["batch"], row[f"{name} floor ms"]) for row in group]
    return plots.lines("batch", "ms", series, log_x=True, log_y=True, guides=guides)


def _roofline(rows: Rows, machine: Mapping[str, Any]) -> str:
    series = {
        _named(name, key): [(row[f"{name} FLOP/byte"], row[f"{name} GFLOP/s"]) for row in group]
        for key, group in _grouped(rows, "context", "num_draft").items()
        for name in ("plain", "round")
    }
    bandwidth, peak = machine["bandwidth GB/s"], machine["GFLOP/s"]
    intensities = [x for points in series.values() for x, _ in points]
    ridge = peak / bandwidth
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    roof = [(low, low * bandwidth), (ridge, peak), (high, peak)]
    bound = {"bound of bandwidth and arithmetic": roof}
    return plots.lines("FLOP per byte", "GFLOP/s", series, log_x=True, log_y=True, guides=bound)


def _by_position(named: Mapping[str, dict[str, Any]]) -> str:
    series = {
        name: list(enumerate(map(float, row["per-position acceptance rate"].split()), 1)) for name, row in named.items()
    }
    return plots.lines("position", "acceptance rate", series)


def _by_category(rows: Rows) -> dict[str, str]:
    """Returns the speed-ups of each way to decode by category, and the acceptance of drafters over all of them."""
    speed_ups: dict[str, dict[str, float]] = {}
    last: dict[str, dict[str, Any]] = {}  # the last category is all of them
    for row in rows:
        name = f"{row['decoding']}, temperature {row['temperature']:g}"
        if row["decoding"] != "plain":
            speed_ups.setdefault(name, {})[row["category"]] = row["speed-up"]
        if row["per-position acceptance rate"] is not None:
            last[name] = row
    made = {f"Speed-up over plain decoding: {name}": plots.bars(each, "") for name, each in speed_ups.items()}
    return made | {"Acceptance rate by position of the draft": _by_position(last)}


def _table(rows: Rows) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{_value(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(_value, value))
    return escape(f"{value:.3g}" if isinstance(value, float) else str(value))


_STYLE = """
body { margin: 0 auto; padding: 24px; max-width: 1120px; background: #fff; color: #1c2128;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 24px; }
h2 { margin: 28px 0 8px; font-size: 18px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0; color: #56606c; font-size: 13px; }
.facts b { color: #1c2128; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px 14px; border: 1px solid #d9dce1; border-radius: 6px; }
figcaption { margin-bottom: 6px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #1c2128; }
.grid { stroke: #e4e7eb; }
.guide { fill: none; stroke: #56606c; stroke-width: 1.5; stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  list-style: none; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 5px; border-radius: 2px; }
.legend i.dashed { height: 0; border-top: 2px dashed #56606c; vertical-align: 4px; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid #e4e7eb; text-align: left; white-space: nowrap; }
"""
