"""What a caller asks for, checked and laid out in shapes that other calls share.

Values are checked whenever they are known, that is outside ``jit``; under ``jit`` only shapes and dtypes are.
"""

import dataclasses
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
    """Returns ragged prompts as int32 ``[b, t]``, right-padded with zeros, and their lengths, int32 ``[b]``.

    Raises:
      ValueError, TypeError: there is no prompt, one is empty or not flat, or its tokens are no integers of int32.
    """
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"prompts is {prompts!r}; give a sequence of prompts, each a sequence of token ids")
    rows = [np.asarray(_array(f"prompt {row}", prompt)) for row, prompt in enumerate(prompts)]
    for row, tokens in enumerate(rows):
        if tokens.size:  # NumPy gives an empty list the dtype float64
            _check_integers(f"prompt {row}", tokens)
        if tokens.ndim != 1:
            raise ValueError(f"prompt {row} has shape {tokens.shape}; give a flat sequence of token ids")
        if tokens.size and tokens.max() >= 2**31:
            raise ValueError(f"prompt {row} holds token {tokens.max()}; ids are below 2**31")
    length_b = np.asarray([len(tokens) for tokens in rows], np.int32)
    if not rows or not length_b.min():
        raise ValueError(f"prompts have lengths {length_b.tolist()}; give at least one, each of at least one token")
    prompt_bt = np.zeros((len(rows), length_b.max()), np.int32)
    for row, tokens in enumerate(rows):
        prompt_bt[row, : len(tokens)] = tokens
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
    _check_model("target", target)
    prompt_bt = _array("prompt_bt", prompt)
    if prompt_bt.size:
        _check_integers("prompt_bt", prompt_bt)
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
    max_new_tokens = int(max_new_tokens)
    if slots is not None and (isinstance(slots, bool) or not isinstance(slots, (int, np.integer))):
        raise TypeError(f"slots is {slots!r}; give an integer, or None for what fits")
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
    if needed > 2**30:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; with the prompt it needs {needed} slots and 2**30 is the most: ask "
            "for fewer tokens"
        )
    fitting = bucket(needed, _SMALLEST_SLOTS) if known else needed
    allocated = fitting if slots is None else int(slots)
    if allocated < needed:
        raise ValueError(
            f"slots is {allocated}; a prompt of {longest} tokens (padded to {width}), max_new_tokens {max_new_tokens} "
            f"and {g} drafts need {needed}: allocate more slots or ask for fewer tokens"
        )
    if known:
        padded = min(bucket(width, _SMALLEST_PROMPT), allocated)
        prompt_bt = np.pad(np.asarray(prompt_bt), ((0, 0), (0, padded - width)))

    own = max_new_tokens if sampling.max_new_tokens is None else sampling.max_new_tokens
    sampling = dataclasses.replace(sampling, max_new_tokens=own).per_row(rows)  # None would be another loop
    prompt_length_b = _int32(prompt_length_b)
    limit_b = prompt_length_b + jnp.minimum(jnp.asarray(sampling.max_new_tokens), max_new_tokens)
    return _int32(prompt_bt), Request(prompt_length_b, limit_b, _int32(stop_tokens_k), sampling), allocated


def _int32(array: Any) -> Array:
    """Returns the array on the device. One from the host is converted there, which compiles nothing."""
    return jnp.asarray(array.astype(np.int32))


