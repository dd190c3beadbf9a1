"""What DSpark adds to a block of drafts: a head that corrects each draft's logits, and one that trusts it or not."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from specjax.transformer.layers import Embedding, Linear

Kind = Literal["vanilla", "gated", "rnn"]
KINDS: tuple[Kind, ...] = ("vanilla", "gated", "rnn")


class MarkovHead(nnx.Module):
    """A bias on the logits of each draft from the token before it, of rank r (DSpark, arXiv 2607.05147, section 3)."""

    def __init__(
        self, kind: Kind, rank: int, width: int, vocab: int, drafted: int | None, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """``vocab`` tokens may stand before a draft, ``drafted`` may be drafted (None: all). States have ``width``."""
        self.kind: Kind = kind
        self.markov_w1 = Embedding(vocab, rank, dtype, rngs)
        axes = (None, "vocab" if drafted is None else None)
        self.markov_w2 = Linear(rank, drafted or vocab, False, dtype, rngs, axes)
        if kind == "gated":
            self.gate_proj = Linear(width + rank, rank, True, dtype, rngs)
        elif kind == "rnn":
            self.joint_proj = Linear(2 * rank + width, 3 * rank, True, dtype, rngs)

    def __call__(self, state_bd: Array, token_b: Array, carry: Array | None) -> tuple[Array, Array | None]:
        """Returns float32 biases ``[b, u]`` and the recurrent state ``[b, r]``, if there is one."""
        before_br = self.markov_w1(token_b)
        if self.kind == "gated":
            gate_br = nnx.sigmoid(self.gate_proj(jnp.concatenate([state_bd, before_br], axis=-1)))
            return self.markov_w2.logits(gate_br * before_br), carry
        if self.kind == "rnn":
            assert carry is not None
            joint = self.joint_proj(jnp.concatenate([carry, before_br, state_bd], axis=-1))
            gate_br, candidate_br, out_br = jnp.split(joint, 3, axis=-1)
            gate_br = nnx.sigmoid(gate_br)
            carry = gate_br * carry + (1 - gate_br) * jnp.tanh(candidate_br)
            return self.markov_w2.logits(jnp.tanh(out_br)), carry
        return self.markov_w2.logits(before_br), carry


class ConfidenceHead(nnx.Module):
    """One number for each draft: the logit of the probability that it is accepted, given that all before it are."""

    def __init__(self, inputs: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = Linear(inputs, 1, True, dtype, rngs)

    def __call__(self, read_bx: Array) -> Array:
        """Returns the float32 logits ``[b]``."""
        return self.proj.logits(read_bx)[:, 0]
