"""How far two numbers may differ that should be equal."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


def default_tolerance(tree: Any) -> float:
    """Returns how much logits may differ, by the narrowest floating dtype of a tree."""
    dtypes = {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}
    return max(_TOLERANCES.get(dtype, 0.1) for dtype in dtypes)


def spread(x: Any) -> float:
    """Returns the size of what distinguishes the numbers: a median, so that banned tokens do not change it."""
    finite = x[np.isfinite(x)]
    if not finite.size:
        return 1.0
    deviation = 1.5 * np.median(np.abs(finite - np.median(finite)))
    return float(max(deviation, 0.1 * np.median(np.abs(finite)))) or 1.0


def finite(arrays: Iterable[Any]) -> bool:
    """Returns whether no number is NaN or positive infinity; banned tokens may have -inf."""
    return not any(np.isnan(x).any() or np.isposinf(x).any() for x in arrays)
