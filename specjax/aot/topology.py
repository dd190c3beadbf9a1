"""Topologies that can be compiled for without a device: TPUs through libtpu, an H100 through jax's CUDA plugin."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from specjax.planning import HARDWARE, Hardware


@dataclasses.dataclass(frozen=True)
class Topology:
    """A group of devices to compile for.

    Attributes:
      name: a key of ``TOPOLOGIES``; for TPUs also libtpu's name.
      platform: "tpu" or "cuda".
      hardware: a key of ``specjax.planning.HARDWARE``.
      devices: how many devices the topology has. Programs for fewer use its first devices.
      clock: cycles per second, for XLA:TPU's estimates; None for GPUs, where XLA makes none.
    """

    name: str
    platform: str
    hardware: str
    devices: int
    clock: float | None = None

    @property
    def figures(self) -> Hardware:
        return HARDWARE[self.hardware]

    @property
    def gpu(self) -> bool:
        return self.platform == "cuda"


# Clocks: v5e has 197e12 bf16 operations per second from 4 units of 128 x 128, which is 1.5 GHz
# (https://docs.cloud.google.com/tpu/docs/v5e). v6e's is not published: 918e12 from 4 units of 256 x 256 is 1.75 GHz.
TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("v5e:2x2", "tpu", "v5e", 4, 1.5e9),
        Topology("v6e:2x2", "tpu", "v6e", 4, 1.75e9),
        Topology("h100", "cuda", "h100", 1),
    )
}

# libtpu reads these when it is loaded. There is no device, so no lock and no question to a cloud's metadata server.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}

# XLA's own description of an H100 (xla/backends/gpu/target_config/specs/h100_sxm.txtpb), with versions: without them,
# or with a driver below 12.3, XLA keeps control flow out of CUDA graphs.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def choose(name: str, tensor: int = 1) -> Topology:
    """Returns a topology by its name.

    Raises:
      ValueError: the name is unknown, the topology has fewer than ``tensor`` devices, or its compiler is not installed.
    """
    if name not in TOPOLOGIES:
        raise ValueError(f"--topology is {name!r}; choose from {', '.join(TOPOLOGIES)}")
    topology = TOPOLOGIES[name]
    if not 1 <= tensor <= topology.devices:
        raise ValueError(f"--tensor is {tensor}; {name} has {topology.devices} devices: give 1 to {topology.devices}")
    missing = missing_compiler(topology)
    if missing:
        raise ValueError(missing)
    return topology


def missing_compiler(topology: Topology) -> str:
    """Returns what to install to compile for the topology; empty if it is there."""
    if topology.gpu:
        found = any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))
        needs, extra = "jax's CUDA plugin", "cuda"
    else:
        found, needs, extra = importlib.util.find_spec("libtpu") is not None, "libtpu", "aot"
    return "" if found else f"{topology.name} needs {needs}, which is not installed: pip install -e '.[{extra}]'"


def prepare(topology: Topology, flags: str = "") -> None:
    """Prepares this process to compile for the topology; call it before jax has made any backend.

    Args:
      topology: the topology.
      flags: more flags of XLA, separated by spaces. XLA ends the process at a flag that it does not know.
    """
    jax.config.update("jax_platforms", "cpu")  # the backend of the process itself
    if topology.platform == "tpu":
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    if flags:
        # libtpu has a variable of its own: it does not read the flags of the other.
        name = "XLA_FLAGS" if topology.gpu else "LIBTPU_INIT_ARGS"
        os.environ[name] = f"{os.environ.get(name, '')} {flags}".strip()


def devices(topology: Topology) -> list[Any]:
    """Returns the topology's devices, which need not exist."""
    if topology.gpu:
        described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    return list(described.devices)
