"""Runs steps in processes of their own until a deadline, and keeps the summary up to date."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from specjax.commands.accelerator import summary
from specjax.commands.accelerator.records import Recorder, read_records, remove_records
from specjax.commands.accelerator.steps import WHILE, Step

MARGIN = 3.0  # seconds before the deadline at which the last process is ended
POLL = 0.2  # seconds between two looks at a process
LOG_END = 1500  # characters of a failed step's log that its record has


def run_all(
    folder: Path, steps: Mapping[str, Step], deadline: float, cache: Path, small: bool, command: list[str] | None = None
) -> bool:
    """Runs the steps and returns whether all checks passed.

    Args:
      folder: where records, logs and the summary go.
      steps: the steps by name, in order.
      deadline: the time, by ``time.monotonic``, at which this function returns at the latest.
      cache: the folder of JAX's compilation cache, which the steps share.
      small: run small models. A machine without an accelerator does so in any case.
      command: starts the process of a step; None is this package. The folder and the step's name are added.
    """
    for name in steps:
        remove_records(folder, name)
    passed, platform = True, None
    for name, step in steps.items():
        small = small or platform == "cpu"
        begin = time.monotonic()
        left = deadline - MARGIN - begin
        # 1. Run the step, or say why not.
        meaningless = WHILE in step.flags and platform == "tpu"
        if meaningless:
            status, reason = "skipped", "its flags are for a GPU"
        elif left < step.least:
            status, reason = "skipped", f"{max(left, 0):.0f} s are left, and the step needs {step.least:g} s"
        else:
            started = _command(folder, name, small) if command is None else [*command, str(folder), name]
            status, reason = run_step(folder, name, step, started, min(step.timeout, left), cache)
        # 2. Write down how it ended, before anything else can go wrong.
        seconds = round(time.monotonic() - begin, 1)
        Recorder(folder, name).write("step", "step", status=status, seconds=seconds, text=reason)
        failed = any(record["kind"] == "check" and not record["passed"] for record in read_records(folder, name))
        passed &= not failed and (status == "done" or not step.required or meaningless)
        platform = next((record["platform"] for record in read_records(folder, "facts", "machine")), platform)
        summary.write(folder)
    return passed


def _command(folder: Path, name: str, small: bool) -> list[str]:
    # -P: the current folder may hold another specjax.
    own = [sys.executable, "-P", "-m", "specjax.commands.accelerator", str(folder), "--only", name]
    return [*own, "--small"] if small else own


def run_step(folder: Path, name: str, step: Step, command: list[str], timeout: float, cache: Path) -> tuple[str, str]:
    """Runs a step's process, and returns how it ended, "done", "failed" or "timed out", and why."""
    log = folder / "logs" / f"{name.replace(' ', '_')}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        # A process group of its own, so that what the process starts can be ended with it.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(step, cache), process_group=0
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "timed out", f"ended after {timeout:.0f} s"
        finally:
            end(process)
    if status == 0:
        return "done", ""
    return "failed", f"exit status {status}: {log.read_text(encoding='utf-8', errors='replace')[-LOG_END:]}"


def end(process: subprocess.Popen) -> None:
    """Ends a process and its group, if it still runs. Waits a little, but not for a process that cannot be ended."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, sent)
            process.wait(MARGIN / 2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def environment(step: Step, cache: Path) -> dict[str, str]:
    """Returns the variables of a step's process: those of this one, the step's own, and the shared cache."""
    flags = " ".join([os.environ.get("XLA_FLAGS", ""), *step.flags]).strip()
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **shared, **step.environment, **({"XLA_FLAGS": flags} if flags else {})}
