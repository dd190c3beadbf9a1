"""Prompts that are padded on the left."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def from_left_padded(tokens: Any, mask: Any) -> tuple[Array, Array]:
    """Returns left-padded prompts right-padded, as ``specjax.generate`` takes them: tokens and lengths.

    Works under ``jit``, too. There the mask's values are not known, and only its shape is checked.

    Args:
      tokens: integers ``[b, t]``, each row ending with its last token.
      mask: bool or integers ``[b, t]``, whether a place holds a token. The tokens of a row are its last places.

    Returns:
      int32 ``[b, t]``, padded with zeros, and int32 ``[b]``.

    Raises:
      ValueError: the shapes differ, or a row of the mask is no row of padding and then tokens.
    """
    tokens_bt, mask_bt = jnp.asarray(tokens), jnp.asarray(mask)
    if tokens_bt.ndim != 2 or tokens_bt.shape != mask_bt.shape:
        raise ValueError(f"tokens is {tokens_bt.shape} and mask is {mask_bt.shape}; give [rows, width] for both")
    if not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
        raise ValueError(f"tokens is {tokens_bt.dtype}; give integers")
    mask_bt = mask_bt != 0
    if not isinstance(mask_bt, Tracer):
        held_bt = np.asarray(mask_bt)
        wrong = np.flatnonzero((held_bt[:, :-1] & ~held_bt[:, 1:]).any(axis=1) | ~held_bt.any(axis=1))
        if wrong.size:
            raise ValueError(
                f"row {wrong[0]} of mask is {held_bt[wrong[0]].astype(int).tolist()}; give zeros for the padding on "
                "the left, then ones for the tokens, at least one"
            )
    width, length_b = tokens_bt.shape[1], jnp.sum(mask_bt, axis=1, dtype=jnp.int32)
    place_1t = jnp.arange(width, dtype=jnp.int32)[None]
    from_bt = jnp.minimum(place_1t + (width - length_b)[:, None], width - 1)
    moved_bt = jnp.take_along_axis(tokens_bt.astype(jnp.int32), from_bt, axis=1)
    return jnp.where(place_1t < length_b[:, None], moved_bt, 0), length_b
