"""Drafting with the target's own first layers."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.checks import check_integer
from specjax.drafters.chain import Chain, repeat
from specjax.rows import text_at
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal


@struct.dataclass
class EarlyExitDrafter:
    """Drafts with the target's first layers, its final norm and its output head (Zhang et al. 2024, arXiv 2309.08168,
    which picks the layers to leave out; Elhoushi et al. 2024, arXiv 2404.16710, which trains targets for it).

    Drafting goes on from the first layers' part of the target's cache, which holds the row. So the drafter has no state
    of its own. The target's pass then overwrites what the drafter wrote there.

    Attributes:
      depth: layers to draft with, from 1 to the target's number.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``.

    Raises:
      ValueError: ``depth`` is below 1.
    """

    depth: int = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)

    capture = ()
    vocab_size = None
    max_positions = None

    def __post_init__(self):
        check_integer("depth", self.depth, 1)

    def init(self, target: LanguageModel, rows: int, slots: int) -> None:
        """Checks that the target has so many layers to leave early.

        Raises:
          ValueError: the target has fewer, or no ``early_exit``.
        """
        del rows, slots
        target.require("early_exit")
        if target.num_layers is not None and self.depth > target.num_layers:
            raise ValueError(
                f"depth is {self.depth} and the target has {target.num_layers} layers; give 1 to {target.num_layers}"
            )

    def observe(self, state: None, context: Context, event: Event) -> None:
        """Nothing to note."""
        del state, context, event

    def propose(self, state: None, context: Context, draw: Draw) -> tuple[Proposal, None]:
        """Samples a chain of ``num_draft`` tokens; the first pass feeds the row's last token."""
        target, length_b = context.target, context.length_b
        early_exit = target.early_exit
        assert early_exit is not None
        running_b = context.running_b.astype(jnp.int32)

        def advance(i: int | Array, carry: tuple[Chain, Array, Cache]) -> tuple[Chain, Array, Cache]:
            chain, token_b, cache = carry
            feed = Feed(token_b[:, None], length_b + (i - 1), running_b)
            output = early_exit(target.params, feed, cache, self.depth)
            return *chain.add(draw, output.logits_btv[:, 0], i), output.cache

        g = context.drafts(self.num_draft)
        chain = Chain.empty(length_b.shape[0], g, target.vocab_size)
        last_b = text_at(context.tokens_bs, length_b - 1, 1)[:, 0]
        carry = (chain, last_b, context.cache)
        chain, _, cache = repeat(0, g, advance, carry, self.unrolled)
        return chain.propose(jnp.full_like(length_b, g), cache), state
