"""Runs steps in processes of their own until a deadline, and keeps the summary up to date."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from specjax.commands.accelerator import summary
from specjax.commands.accelerator.records import Recorder, read_records, remove_records
from specjax.commands.accelerator.steps import WHILE, Step

MARGIN = 3.0  # seconds before the deadline at which the last process is ended
LOG_END = 1500  # characters of a failed step's log that its record has
OWN = (sys.executable, "-P", "-m", "specjax.commands.accelerator")  # -P: the current folder may hold another specjax


def run_all(
    folder: Path,
    steps: Mapping[str, Step],
    deadline: float,
    cache: Path,
    small: bool = False,
    command: Sequence[str] = OWN,
) -> bool:
    """Runs the steps and returns whether all checks passed.

    Args:
      folder: where records, logs and the summary go.
      steps: the steps by name, in order. The step "facts" says what the machine is.
      deadline: the time, by ``time.monotonic``, at which this function returns at the latest.
      cache: the folder of JAX's compilation cache, which the steps share.
      small: run small models. After the step "facts", a machine without an accelerator does so in any case.
      command: starts the process of a step, with the arguments ``FOLDER --only STEP [--small]``.
    """
    for name in steps:
        remove_records(folder, name)
    passed, platform = True, None
    try:
        for name, step in steps.items():
            begin = time.monotonic()
            left = deadline - MARGIN - begin
            # 1. Run the step, or say why not.
            meaningless = WHILE in step.flags and platform == "tpu"
            if meaningless:
                status, reason = "skipped", "its flags are for a GPU"
            elif left < step.least:
                status, reason = "skipped", f"{max(left, 0):.0f} s are left, and the step needs {step.least:g} s"
            else:
                options = ["--small"] if small or platform == "cpu" else []
                started = [*command, str(folder), "--only", name, *options]
                variables = environment(step, cache, on_cpu=platform == "cpu")
                status, reason = run_step(folder, name, started, variables, min(step.timeout, left))
            # 2. Write down how it ended, before anything else can go wrong.
            seconds = round(time.monotonic() - begin, 1)
            Recorder(folder, name).write("step", "step", status=status, seconds=seconds, text=reason)
            failed = any(record["kind"] == "check" and not record["passed"] for record in read_records(folder, name))
            passed &= not failed and (status == "done" or not step.required or meaningless)
            platform = next((record["platform"] for record in read_records(folder, "facts", "machine")), None)
            summary.write(folder)
    finally:  # a signal may have ended this process in the midst of a step
        summary.write(folder)
    return passed


def run_step(
    folder: Path, name: str, command: Sequence[str], variables: Mapping[str, str], timeout: float
) -> tuple[str, str]:
    """Runs a step's process, and returns how it ended, "done", "failed" or "timed out", and why."""
    log = folder / "logs" / f"{name.replace(' ', '_')}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        # A process group of its own, so that what the process starts can be ended with it.
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, process_group=0)
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
    """Ends a process and all of its group, also what outlives it. Waits a little for a process that cannot be ended."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(MARGIN / 3)
        except ProcessLookupError:  # nothing of the group is left
            return
        except subprocess.TimeoutExpired:
            continue


def environment(step: Step, cache: Path, on_cpu: bool) -> dict[str, str]:
    """Returns the variables of a step's process: those of this one, the step's own, and the shared cache."""
    variables = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        **step.environment,
    }
    if step.flags:
        variables["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *step.flags]).strip()
    if on_cpu:  # a trial of the script, whose times mean nothing
        variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return variables
