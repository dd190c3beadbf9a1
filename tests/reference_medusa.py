"""A slow twin of Medusa heads, from the paper (Cai et al. 2024, section 2.1.1): NumPy, one state at a time, float64."""

import numpy as np


def logits(tensors, head, state, vocab=None):
    """Returns the logits of one head after one state.

    Args:
      tensors: arrays by FasterDecoding's names, weights being ``[out, in]``; biases may be missing. With vLLM's
        ``token_map``, the output layers have the rows of those tokens only.
      head: its number, from 0.
      state: ``[d]``, the target's after its final norm.
      vocab: tokens of the target, for ``token_map``.
    """
    x, block = np.asarray(state, np.float64), 0
    while f"{head}.{block}.linear.weight" in tensors:
        y = np.zeros_like(x)
        for unit, row in enumerate(np.asarray(tensors[f"{head}.{block}.linear.weight"], np.float64)):
            y[unit] = row @ x
            if f"{head}.{block}.linear.bias" in tensors:
                y[unit] += float(tensors[f"{head}.{block}.linear.bias"][unit])
        x = x + y * (1 / (1 + np.exp(-y)))
        block += 1
    drafted = np.asarray(tensors[f"{head}.{block}.weight"], np.float64) @ x
    if "token_map" not in tensors:
        return drafted
    out = np.full(vocab, -np.inf)
    for u, token in enumerate(tensors["token_map"]):
        out[token] = drafted[u]
    return out
