"""The one seam for choices by platform: code has one way for each kind of device; results are equal up to rounding."""

import contextlib
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, use_abstract_mesh

_GPUS = ("cuda", "rocm")


def by_platform(*args: Any, default: Callable[..., Any], **ways: Callable[..., Any]) -> Any:
    """Returns what the way of the platform makes of ``args``, as ``lax.platform_dependent`` does.

    That function traces all ways, which doubles the time that ``generate`` takes to trace. So it is asked only where
    the platform is not known yet: without a mesh and outside of ``platform_of``.

    Args:
      *args: what the way is called with.
      default: the way of platforms that have none.
      **ways: by platform: cpu, tpu, cuda or rocm.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return lax.platform_dependent(*args, default=default, **ways)
    if device.platform != "gpu":
        return ways.get(device.platform, default)(*args)
    of_gpus = {name: way for name, way in ways.items() if name in _GPUS}
    return lax.platform_dependent(*args, default=default, **of_gpus) if of_gpus else default(*args)


def platform_of(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which ``by_platform`` knows the platform of the first array of ``tree``.

    It changes nothing if a mesh is set, or if an array is traced: then the caller's ``jit`` decides where to run.
    """
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    traced = any(isinstance(x, Tracer) for x in leaves)
    if not leaves or traced or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    # A mesh of the device has JAX's own description of it, which kernels of the caller's may ask for.
    described = Mesh(np.array([next(iter(leaves[0].devices()))]), ("one",)).abstract_mesh.abstract_device
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def processor() -> tuple[str, int | None, tuple[str, ...]]:
    """Returns the host's architecture, its number of cores, and the model and abilities of the processor.

    JAX calls every CPU "cpu". Machines that share a folder must not share programs and times.
    """
    told = r"^(?:model name|flags|Features|CPU (?:implementer|part|variant))\s*: (.*)$"
    try:
        lines = re.findall(told, Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        lines = []
    return platform.machine(), os.cpu_count(), (platform.processor(), *sorted(set(lines)))
