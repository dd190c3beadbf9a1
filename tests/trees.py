"""Drafters of trees for tests."""

import jax
import jax.numpy as jnp
from flax import struct
from stateless import Stateless

from specjax import Proposal

# Two children of the root, three of the first of them, and a path of three: draft 5 follows draft 3.
BUSHY = (-1, -1, 0, 0, 0, 3, 1)
CHAIN = (-1, 0, 1)
STAR = (-1, -1, -1)
SHAPES = {"bushy": BUSHY, "chain": CHAIN, "star": STAR}


def depths(parents):
    """Returns the depth of each draft, from 1."""
    deep = []
    for parent in parents:
        deep.append(1 if parent < 0 else deep[parent] + 1)
    return deep


def path_to(parents, draft):
    """Returns the drafts from the root to a draft."""
    path = []
    while draft >= 0:
        path.insert(0, draft)
        draft = parents[draft]
    return path


def ranks_along(parents, leaf):
    """Returns a rank for each draft: 0 on the path to a leaf, and different ones for siblings."""
    path = set(path_to(parents, leaf))
    ranks = []
    for draft, parent in enumerate(parents):
        used = {ranks[other] for other in range(draft) if parents[other] == parent}
        rank = 0 if draft in path else 1
        while rank in used:
            rank += 1
        ranks.append(rank)
    return tuple(ranks)


class OfOneShape(Stateless):
    """A drafter of the trees of its ``parents``, but for ``propose``."""

    @property
    def num_draft(self):
        return len(self.parents)

    @property
    def tree_depth(self):
        return max(depths(self.parents))

    siblings = "chosen"


@struct.dataclass
class TreeDrafter(OfOneShape):
    """A tree of one shape from a table of logits after each two tokens.

    Attributes:
      table: floats ``[v, v, v]``.
      parents: of the drafts.
      ranks: a draft is the token of this rank after its parent. None: drafts are drawn, siblings independently.
      ragged: a row proposes fewer drafts, as its last token says.
      replacement: whether siblings may be drawn several times. Else their logits are masked, which is right without
        filters alone.
    """

    table: jax.Array
    parents: tuple = struct.field(pytree_node=False, default=BUSHY)
    ranks: tuple | None = struct.field(pytree_node=False, default=None)
    ragged: bool = struct.field(pytree_node=False, default=False)
    replacement: bool = struct.field(pytree_node=False, default=True)

    @property
    def siblings(self):
        if self.ranks is not None or not self.replacement:
            return "distinct" if self.ranks is None else "chosen"
        branches = len(set(self.parents)) < sum(parent >= 0 for parent in self.parents) + 1
        return "independent" if branches else "paths"

    def propose(self, state, context, draw):
        rows, last_b = context.length_b.shape[0], context.length_b - 1
        row_b, slots = jnp.arange(rows), context.tokens_bs
        root = (jnp.where(last_b > 0, slots[row_b, jnp.maximum(last_b - 1, 0)], 0), slots[row_b, last_b])
        after, probs, tokens_bg = [], [], jnp.zeros((rows, self.num_draft), jnp.int32)
        for draft, parent in enumerate(self.parents):
            before_b, token_b = after[parent] if parent >= 0 else root
            logits_bv = self.table[before_b, token_b]
            elder = [other for other in range(draft) if self.parents[other] == parent]
            if self.ranks is None:
                for other in [] if self.replacement else elder:
                    logits_bv = logits_bv.at[row_b, tokens_bg[:, other]].set(-jnp.inf)
                path = jnp.asarray([other in path_to(self.parents, parent) for other in range(self.num_draft)])
                drawn_b, probs_bv = draw(logits_bv, tokens_bg, draft, jnp.broadcast_to(path, tokens_bg.shape))
                probs.append(probs[elder[0]] if elder else probs_bv)
            else:
                drawn_b = jnp.argsort(-logits_bv, axis=-1)[:, self.ranks[draft]].astype(jnp.int32)
            tokens_bg = tokens_bg.at[:, draft].set(drawn_b)
            after.append((token_b, drawn_b))
        length_b = jnp.full((rows,), self.num_draft, jnp.int32)
        length_b = root[1] % (self.num_draft + 1) if self.ragged else length_b
        proposal = Proposal(
            tokens_bg=tokens_bg,
            probs_bgv=jnp.stack(probs, axis=1) if probs else None,
            length_b=length_b,
            parents_bg=jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), (rows, self.num_draft)),
            replacement=self.replacement,
        )
        return proposal, state


@struct.dataclass
class Oracle(OfOneShape):
    """A tree with a known text on the path to one draft, which changes from round to round, and other tokens beside it.

    Attributes:
      text_bs: int32, the text of each row, its prompt included.
      vocab_size: v.
      parents: of the drafts.
    """

    text_bs: jax.Array
    vocab_size: int = struct.field(pytree_node=False)
    parents: tuple = struct.field(pytree_node=False, default=BUSHY)

    def propose(self, state, context, draw):
        rows, g = context.length_b.shape[0], self.num_draft
        ranks = jnp.asarray([ranks_along(self.parents, leaf) for leaf in range(g)], jnp.int32)
        rank_bg = ranks[context.length_b % g]
        at_bg = context.length_b[:, None] + jnp.asarray(depths(self.parents), jnp.int32)[None] - 1
        text_bg = jnp.take_along_axis(self.text_bs, jnp.minimum(at_bg, self.text_bs.shape[1] - 1), axis=1)
        parents_bg = jnp.broadcast_to(jnp.asarray(self.parents, jnp.int32), (rows, g))
        tokens_bg = (text_bg + rank_bg) % self.vocab_size
        return Proposal(tokens_bg, None, jnp.full((rows,), g, jnp.int32), parents_bg=parents_bg), state
