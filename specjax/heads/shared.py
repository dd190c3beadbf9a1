"""Tables that a folder of draft heads repeats from its target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specjax.hf.weights import Parameter
from specjax.types import LanguageModel

_COMPARED = 1024  # rows at a time


def is_targets_embedding(table_vd: Parameter, target: LanguageModel) -> bool:
    """Returns whether a stored embedding ``[v, d]`` is the target's, bit for bit in the target's dtype.

    The target has ``embed``.
    """
    assert target.embed is not None
    embed = target.embed
    return _equal(table_vd, lambda start, end: embed(target.params, jnp.arange(start, end, dtype=jnp.int32)[None])[0])


def is_targets_head(kernel_dv: Parameter, target: LanguageModel) -> bool:
    """Returns whether a stored output head ``[d, v]`` is the target's, bit for bit in the target's dtype.

    The target has ``embed`` and ``unembed``. Rows of its kernel are the logits of unit vectors.
    """
    assert target.unembed is not None
    unembed, like = target.unembed, target.embedded

    def rows(start: int, end: int) -> jax.Array:
        unit_bd = jax.nn.one_hot(jnp.arange(start, end), like.shape[-1], dtype=like.dtype)
        with jax.default_matmul_precision("highest"):
            return unembed(target.params, unit_bd[None])[0].astype(like.dtype)

    return _equal(kernel_dv, rows)


def _equal(parameter: Parameter, rows: Callable[[int, int], jax.Array]) -> bool:
    """Returns whether a table equals the one whose rows from start to end ``rows`` returns."""
    table = parameter.read(rows(0, 1).dtype)
    starts = range(0, len(table), _COMPARED)
    return all(np.array_equal(table[i : i + _COMPARED], rows(i, min(i + _COMPARED, len(table)))) for i in starts)
