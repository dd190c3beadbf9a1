"""The least time of a round of speculative decoding, the memory that it needs, and the best number of drafts.

``docs/scaling.md`` gives the formulas and lists the parts that they leave out.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from specjax.planning.hardware import Hardware
from specjax.planning.roofline import Mesh, Model, Pass, Seconds, cache_bytes, choosing, forward, seconds, weights

RESERVE = 0.1  # share of a device's memory for activations, the compiled program and the runtime
VERIFY = 3  # all-reduces of the rule `block`; without drafts, 1


def kept(acceptance: Sequence[float]) -> tuple[float, ...]:
    """Returns the probability that each draft is kept, which needs all drafts before it: products of rates.

    Example: (0.8, 0.5) becomes (0.8, 0.4).
    """
    return tuple(itertools.accumulate(acceptance, operator.mul))


@dataclasses.dataclass(frozen=True)
class Setting:
    """The target, drafter, mesh and batch to plan.

    Attributes:
      target: the target.
      mesh: the target's mesh.
      batch: rows on all devices together.
      context: tokens of each row.
      kept: the probability that each draft is kept, by position.
      draft: the draft model, or the time of a draft step in plain steps of the target.
      draft_mesh: the draft's mesh: ``mesh``, or only the ``data`` axis of ``mesh``.
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
        """Rows of one device."""
        return self.batch / self.mesh.data


class Memory(NamedTuple):
    """Bytes on one device. ``draft`` is the draft's weights and cache."""

    weights: float
    cache: float
    draft: float
    logits: float


def memory(setting: Setting, num_draft: int) -> Memory:
    """Returns the memory of one device. Logits and distributions are float32."""
    # specjax allocates a power of two of slots. Example, context 4000 and g = 4: 4096.
    slots = 1 << (setting.context + num_draft).bit_length()

    def cache(model: Model, mesh: Mesh) -> float:
        return cache_bytes(model, setting.rows, slots, mesh)

    draft = 0.0
    if isinstance(setting.draft, Model):
        draft = weights(setting.draft, setting.draft_mesh).held + cache(setting.draft, setting.draft_mesh)
    distributions = 2 * (num_draft + 1) + num_draft  # logits and p of the target, q of the draft
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
      emitted: tokens per row, the target's own token included.
      target: the time of the target's pass.
      drafting: seconds of the draft's passes, collectives included.
      read: bytes that a device reads, in the passes of target and draft.
      collectives: all-reduces of both.
      sent: bytes that a device sends in both.
      tokens_per_second: tokens of all rows.
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
        """Seconds of the round."""
        return self.target.total + self.drafting


def plan_round(setting: Setting, hardware: Hardware, num_draft: int) -> Round:
    """Returns a round of ``num_draft`` drafts. A round of 0 drafts is a step of plain decoding."""
    target, draft, rows, context = setting.target, setting.draft, setting.rows, setting.context

    # The target's pass. Without drafts, one all-reduce of verification is left: the sum of the residual.
    def check(num_draft: int) -> Pass:
        verify = VERIFY if num_draft else 1
        chosen = choosing(setting.mesh, rows, num_draft + 1, setting.sampling, verify)
        return forward(target, setting.mesh, rows, num_draft + 1, context, chosen)

    checking = check(num_draft)
    passes = [checking]
    # The draft's passes, if the draft is a model. A draft that is only a cost reads and sends nothing here: its cost
    # stands for all its time.
    if isinstance(draft, Model):
        # The first step feeds two tokens: the last draft may be new to the draft model.
        widths = [2] + [1] * (num_draft - 1) if num_draft else []
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
