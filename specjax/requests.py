"""What a caller asks for, checked and laid out in shapes that other calls share.

Values are checked whenever they are known, that is outside ``jit``; under ``jit`` only shapes and dtypes are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from specjax.sampling import Sampling
from specjax.types import Drafter, LanguageModel

_SMALLEST_PROMPT = 16
_SMALLEST_SLOTS = 128
_STOP_TOKENS = 8


@struct.dataclass
class Request:
    """The part of the loop's state that does not change.

    Attributes:
      prompt_length_b: int32.
      limit_b: int32, the length at which a row ends.
      stop_tokens_k: int32, ids that end a row; -1 is none.
      sampling: per-row parameters.
    """

    prompt_length_b: Array
    limit_b: Array
    stop_tokens_k: Array
    sampling: Sampling


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ragged prompts as int32 ``[b, t]``, right-padded with zeros, and their lengths ``[b]``."""
    length_b = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if not len(prompts) or not length_b.min():
        raise ValueError(f"prompts have lengths {length_b.tolist()}; give at least one, each of at least one token")
    prompt_bt = np.zeros((len(prompts), length_b.max()), np.int32)
    for row, prompt in enumerate(prompts):
        prompt_bt[row, : len(prompt)] = prompt
    return prompt_bt, length_b


def bucket(size: int, smallest: int) -> int:
    """Returns the least power of two that is at least ``size`` and ``smallest``."""
    return max(smallest, 1 << (size - 1).bit_length())


def lay_out(
    target: LanguageModel,
    drafter: Drafter | None,
    prompt: ArrayLike,
    prompt_length: ArrayLike | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Any,
    slots: int | None,
) -> tuple[Array, Request, int]:
    """Checks the arguments of ``generate`` and returns the prompt, the request and the slots per row.

    With known values the prompt's width, the slots and the stop tokens are padded to buckets.

    Raises:
      ValueError, TypeError: an argument is out of its range; the message names value, limit and cure.
    """
    prompt_bt = _integers("prompt_bt", prompt)
    if prompt_bt.ndim != 2 or 0 in prompt_bt.shape:
        raise ValueError(
            f"prompt_bt has shape {prompt_bt.shape}; give [rows, tokens], neither of them 0 (see specjax.pad_prompts)"
        )
    rows, width = prompt_bt.shape
    prompt_length_b = _integers(
        "prompt_length_b", np.full((rows,), width, np.int32) if prompt_length is None else prompt_length
    )
    if prompt_length_b.shape != (rows,):
        raise ValueError(f"prompt_length_b has shape {prompt_length_b.shape}; give ({rows},), one length per prompt")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens!r}; give an integer of at least 1 (per row: Sampling.max_new_tokens)"
        )
    g = _check_drafter(target, drafter)
    _check_sampling(sampling, rows, target.vocab_size)
    stop_tokens_k = _stop_tokens(stop_tokens, target.vocab_size)

    known = _is_known((prompt_bt, prompt_length_b))
    if known:
        _check_prompt(np.asarray(prompt_bt), np.asarray(prompt_length_b), target.vocab_size)
    longest = int(np.max(np.asarray(prompt_length_b))) if known else width
    limits = {"target": target.max_positions, "drafter": None if drafter is None else drafter.max_positions}
    for name, limit in limits.items():
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} need {longest + max_new_tokens} "
                f"positions; the {name} has {limit}: shorten the prompt or ask for fewer tokens"
            )
    needed = max(longest + max_new_tokens + g + 1, width)
    fitting = bucket(needed, _SMALLEST_SLOTS) if known else needed
    allocated = fitting if slots is None else slots
    if allocated < needed:
        raise ValueError(
            f"slots is {allocated}; a prompt of {longest} tokens (padded to {width}), max_new_tokens {max_new_tokens} "
            f"and {g} drafts need {needed}: allocate more slots or ask for fewer tokens"
        )
    if known:
        padded = min(bucket(width, _SMALLEST_PROMPT), allocated)
        prompt_bt = np.pad(np.asarray(prompt_bt), ((0, 0), (0, padded - width)))

    sampling = sampling.per_row(rows)
    prompt_length_b = jnp.asarray(prompt_length_b, jnp.int32)
    new_b = jnp.full((rows,), max_new_tokens, jnp.int32)
    if sampling.max_new_tokens is not None:
        new_b = jnp.minimum(new_b, jnp.asarray(sampling.max_new_tokens))
    request = Request(prompt_length_b, prompt_length_b + new_b, stop_tokens_k, sampling)
    return jnp.asarray(prompt_bt, jnp.int32), request, allocated


