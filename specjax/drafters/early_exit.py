"""Drafting with the target's own first layers."""

import jax.numpy as jnp
from flax import struct

from specjax.checks import check_integer
from specjax.types import Context, Draw, Proposal, Verdict


@struct.dataclass
class EarlyExitDrafter:
    """Drafts with the target's first layers, its final norm and its head (Zhang et al. 2024, arXiv 2309.08168, which
    picks the layers to leave out; Elhoushi et al. 2024, arXiv 2404.16710, which trains targets for it).

    Drafting goes on from the first layers' part of the target's cache, which holds the row. If the target has
    ``resume``, its pass goes on from the states and the cache that drafting leaves, and no layer runs over a token
    twice. So there is no state of the drafter's own, and nothing to fill at the start.

    Attributes:
      depth: layers to draft with, from 1 to the target's number.
      num_draft: g, tokens proposed per round.

    Raises:
      ValueError: ``depth`` is below 1.
    """

    depth: int = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)

    capture = ()
    vocab_size = None
    max_positions = None

    def __post_init__(self):
        check_integer("depth", self.depth, 1)

    def start(self, context: Context, features: tuple, slots: int) -> None:
        """Checks that the target has so many layers to leave early.

        Raises:
          ValueError: it has fewer, or no ``early_exit``.
        """
        del features, slots
        target = context.target
        if target.early_exit is None:
            raise ValueError("the target has no early_exit; give a LanguageModel that has one, or another drafter")
        if target.num_layers is not None and self.depth > target.num_layers:
            raise ValueError(
                f"depth is {self.depth} and the target has {target.num_layers} layers; give 1 to {target.num_layers}"
            )

    def propose(self, state: None, context: Context, draw: Draw) -> tuple[Proposal, None]:
        """Samples a chain of ``num_draft`` tokens; the first pass feeds the row's last token.

        Raises:
          ValueError: the target's ``early_exit`` does not give one feature.
        """
        target, length_b = context.target, context.length_b
        assert target.early_exit is not None
        token_b = jnp.take_along_axis(context.tokens_bs, length_b[:, None] - 1, axis=1)[:, 0]
        cache, tokens, probs, states = context.cache, [], [], []
        goes_on = target.resume is not None
        # The last draft only goes through the layers, for the target's pass.
        for i in range(self.num_draft + goes_on):
            output = target.early_exit(target.params, token_b[:, None], cache, length_b + (i - 1), self.depth)
            if len(output.features) != 1:
                raise ValueError(
                    f"the target's early_exit returns {len(output.features)} features; it must return one, the state "
                    "behind the first layers"
                )
            cache = output.cache
            states.append(output.features[0])
            if i < self.num_draft:
                prefix_bi = jnp.stack(tokens, axis=1) if tokens else jnp.zeros((length_b.shape[0], 0), jnp.int32)
                token_b, probs_bv = draw(output.logits_btv[:, 0], prefix_bi)
                tokens.append(token_b)
                probs.append(probs_bv)
        proposal = Proposal(
            tokens_bg=jnp.stack(tokens, axis=1),
            probs_bgv=jnp.stack(probs, axis=1),
            length_b=jnp.full_like(length_b, self.num_draft),
            cache=cache,
            states_btd=jnp.concatenate(states, axis=1) if goes_on else None,
            depth=self.depth if goes_on else 0,
        )
        return proposal, state

    def commit(self, state: None, context: Context, verdict: Verdict, features: tuple) -> None:
        """Nothing to note."""
        del state, context, verdict, features
