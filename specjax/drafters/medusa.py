"""Medusa: heads that each predict one of the next tokens from the target's last state (Cai et al. 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.drafters.chain import Chain, place
from specjax.drafters.drawn import DrawnTree, check_drawn_tree
from specjax.drafters.trees import Path, check_static_tree, in_order, parents_of
from specjax.search import largest
from specjax.transformer.products import product
from specjax.types import Context, Draw, Event, LanguageModel, Proposal, whole_feed


def head_logits(params: Any, states: Array) -> Array:
    """Returns the logits of one head: residual blocks, then a linear layer (Cai et al. 2024, section 2.1.1).

    Args:
      params: ``{"blocks": {k: {"kernel": [d, d], "bias": [d]}}, "lm_head": {"kernel": [d, v]}}``. Blocks may be without
        ``bias``. With a reduced vocabulary of u tokens, int32 ``"draft_of_v"`` ``[v]`` holds the draft's id of each
        target token, and -1 for tokens that are never drafted; the kernel is ``[d, u]``, or ``[d, v]``.
      states: ``[.., d]``, the target's after its final norm.

    Returns:
      Float32 ``[.., v]``, -inf for tokens that are never drafted.
    """
    kernel_du = params["lm_head"]["kernel"]
    x = states.astype(kernel_du.dtype)
    for k in range(len(params["blocks"])):
        block = params["blocks"][k]
        y = product(x, block["kernel"])
        x = x + jax.nn.silu(y + jnp.broadcast_to(block["bias"], y.shape) if "bias" in block else y)
    logits = product(x, kernel_du, jnp.dtype("float32"))
    if "draft_of_v" not in params:
        return logits
    draft_of_v = params["draft_of_v"]
    if logits.shape[-1] < draft_of_v.shape[0]:
        logits = jnp.take(logits, jnp.maximum(draft_of_v, 0), axis=-1)
    return jnp.where(jnp.broadcast_to(draft_of_v >= 0, logits.shape), logits, -jnp.inf)


def init_medusa_params(kernel_dv: Array, num_heads: int, num_blocks: int = 1) -> Any:
    """Returns heads to train: at first each is the target's own, its blocks being zero (section 2.1.1).

    Args:
      kernel_dv: the kernel of the target's head; the heads have its dtype.
      num_heads: heads, the most drafts.
      num_blocks: residual blocks of each.

    Returns:
      ``{i: params}``, each as ``head_logits`` takes them.
    """
    width, dtype = kernel_dv.shape[0], kernel_dv.dtype

    def block() -> Any:
        return {"kernel": jnp.zeros((width, width), dtype), "bias": jnp.zeros((width,), dtype)}

    return {
        i: {"blocks": {k: block() for k in range(num_blocks)}, "lm_head": {"kernel": kernel_dv}}
        for i in range(num_heads)
    }


@struct.dataclass
class MedusaDrafter:
    """Drafts with Medusa heads (Cai et al. 2024, arXiv 2401.10774): a chain, each token drawn from its head's law; or a
    static tree of the heads' likeliest tokens (section 2.1.2).

    The last state that is known of a row of n tokens is that at position n - 2. The target's own head gave token
    n - 1 from it, and head i gives token n + i. No head sees the drafts before its own, so nothing is fed and there is
    no cache. A row of one token drafts nothing: no state of the target is known yet.

    Attributes:
      params: ``{i: params}`` of at least ``num_draft`` heads, each as ``head_logits`` takes them. Heads without
        ``lm_head`` share that of head 0, and all heads share the ``draft_of_v`` of head 0.
      num_draft: g, tokens proposed per round.
      tree: for trees: drafts by the ranks of their tokens, of which the first ``num_draft`` are proposed. Example:
        ((0,), (1,), (0, 0)) has the two likeliest tokens of head 0, and after the first of them the likeliest of head
        1. Logits are ranked as they are, without penalties or bias. None drafts a chain. ``drafters.trees`` has
        published ones.
      siblings: for trees: "chosen" as above, or drawn in place of the likeliest tokens: as for ``ModelDrafter``.
    """

    params: Any
    num_draft: int = struct.field(pytree_node=False, default=4)
    tree: tuple[Path, ...] | None = struct.field(pytree_node=False, default=None)
    siblings: str = struct.field(pytree_node=False, default="chosen")

    capture = (-1,)
    max_positions = None

    @property
    def vocab_size(self) -> int:
        first = self.params[0]
        return first["draft_of_v"].shape[0] if "draft_of_v" in first else first["lm_head"]["kernel"].shape[1]

    @property
    def tree_depth(self) -> int | None:
        return None if self.tree is None else max(map(len, self.tree[: self.num_draft]))

    def axes(self) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        # With a reduced vocabulary, logits are looked up by the target's ids. With logits split over devices, the
        # look-up would move more than the split saves.
        reduced = "draft_of_v" in self.params[0]
        block = {"kernel": (None, "embed"), "bias": ("embed",)}
        whole = {"lm_head": {"kernel": ("embed", None if reduced else "vocab")}, "draft_of_v": (None,)}
        return {
            i: {name: whole[name] for name in head if name != "blocks"}
            | {"blocks": {k: {name: block[name] for name in head["blocks"][k]} for k in head["blocks"]}}
            for i, head in self.params.items()
        }

    def init(self, target: LanguageModel, rows: int, slots: int) -> Array:
        """Returns ``[b, d]`` in the target's dtype, for the last state known of each row.

        Raises:
          ValueError: there are fewer heads than drafts of a path, or they are of another width than the target; or the
            tree is none.
        """
        del slots
        (spec,) = target.state_specs(self.capture)
        if self.tree is not None and self.siblings != "chosen":
            check_drawn_tree(self.tree, self.num_draft, self.siblings, self.vocab_size)
        elif self.tree is not None:
            check_static_tree(self.tree, self.num_draft)
            widest = 1 + max(path[-1] for path in self.tree[: self.num_draft])
            if widest > self.vocab_size:
                raise ValueError(
                    f"the tree has rank {widest - 1} and there are {self.vocab_size} tokens; give lower ranks"
                )
        check_medusa_fit(self.params, self.tree_depth or self.num_draft, spec.shape[-1])
        return jnp.zeros((rows, spec.shape[-1]), spec.dtype)

    def observe(self, state: Array, context: Context, event: Event) -> Array:
        """Returns the state at the last place that was kept."""
        del context
        last_bd = place(event.features[0], jnp.maximum(event.kept_b - 1, 0))
        return jnp.where(event.kept_b[:, None] > 0, last_bd, state)

    def propose(self, state: Array, context: Context, draw: Draw) -> tuple[Proposal, Array]:
        """Samples one token from each of the first ``num_draft`` heads, or a tree, or takes the likeliest ones."""
        if self.tree is not None:
            tree = self.tree[: context.drafts(self.num_draft)]
            if self.siblings == "chosen":
                return self._choose(in_order(tree), state, context), state
            return self._draw_tree(tree, state, context, draw), state
        g = context.drafts(self.num_draft)
        chain = Chain.empty(state.shape[0], g, context.target.vocab_size)
        drafting_b, drafted_b = context.length_b >= 2, jnp.zeros_like(context.length_b)
        for i in range(g):
            chain, _ = chain.add(draw, self.logits(i, state), i)
            # A row proposes no more where a bias bans all tokens of a reduced vocabulary.
            drafting_b = drafting_b & chain.lawful(i) if "draft_of_v" in self.params[0] else drafting_b
            drafted_b = drafted_b + drafting_b.astype(jnp.int32)
        return chain.propose(drafted_b), state

    def logits(self, head: int, states: Array) -> Array:
        """Returns what ``head_logits`` does of one head. What the heads share is in the first one's parameters."""
        shared = {name: part for name, part in self.params[0].items() if name != "blocks"}
        return head_logits(shared | self.params[head], states)

    def _draw_tree(self, tree: tuple[Path, ...], state: Array, context: Context, draw: Draw) -> Proposal:
        drawn = DrawnTree.of(tree, self.siblings, state.shape[0])
        for depth in range(drawn.shape.depth):
            logits_bv = self.logits(depth, state)
            parents = len(drawn.shape.last_fed(depth))
            drawn = drawn.add(draw, jnp.repeat(logits_bv[:, None], parents, axis=1))
        return drawn.propose(context.length_b >= 2)

    def _choose(self, tree: tuple[Path, ...], state: Array, context: Context) -> Proposal:
        tops = []
        for i in range(max(map(len, tree))):
            most = 1 + max(path[i] for path in tree if len(path) == i + 1)
            tops.append(largest(self.logits(i, state), most))
        tokens_bg = jnp.stack([tops[len(path) - 1][:, path[-1]] for path in tree], axis=1)
        rows, g = tokens_bg.shape
        length_b = jnp.where(context.length_b >= 2, jnp.int32(g), 0)
        return Proposal(tokens_bg, None, length_b, parents_bg=parents_of(tree, rows))

    def follow(self, state: Array, context: Context, tokens_bg: Array) -> Array:
        """Nothing to do: the next state comes from the target, whoever drafted."""
        del context, tokens_bg
        return state