def _is_known(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _integers(name: str, value: Any) -> Any:
    array = _array(name, value)
    _check_integers(name, array)
    return array


def _check_integers(name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {array.dtype}; give integers")


def _numbers(name: str, value: Any) -> Any:
    array = _array(name, value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} is {value!r}; give real numbers")
    return array


def _array(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} is not a rectangular array; give rows of one length (prompts: specjax.pad_prompts)"
        ) from None


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{name} is a {type(model).__name__}; give a specjax.LanguageModel, as specjax.load returns it")


def check_rule(verify: Any) -> None:
    """Raises TypeError unless ``verify`` is a verification rule."""
    if isinstance(verify, type) or not (callable(verify) and hasattr(verify, "shares_noise")):
        raise TypeError(f"verify is {verify!r}; give a rule, such as specjax.verify.block")


def check_key(key: Any) -> None:
    """Raises TypeError unless ``key`` is None or one key, of the new kind or the old."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype == np.uint32 and shape in ((2,), (4,))
    if key is not None and not typed and not raw:
        raise TypeError(f"key is {key!r}; give one key, as jax.random.key(seed) makes it, or None")


_DRAFTER = ("num_draft", "capture", "vocab_size", "max_positions", "start", "propose", "commit")


def _check_drafter(target: LanguageModel, drafter: Drafter | None) -> int:
    if drafter is None:
        return 0
    missing = [name for name in _DRAFTER if not hasattr(drafter, name)]
    if isinstance(drafter, type) or missing:
        kind = f"the class {drafter.__name__}" if isinstance(drafter, type) else f"a {type(drafter).__name__}"
        raise TypeError(
            f"drafter is {kind}{f' without {missing[0]}' if missing else ''}; give a drafter, such as "
            "specjax.ModelDrafter(model) or specjax.NGramDrafter()"
        )
    g = drafter.num_draft
    if isinstance(g, bool) or not isinstance(g, int) or g < 1:
        raise ValueError(f"num_draft is {g!r}; give an integer of at least 1, or drafter=None for plain decoding")
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens and the target's {target.vocab_size}; "
            "use a drafter that shares the target's tokenizer"
        )
    layers = target.num_layers
    if layers is not None and any(not -1 <= index <= layers for index in drafter.capture):
        raise ValueError(
            f"the drafter reads the target's hidden states {drafter.capture} and the target has {layers} layers: 0 is "
            f"the embedding, {layers} the last layer's output, -1 that of the final norm; use a drafter made for it"
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


def _stop_tokens(stop_tokens: Any, vocab: int) -> Any:
    """Returns the ids, padded with -1 to a bucket if they are known."""
    array = _integers("stop_tokens", stop_tokens if np.size(stop_tokens) else np.zeros((0,), np.int32))
    if array.ndim > 1:
        raise ValueError(f"stop_tokens has shape {array.shape}; give a flat sequence of token ids")
    array = array.reshape(-1)
    if not _is_known(array):
        return array
    array = np.asarray(array)
    if array.size and not (0 <= array.min() and array.max() < vocab):
        raise ValueError(f"stop_tokens are {array.tolist()}; the target's ids are 0 to {vocab - 1}")
    padded = bucket(max(array.size, 1), _STOP_TOKENS)
    return np.pad(array.astype(np.int32), (0, padded - array.size), constant_values=-1)


# name -> (holds for all values, what the values must be)
_RANGES = {
    "temperature": (lambda x: np.isfinite(x) & (x >= 0), "finite and at least 0 (0 is greedy)"),
    "top_k": (lambda x: (x >= 0) & (x < 2**31), "at least 0 (0 keeps all tokens) and below 2**31"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 (keeps all tokens) to 1"),
    "repetition_penalty": (lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 is none)"),
    "presence_penalty": (np.isfinite, "finite (0 is none)"),
    "frequency_penalty": (np.isfinite, "finite (0 is none)"),
    "seed": (lambda x: (x >= 0) & (x < 2**32), "from 0 to 2**32 - 1"),
    "max_new_tokens": (lambda x: (x >= 1) & (x < 2**31), "at least 1 and below 2**31"),
}
_INTEGER = ("top_k", "seed", "max_new_tokens")


def _check_sampling(sampling: Sampling, rows: int, vocab: int) -> None:
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is a {type(sampling).__name__}; give a specjax.Sampling")
    for name, (holds, wanted) in _RANGES.items():
        value = getattr(sampling, name)
        if value is None and name == "max_new_tokens":
            continue
        array = _integers(name, value) if name in _INTEGER else _numbers(name, value)
        if array.shape not in ((), (rows,)):
            raise ValueError(f"{name} has shape {array.shape}; give one number, or one per row: ({rows},)")
        if _is_known(array) and not np.all(holds(_as_sampled(name, array))):
            raise ValueError(f"{name} is {np.asarray(array).tolist()}; it must be {wanted}")
    if sampling.logit_bias is None:
        return
    bias = _numbers("logit_bias", sampling.logit_bias)
    if bias.shape not in ((vocab,), (rows, vocab)):
        raise ValueError(f"logit_bias has shape {bias.shape}; give ({vocab},) or ({rows}, {vocab})")
    if _is_known(bias):
        bias = np.atleast_2d(_as_sampled("logit_bias", bias))
        if np.isnan(bias).any() or np.isposinf(bias).any() or np.isneginf(bias).all(-1).any():
            raise ValueError("logit_bias holds nan, +inf, or -inf for every token; -inf may ban some tokens, not all")


def _as_sampled(name: str, array: Any) -> np.ndarray:
    """Returns the values that the loop will see: float32 rounds 1e-50 to 0, and 1e39 to infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(array) if name in _INTEGER else np.asarray(array).astype(np.float32)
