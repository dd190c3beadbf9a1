"""Parameters are finite: the check of everything that is read from a folder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2**16  # numbers at a time, so that intermediate results stay in a core's cache


def check_finite(path: Any, array: np.ndarray | jax.Array) -> None:
    """Raises ValueError if a parameter holds a NaN or an infinite number, with which a model has no law.

    Arrays in the host's memory are read once, at half the time of a copy. Others are reduced where they are.

    Args:
      path: the parameter's path, as ``jax.tree_util`` gives it.
      array: the parameter. Integers are finite.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return
    on_host = isinstance(array, np.ndarray) or (
        array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())
    )
    if on_host:
        parts = [array] if isinstance(array, np.ndarray) else [shard.data for shard in array.addressable_shards]
        finite = all(_is_finite(np.asarray(part)) for part in parts)
    else:
        finite = bool(jnp.isfinite(array).all())
    if not finite:
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path)} holds NaN or an infinite number in {array.dtype}; the file is "
            "damaged, download it again, or the numbers need a wider dtype"
        )


def _is_finite(array: np.ndarray) -> bool:
    """Returns whether all numbers are finite. A number whose exponent has all bits set is not."""
    limits = jnp.finfo(array.dtype)
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    exponent = bits.dtype.type((1 << limits.nexp) - 1 << limits.nmant)
    room = np.empty(_BLOCK, bits.dtype)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        if np.bitwise_and(block, exponent, out=room[: block.size]).max() == exponent:
            return False
    return True
