"""PARD: a language model that drafts all tokens of a round in one pass."""

import dataclasses

import jax.numpy as jnp
from flax import struct

from specjax.drafters.block import likeliest
from specjax.drafters.chain import Chain
from specjax.drafters.model import ModelDrafter, ModelState
from specjax.types import Context, Draw, Feed, LanguageModel, Proposal


@struct.dataclass
class PardDrafter(ModelDrafter):
    """Drafts with a language model that was trained to go on over masks (An et al. 2025, PARD, arXiv 2504.18583).

    One pass reads the tokens that the model has not seen, and g - 1 masks after them, by ordinary causal attention. The
    last token gives the first draft, and each mask one more. The masks are forgotten.

    Example, a row of n = 10 tokens of which the model has read 8, g = 3: the pass feeds tokens 8 and 9 at slots 8 and
    9, and masks at slots 10 and 11. Slots 9 to 11 predict tokens 10 to 12.

    Attributes:
      mask_token: the token that stands for a mask.
      argmax: as for ``BlockDrafter``.
    """

    mask_token: int = struct.field(pytree_node=False, default=0)
    argmax: bool = struct.field(pytree_node=False, default=False)

    @property
    def _rolls_back(self) -> bool:
        """The cache never keeps what was drafted, whatever the model."""
        return True

    def init(self, target: LanguageModel, rows: int, slots: int) -> ModelState:
        """Returns an empty cache. Masks reach further past the rows' ends than drafts do.

        Raises:
          ValueError: a tree is asked for.
        """
        if self.tree is not None:
            raise ValueError(f"tree is {self.tree} and PARD models draft chains; leave out tree")
        return super().init(target, rows, slots + self.num_draft)

    def propose(self, state: ModelState, context: Context, draw: Draw) -> tuple[Proposal, ModelState]:
        """Draws ``num_draft`` tokens from one pass."""
        # 1. Feed what the cache lacks of the row, and masks.
        length_b, g = context.length_b, context.drafts(self.num_draft)
        feed = self._missing(state, context, self._window)
        rows, width = feed.tokens_bt.shape
        place_t = jnp.arange(width + g - 1, dtype=jnp.int32)[None]
        masks_bt = jnp.full((rows, g - 1), self.mask_token, jnp.int32)
        tokens_bt = jnp.concatenate([feed.tokens_bt, masks_bt], axis=1)
        tokens_bt = jnp.where(place_t < feed.count_b[:, None], tokens_bt, self.mask_token)
        count_b = jnp.where(context.running_b, feed.count_b + (g - 1), 0)
        masked = Feed(tokens_bt, feed.start_b, count_b)
        output = self.model.forward(self.model.params, masked, state.cache)
        read = ModelState(
            self.model.keep(output.cache, masked, feed.count_b),
            jnp.where(context.running_b, length_b, state.fed_b),
        )
        # 2. The last token's place, and those of the masks after it.
        place_bg = jnp.maximum(feed.count_b - 1, 0)[:, None] + jnp.arange(g, dtype=jnp.int32)[None]
        logits_bgv = jnp.take_along_axis(output.logits_btv, place_bg[:, :, None], axis=1)
        chain = Chain.empty(rows, g, logits_bgv.shape[-1])
        for i in range(g):
            chain, _ = chain.add(likeliest(draw) if self.argmax else draw, logits_bgv[:, i], i)
        proposal = chain.propose(jnp.full_like(length_b, g))
        return (dataclasses.replace(proposal, probs_bgv=None) if self.argmax else proposal), read
