"""What a caller asks for, checked and laid out in shapes that other calls share.

Values are checked whenever they are known, that is outside ``jit``; under ``jit`` only shapes and dtypes are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from specjax.engine.adapt import drafts_of, places_past
from specjax.engine.arguments import (
    Prompts,
    allocated_slots,
    as_costs,
    as_limits,
    as_prompts,
    as_stop_tokens,
    bucket,
    check_drafter,
    check_logprobs,
    check_model,
    check_positions,
    check_sampling,
    check_tokens,
    is_known,
)
from specjax.sampling import Sampling
from specjax.sharding import gathered
from specjax.types import Drafter, LanguageModel

CHUNK = 256
"""The most tokens of a prompt that are read in one pass."""

SMALLEST_PROMPT = 16
"""The least width of prompts whose values are known: they are padded to powers of two from here on."""


@struct.dataclass
class Request:
    """The part of the loop's state that does not change in rounds.

    Attributes:
      prompt_length_b: int32.
      limit_b: int32, the length at which a row ends.
      stop_tokens_bk: int32, ids that end a row; -1 is none.
      sampling: per-row parameters.
      cost_bw: float32, the time of a round of each width, over that of a plain one, by which the loop chooses how many
        drafts a round takes; the same in all rows. None: all rounds take all drafts.
    """

    prompt_length_b: Array
    limit_b: Array
    stop_tokens_bk: Array
    sampling: Sampling
    cost_bw: Array | None = None


def lay_out(
    target: LanguageModel,
    drafter: Drafter | None,
    prompts: Prompts,
    lengths: ArrayLike | None,
    sampling: Sampling,
    max_new_tokens: ArrayLike,
    stop_tokens: Any,
    slots: int | None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    fixed: bool = True,
    costs: ArrayLike | None = None,
) -> tuple[Array, Request, dict[str, Any]]:
    """Checks the arguments of ``generate`` and lays them out.

    Returns:
      The prompts, int32 ``[rows, slots]``; the request; and the static arguments of the compiled programs. With known
      values, slots and the number of stop tokens are rounded up to buckets, and so is the width of short prompts.

    Raises:
      ValueError, TypeError: an argument is out of its range.
    """
    # 1. Each argument by itself.
    check_model("target", target)
    prompt_bt, length_b = as_prompts(prompts, lengths, least=1)
    rows, width = prompt_bt.shape
    new_b = as_limits(max_new_tokens, rows)
    g = check_drafter(target, drafter)
    check_sampling(sampling, rows, target.vocab_size)
    stop_tokens_bk = as_stop_tokens(stop_tokens, rows, target.vocab_size)
    top = check_logprobs(logprobs, top_logprobs, target.vocab_size)
    if fixed and costs is not None:
        raise ValueError(
            "costs are given and fixed is True; give costs where rounds may take fewer drafts, or only fixed"
        )
    cost_w = None if fixed or drafter is None else as_costs(costs, drafts_of(drafter))
    past = places_past(g, cost_w is not None)

    # 2. How many slots a row needs. Values that are traced are taken to be the most that their shapes allow.
    if is_known((prompt_bt, length_b)):
        check_tokens(np.asarray(prompt_bt), np.asarray(length_b), target.vocab_size)
    longest_b = np.asarray(length_b) if is_known(length_b) else np.full((rows,), width)
    needed = None
    if is_known(new_b):
        final = int(np.max(longest_b + np.asarray(new_b)))
        check_positions(target, drafter, int(longest_b.max()), final)
        needed = max(final + past + 1, width)
    allocated = allocated_slots(slots, needed, width, is_known((prompt_bt, length_b)), past)

    # 3. Pad the prompts to the slots. A chunk is as wide as all of a short prompt.
    chunk = width
    if is_known((prompt_bt, length_b)):
        chunk = bucket(width, SMALLEST_PROMPT)
    chunk = min(chunk, CHUNK, allocated)
    pad = np if is_known(prompt_bt) else jnp
    prompt_bs = pad.pad(prompt_bt, ((0, 0), (0, allocated - width)))
    length_b = _int32(length_b)
    limit_b = length_b + _int32(new_b)
    cost_bw = None if cost_w is None else _spread(cost_w, rows)
    request = Request(length_b, limit_b, _int32(stop_tokens_bk), sampling.per_row(rows), cost_bw)
    return _int32(prompt_bs), request, {"chunk": chunk, "logprobs": bool(logprobs), "top_logprobs": top}


def lay_out_more(
    target: LanguageModel,
    drafter: Drafter | None,
    state: Any,
    tokens: Prompts,
    lengths: ArrayLike | None,
    max_new_tokens: ArrayLike,
) -> tuple[Array, Array, Array, int]:
    """Checks the arguments of ``extend`` and lays them out.

    Returns:
      The new tokens, int32 ``[rows, t]``; how many count, int32 ``[rows]``; the new limits, int32 ``[rows]``; and the
      width of a chunk.

    Raises:
      ValueError, TypeError: an argument is out of its range.
    """
    # 1. Each argument by itself.
    check_model("target", target)
    new_bt, count_b = as_prompts(tokens, lengths, least=0)
    rows, slots = state.tokens_bs.shape
    if new_bt.shape[0] != rows:
        raise ValueError(f"tokens has {new_bt.shape[0]} rows and the state {rows}; give one for each, empty ones too")
    limit_b = as_limits(max_new_tokens, rows)
    g = check_drafter(target, drafter)
    if g != state.num_draft:
        raise ValueError(f"the drafter proposes {g} tokens and the state was made for {state.num_draft}: give the same")
    width = new_bt.shape[1]
    if not is_known((new_bt, count_b, limit_b, state.length_b)):
        return _int32(new_bt), _int32(count_b), _int32(limit_b), min(width, CHUNK)

    # 2. Whether it fits.
    check_tokens(np.asarray(new_bt), np.asarray(count_b), target.vocab_size, "tokens")
    old_b, count_b = gathered(state.length_b), np.asarray(count_b)
    extended_b = count_b > 0
    final_b = np.where(extended_b, old_b + count_b + np.asarray(limit_b), 0)
    row = int(np.argmax(final_b))
    if extended_b.any():
        check_positions(target, drafter, int((old_b + count_b)[row]), int(final_b[row]))
    past = places_past(g, state.adapt is not None)
    if final_b[row] + past + 1 > slots:
        raise ValueError(
            f"row {row} has {old_b[row]} tokens; {count_b[row]} more, max_new_tokens {np.asarray(limit_b)[row]} and "
            f"{past} places past the end need {final_b[row] + past + 1} slots, and the state has {slots}: prefill with "
            "more slots="
        )

    # 3. A chunk must fit after the last token of every row, also of those that rest.
    width = bucket(width, SMALLEST_PROMPT)
    new_bt = np.pad(np.asarray(new_bt), ((0, 0), (0, width - new_bt.shape[1])))
    chunk = min(width, CHUNK)
    while old_b.max() - 1 + chunk > slots:
        chunk //= 2
    return _int32(new_bt), _int32(count_b), _int32(limit_b), chunk


def _spread(array: Any, rows: int) -> Array:
    """Returns the array once for each row, on the device. One from the host compiles nothing."""
    shape = (rows, *array.shape)
    return (
        jax.device_put(np.broadcast_to(array, shape))
        if isinstance(array, np.ndarray)
        else jnp.broadcast_to(array, shape)
    )


def _int32(array: Any) -> Array:
    """Returns the array on the device. One from the host is converted there and put, which compiles nothing."""
    array = array.astype(np.int32)
    # Not jnp.asarray, which compiles a program for each shape.
    return jax.device_put(array) if isinstance(array, np.ndarray) else array