def accepted_by_rank(drafter: MedusaDrafter, target: LanguageModel, tokens_bt: Array, ranks: int = 10) -> list[Any]:
    """Returns for each head how often the right token was its likeliest, its second, and so on: ``[heads][ranks]``.

    With ``drafters.trees.best_tree`` this gives the best tree for the heads, as far as the ranks at two depths do not
    depend on each other (Cai et al. 2024, section 2.3.3).

    Args:
      drafter: its first ``num_draft`` heads are measured.
      target: the target.
      tokens_bt: int32, texts of one length as the target writes them, longer than a path.
      ranks: of each head.
    """
    feed = whole_feed(tokens_bt)
    output = target.forward(target.params, feed, target.init_cache(*tokens_bt.shape), drafter.capture)
    found = []
    for i in range(drafter.num_draft):
        # The state at position p predicts token p + 2 + i.
        logits_btv = drafter.logits(i, output.features[0][:, : -2 - i])
        right_bt1 = jnp.take_along_axis(logits_btv, tokens_bt[:, 2 + i :, None], axis=-1)
        rank_bt = (logits_btv > right_bt1).sum(-1)
        found.append([float((rank_bt == rank).mean()) for rank in range(ranks)])
    return found


def check_medusa_fit(params: Any, num_draft: int, width: int) -> None:
    """Raises ValueError unless there is a head for each draft of a path, for states of that width.

    The leaves have shapes.
    """
    if num_draft > len(params):
        raise ValueError(f"num_draft is {num_draft} and there are {len(params)} Medusa heads; draft at most that many")
    own = params[0]["lm_head"]["kernel"].shape[0]
    if own != width:
        raise ValueError(f"the Medusa heads read states of width {own} and the target's are {width} wide; give its own")
