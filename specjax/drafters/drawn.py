"""Static trees whose drafts are drawn, one depth after another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from specjax.drafters.trees import Path, check_static_tree, in_order
from specjax.types import SIBLINGS, Draw, Proposal

_DRAWN = SIBLINGS[1:]


def check_drawn_tree(tree: tuple[Path, ...], num_draft: int, siblings: str, vocab: int) -> None:
    """Checks that the first ``num_draft`` drafts of a static tree can be drawn.

    Raises:
      ValueError: they are no tree; or ``siblings`` is unknown, or the tree has more siblings than there are tokens, or
        paths with siblings below the root.
    """
    check_static_tree(tree, num_draft)
    if siblings not in _DRAWN:
        raise ValueError(f"siblings is {siblings!r}; give one of {', '.join(_DRAWN)} for drafts that are drawn")
    shape = Shape(in_order(tree[:num_draft]))
    widest = max(len(shape.children(parent)) for parent in (-1, *range(num_draft)))
    if siblings == "distinct" and widest > vocab:
        raise ValueError(f"the tree has {widest} siblings that differ and there are {vocab} tokens; give at most those")
    branching = [shape.paths[draft] for draft in range(num_draft) if len(shape.children(draft)) > 1]
    if siblings == "paths" and branching:
        raise ValueError(
            f"siblings is 'paths' and the tree has several drafts after {branching[0]}; let the root alone have "
            "several, or give siblings='independent'"
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static tree: who follows whom.

    Attributes:
      paths: its drafts, parents before children and siblings by rank (``in_order``).
    """

    paths: tuple[Path, ...]

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """The draft that each draft follows, -1 for the root."""
        place = {path: draft for draft, path in enumerate(self.paths)} | {(): -1}
        return tuple(place[path[:-1]] for path in self.paths)

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    def children(self, parent: int) -> list[int]:
        """Returns the drafts that follow a draft, or the root, in order."""
        return [draft for draft, other in enumerate(self.parents) if other == parent]

    def fed(self, depth: int) -> list[int]:
        """Returns the drafts of at most that depth that others follow: a drafter reads them for the depth after it."""
        return [draft for draft in sorted(set(self.parents) - {-1}) if len(self.paths[draft]) <= depth]

    def last_fed(self, depth: int) -> list[int]:
        """Returns those of ``fed`` that have this depth; -1, the root, for depth 0."""
        return [draft for draft in self.fed(depth) if len(self.paths[draft]) == depth] if depth else [-1]

    def parents_fed(self, depth: int) -> list[int]:
        """Returns for each draft of ``fed`` the place of its parent in ``fed``, -1 for the root."""
        fed = self.fed(depth)
        return [fed.index(self.parents[draft]) if self.parents[draft] >= 0 else -1 for draft in fed]

    def followed(self, draft: int) -> np.ndarray:
        """Returns bool ``[g]``, the drafts that come before a child of a draft: the draft and those it follows."""
        path = () if draft < 0 else self.paths[draft]
        return np.asarray([path[: len(other)] == other for other in self.paths])


@struct.dataclass
class DrawnTree:
    """The drafts of a static tree while they are drawn.

    A draft of a tree that is drawn may not be dropped for its token, nor for what was drawn after it, since rules count
    on its law. So the shape is known before anything is drawn.

    Attributes:
      tokens_bg: int32; 0 at drafts that are not drawn yet.
      probs: float32 ``[b, drafts, v]`` for each depth, the distribution that the first of each draft's siblings was
        drawn from.
      shape: the tree.
      siblings: how siblings are drawn, see ``types.Drafter``.
    """

    tokens_bg: Array
    probs: tuple[Array, ...]
    shape: Shape = struct.field(pytree_node=False)
    siblings: str = struct.field(pytree_node=False)

    @classmethod
    def of(cls, tree: tuple[Path, ...], siblings: str, rows: int) -> "DrawnTree":
        """Returns a tree without drafts."""
        return cls(jnp.zeros((rows, len(tree)), jnp.int32), (), Shape(in_order(tree)), siblings)

    def fed(self, depth: int) -> tuple[Array, Array]:
        """Returns tokens and parents of ``shape.fed``, both int32 ``[b, m]``, as a ``Feed`` has them."""
        tokens_bm = self.tokens_bg[:, np.asarray(self.shape.fed(depth))]
        parents_m = jnp.asarray(self.shape.parents_fed(depth), jnp.int32)
        return tokens_bm, jnp.broadcast_to(parents_m[None], tokens_bm.shape)

    def add(self, draw: Draw, logits_bkv: Array) -> "DrawnTree":
        """Draws the drafts of the next depth from the logits after each of ``shape.last_fed``."""
        shape, depth, distinct = self.shape, len(self.probs), self.siblings == "distinct"
        # Siblings that differ are one draw together. Otherwise each draft is a draw of its own.
        draws: list[tuple[int, list[int]]] = []
        for place, parent in enumerate(shape.last_fed(depth)):
            children = shape.children(parent)
            draws += [(place, children)] if distinct else [(place, [child]) for child in children]
        most = max(len(children) for _, children in draws)
        before_kg = np.stack([shape.followed(shape.parents[children[0]]) for _, children in draws])
        index_k = np.asarray([children[0] for _, children in draws], np.int32)
        logits_bkv = logits_bkv[:, np.asarray([place for place, _ in draws])]

        def one(logits_bv: Array, index: Array, before_g: Array) -> tuple[Array, Array]:
            before_bg = jnp.broadcast_to(before_g[None], self.tokens_bg.shape)
            token, probs_bv = draw(logits_bv, self.tokens_bg, index, before_bg, most if distinct else None)
            return token.reshape(-1, most), probs_bv

        token_bkn, probs_bkv = jax.vmap(one, in_axes=(1, 0, 0), out_axes=1)(
            logits_bkv, jnp.asarray(index_k), jnp.asarray(before_kg)
        )
        # From draws to drafts, which have the same order.
        draw_j = np.asarray([k for k, (_, children) in enumerate(draws) for _ in children])
        rank_j = np.asarray([rank for _, children in draws for rank in range(len(children))])
        first = int(index_k[0])
        tokens_bg = self.tokens_bg.at[:, first : first + len(draw_j)].set(token_bkn[:, draw_j, rank_j])
        return dataclasses.replace(self, tokens_bg=tokens_bg, probs=(*self.probs, probs_bkv[:, draw_j]))

    def propose(self, ready_b: Array) -> Proposal:
        """Returns the proposal of the rows that can draft.

        A row proposes no draft from the first one on that has no law, where a bias bans all that can be drafted.
        """
        rows, g = self.tokens_bg.shape
        probs_bgv = jnp.concatenate(self.probs, axis=1)
        lawful_bg = jnp.cumprod((probs_bgv.sum(-1) > 0).astype(jnp.int32), axis=1)
        return Proposal(
            tokens_bg=self.tokens_bg,
            probs_bgv=probs_bgv,
            length_b=jnp.where(ready_b, lawful_bg.sum(1, dtype=jnp.int32), 0),
            parents_bg=jnp.broadcast_to(jnp.asarray(self.shape.parents, jnp.int32)[None], (rows, g)),
            replacement=self.siblings != "distinct",
        )
