"""All rules of verification in one program."""

import dataclasses

import jax.numpy as jnp

from specjax import verify


@dataclasses.dataclass(frozen=True)
class EveryRule:
    """The verdict of ``coupled``, spoiled where the target is one-hot and ``token`` or ``block`` finds another."""

    shares_noise = True

    def __call__(self, proposal, target_btv, draws):
        verdict = verify.coupled(proposal, target_btv, draws)
        return _spoiled(verdict, (verify.token, verify.block), proposal, target_btv, draws)


@dataclasses.dataclass(frozen=True)
class EveryTreeRule:
    """The verdict of ``walk`` on a tree, spoiled where the target is one-hot and another rule finds another."""

    shares_noise, trees = False, True

    def __call__(self, proposal, target_btv, draws):
        verdict = verify.walk(proposal, target_btv, draws)
        others = (verify.coupled, verify.recursive, verify.traversal)
        return _spoiled(verdict, others, proposal, target_btv, draws)


def _spoiled(verdict, others, proposal, target_btv, draws):
    spoiled_b = jnp.zeros_like(verdict.next_b, bool)
    for rule in others:
        other = rule(proposal, target_btv, draws)
        spoiled_b |= (other.num_accepted_b != verdict.num_accepted_b) | (other.next_b != verdict.next_b)
    spoiled_b &= (target_btv.max(-1) == 1).all(-1)
    last = target_btv.shape[-1] - 1
    return verdict.replace(next_b=jnp.where(spoiled_b, last - verdict.next_b, verdict.next_b))
