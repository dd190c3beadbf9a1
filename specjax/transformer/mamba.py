"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state-space model as linear attention with decay."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.transformer.config import DecoderConfig, MambaConfig
from specjax.transformer.layers import declare, rms
from specjax.transformer.recurrent import Places, Recurrence, RecurrentPass, RecurrentState, check_chain
from specjax.types import Feed


class Mamba(Recurrence):
    """A layer's Mamba-2. In the paper, queries are C, keys are B, values are x, the step is dt, and the skip is D."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = config.recurrence
        assert isinstance(sizes, MambaConfig)
        # Groups are often one, so their queries and keys may stay whole where heads are split.
        super().__init__(config, dtype, rngs, "kv_heads", sizes.proj_bias, sizes.conv_bias)
        self.skip = declare(jnp.ones((sizes.heads,), jnp.float32), ("heads", sizes.heads))
        self.norm = GroupedRMSNorm(sizes.heads * sizes.head_width, sizes.groups, config.norm_eps, dtype)

    def __call__(self, x_btd: Array, feed: Feed, stored: RecurrentState) -> tuple[Array, RecurrentPass]:
        """Returns the output ``[b, t, d]`` and what the pass may keep."""
        check_chain(feed)
        query, keys, values, inputs = self.project(x_btd, stored)
        # A token's step multiplies what it writes, and is how long the state decays.
        step, decay = self.steps(x_btd)
        out, kept = self.run(stored, Places(query, keys, values * step[..., None], decay, None), inputs)
        k, _, r, _ = self.shape
        out = jnp.moveaxis(out + self.skip[...].reshape(1, k, 1, r, 1) * values, 1, 2)
        # The output is gated, then normed.
        gate = self.gate_proj(x_btd).astype(jnp.float32)
        return self.o_proj(self.norm(out.reshape(gate.shape) * jax.nn.silu(gate), x_btd.dtype)), kept


class GroupedRMSNorm(nnx.Module):
    """Root-mean-square norm of each of some equal groups of entries, with a weight for each entry."""

    def __init__(self, width: int, groups: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Array, dtype: jnp.dtype) -> Array:
        """Returns the normed ``x`` of ``[.., width]``, in ``dtype``."""
        normed = rms(x.reshape(*x.shape[:-1], self.groups, -1), self.eps).reshape(x.shape)
        return normed.astype(dtype) * jnp.broadcast_to(self.weight[...], x.shape)
