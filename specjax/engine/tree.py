"""Rounds of trees: what they need, and how the path that was kept becomes a chain."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.types import SIBLINGS, Drafter, Feed, LanguageModel, Output, Verdict


def depth_of(drafter: Drafter | None) -> int | None:
    """Returns the most drafts on one path of the drafter's trees; None for chains."""
    return getattr(drafter, "tree_depth", None)


def longest_path(drafter: Drafter) -> int:
    """Returns the most drafts that a round of the drafter's can keep."""
    depth = depth_of(drafter)
    return drafter.num_draft if depth is None else depth


def check_tree(target: LanguageModel, drafter: Drafter | None) -> None:
    """Checks what is known of a drafter of trees and its target before anything is traced.

    Raises:
      ValueError: ``tree_depth`` is no depth of a tree of ``num_draft`` drafts; ``siblings`` is unknown; or the drafter
        proposes trees and the target cannot be fed any.
    """
    depth = depth_of(drafter)
    if drafter is None or depth is None:
        return
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= drafter.num_draft:
        raise ValueError(
            f"the drafter's tree_depth is {depth!r}; give an integer from 1 to num_draft, {drafter.num_draft}, or None "
            "for chains"
        )
    siblings = getattr(drafter, "siblings", None)
    if siblings is not None and siblings not in SIBLINGS:
        raise ValueError(f"the drafter's siblings is {siblings!r}; give one of {', '.join(SIBLINGS)}")
    if target.gather is None:
        raise ValueError(
            f"the drafter proposes trees (depth {depth}) and the target has no gather, as models with recurrent layers "
            "have none, nor adapted ones; give a drafter of chains, or LanguageModel(gather=...) for an attention cache"
        )


@struct.dataclass
class KeptPath:
    """The path of a tree that verification kept, as places of the feed.

    Attributes:
      place_bt: int32 ``[b, depth + 1]``: place 0, of the last token, and then the places of the drafts that were kept.
        0 past these.
      count_b: int32, how many of them count; 0 in rows that rest.
    """

    place_bt: Array
    count_b: Array

    @classmethod
    def of(cls, verdict: Verdict, depth: int, running_b: Array) -> "KeptPath":
        """Returns the path of a verdict on trees of that depth.

        Raises:
          ValueError: the verdict has no path, or one of another shape.
        """
        path_bd, rows = verdict.path_bd, verdict.num_accepted_b.shape[0]
        if path_bd is None or path_bd.ndim != 2 or path_bd.shape[0] != rows or path_bd.shape[1] < depth:
            shape = None if path_bd is None else path_bd.shape
            raise ValueError(f"the rule's path_bd is {shape} after a tree; specjax.types asks for ({rows}, {depth})")
        kept_bd = jnp.arange(depth, dtype=jnp.int32)[None] < verdict.num_accepted_b[:, None]
        place_bd = jnp.where(kept_bd, path_bd[:, :depth] + 1, 0).astype(jnp.int32)
        count_b = jnp.minimum(verdict.num_accepted_b, depth) + 1
        return cls(jnp.pad(place_bd, ((0, 0), (1, 0))), jnp.where(running_b, count_b, 0))

    def along(self, tree: Any) -> Any:
        """Returns arrays ``[b, t, ..]`` of the feed's places as ``[b, depth + 1, ..]`` of the path's."""

        def pick(array: Array) -> Array:
            place = self.place_bt.reshape(*self.place_bt.shape, *(1 for _ in array.shape[2:]))
            return jnp.take_along_axis(array, place, axis=1)

        return jax.tree.map(pick, tree)

    def feed(self, feed: Feed) -> Feed:
        """Returns the path as a chain."""
        return Feed(self.along(feed.tokens_bt), feed.start_b, self.count_b)

    def gather(self, target: LanguageModel, output: Output, feed: Feed) -> Output:
        """Returns the target's output as a pass over the path alone would have given it."""
        assert target.gather is not None
        cache = target.gather(output.cache, feed, self.place_bt)
        logits_btv, features = self.along((output.logits_btv, output.features))
        return Output(logits_btv, features, cache)

    def emits(self, verdict: Verdict, room_b: Array) -> Array:
        """Returns how many tokens each row emits, int32 ``[b]``, before stop tokens are looked for.

        Args:
          verdict: what the path comes from.
          room_b: int32, how many drafts each row can use. What a path has past them is cut, as after a stop token: the
            tokens before the cut have the target's law whatever comes after them.
        """
        # A path that is deeper than the drafter said ends without the token after it, which follows another draft.
        depth = self.place_bt.shape[1] - 1
        ends_b = jnp.where(verdict.num_accepted_b > depth, depth, verdict.num_accepted_b + 1)
        return jnp.minimum(ends_b, jnp.maximum(room_b, 0) + 1)


def deepest(feed: Feed) -> Array:
    """Returns the depth of each row's deepest real draft, int32 ``[b]``: 0 without drafts."""
    depth_bt = feed.position_bt - feed.start_b[:, None]
    return jnp.max(jnp.where(feed.real_bt, depth_bt, 0), axis=1)
