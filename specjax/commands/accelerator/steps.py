"""The steps in order of worth: what each runs, in what environment, and for how long."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from specjax.commands.accelerator import checks, facts, speed, waits
from specjax.commands.accelerator.records import Recorder

EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # a GPU's float32 products have 10 bits, and a TPU's 8, by default
CPU = {"JAX_PLATFORMS": "cpu"}
# Loops run inside CUDA graphs too, so a round does not wait for the host.
WHILE = "--xla_gpu_enable_command_buffer=+WHILE"
TRACED = "--xla_enable_command_buffers_during_profiling=true"


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the run, in a process of its own.

    Attributes:
      run: ``run(record, small)``.
      timeout: seconds after which the process is ended.
      least: the step is skipped with fewer seconds left.
      environment: variables of the process.
      flags: XLA flags of the process.
      required: the exit status tells whether this step ran to its end.
    """

    run: Callable[[Recorder, bool], None]
    timeout: float
    least: float = 20
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    required: bool = False


def _check(pair: str, few: bool, record: Recorder, small: bool) -> None:
    cases = (checks.FEW if few or small else checks.CASES)[pair]
    most = checks.SMALL_ROWS if small else max(case.rows for case in cases)
    checks.run(record, pair, [case._replace(rows=min(case.rows, most)) for case in cases])


def _speed(shape: str, batches: tuple[int, ...], quantised: bool) -> Callable[[Recorder, bool], None]:
    return functools.partial(speed.run, shape=shape, batches=batches, quantised=quantised)


STEPS = {
    "facts": Step(facts.run, 60, 5),
    checks.REFERENCE: Step(checks.reference, 80, 5, {**EXACT, **CPU}, required=True),
    "tiny": Step(functools.partial(_check, "tiny", False), 80, environment=EXACT, required=True),
    "shipped": Step(functools.partial(_check, "shipped", False), 110, environment=EXACT, required=True),
    "tiny+while": Step(functools.partial(_check, "tiny", True), 60, 20, EXACT, (WHILE,), required=True),
    "1b": Step(_speed("1b", (1,), True), 120, 40),
    "8b": Step(_speed("8b", (1,), True), 150, 50),
    "waits": Step(waits.run, 60, flags=(TRACED,)),
    "waits+while": Step(waits.run, 60, flags=(TRACED, WHILE)),
    "1b+while": Step(_speed("1b", (1,), False), 100, 40, flags=(WHILE,)),
    "1b rows": Step(_speed("1b", (8, 32), False), 150, 40),
    "8b rows": Step(_speed("8b", (8, 32), False), 150, 50),
    "8b+while": Step(_speed("8b", (1,), False), 120, 50, flags=(WHILE,)),
}
