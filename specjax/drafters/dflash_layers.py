"""What a DFlash, DFlash2 or DSpark head computes: its layers, and the small heads beside them."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.cache import KVCache, LayerCache
from specjax.drafters.block_layers import BlockLayer, Sight, Tables
from specjax.drafters.candidates import Selector
from specjax.drafters.markov import ConfidenceHead, MarkovHead
from specjax.transformer.layers import Embedding, Linear, make_norm, rotary_tables

if TYPE_CHECKING:
    from specjax.drafters.dflash import DFlashHead


class DFlashLayers(nnx.Module):
    """The parameters of a ``DFlashHead``, and the passes over them."""

    def __init__(self, head: "DFlashHead", dtype: jnp.dtype, rngs: nnx.Rngs):
        config, width, target_width = head.decoder, head.decoder.hidden_size, head.target_hidden_size
        assert target_width is not None
        self.head = head
        if head.own_embedding:
            self.embed_tokens = Embedding(head.vocab_size, width, dtype, rngs)
        self.fc = Linear(len(head.capture) * target_width, width, False, dtype, rngs, (None, "embed"))
        self.hidden_norm = make_norm(config, width, dtype)
        self.layers = nnx.List(
            [BlockLayer(config, layer, dtype, rngs, head.conv_taps, head.conv_group) for layer in config.each_layer]
        )
        self.norm = make_norm(config, width, dtype)
        if head.own_head:
            # With a reduced draft vocabulary, logits are looked up by the target's ids. With logits split over devices,
            # the look-up would move more than the split saves.
            axes = ("embed", "vocab" if head.draft_vocab_size is None else None)
            self.lm_head = Linear(width, head.draft_vocab_size or head.vocab_size, False, dtype, rngs, axes)
        if head.draft_vocab_size is not None:
            token_v = jnp.arange(head.vocab_size, dtype=jnp.int32)
            self.draft_of_v = nnx.Param(jnp.where(token_v < head.draft_vocab_size, token_v, -1))
        rank = head.markov_rank
        if head.markov is not None:
            sizes = (rank, width, head.vocab_size, head.draft_vocab_size)
            self.markov_head = MarkovHead(head.markov, *sizes, dtype, rngs)
        if head.selector_rank is not None:
            sizes = (width, head.selector_rank, head.vocab_size, head.selector_top_k)
            self.candidate_selector = Selector(*sizes, dtype, rngs)
        if head.confidence:
            self.confidence_head = ConfidenceHead(width + rank * head.confidence_with_markov, dtype, rngs)

    def contexts(self, states_btd: Array, position_bt: Array) -> list[LayerCache]:
        """Returns each layer's keys and values ``[b, k, t, h]`` of the target's states, side by side."""
        c_btd, tables = self.hidden_norm(self.fc(states_btd)), self._tables(position_bt)
        layers = zip(self.layers, self.head.decoder.each_layer, strict=True)
        return [layer.keys_values(c_btd, tables[described.rope]) for layer, described in layers]

    def __call__(
        self, x_btd: Array, cache: KVCache, end_bm: Array, used_b: Array | None, start_bm: Array | None = None
    ) -> Array:
        """Returns the normed states ``[b, t, d]`` of m blocks side by side, each of t / m places.

        Args:
          x_btd: the embeddings of the places.
          cache: keys and values of the text.
          end_bm: int32, the position of each block's anchor.
          used_b: as for ``Sight``.
          start_bm: int32, the first position that each block sees; None for 0.
        """
        head, t, m = self.head, x_btd.shape[1], end_bm.shape[1]
        assert head.causal is not None
        place_p = jnp.arange(t // m, dtype=jnp.int32)
        end_bt, place_1t = jnp.repeat(end_bm, t // m, axis=1), jnp.tile(place_p, m)[None]
        start_bt = None if start_bm is None else jnp.repeat(start_bm, t // m, axis=1)
        tables, apart_pp = self._tables(end_bt + place_1t), place_p[:, None] - place_p[None]
        parts = zip(self.layers, head.decoder.each_layer, head.causal, cache.layers, strict=True)
        for layer, described, causal, stored in parts:
            own_pp = (apart_pp >= 0) if causal else jnp.ones(apart_pp.shape, bool)
            first_bt, window = start_bt, described.window
            if window is not None:
                window_bt = end_bt - window if head.window_stays else end_bt + place_1t - (window - 1)
                first_bt = window_bt if start_bt is None else jnp.maximum(window_bt, start_bt)
                own_pp = own_pp if head.window_stays else own_pp & (jnp.abs(apart_pp) < window)
            x_btd = layer.run(x_btd, stored, Sight(end_bt, first_bt, own_pp, used_b), tables[described.rope])
        return self.norm(x_btd)

    def _tables(self, position_bt: Array) -> dict[Any, Tables]:
        ropes = dict.fromkeys(layer.rope for layer in self.head.decoder.each_layer)
        return {rope: rotary_tables(position_bt, rope) for rope in ropes}
