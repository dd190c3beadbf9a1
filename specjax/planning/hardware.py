"""Figures of accelerators for ``roofline``, each with its public source."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device and its links to other devices.

    Attributes:
      bandwidth: bytes per second that the device reads from its memory.
      flops: dense operations per second by dtype, a key of ``roofline.BYTES``. A dtype that is missing here is
        multiplied in bfloat16.
      memory: bytes.
      link: bytes per second that a device sends one way, to a switch or along one axis of a torus.
      latency: seconds of a collective through a switch, or of each hop in a torus.
      torus: number of axes of the torus, or 0 for a switch.
      island: number of devices that these links join.
      beyond: ``link`` and ``latency`` of collectives over several islands. None: such collectives are not modelled.
      overlaps: whether the device reads and computes at the same time, or else in turn.
    """

    bandwidth: float
    flops: dict[str, float]
    memory: float = math.inf
    link: float = 0.0
    latency: float = 0.0
    torus: int = 0
    island: int = 1
    beyond: tuple[float, float] | None = None
    overlaps: bool = True


HARDWARE = {
    # SXM, 80 GB. Memory, bandwidth, NVLink and peaks: https://www.nvidia.com/en-us/data-center/h100/
    # That page gives NVLink both ways (900 GB/s), and peaks with sparsity; both are halved here.
    # Latency: 32 kB over 2, 4 and 8 devices took 8.7, 9.2 and 11.8 us with vLLM's all-reduce; NCCL, which XLA calls,
    # may take longer: https://github.com/sgl-project/sglang/pull/2904
    # Beyond 8: one 400 Gb/s adapter per device, https://docs.nvidia.com/dgx/dgxh100-user-guide/. A ring over whole
    # machines uses all eight adapters. 25 us is NCCL's own estimate for 128 bytes, https://github.com/NVIDIA/nccl/issues/1453
    "h100": Hardware(
        memory=80e9,
        bandwidth=3.35e12,
        flops={"float32": 494e12, "bfloat16": 989e12, "float8": 1979e12, "int8": 1979e12},
        link=450e9,
        latency=10e-6,
        island=8,
        beyond=(400e9, 25e-6),
    ),
    # Peaks, memory, bandwidth and pod: https://docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e. They give the
    # interconnect of a chip both ways, all ports together (400, 1200 and 800 GB/s). ``link`` is one port, one way.
    # Latency of a hop, and v5p's int8: https://jax-ml.github.io/scaling-book/sharding/ and .../tpus/
    "v5e": Hardware(
        memory=16e9,
        bandwidth=819e9,
        flops={"bfloat16": 197e12, "int8": 393e12},
        link=50e9,
        latency=1e-6,
        torus=2,
        island=256,
    ),
    "v5p": Hardware(
        memory=95e9,
        bandwidth=2765e9,
        flops={"bfloat16": 459e12, "float8": 459e12, "int8": 918e12},
        link=100e9,
        latency=1e-6,
        torus=3,
        island=8960,
    ),
    "v6e": Hardware(
        memory=32e9,
        bandwidth=1638e9,
        flops={"bfloat16": 918e12, "int8": 1836e12},
        link=100e9,
        latency=1e-6,
        torus=2,
        island=256,
    ),
}
