"""A cache for training a draft head as it drafts: chains of drafts that start at every slot at once."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.cache import LayerCache
from specjax.transformer.attend import first_seen
from specjax.transformer.layers import softcap, softmax


@struct.dataclass
class ChainCache:
    """One layer's keys and values for chains that start at every slot at once, to train a draft head as it drafts.

    Step j of the chain that starts at slot s is stored at slot s + j. Example: for the chain that starts at slot 8,
    step 2 is entry 10 of ``steps[2]``. Step 0 is the true text.

    Attributes:
      steps: for each step so far, arrays ``[b, k, t, h]``.
    """

    steps: tuple[LayerCache, ...] = ()

    def attend(
        self,
        query_bnth: Array,
        new: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        cap: float | None = None,
        value_width: int | None = None,
        sinks_n: Array | None = None,
    ) -> tuple[Array, "ChainCache"]:
        """Adds a step to all chains and attends from it (EAGLE-3's training-time test).

        The query at slot i belongs to step j of the chain that started at slot i - j. It attends to the true entries of
        slots 0 .. i - j and to one entry of each step 1 .. j of its own chain. Example, i = 10, j = 2: the chain
        started at slot 8. The query sees the true slots 0 .. 8, the entry of step 1 at slot 9, and the entry of step 2
        at slot 10. No chain of j steps ends at a slot below j, so outputs of these slots mean nothing.

        Args:
          query_bnth: floats, queries of the step, one for each slot.
          new: keys and values of the step, or keys alone that hold the values.
          scale: as for ``specjax.transformer.attend.attend``, like the arguments after it.

        Returns:
          ``[b, n, t, values' h]``, and the cache with the step.
        """
        cache = ChainCache((*self.steps, new))
        b, n, t, h = query_bnth.shape
        (true_keys, true_values), *chain = ((step[0], step[-1][..., :value_width]) for step in cache.steps)
        k, j = true_keys.shape[1], len(chain)
        query = query_bnth.reshape(b, k, n // k, t, h) * jnp.asarray(scale, query_bnth.dtype)
        # Step 0 of every chain is the true text, shared by all chains: one matrix product.
        slot_t = jnp.arange(t, dtype=jnp.int32)
        seen_ts = slot_t[None, :] <= slot_t[:, None] - j
        first_t = first_seen(slot_t, window, chunk)
        if first_t is not None:
            seen_ts &= slot_t[None, :] >= first_t[:, None]
        scores = softcap(jnp.einsum("bkqth,bksh->bkqts", query, true_keys, preferred_element_type=jnp.float32), cap)
        scores = [jnp.where(seen_ts[None, None, None], scores, -jnp.inf)]
        # Of each later step a query sees one entry, j - m slots before its own. A dot product per slot is enough.
        own = [(_shift(keys, j - m), _shift(values, j - m)) for m, (keys, values) in enumerate(chain, 1)]
        for m, (keys, _) in enumerate(own, 1):
            score = softcap(jnp.einsum("bkqth,bkth->bkqt", query, keys, preferred_element_type=jnp.float32), cap)
            if first_t is not None:
                score = jnp.where((slot_t - (j - m) >= first_t)[None, None, None], score, -jnp.inf)
            scores.append(score[..., None])
        # One softmax over both parts; the sums over values are split in the same way as the scores.
        sinks = None if sinks_n is None else sinks_n.astype(jnp.float32).reshape(1, k, n // k, 1, 1)
        weights = softmax(jnp.concatenate(scores, axis=-1), sinks).astype(true_values.dtype)
        out = jnp.einsum("bkqts,bksh->bkqth", weights[..., :t], true_values)
        for m, (_, values) in enumerate(own):
            out = out + weights[..., t + m, None] * values[:, :, None]
        return out.reshape(b, n, t, out.shape[-1]), cache


def _shift(x_bkth: Array, slots: int) -> Array:
    """Returns at slot i the entry of slot i - ``slots``, or zeros if there is no such slot."""
    return jnp.pad(x_bkth, ((0, 0), (0, 0), (slots, 0), (0, 0)))[:, :, : x_bkth.shape[2]]
