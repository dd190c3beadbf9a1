"""What a round of each width costs on this device, measured once for each target, drafter and batch."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from specjax.engine.adapt import PRIOR
from specjax.engine.kept import environment

FILE = "specjax_costs.json"
"""In JAX's folder of compiled programs (``jax_compilation_cache_dir``), if there is one: costs for later processes."""

_SECONDS, _ROUNDS = 0.3, 16  # of a plain run: the time of its rounds; and the most rounds if all drafts are accepted
_ALL_SECONDS, _REPEATS = 6.0, 4  # of all runs: about the most time, and the most repeats

_known: dict[Hashable, np.ndarray] = {}


def assumed(drafts: tuple[int, ...]) -> np.ndarray:
    """Returns costs for where nothing can be measured, as under the caller's ``jit``: each draft costs a tenth."""
    return 1 + 0.1 * np.asarray(drafts, np.float32)


def forced(widths: tuple[int, ...], number: int) -> np.ndarray:
    """Returns costs under which every round has the width ``widths[number]``."""
    return np.where(np.arange(len(widths)) == number, 1.0, np.inf).astype(np.float32)


Run = Callable[[np.ndarray, int], tuple[float, int]]
"""``run(cost_w, new_tokens)``: the seconds that so many tokens took under these costs, and the rounds."""


def measured(
    key: Hashable,
    lasting_key: Callable[[], str],
    drafts: tuple[int, ...],
    widths: tuple[int, ...],
    find_room: Callable[[], int],
    run: Run,
) -> np.ndarray:
    """Returns the time of a round of each width over that of a plain round; measures what is not known yet.

    Args:
      key: differs where programs do, in this process.
      lasting_key: ``key_of`` what is run, for the file.
      drafts: of rounds, 0 first (``adapt.drafts_of``).
      widths: the most drafts that these rounds keep (``adapt.kept_by``).
      find_room: returns the most tokens that a run may emit. If they are too few to measure, costs are assumed.
      run: runs the program.
    """
    if key in _known:
        return _known[key]
    room = find_room()
    if room < _least(widths):
        return assumed(drafts)
    lasting = lasting_key()
    unknown = [math.nan] * len(widths)
    # All processes must take the same decisions, and run as many rounds as the others: the first one's figures count.
    cost_w = _agreed(_read().get(lasting, unknown))
    if np.isnan(cost_w).any():
        seconds = _seconds(widths, room, run)
        cost_w = _agreed(seconds / seconds[0])
        # A machine that was busy gives costs under which nothing pays. They should not outlast that.
        if np.any([sum(PRIOR**i for i in range(width + 1)) > cost_w[n] for n, width in enumerate(widths) if width]):
            _write(lasting, cost_w.tolist())
    _known[key] = cost_w
    return cost_w


def _least(widths: tuple[int, ...]) -> int:
    """Returns how many tokens take at least three rounds, whatever is accepted."""
    return 2 * (widths[-1] + 1) + 1


def _agreed(values: Any) -> np.ndarray:
    array = np.asarray(values, np.float32)
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def _seconds(widths: tuple[int, ...], room: int, run: Run) -> np.ndarray:
    """Returns the seconds of a round of each width."""
    costs = [forced(widths, number) for number in range(len(widths))]
    for cost_w in costs:  # loads what is needed
        run(cost_w, 1)
    # 1. How many tokens are enough, and how many repeats there is time for. Rounds of useless drafts give one token
    # each, and may cost three times as much as plain ones.
    least = _least(widths)
    one, few = (float(_agreed(run(costs[0], new)[0])) for new in (1, least))
    plain = max(few - one, 0.01 * one) / (least - 1)
    new = min(max(int(_SECONDS / plain), least), _ROUNDS * (widths[-1] + 1), room)
    longest = one + new * plain * (1 + 3 * (len(widths) - 1))
    repeats = min(max(int(_ALL_SECONDS / longest), 1), _REPEATS)

    # 2. One plain round, and many of each width. In turn, so that a slow moment of the machine does not fall on one
    # width alone; and the least of several times, since noise only adds.
    asked = [(costs[0], 1), *((cost_w, new) for cost_w in costs)]
    runs = np.asarray([[run(*each) for each in asked] for _ in range(repeats)]).min(0)
    one, seconds_w, rounds_w = runs[0, 0], runs[1:, 0], runs[1:, 1]
    # 3. The prompt takes the same time in all of them. Where that is nearly all of the time, noise must not make a
    # round free.
    plain = max((seconds_w[0] - one) / (rounds_w[0] - 1), 0.01 * one)
    return np.maximum((seconds_w - (one - plain)) / rounds_w, 0.01 * one)


def key_of(widths: tuple[int, ...], *trees: Any) -> str:
    """Returns a text that differs where programs or devices do, and is the same in other processes."""
    leaves, structure = jax.tree.flatten(trees)
    text = re.sub(r" at 0x[0-9a-f]+", "", str(structure))
    parts = environment(), widths, text, [(str(jax.typeof(x)), _devices(x)) for x in leaves]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _devices(leaf: Any) -> list[str]:
    sharding = getattr(leaf, "sharding", None)
    return [] if sharding is None else sorted(device.device_kind for device in sharding.device_set)


def _file() -> Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    used = folder and jax.config.values["jax_enable_compilation_cache"] and "://" not in folder
    return Path(folder) / FILE if used else None


def _read() -> dict[str, list[float]]:
    path = _file()
    try:
        held = None if path is None else json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or another process writes it
        held = None
    return held if isinstance(held, dict) else {}


def _write(key: str, costs: list[float]) -> None:
    path = _file()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}")
        part.write_text(json.dumps(_read() | {key: costs}, indent=1))
        part.replace(path)
    except OSError:  # a folder that cannot be written to costs a second in each process, no more
        pass
