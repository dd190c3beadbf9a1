"""Plots as inline SVG: lines and points over linear or logarithmic axes, and bars."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 520, 320  # of a plot, in units of the SVG's view box
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44  # margins for the axes
COLOURS = ("#0072b2", "#d55e00", "#00946b", "#a2508a", "#8a6d00", "#56707f")  # of Okabe and Ito, darker
BAR, GAP = 22, 6  # height of a bar, and between two
NAMES, VALUES = 190, 90  # width of the names and of the values beside bars
Points = Sequence[tuple[float, float]]


def lines(
    x_name: str,
    y_name: str,
    series: Mapping[str, Points],
    *,
    log_x: bool = False,
    log_y: bool = False,
    guides: Mapping[str, Points] | None = None,
    joined: bool = True,
) -> str:
    """Returns a plot as an ``<svg>`` element, followed by its legend.

    Args:
      x_name, y_name: names of the axes.
      series: finite points by name, above 0 on logarithmic axes; at least one point in all.
      log_x, log_y: whether an axis is logarithmic.
      guides: dashed lines by name, for bounds.
      joined: join the points of a series by lines.
    """
    guides = guides or {}
    points = [point for each in (*series.values(), *guides.values()) for point in each]
    place_x, ticks_x = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
    place_y, ticks_y = _axis([y for _, y in points] + ([] if log_y else [0.0]), HEIGHT - BOTTOM, TOP, log_y)
    body = [_grid(place_x, ticks_x, place_y, ticks_y)]
    for name, each in guides.items():
        body.append(f'<polyline class="guide" points="{_path(each, place_x, place_y)}"><title>{escape(name)}</title>')
        body.append("</polyline>")
    for number, (name, each) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if joined:
            path = _path(each, place_x, place_y)
            body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        for x, y in each:
            about = escape(f"{name}: {x_name} {x:.4g}, {y_name} {y:.4g}")
            body.append(f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="4" fill="{colour}">')
            body.append(f"<title>{about}</title></circle>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    body.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_name)}</text>'
    )
    return _svg(HEIGHT, body) + _legend(series, guides)


def bars(values: Mapping[str, float], unit: str) -> str:
    """Returns horizontal bars as an ``<svg>`` element.

    Args:
      values: at least one number above 0, by name.
      unit: of the values.
    """
    most, body = max(values.values()), []
    for number, (name, value) in enumerate(values.items()):
        top = GAP + number * (BAR + GAP)
        length = (WIDTH - NAMES - VALUES) * value / most
        body.append(f'<text x="{NAMES - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<rect x="{NAMES}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[0]}"/>')
        body.append(f'<text x="{NAMES + length + 6:.1f}" y="{top + 16}">{value:.3g} {escape(unit)}</text>')
    return _svg(GAP + len(values) * (BAR + GAP), body)


def _svg(height: int, body: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(body)}</svg>'


def _axis(values: Sequence[float], begin: float, end: float, log: bool) -> tuple[Callable[[float], float], list[float]]:
    """Returns the function from values to places, and the values that are named."""
    low, high = min(values), max(values)
    ticks = _powers(low, high) if log else _steps(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    scale = math.log if log else float
    length = (scale(high) - scale(low)) or 1.0
    return (lambda value: begin + (end - begin) * (scale(value) - scale(low)) / length), ticks


def _steps(low: float, high: float) -> list[float]:
    """Returns about five round numbers around a range."""
    raw = (high - low or abs(high) or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Returns powers of 2, or of 10 for a wide range, around a range of numbers above 0."""
    base = 2 if high / low <= 256 else 10
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


def _grid(place_x: Callable, ticks_x: list[float], place_y: Callable, ticks_y: list[float]) -> str:
    body = []
    for tick in ticks_x:
        x = f"{place_x(tick):.1f}"
        body.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick in ticks_y:
        y = place_y(tick)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    return "".join(body)


def _path(points: Points, place_x: Callable, place_y: Callable) -> str:
    return " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)


def _legend(series: Mapping[str, Points], guides: Mapping[str, Points]) -> str:
    items = [
        f'<li><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</li>'
        for number, name in enumerate(series)
    ]
    items += [f'<li><i class="dashed"></i>{escape(name)}</li>' for name in guides]
    return f'<ul class="legend">{"".join(items)}</ul>'
