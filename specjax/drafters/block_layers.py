"""Layers whose places see keys and values that are kept of a text, and each other, in both directions."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.cache import LayerCache
from specjax.drafters.candidates import LocalConvolution
from specjax.transformer.attend import attention_windows
from specjax.transformer.config import DecoderConfig, LayerConfig
from specjax.transformer.decoder import DecoderLayer
from specjax.transformer.layers import rotate, softmax

Tables = tuple[Array, Array] | None
"""What ``rotary_tables`` returns."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the places of blocks of p places see. Blocks stand side by side and see nothing of each other.

    Attributes:
      end_bt: int32, the slot of the text before which each place sees.
      first_bt: int32, the first slot of the text that each place sees; None for all.
      own_pp: bool, whether place i of a block sees place j of the block.
      used_b: int32, how many slots are in use, 0 of rows that rest; None: the whole text is.
    """

    end_bt: Array
    first_bt: Array | None
    own_pp: Array
    used_b: Array | None


class BlockLayer(DecoderLayer):
    """A layer over the places of a block, which see kept keys and values of the text and each other.

    ``taps``: how many places the convolutions around attention and MLP see (DFlash2); 0: there are none.
    """

    def __init__(
        self, config: DecoderConfig, layer: LayerConfig, dtype: jnp.dtype, rngs: nnx.Rngs, taps: int = 0, group: int = 1
    ):
        super().__init__(config, layer, dtype, rngs)
        convolutions = (
            [LocalConvolution(config.hidden_size, taps, group, dtype, rngs) for _ in range(2)] if taps else []
        )
        self.attention_conv, self.mlp_conv = convolutions or (None, None)

    def keys_values(self, x_btd: Array, tables: Tables) -> LayerCache:
        """Returns keys and values ``[b, k, t, h]``."""
        own = self.self_attn
        return self._rotated(_heads(own.k_proj(x_btd), own.k, own.k_norm), tables), _heads(own.v_proj(x_btd), own.k)

    def run(self, x_btd: Array, stored: LayerCache, sight: Sight, tables: Tables) -> Array:
        """Returns the residual stream ``[b, t, d]`` after the layer."""
        assert self.input_layernorm is not None and self.post_attention_layernorm is not None
        u_btd, own = self.input_layernorm(x_btd), self.self_attn
        normed_btd, made = (u_btd, None) if self.attention_conv is None else self.attention_conv.before(u_btd)
        query_bnth = self._rotated(_heads(own.q_proj(normed_btd), own.n, own.q_norm), tables)
        out_bnth = attend(query_bnth, stored, self.keys_values(normed_btd, tables), sight, own.scale)
        b, _, t, _ = out_bnth.shape
        y_btd = own.o_proj(out_bnth.transpose(0, 2, 1, 3).reshape(b, t, -1))
        if self.attention_conv is None or self.mlp_conv is None or made is None:
            return self.add(x_btd, normed_btd, y_btd)
        x_btd = x_btd + self.attention_conv.after(y_btd, made)
        z_btd, made = self.mlp_conv.before(self.post_attention_layernorm(x_btd))
        return x_btd + self.mlp_conv.after(self.mlp(z_btd), made)

    def _rotated(self, x: Array, tables: Tables) -> Array:
        rope = self.self_attn.layer.rope
        return rotate(x, tables, rope is not None and rope.interleaved)


def _heads(x: Array, count: int, norm: Any = None) -> Array:
    b, t, _ = x.shape
    x = x.reshape(b, t, count, -1)
    return (x if norm is None else norm(x)).transpose(0, 2, 1, 3)


def attend(query_bnth: Array, stored: LayerCache, own: LayerCache, sight: Sight, scale: float) -> Array:
    """Attends to the kept slots and to the own block in one softmax; returns ``[b, n, t, h]``.

    The cost follows the slots in use, as in ``specjax.transformer.attend``.
    """
    (b, n, t, h), k, size = query_bnth.shape, own[0].shape[1], sight.own_pp.shape[0]
    blocks = t // size
    query_bkqh = query_bnth.reshape(b, k, n // k * t, h) * jnp.asarray(scale, query_bnth.dtype)

    def over(
        used: int, query: Array, stored: LayerCache, own: LayerCache, end_bt: Array, first_bt: Array | None
    ) -> Array:
        slot_11s = jnp.arange(used, dtype=jnp.int32)[None, None]
        seen_bts = slot_11s < end_bt[:, :, None]
        seen_bts = seen_bts if first_bt is None else seen_bts & (slot_11s >= first_bt[:, :, None])
        text = jnp.einsum("bkqh,bksh->bkqs", query, stored[0][:, :, :used], preferred_element_type=jnp.float32)
        text = jnp.where(seen_bts[:, None], text.reshape(b, n, t, used), -jnp.inf)
        # Blocks side by side: a place is compared with the places of its own block alone.
        own_keys, own_values = (x.reshape(b, k, blocks, size, x.shape[-1]) for x in own)
        block = jnp.einsum(
            "bkgmph,bkmoh->bkgmpo",
            query.reshape(b, k, -1, blocks, size, h),
            own_keys,
            preferred_element_type=jnp.float32,
        )
        block = jnp.where(sight.own_pp[None, None, None, None], block, -jnp.inf).reshape(b, n, t, size)
        weights = softmax(jnp.concatenate([text, block], axis=-1)).astype(own_values.dtype)
        of_text = weights[..., :used].reshape(b, k, -1, used)
        of_block = weights[..., used:].reshape(b, k, -1, blocks, size, size)
        out = jnp.einsum("bkqs,bksh->bkqh", of_text, stored[1][:, :, :used])
        return out + jnp.einsum("bkgmpo,bkmoh->bkgmph", of_block, own_values).reshape(out.shape)

    given = (query_bkqh, stored, own, sight.end_bt, sight.first_bt)
    if sight.used_b is None:
        return over(stored[0].shape[2], *given).reshape(b, n, t, h)
    # One branch for each window, chosen on the device: the length of the text is not known when this compiles.
    windows = attention_windows(stored[0].shape[2])
    index = jnp.sum(jnp.max(sight.used_b) > jnp.asarray(windows[:-1], jnp.int32))
    branches = [functools.partial(over, used) for used in windows]
    return lax.switch(index, branches, *given).reshape(b, n, t, h)
