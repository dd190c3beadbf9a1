"""What a round of speculative decoding takes at least, what a device must hold for it, and the best number of drafts.

``docs/scaling.md`` gives the formulas and what they leave out.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from specjax.planning.hardware import Hardware
from specjax.planning.roofline import Mesh, Model, Pass, Seconds, choosing, forward, seconds, token_bytes, weights

RESERVE = 0.1  # of a device's memory, for activations, the compiled program and the runtime
VERIFY = 3  # all-reduces of verification by blocks; without drafts 1 is left


def kept(acceptance: Sequence[float]) -> tuple[float, ...]:
    """Returns how often each draft is kept: as often as it is accepted and all before it are, a product of rates."""
    return tuple(itertools.accumulate(acceptance, operator.mul))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned.

    Attributes:
      target: the target.
      mesh: of the target.
      batch: rows, all together.
      context: tokens of each row.
      kept: how often each draft is kept, by position.
      draft: the draft model, or the time of a draft step in plain steps of the target.
      draft_mesh: of the draft; the same as ``mesh``, or with nothing but its ``data`` axis.
      sampling: a key of ``WARP``.
    """

    target: Model
    mesh: Mesh
    batch: int
    context: int
    kept: tuple[float, ...]
    draft: Model | float
    draft_mesh: Mesh
    sampling: str = "temperature"

    @property
    def rows(self) -> float:
        return self.batch / self.mesh.data


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: float
    cache: float
    draft: float
    logits: float


def memory(setting: Setting, num_draft: int) -> Memory:
    """Returns what one device holds: caches in specjax's slots, a power of two; logits and distributions in float32."""
    slots = 1 << (setting.context + num_draft).bit_length()

    def cache(model: Model, mesh: Mesh) -> float:
        return setting.rows * slots * model.config.num_hidden_layers * token_bytes(model, mesh)

    draft = 0.0
    if isinstance(setting.draft, Model):
        draft = weights(setting.draft, setting.draft_mesh).held + cache(setting.draft, setting.draft_mesh)
    distributions = 2 * (num_draft + 1) + num_draft  # the target's logits and p, the draft's q
    return Memory(
        weights(setting.target, setting.mesh).held,
        cache(setting.target, setting.mesh),
        draft,
        4 * setting.rows * distributions * setting.target.config.vocab_size / setting.mesh.tensor,
    )


class Round(NamedTuple):
    """A round of g drafts.

    Attributes:
      num_draft: g.
      emitted: tokens per row, the target's own included.
      target: what the target's pass takes.
      drafting: seconds of the draft's passes, their collectives included.
      read: bytes that a device reads, the draft's included, as in what follows.
      collectives: all-reduces.
      sent: bytes that a device sends.
      tokens_per_second: of all rows.
    """

    num_draft: int
    emitted: float
    target: Seconds
    drafting: float
    read: float
    collectives: int
    sent: float
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        return self.target.total + self.drafting


def plan_round(setting: Setting, hardware: Hardware, num_draft: int) -> Round:
    """Returns a round of ``num_draft`` drafts; of 0, a step of plain decoding."""
    target, draft, rows, context = setting.target, setting.draft, setting.rows, setting.context

    def check(num_draft: int) -> Pass:
        verify = VERIFY if num_draft else 1
        chosen = choosing(setting.mesh, rows, num_draft + 1, setting.sampling, verify)
        return forward(target, setting.mesh, rows, num_draft + 1, context, chosen)

    checking = check(num_draft)
    passes = [checking]
    if isinstance(draft, Model):
        # The first step feeds two tokens: the last draft may be new to the draft model.
        widths = [2] * (num_draft > 0) + [1] * (num_draft - 1)
        chosen = choosing(setting.mesh, rows, 1, setting.sampling)
        steps = [forward(draft, setting.draft_mesh, rows, width, context, chosen) for width in widths]
        passes += steps
        drafting = sum(seconds(step, hardware, draft.weights).total for step in steps)
    else:
        plain = seconds(check(0), hardware, target.weights)
        drafting = num_draft * draft * plain.total
    spent = seconds(checking, hardware, target.weights)
    # Each round emits the kept drafts and one token of the target (Leviathan et al. 2023, section 3.1).
    emitted = 1 + sum(setting.kept[:num_draft])
    return Round(
        num_draft,
        emitted,
        spent,
        drafting,
        sum(work.read for work in passes),
        sum(work.collectives for work in passes),
        sum(work.sent for work in passes),
        setting.batch * emitted / (spent.total + drafting),
    )


def best(rounds: Sequence[Round]) -> Round:
    """Returns the round with the most tokens per second; of equals, the one with the fewest drafts."""
    return max(rounds, key=lambda r: (r.tokens_per_second, -r.num_draft))
