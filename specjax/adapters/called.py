"""A foreign model is called, and what it returns is checked as it is traced."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.adapters.layout import Layout
from specjax.types import Output

Call = Callable[..., Any]
"""``call(model, tokens, positions, cache, attention_mask) -> (logits, cache)`` or ``(logits, cache, states)``."""


def invoked(model: Any, tokens: Array, positions: Array, cache: Any, attention_mask: Array) -> Any:
    """Calls a model that is called itself, as most are."""
    return model(tokens, positions, cache, attention_mask)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Calls functions of a model with its parameters.

    Attributes:
      graph: the structure of an ``nnx`` module, or None if the model is a pytree of parameters.
    """

    graph: Any

    def __call__(self, function: Call, params: Any, *args: Any) -> Any:
        """Returns ``function(model, *args)``.

        Raises:
          ValueError: the function changed the model, such as a cache that an ``nnx`` module holds.
        """
        # Fresh containers: a function that assigns to them changes no argument of the caller's.
        given = jax.tree.map(lambda x: x, params)
        model = given if self.graph is None else nnx.merge(self.graph, given)
        result = function(model, *args)
        after = model if self.graph is None else nnx.split(model)[1]
        was = dict(jax.tree_util.tree_leaves_with_path(params))
        now = dict(jax.tree_util.tree_leaves_with_path(after))
        if changed := [path for path in was if now.get(path) is not was[path]]:
            raise ValueError(
                f"a pass changes the model itself, at {jax.tree_util.keystr(changed[0])}: state that lives in the "
                "model would be lost. Give what a pass changes as the cache, and switch off what draws at random, "
                "such as dropout"
            )
        return result


def taken(result: Any, given: Any, shape: tuple[int, ...]) -> tuple[Array, Any, dict[int, Array]]:
    """Returns logits, cache and hidden states of a pass.

    Args:
      result: what the model returned.
      given: the cache that it was given.
      shape: rows and places of the pass.

    Raises:
      ValueError: it is not ``(logits, cache)`` or ``(logits, cache, states)`` of the right shapes and dtypes.
    """
    if isinstance(result, Output) or not isinstance(result, tuple | list) or len(result) not in (2, 3):
        parts = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise ValueError(
            f"a pass returned a {type(result).__name__}{parts}; return (logits, cache), or (logits, cache, states)"
        )
    logits, cache = result[:2]
    if getattr(logits, "ndim", 0) != 3 or logits.shape[:2] != shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        what = f"{logits.shape} and {logits.dtype}" if hasattr(logits, "shape") else f"a {type(logits).__name__}"
        raise ValueError(
            f"a pass over {shape[0]} rows of {shape[1]} places returned logits of {what}; return the logits of every "
            f"place, {(*shape, 'vocabulary')}, not of the last one alone"
        )
    _check_cache(cache, given)
    states = result[2] if len(result) == 3 else {}
    good = isinstance(states, Mapping) and all(isinstance(index, int) for index in states)
    if not good or any(getattr(x, "ndim", 0) != 3 or x.shape[:2] != shape for x in states.values()):
        raise ValueError(
            f"the third result is {jax.tree.map(jnp.shape, states)}; return hidden states by index, "
            f"{{index: [b, t, d]}}, here {(*shape, 'd')}: 0 is the embedding, i layer i's output, -1 the last norm's"
        )
    return logits, cache, dict(states)


def _check_cache(cache: Any, given: Any) -> None:
    if jax.tree.structure(cache) != jax.tree.structure(given):
        raise ValueError(
            f"a pass returned a cache of the structure {jax.tree.structure(cache)} and was given "
            f"{jax.tree.structure(given)}; return the whole cache as it was given"
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(cache), jax.tree.leaves(given), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"a pass returned a cache with {x.shape} and {x.dtype} at {jax.tree_util.keystr(path)}, and was given "
                f"{y.shape} and {y.dtype} there; let cache(rows, slots) have the shapes and dtypes that passes write"
            )


@dataclasses.dataclass(frozen=True)
class Caller:
    """One function of a model over the cache as specjax keeps it; see ``ways``.

    Attributes:
      bound: calls it.
      layout: the foreign cache's.
      function: such as the model's forward pass.
    """

    bound: Bound
    layout: Layout
    function: Call

    def __call__(
        self,
        params: Any,
        tokens_bt: Array,
        position_bt: Array,
        seen_bts: Array,
        kept: tuple[Array, ...],
        index_b: Array,
    ) -> tuple[Array, tuple[Array, ...], dict[int, Array]]:
        """Returns logits ``[b, t, v]``, the cache, and hidden states ``[b, t, d]`` by index."""
        given = self.layout.foreign(kept, index_b)
        fresh = jax.tree.map(lambda x: x, given)
        result = self.bound(self.function, params, tokens_bt, position_bt, fresh, seen_bts)
        logits_btv, cache, states = taken(result, given, (tokens_bt.shape[0], tokens_bt.shape[1]))
        return logits_btv, self.layout.kept(cache), states
