"""What figures depend on: the device, the CPU's instruction set, bandwidth, arithmetic and memory."""

import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.planning import Hardware

CPUINFO = Path("/proc/cpuinfo")  # Linux
# The widest first. A name and the flag that says so.
INSTRUCTION_SETS = (
    ("AMX", "amx_bf16"),
    ("AVX-512", "avx512f"),
    ("AVX2", "avx2"),
    ("AVX", "avx"),
    ("SVE", "sve"),
    ("NEON", "asimd"),
)
ARRAY_BYTES = 2**28  # far more than a CPU's caches hold
SQUARE = 2048  # rows and columns of the matrices whose product measures arithmetic
TRIES = 7  # of each measurement, the fastest counts: both are bounds


def instruction_set(cpuinfo: Path = CPUINFO) -> str:
    """Returns the widest set of vector or matrix instructions of the CPU, such as "AMX" or "AVX2".

    Without a readable ``cpuinfo`` or a known flag, returns the architecture, such as "arm64".
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return next((name for name, flag in INSTRUCTION_SETS if flag in flags), platform.machine())


def facts(dtype: str) -> dict[str, Any]:
    """Returns what the machine is, for the heading of tables and for JSON. ``dtype``: of the models."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "instruction set": instruction_set(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "dtype": dtype,
    }


def heading(known: dict[str, Any]) -> str:
    """Returns one line with the facts."""
    cpu = f"CPU with {known['instruction set']}, {known['cores']} cores"
    return f"jax {known['jax']}, Python {known['python']}, {known['device']} ({cpu}), {known['dtype']}"


def _least_seconds(function: Callable[[Any], Any], x: Any) -> float:
    """Returns the least seconds of several calls, after one that compiles."""
    jax.block_until_ready(function(x))
    times = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        jax.block_until_ready(function(x))
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def measured_hardware(dtype: str) -> Hardware:
    """Returns this device's bandwidth and arithmetic, measured once in a process.

    The bandwidth is that of a sum over ``ARRAY_BYTES`` of float32. The arithmetic is that of a product of two square
    matrices of ``SQUARE`` rows.

    Args:
      dtype: of the product, a name such as "float32".
    """
    x = jnp.ones((ARRAY_BYTES // 4,), jnp.float32)
    bandwidth = ARRAY_BYTES / _least_seconds(jax.jit(jnp.sum), x)
    square = jnp.ones((SQUARE, SQUARE), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))  # as models multiply
    flops = 2 * SQUARE**3 / _least_seconds(product, square)
    return Hardware(bandwidth=bandwidth, flops={dtype: flops, "bfloat16": flops})


def roof(dtype: str) -> dict[str, float]:
    """Returns the measured bandwidth, and the arithmetic in a dtype, in the units of tables."""
    hardware = measured_hardware(dtype)
    return {"bandwidth GB/s": hardware.bandwidth / 1e9, "GFLOP/s": hardware.flops[dtype] / 1e9}


def peak_memory(program: Any) -> tuple[float, str]:
    """Returns the peak memory in bytes, and what it is a measure of.

    Args:
      program: the compiled program (``jax.stages.Compiled``), for devices whose allocator keeps no statistics.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"]), "peak of the device's allocator since the process began"
    analysis = program.memory_analysis()
    if analysis is None:
        return resident_bytes(), "peak resident set of the process"
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return float(total - analysis.alias_size_in_bytes), "the program's arguments, outputs and temporaries"


def free_bytes() -> float:
    """Returns the free memory of the device in bytes; on a CPU, that of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS knows all alone
    return float(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"))


def resident_bytes() -> float:
    """Returns the peak resident set of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in kB
