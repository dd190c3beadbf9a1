"""What the folders of all heads share: how parameters are read, and tables that are repeated from the target."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax.checkpoint.models import placed, read_params
from specjax.hf.weights import Parameter
from specjax.sharding import Rules, gathered
from specjax.types import LanguageModel

_COMPARED = 1024  # rows at a time
D = TypeVar("D")


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Puts a path in front of the message of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_onto(mesh: Mesh | None, rules: Rules, drafter: D, params: Any) -> D:
    """Returns the drafter with parameters that are read, by each process the parts that its devices hold.

    Args:
      mesh, rules: as for ``specjax.load``, errors too.
      drafter: its parameters are shapes and dtypes.
      params: a tree like them of ``Parameter``.
    """
    assert dataclasses.is_dataclass(drafter) and not isinstance(drafter, type)
    return dataclasses.replace(drafter, params=read_params(params, placed(drafter, mesh, rules)))


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
    unembed, like = target.unembed, target.embedding_spec

    def rows(start: int, end: int) -> jax.Array:
        unit_bd = jax.nn.one_hot(jnp.arange(start, end), like.shape[-1], dtype=like.dtype)
        with jax.default_matmul_precision("highest"):
            return unembed(target.params, unit_bd[None])[0].astype(like.dtype)

    return _equal(kernel_dv, rows)


def _equal(parameter: Parameter, rows: Callable[[int, int], jax.Array]) -> bool:
    """Returns whether a table equals the one whose rows from start to end ``rows`` returns."""
    for start in range(0, parameter.shape[0], _COMPARED):
        end = min(start + _COMPARED, parameter.shape[0])
        known = gathered(rows(start, end))
        if not np.array_equal(parameter.read(known.dtype, (slice(start, end),)), known):
            return False
    return True
