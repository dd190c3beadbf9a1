"""Several drafters in one program, each for its own rows."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from specjax import Proposal


@struct.dataclass
class ByRow:
    """Drafters that take turns: a row whose first token is t is drafted for by the drafter t modulo their number.

    All drafters propose for all rows and observe all rows, and each row uses the proposal of its own drafter.
    """

    parts: tuple

    max_positions = None

    @property
    def num_draft(self):
        return self.parts[0].num_draft

    @property
    def capture(self):
        return tuple(dict.fromkeys(index for part in self.parts for index in part.capture))

    @property
    def vocab_size(self):
        return next((part.vocab_size for part in self.parts if part.vocab_size is not None), None)

    def init(self, target, rows, slots):
        return tuple(part.init(target, rows, slots) for part in self.parts)

    def propose(self, state, context, draw):
        row_b, turn_b = jnp.arange(context.length_b.size), context.tokens_bs[:, 0] % len(self.parts)
        proposals, states = [], []
        for part, own in zip(self.parts, state, strict=True):
            proposal, own = part.propose(own, context, draw)
            cache = context.cache if proposal.cache is None else proposal.cache
            context = dataclasses.replace(context, cache=cache)
            vocab = context.target.vocab_size
            proposals.append(Proposal(proposal.tokens_bg, proposal.q(vocab), proposal.length_b))
            states.append(own)
        chosen = jax.tree.map(lambda *parts: jnp.stack(parts)[turn_b, row_b], *proposals)
        return dataclasses.replace(chosen, cache=context.cache), tuple(states)

    def observe(self, state, context, event):
        pairs = zip(self.parts, state, strict=True)
        return tuple(part.observe(own, context, self._of(part, event)) for part, own in pairs)

    def _of(self, part, event):
        features = tuple(event.features[self.capture.index(index)] for index in part.capture)
        return dataclasses.replace(event, features=features)
