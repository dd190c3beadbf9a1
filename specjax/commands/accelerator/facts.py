"""What the machine is: versions, device, memory, driver, and the bandwidth of a copy."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from specjax.commands.accelerator.records import Recorder

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers")
QUERIED = "name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.memory,power.limit"  # nothing is set


def run(record: Recorder, small: bool) -> None:
    """Writes the facts, and then the bandwidth."""
    device = jax.devices()[0]
    record.write(
        "fact",
        "machine",
        platform=device.platform,
        device=device.device_kind,
        devices=jax.device_count(),
        memory=_asked(lambda: device.memory_stats()["bytes_limit"]),
        runtime=_asked(lambda: device.client.platform_version),
        driver=_driver(),
        python=platform.python_version(),
        cores=os.cpu_count(),
        packages={name: _version(name) for name in PACKAGES},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    record.write("figure", "bandwidth", bytes_per_second=copy_bandwidth(small or device.platform == "cpu"))


def copy_bandwidth(small: bool) -> float:
    """Returns the bytes per second of an elementwise pass over a large array, bytes read and bytes written added."""
    size = 2**22 if small else 2**29  # int32: 16 MB or 2 GB, far more than a cache on the device holds
    calls, seconds = 10, []

    @functools.partial(jax.jit, donate_argnums=0)
    def negated(x: Array) -> Array:
        return -x

    x = jnp.arange(size, dtype=jnp.int32)
    for _ in range(5):
        x = jax.block_until_ready(negated(x))
        begin = time.perf_counter()
        for _ in range(calls):  # queued one after the other, so the dispatch of a call hides behind the one before
            x = negated(x)
        jax.block_until_ready(x)
        seconds.append(time.perf_counter() - begin)
    return 2 * 4 * size * calls / float(np.median(seconds))


def _asked(question: Callable[[], Any]) -> Any:
    """Returns the answer, or "not known" where the device or this version of JAX has none."""
    try:
        return question()
    except Exception:
        return "not known"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Returns what ``nvidia-smi`` reports. It is only asked."""
    if not shutil.which("nvidia-smi"):
        return "not known"
    command = ["nvidia-smi", f"--query-gpu={QUERIED}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
