"""Flax modules as pure functions over nested dicts of arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.transformer.layers import declared_axes


@dataclasses.dataclass(frozen=True)
class Functional:
    """The pure functions of a kind of module.

    Attributes:
      make: ``make(config, dtype, rngs) -> module``. It must be a function or class at the top level of a Python module,
        and its config hashable: results are cached by both.
    """

    make: Callable[[Any, jnp.dtype, nnx.Rngs], nnx.Module]

    def init(self, config: Any, key: Array, dtype: jnp.dtype) -> Any:
        """Returns freshly drawn parameters; ``key`` is consumed."""
        return nnx.to_pure_dict(nnx.split(self.make(config, dtype, nnx.Rngs(params=key)))[1])

    def abstract(self, config: Any, dtype: jnp.dtype) -> Any:
        """Returns the parameters' shapes and dtypes without computing them."""
        return jax.eval_shape(lambda: self.init(config, jax.random.key(0), dtype))

    def axes(self, config: Any, dtype: jnp.dtype) -> Any:
        """Returns a tree like the parameters, with a tuple of ``Axis`` in place of each array."""
        return declared_axes(_split(self, config, dtype)[1])

    def bind(self, config: Any, params: Any, dtype: jnp.dtype) -> Any:
        """Returns the module over ``params``, for calls inside a traced function."""
        graph, state = _split(self, config, dtype)
        state = jax.tree.map(lambda x: x, state)  # a copy, since the next line writes into it and the cache keeps it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)


# Cached, since every trace of a pass binds a module and flax is slow to build one.
@functools.cache
def _split(functional: Functional, config: Any, dtype: jnp.dtype):
    return nnx.split(nnx.eval_shape(lambda: functional.make(config, dtype, nnx.Rngs(0))))