def _is_known(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _integers(name: str, value: ArrayLike) -> Any:
    array = value if isinstance(value, jax.Array) else _as_numpy(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {array.dtype}; give integers")
    return array


def _as_numpy(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} is not a rectangular array; pad ragged prompts with specjax.pad_prompts") from None


def _check_drafter(target: LanguageModel, drafter: Drafter | None) -> int:
    if drafter is None:
        return 0
    g = drafter.num_draft
    if isinstance(g, bool) or not isinstance(g, int) or g < 1:
        raise ValueError(f"num_draft is {g!r}; give an integer of at least 1, or drafter=None for plain decoding")
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens and the target's {target.vocab_size}; "
            "use a drafter that shares the target's tokenizer"
        )
    return g


def _check_prompt(prompt_bt: np.ndarray, prompt_length_b: np.ndarray, vocab: int) -> None:
    rows, width = prompt_bt.shape
    for row in range(rows):
        length = int(prompt_length_b[row])
        if not 1 <= length <= width:
            raise ValueError(f"prompt {row} has length {length}; give 1 to {width}, the width of prompt_bt")
        tokens = prompt_bt[row, :length]
        outside = tokens[(tokens < 0) | (tokens >= vocab)]
        if outside.size:
            raise ValueError(
                f"prompt {row} holds token {int(outside[0])}; the target's ids are 0 to {vocab - 1}: "
                "encode it with the target's tokenizer"
            )


def _stop_tokens(stop_tokens: Any, vocab: int) -> Array:
    array = _integers("stop_tokens", stop_tokens if np.size(stop_tokens) else np.zeros((0,), np.int32))
    if array.ndim > 1:
        raise ValueError(f"stop_tokens has shape {array.shape}; give a flat sequence of token ids")
    array = array.reshape(-1)
    if not _is_known(array):
        return array.astype(jnp.int32)
    array = np.asarray(array)
    if array.size and not (0 <= array.min() and array.max() < vocab):
        raise ValueError(f"stop_tokens are {array.tolist()}; the target's ids are 0 to {vocab - 1}")
    padded = bucket(max(array.size, 1), _STOP_TOKENS)
    return jnp.asarray(np.pad(array, (0, padded - array.size), constant_values=-1), jnp.int32)


# name -> (holds for all values, what the values must be)
_RANGES = {
    "temperature": (lambda x: np.isfinite(x) & (x >= 0), "finite and at least 0 (0 is greedy)"),
    "top_k": (lambda x: x >= 0, "at least 0 (0 keeps all tokens)"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 (keeps all tokens) to 1"),
    "repetition_penalty": (lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 is none)"),
    "presence_penalty": (np.isfinite, "finite (0 is none)"),
    "frequency_penalty": (np.isfinite, "finite (0 is none)"),
    "seed": (lambda x: (x >= 0) & (x < 2**32), "from 0 to 2**32 - 1"),
    "max_new_tokens": (lambda x: x >= 1, "at least 1"),
}
_INTEGER = ("top_k", "seed", "max_new_tokens")


def _check_sampling(sampling: Sampling, rows: int, vocab: int) -> None:
    for name, (holds, wanted) in _RANGES.items():
        value = getattr(sampling, name)
        if value is None:
            continue
        if np.shape(value) not in ((), (rows,)):
            raise ValueError(f"{name} has shape {np.shape(value)}; give one number, or one per row: ({rows},)")
        if name in _INTEGER:
            value = _integers(name, value)
        if _is_known(value) and not np.all(holds(np.asarray(value))):
            raise ValueError(f"{name} is {np.asarray(value).tolist()}; it must be {wanted}")
    if sampling.logit_bias is None:
        return
    shape = np.shape(sampling.logit_bias)
    if shape not in ((vocab,), (rows, vocab)):
        raise ValueError(f"logit_bias has shape {shape}; give ({vocab},) or ({rows}, {vocab})")
    if _is_known(sampling.logit_bias):
        bias = np.atleast_2d(np.asarray(sampling.logit_bias))
        if np.isnan(bias).any() or np.isposinf(bias).any() or np.isneginf(bias).all(-1).any():
            raise ValueError("logit_bias holds nan, +inf, or -inf for every token; -inf may ban some tokens, not all")
