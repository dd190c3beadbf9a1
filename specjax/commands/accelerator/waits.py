"""How often a round waits for the host, counted by the profiler.

A GPU waits for the host when XLA copies a condition to the host, so the copies from device to host are counted. A run
of a few rounds and a run of more rounds are traced, and the difference is divided by the number of rounds between them:
what comes before and after the loop drops out.

By default XLA launches kernels one by one while a profiler is on, and every condition then goes to the host. The steps
that run this module set ``--xla_enable_command_buffers_during_profiling=true``, so CUDA graphs run as they do without a
profiler.
"""

import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import specjax
from specjax.commands.accelerator import pairs
from specjax.commands.accelerator.records import Recorder

Counts = Counter[tuple[str, str]]
"""Numbers of events by plane and name."""

FEW, MANY = 4, 20  # rounds of the two traced runs
SHOWN = 30  # events, the most frequent ones, that a record lists
DEVICE, HOST = "/device:GPU", "/host:"
COPY = re.compile(r"Memcpy(D2H|DtoH)")
WAIT = re.compile(r"(Stream|Event|Ctx)Synchronize")
LAUNCH = re.compile(r"(Launch\w*Kernel|GraphLaunch)")


def run(record: Recorder, small: bool) -> None:
    """Writes a figure for plain decoding and for some drafters of the shipped pair, one row, greedily."""
    pair = pairs.open_pair("shipped")
    for kind in ("model",) if small else ("model", "none", "ngram"):
        if kind not in (*pair.drafters, "none"):
            continue
        facts = {"pair": "shipped", "dtype": "float32", "batch": 1, "drafter": kind}
        try:
            found = count_waits(pair, pair.drafters.get(kind))
        except Exception as error:
            found = {"waits_per_round": None, "text": f"not counted: {type(error).__name__}: {error}"[:2000]}
        record.write("figure", f"waits {kind}", **facts, **found)


def count_waits(pair: pairs.Pair, drafter: Any) -> dict[str, Any]:
    """Traces two runs and returns ``waits_per_round`` and other counts per round; see the module."""

    def ready() -> specjax.State:
        sampling = specjax.Sampling(temperature=0.0)
        # No row ends while it is traced, since a round emits at most g + 1 tokens.
        most = (MANY + 1) * (pairs.NUM_DRAFT + 1)
        state = specjax.prefill(
            pair.target,
            pair.prompts_bt[:1],
            pair.length_b[:1],
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=most,
            slots=2 * pairs.SLOTS,
            fixed=True,
        )
        return jax.block_until_ready(state)

    for _ in range(3):  # XLA records CUDA graphs in the first runs
        jax.block_until_ready(specjax.run(pair.target, ready(), drafter=drafter, rounds=FEW))
    counted: list[Counts] = []
    for rounds in (FEW, MANY):
        state = ready()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=_options()):
                jax.block_until_ready(specjax.run(pair.target, state, drafter=drafter, rounds=rounds))
            (file,) = Path(folder).rglob("*.xplane.pb")
            counted.append(count_events(jax.profiler.ProfileData.from_file(str(file))))
    return per_round(counted[0], counted[1], MANY - FEW)


def _options() -> Any:
    """Returns options without Python's own calls, which would fill the trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def count_events(profile: Any) -> Counts:
    """Counts the events of a ``jax.profiler.ProfileData``. Of a GPU's plane, only the lines of its streams count."""
    counts: Counts = Counter()
    for plane in profile.planes:
        for line in plane.lines:
            if plane.name.startswith(DEVICE) and not line.name.startswith("Stream"):
                continue  # such a line sums up what others show
            counts.update((plane.name, event.name) for event in line.events)
    return counts


def per_round(few: Counts, many: Counts, rounds: int) -> dict[str, Any]:
    """Returns the counts per round of two traces that are ``rounds`` rounds apart.

    ``waits_per_round`` is the number of copies from the device to the host, or None without a GPU's plane in the trace.
    """
    more = {key: (many[key] - few[key]) / rounds for key in {*few, *many}}

    def total(plane: str, wanted: re.Pattern[str] | None, unwanted: re.Pattern[str] | None = None) -> float:
        return sum(
            count
            for (where, name), count in more.items()
            if where.startswith(plane)
            and (wanted is None or wanted.search(name))
            and (unwanted is None or not unwanted.search(name))
        )

    most = sorted(((count, *key) for key, count in more.items() if count), reverse=True)[:SHOWN]
    listed = {"events_per_round": [f"{plane} {name}: {count:g}" for count, plane, name in most]}
    if not any(plane.startswith(DEVICE) for plane, _ in many):
        return {"waits_per_round": None, "text": "not counted: the trace has no plane of a GPU", **listed}
    return {
        "waits_per_round": total(DEVICE, COPY),
        "synchronisations_per_round": total(HOST, WAIT),
        "launches_per_round": total(HOST, LAUNCH),
        "kernels_per_round": total(DEVICE, None, re.compile("^Mem(cpy|set)")),
        "text": "CUDA graphs on while profiling" if _graphs_stay_on() else "CUDA graphs off while profiling",
        **listed,
    }


def _graphs_stay_on() -> bool:
    return "xla_enable_command_buffers_during_profiling=true" in os.environ.get("XLA_FLAGS", "")
