"""Trees of drafts: static ones by the ranks of siblings, and those that grow from the likeliest tokens."""

import heapq
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.search import largest

Path = tuple[int, ...]
"""A draft of a static tree, by the ranks from the root on: (0, 2) is the third child of the first child. Children are
the likeliest tokens by probability, or drawn tokens in the order of drawing."""

_CHOICES = """
0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 011 006
030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070
"""

MEDUSA_CHOICES: tuple[Path, ...] = tuple(tuple(map(int, path)) for path in _CHOICES.split())
"""Medusa's 63 drafts for heads of a 7B model (FasterDecoding's ``mc_sim_7b_63``), the most valuable first. So the first
n of them are the best tree of n drafts, and a parent comes before its children."""


EXPECTED = (0.75, 0.12, 0.04, 0.02, 0.01, 0.008, 0.006, 0.004)
"""The acceptance of siblings by rank that ``drawn_tree`` counts on: about that of the shipped draft heads and draft
model at temperatures 0 and 1 (docs/performance.md)."""


def check_static_tree(tree: Any, num_draft: int) -> None:
    """Checks that the first ``num_draft`` drafts of a static tree are a tree.

    Raises:
      ValueError: there are fewer drafts, one is no path, one occurs twice, or one comes without the draft it follows.
    """
    if len(tree) < num_draft:
        raise ValueError(f"num_draft is {num_draft} and the tree has {len(tree)} drafts; draft at most that many")
    known: set[Path] = {()}
    for path in tree[:num_draft]:
        ranks = isinstance(path, tuple) and all(isinstance(rank, int) and rank >= 0 for rank in path)
        if not ranks or path in known or path[:-1] not in known:
            raise ValueError(
                f"the tree has {path!r} after {sorted(known - {()})}; give each draft once, as a tuple of ranks "
                "from 0, after the draft that it follows"
            )
        known.add(path)


def best_tree(accepted: Sequence[Sequence[float]], nodes: int) -> tuple[Path, ...]:
    """Returns the static tree of that many drafts that keeps the most on average, the most valuable drafts first.

    A draft is kept with the product of the probabilities along its path (Cai et al. 2024, arXiv 2401.10774, section
    2.3.3; Chen et al. 2024, Sequoia, arXiv 2402.12374). So the best tree of n drafts begins every larger one.

    Args:
      accepted: ``accepted[depth][rank]``, the probability that the child of this rank is kept, given that its parent
        is: falling in rank. The lists say how deep and how wide the tree may be.
      nodes: drafts, at least 1.

    Raises:
      ValueError: the lists hold fewer drafts.
    """
    tree: list[Path] = []
    waiting: list[tuple[float, int, Path]] = []

    def offer(path: Path, parent: float) -> None:
        if len(path) <= len(accepted) and path[-1] < len(accepted[len(path) - 1]):
            heapq.heappush(waiting, (-parent * accepted[len(path) - 1][path[-1]], len(path), path))

    values: dict[Path, float] = {(): 1.0}
    offer((0,), 1.0)
    while waiting and len(tree) < nodes:
        value, _, path = heapq.heappop(waiting)
        tree.append(path)
        values[path] = -value
        offer((*path[:-1], path[-1] + 1), values[path[:-1]])
        offer((*path, 0), -value)
    if len(tree) < nodes:
        raise ValueError(
            f"nodes is {nodes} and there are {len(tree)} drafts of known acceptance; ask for at most those"
        )
    return tuple(tree)


def paths_tree(nodes: int, depth: int) -> tuple[Path, ...]:
    """Returns the static tree of paths from the root of ``depth`` drafts each; the last one has what remains."""
    return tuple((node // depth, *(0,) * (node % depth)) for node in range(nodes))


def drawn_tree(nodes: int, depth: int, siblings: str) -> tuple[Path, ...]:
    """Returns a static tree to draw: paths, or else the best tree under the acceptance ``EXPECTED``.

    Args:
      nodes: drafts of the tree.
      depth: the most drafts on a path.
      siblings: "distinct", "independent" or "paths", see ``types.Drafter``.

    Raises:
      ValueError: a tree of this depth does not have so many drafts.
    """
    return paths_tree(nodes, depth) if siblings == "paths" else best_tree([EXPECTED] * depth, nodes)


def in_order(tree: tuple[Path, ...]) -> tuple[Path, ...]:
    """Returns a static tree with parents before their children, and siblings by rank."""
    return tuple(sorted(tree, key=lambda path: (len(path), path)))


def parents_of(tree: tuple[Path, ...], rows: int) -> Array:
    """Returns the parents of a static tree's drafts, int32 ``[rows, g]``: ``Proposal.parents_bg``."""
    parents_g = [tree.index(path[:-1]) if len(path) > 1 else -1 for path in tree]
    return jnp.broadcast_to(jnp.asarray(parents_g, jnp.int32)[None], (rows, len(tree)))


@struct.dataclass
class Candidates:
    """Drafts of a tree that grows, of which the likeliest are proposed; c of them.

    Attributes:
      tokens_bc: int32.
      scores_bc: float32, the logarithm of the probability of the path to each; never above its parent's.
      parents_bc: int32, the candidate that each follows, an earlier one; -1 for the root.
    """

    tokens_bc: Array
    scores_bc: Array
    parents_bc: Array

    @classmethod
    def after(cls, log_probs_bkv: Array, scores_bk: Array, parents_bk: Array, top_k: int) -> "Candidates":
        """Returns the ``top_k`` likeliest children of each of k drafts, ``[b, k * top_k]``.

        ``log_probs_bkv`` may be ``[b, 1, v]``, the same for all of them.
        """
        rows, k = scores_bk.shape
        token_bkc = largest(log_probs_bkv, top_k)
        log_prob_bkc = jnp.take_along_axis(log_probs_bkv, token_bkc, axis=-1)
        log_prob_bkc, token_bkc = (jnp.broadcast_to(x, (rows, k, top_k)) for x in (log_prob_bkc, token_bkc))
        parent_bkc = jnp.broadcast_to(parents_bk[:, :, None], token_bkc.shape)
        score_bkc = scores_bk[:, :, None] + log_prob_bkc
        return cls(*(x.reshape(rows, -1) for x in (token_bkc.astype(jnp.int32), score_bkc, parent_bkc)))

    def __add__(self, other: "Candidates") -> "Candidates":
        pairs = zip(*((x.tokens_bc, x.scores_bc, x.parents_bc) for x in (self, other)), strict=True)
        return Candidates(*(jnp.concatenate(pair, axis=1) for pair in pairs))

    def best(self, count: int) -> tuple[Array, Array]:
        """Returns ``count`` of the likeliest candidates, as indices in rising order, and their parents among them.

        Both are int32 ``[b, count]``. Equal scores go to the lower index, so no candidate comes without its parent.
        """
        _, index_bg = lax.top_k(self.scores_bc, count)
        index_bg = jnp.sort(index_bg.astype(jnp.int32), axis=1)
        parent_bg1 = jnp.take_along_axis(self.parents_bc, index_bg, axis=1)[:, :, None]
        among_bgg = index_bg[:, None] == parent_bg1
        place_bg = jnp.argmax(among_bgg, axis=-1).astype(jnp.int32)
        return index_bg, jnp.where(among_bgg.any(-1), place_bg, -1)
