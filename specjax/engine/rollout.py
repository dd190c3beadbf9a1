"""Several completions of each prompt, for reinforcement learning and for best-of-n sampling."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from specjax import verify as verify_lib
from specjax.engine.arguments import Prompts, as_prompts, bucket, check_model, check_rule, check_tokens, is_known
from specjax.engine.measuring import costs_of_rollout, with_costs
from specjax.engine.pool import rollout_program
from specjax.engine.programs import classes_key
from specjax.engine.request import SMALLEST_PROMPT, lay_out
from specjax.platforms import platform_of
from specjax.sampling import Sampling
from specjax.sharding import open_parts
from specjax.types import Drafter, Generation, LanguageModel, VerifyRule


@struct.dataclass
class Completions:
    """What was emitted, without the prompts: the shapes of GRPO's and PPO's losses.

    Attributes:
      tokens: int32 ``[completions, width]``, a stop token included; zeros past the end.
      mask: bool ``[completions, width]``, the places that hold an emitted token.
      logprobs: float32 ``[completions, width]``, as of ``Generation``; None if they were not asked for.
      warped_logprobs: the same under the distribution that was sampled.
    """

    tokens: Array
    mask: Array
    logprobs: Array | None
    warped_logprobs: Array | None


@struct.dataclass
class Rollout(Generation):
    """The result of ``rollout``: a ``Generation`` whose rows are completions, those of a prompt after each other.

    Attributes:
      stopped: bool ``[completions]``, whether a stop token ended it; else its limit did.
      rounds: int32 ``[rows]``, target passes of the batch, the same for all of its rows; over a mesh, for the rows of a
        part.
    """

    stopped: Array | None = None
    rounds: Array | None = None

    @property
    def mask(self) -> Array:
        """bool ``[completions, slots]``, the places of ``tokens`` that hold an emitted token."""
        slot_1s = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return (slot_1s >= self.prompt_lengths[:, None]) & (slot_1s < self.lengths[:, None])

    @property
    def resting_share(self) -> Array:
        """float32 scalar, the share of row-rounds in which the row was done and waited for other rows."""
        assert self.rounds is not None
        return 1 - self.stats.rounds.sum() / jnp.maximum(self.rounds.sum(), 1)

    def completions(self, width: int) -> Completions:
        """Returns what was emitted, without the prompts, in arrays of ``width``, such as ``max_new_tokens``.

        Raises:
          ValueError: ``width`` is no integer of at least 1, or a completion is longer. Under ``jit`` a longer one is
            cut.
        """
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width is {width!r}; give an integer of at least 1, such as max_new_tokens")
        count_n = self.lengths - self.prompt_lengths
        if is_known(count_n) and int(jnp.max(count_n)) > width:
            raise ValueError(
                f"width is {width} and a completion has {int(jnp.max(count_n))} tokens; give at least that"
            )
        place_1t = jnp.arange(width, dtype=jnp.int32)[None]
        mask_nt = place_1t < count_n[:, None]
        slot_nt = jnp.minimum(self.prompt_lengths[:, None] + place_1t, self.tokens.shape[1] - 1)

        def emitted(array: Any) -> Any:
            return None if array is None else jnp.where(mask_nt, jnp.take_along_axis(array, slot_nt, axis=1), 0)

        return Completions(emitted(self.tokens), mask_nt, emitted(self.logprobs), emitted(self.warped_logprobs))


def rollout(
    target: LanguageModel,
    prompts: Prompts,
    lengths: ArrayLike | None = None,
    *,
    samples: int,
    rows: int | None = None,
    drafter: Drafter | None = None,
    verify: VerifyRule = verify_lib.block,
    sampling: Sampling = Sampling(),
    max_new_tokens: ArrayLike,
    stop_tokens: ArrayLike | tuple[int, ...] = (),
    slots: int | None = None,
    logprobs: bool = True,
    fixed: bool = False,
    costs: ArrayLike | None = None,
) -> Rollout:
    """Writes ``samples`` completions of each prompt; their law is the target's, whatever the drafter.

    Completion j of prompt i is row ``samples * i + j`` of the result. Its text is that of ``specjax.generate`` for
    ``jnp.repeat(prompts, samples, axis=0)`` with the same seeds, and does not depend on ``rows``, where the text of
    ``generate`` depends on no other row: with ``fixed=True`` and with ``coupled``.

    Each prompt is read once, and its completions start from copies of the cache. ``rows`` completions run at once. A
    row that is done goes on with the next completion, inside the compiled loop.

    Pure, and usable inside the caller's own ``jit``. New parameters of the target or drafter compile nothing. Under
    ``jax.set_mesh`` prompts and rows are split over the mesh's ``data`` axis.

    Memory: caches of ``rows`` rows with all slots, and of one row per prompt with the slots of the longest prompt; a
    target or drafter whose cache is no plain array of slots takes all slots there, too.

    Args:
      target, prompts, lengths, drafter, verify, slots, fixed, costs: as for ``generate``.
      samples: completions of each prompt, at least 1.
      rows: how many completions run at once; None: all. More than there are completions count as all.
      sampling: as for ``generate``, one for all or per completion. One seed s gives completion k the seed s + k.
      max_new_tokens: the most tokens of a completion, an integer or one per completion.
      stop_tokens: as for ``generate``; per completion if two-dimensional.
      logprobs: return the log-probabilities of emitted tokens.

    Raises:
      ValueError, TypeError: as for ``generate``; ``samples`` or ``rows`` is no integer of at least 1; or prompts or
        rows do not divide over the mesh.
    """
    # 1. The arguments. Prompts are repeated only as tokens, so that one function checks all that rows have.
    check_rule(verify, drafter)
    check_model("target", target)
    for name, value in (("samples", samples), ("rows", 1 if rows is None else rows)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value!r}; give an integer of at least 1")
    prompt_pt, length_p = as_prompts(prompts, lengths, least=1)
    known = is_known((prompt_pt, length_p))
    if known:  # here, since a message should name the prompt and not a completion of it
        check_tokens(np.asarray(prompt_pt), np.asarray(length_p), target.vocab_size)
    repeat = (np if known else jnp).repeat
    prompt_ns, request_n, static = lay_out(
        target, drafter, repeat(prompt_pt, samples, axis=0), repeat(length_p, samples), sampling, max_new_tokens,
        stop_tokens, slots, logprobs, 0, fixed, costs,
    )  # fmt: skip
    total, most = prompt_ns.shape
    rows = total if rows is None else min(int(rows), total)
    parts = open_parts("data")
    if prompt_pt.shape[0] % parts or rows % parts:
        raise ValueError(
            f"{prompt_pt.shape[0]} prompts and {rows} rows do not divide over the {parts} parts of the mesh axis "
            f"'data'; give multiples of {parts}, or make that axis smaller"
        )
    width = bucket(prompt_pt.shape[1], SMALLEST_PROMPT) if known else prompt_pt.shape[1]
    del static["top_logprobs"]
    static |= {"samples": int(samples), "rows": rows // parts, "prompt_slots": min(width + 1, most)}
    static |= {"classes": classes_key(target, drafter), "verify": verify}

    # 2. One program.
    prompt_ps, count = prompt_ns[::samples], jnp.int32(total // parts)
    with platform_of((target, prompt_ps, request_n)):
        if request_n.cost_bw is not None and costs is None and is_known((target, prompt_ps, request_n, drafter)):
            cost_w = costs_of_rollout(target, prompt_ps, request_n, drafter, static)
            request_n = with_costs(request_n, cost_w)
        generation, rounds = rollout_program(target, prompt_ps, request_n, drafter, count, **static)
    last_n1 = jnp.take_along_axis(generation.tokens, generation.lengths[:, None] - 1, axis=1)
    emits_n = generation.lengths > generation.prompt_lengths
    stopped = emits_n & jnp.any(last_n1 == request_n.stop_tokens_bk, axis=1)
    fields = {name: getattr(generation, name) for name in Generation.__dataclass_fields__}
    return Rollout(**fields, stopped=stopped, rounds=rounds)
