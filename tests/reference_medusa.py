"""A slow twin of Medusa heads, from the paper (Cai et al. 2024, section 2.1.1): NumPy, one state at a time, float64."""

import numpy as np


def logits(tensors, head, state):
    """Returns the logits of one head after one state.

    Args:
      tensors: arrays by the published names, weights being ``[out, in]``.
      head: its number, from 0.
      state: ``[d]``, the target's after its final norm.
    """
    x, block = np.asarray(state, np.float64), 0
    while f"{head}.{block}.linear.weight" in tensors:
        y = np.zeros_like(x)
        for unit, row in enumerate(np.asarray(tensors[f"{head}.{block}.linear.weight"], np.float64)):
            y[unit] = row @ x + float(tensors[f"{head}.{block}.linear.bias"][unit])
        x = x + y * (1 / (1 + np.exp(-y)))
        block += 1
    return np.asarray(tensors[f"{head}.{block}.weight"], np.float64) @ x
