"""What DFlash2 adds to a block of drafts: convolutions over its places, and a choice among the likeliest tokens."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.transformer.layers import Linear, declare, normal


class LocalConvolution(nnx.Module):
    """Causal convolutions over the places of a block, before and after a part of a layer (z-lab, DFlash2).

    The kernels are fixed ones plus what a projection of the part's normed input makes, one number for each tap and each
    group of entries. Freshly made, both convolutions change nothing.
    """

    def __init__(self, width: int, taps: int, group: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.taps, self.groups = taps, width // group
        self.base_kernel = declare(jnp.zeros((2, taps, width), dtype).at[:, 0].set(1), None, None, "embed")
        self.kernel_projection = Linear(width, 2 * taps * self.groups, False, dtype, rngs, ("embed", None))
        self.kernel_projection.kernel[...] = jnp.zeros_like(self.kernel_projection.kernel[...])

    def before(self, u_btd: Array) -> tuple[Array, Array]:
        """Returns the convolved input of the part, and the kernels ``[b, t, taps, groups]`` for its output."""
        made = self.kernel_projection(u_btd).reshape(*u_btd.shape[:2], 2, self.taps, self.groups)
        return self._convolve(u_btd, made[:, :, 0], 0), made[:, :, 1]

    def after(self, y_btd: Array, made_bttg: Array) -> Array:
        """Returns the convolved output of the part."""
        return self._convolve(y_btd, made_bttg, 1)

    def _convolve(self, z_btd: Array, made_bttg: Array, side: int) -> Array:
        width, out = z_btd.shape[-1], jnp.zeros_like(z_btd)
        for tap in range(self.taps):
            # Places before the block count as zero.
            earlier = jnp.pad(z_btd, ((0, 0), (tap, 0), (0, 0)))[:, : z_btd.shape[1]]
            made = jnp.repeat(made_bttg[:, :, tap], width // self.groups, axis=-1)
            out += earlier * (made + self.base_kernel[...][side, tap][None, None])
        return out


class Selector(nnx.Module):
    """Scores of the likeliest tokens by the token before them and the state at their place, of rank r."""

    def __init__(self, width: int, rank: int, vocab: int, chosen: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.chosen = chosen
        self.predecessor_codebook = declare(normal(rngs, (vocab, rank), dtype), "vocab", None)
        self.successor_codebook = declare(jnp.zeros((vocab, rank), dtype), "vocab", None)
        self.hidden_projection = Linear(width, rank, False, dtype, rngs, ("embed", None))

    def __call__(self, logits_bv: Array, state_bd: Array, token_b: Array) -> Array:
        """Returns float32 logits ``[b, v]``, -inf for all but the likeliest ``chosen`` tokens."""
        likeliest_bk, id_bk = lax.top_k(logits_bv, self.chosen)
        read_br = self.predecessor_codebook[...][token_b] * self.hidden_projection(state_bd)
        candidates_bkr = self.successor_codebook[...][id_bk]
        scores_bk = jnp.einsum("br,bkr->bk", read_br, candidates_bkr, preferred_element_type=jnp.float32)
        row_b1 = jnp.arange(logits_bv.shape[0], dtype=jnp.int32)[:, None]
        return jnp.full_like(logits_bv, -jnp.inf).at[row_b1, id_bk].set(likeliest_bk + scores_bk)
