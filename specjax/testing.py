"""Models whose distribution is known, for tests of loops and drafters.

A table model looks up its next-token logits in a table, through a real cache. Each pass writes its tokens at their
slots and reads them back. So a wrong offset, a stale slot or a token that was never fed changes the distribution.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from specjax.types import LanguageModel, Output


# Cached, so that all models of one order have the same static functions and share compilations.
@functools.cache
def _functions(order: int):
    def init_cache(rows: int, slots: int) -> Array:
        return jnp.zeros((rows, slots), jnp.int32)

    def forward(params, feed, cache, capture=()):
        write = jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))
        cache = write(cache, feed.tokens_bt, feed.start_b)
        logits_btv = table_logits(params, cache, feed.position_bt, order)
        # Hidden states carry nothing here; drafters that capture them get the right shape.
        features = tuple(jnp.zeros((*feed.tokens_bt.shape, 1), jnp.float32) for _ in capture)
        return Output(logits_btv, features, cache)

    return init_cache, forward


def table_logits(table: Array, cache: Array, position_bt: Array, order: int) -> Array:
    """Returns the logits after each position i, ``table[token at i - order + 1, .., token at i]``.

    Slots before the first token count as token 0. Example, order 2: the logits after position 0 are
    ``table[0, token at 0]``.

    Args:
      table: float32, of shape ``[v] * (order + 1)``.
      cache: int32 ``[b, s]``, the tokens of the rows.
      position_bt: int32, the positions.
      order: how many tokens decide, at least 1.

    Returns:
      float32 ``[b, t, v]``.
    """
    index = []
    for back in reversed(range(order)):
        slot_bt = position_bt - back
        token_bt = jnp.take_along_axis(cache, jnp.maximum(slot_bt, 0), axis=1)
        index.append(jnp.where(slot_bt >= 0, token_bt, 0))
    return table[tuple(index)]


def table_model(logits: Array) -> LanguageModel:
    """Returns a model whose next token depends on the last k tokens by ``logits``.

    Args:
      logits: floats of shape ``[v] * (k + 1)``, with k at least 1. ``logits[a, b]`` are the logits of the token after
        tokens a and b, for k = 2.
    """
    logits = jnp.asarray(logits, jnp.float32)
    init_cache, forward = _functions(logits.ndim - 1)
    return LanguageModel(params=logits, forward=forward, init_cache=init_cache, vocab_size=logits.shape[-1])
