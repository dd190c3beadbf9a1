"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464) as in Qwen3-Next: linear attention by the delta rule."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.transformer.config import DecoderConfig, DeltaConfig
from specjax.transformer.layers import Linear, RMSNorm
from specjax.transformer.recurrent import Places, Recurrence, RecurrentPass, RecurrentState, check_chain
from specjax.types import Feed

_UNIT_EPS = 1e-6  # added to the squared lengths of queries and keys


class GatedDelta(Recurrence):
    """A layer's gated DeltaNet: queries and keys of length 1, the delta rule, a norm of each head, and a gate."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = config.recurrence
        assert isinstance(sizes, DeltaConfig)
        super().__init__(config, dtype, rngs, "heads")
        self.rate_proj = Linear(config.hidden_size, sizes.heads, False, dtype, rngs, ("embed", ("heads", sizes.heads)))
        self.norm = RMSNorm(sizes.value_width, config.norm_eps, dtype)

    def __call__(self, x_btd: Array, feed: Feed, stored: RecurrentState) -> tuple[Array, RecurrentPass]:
        """Returns the output ``[b, t, d]`` and what the pass may keep."""
        check_chain(feed)
        query, keys, values, inputs = self.project(x_btd, stored)
        query, keys = (x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _UNIT_EPS) for x in (query, keys))
        _, decay = self.steps(x_btd)
        rate = jax.nn.sigmoid(self.by_head(self.rate_proj(x_btd)))
        places = Places(query * query.shape[-1] ** -0.5, keys, values, decay, rate)
        out, kept = self.run(stored, places, inputs)
        # Each head's output is normed, then gated.
        out = self.norm(jnp.moveaxis(out, 1, 2).astype(x_btd.dtype)).astype(jnp.float32)
        gate = self.gate_proj(x_btd).astype(jnp.float32)
        return self.o_proj((out.reshape(gate.shape) * jax.nn.silu(gate)).astype(x_btd.dtype)), kept
