"""Checks of what a caller gives: values where they are known, that is outside ``jit``, else shapes and dtypes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from specjax.engine.adapt import UNOBSERVED
from specjax.engine.costs import assumed
from specjax.engine.tree import check_tree, depth_of
from specjax.sampling import PENALTIES, Sampling, is_key
from specjax.types import Drafter, LanguageModel

_SMALLEST_SLOTS = 128
_STOP_TOKENS = 8

Prompts = ArrayLike | Sequence[Sequence[int]]
"""Token ids: a sequence of prompts of any lengths, or integers ``[rows, width]``, right-padded."""


def pad_prompts(prompts: Sequence[Sequence[int]], least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns ragged prompts as int32 ``[b, t]``, right-padded with zeros, and their lengths, int32 ``[b]``.

    Args:
      prompts: token ids.
      least: the least length of a prompt, 0 or 1.

    Raises:
      ValueError, TypeError: there is no prompt, one is too short or not flat, or its tokens are no integers of int32.
    """
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"prompts is {prompts!r}; give a sequence of prompts, each a sequence of token ids")
    # Each prompt is checked by itself, so that a message names the one that is wrong.
    rows = [np.asarray(_array(f"prompt {row}", prompt)) for row, prompt in enumerate(prompts)]
    for row, tokens in enumerate(rows):
        if tokens.size:  # NumPy gives an empty list the dtype float64
            _check_integers(f"prompt {row}", tokens)
        if tokens.ndim != 1:
            raise ValueError(f"prompt {row} has shape {tokens.shape}; give a flat sequence of token ids")
        if tokens.size and tokens.max() >= 2**31:
            raise ValueError(f"prompt {row} holds token {tokens.max()}; ids are below 2**31")
    length_b = np.asarray([len(tokens) for tokens in rows], np.int32)
    if not rows or length_b.min() < least:
        raise ValueError(f"prompts have lengths {length_b.tolist()}; give at least one, each of at least one token")
    # A width of 0 would be another shape for every check that follows.
    prompt_bt = np.zeros((len(rows), max(length_b.max(), 1)), np.int32)
    for row, tokens in enumerate(rows):
        prompt_bt[row, : len(tokens)] = tokens
    return prompt_bt, length_b


def bucket(size: int, smallest: int) -> int:
    """Returns the least power of two that is at least ``size`` and ``smallest``."""
    return max(smallest, 1 << (size - 1).bit_length())


def as_prompts(prompts: Any, lengths: Any, least: int) -> tuple[Any, Any]:
    """Returns integers ``[rows, width]`` and their lengths ``[rows]``; ragged prompts are padded."""
    # Rectangular lists are ragged prompts, too: the result is the same.
    ragged = lengths is None and isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if ragged:
        return pad_prompts(prompts, least)
    prompt_bt = _array("prompts", prompts)
    if prompt_bt.size:
        _check_integers("prompts", prompt_bt)
    if prompt_bt.ndim != 2 or 0 in prompt_bt.shape:
        raise ValueError(f"prompts has shape {prompt_bt.shape}; give [rows, width], neither of them 0, or ragged lists")
    rows, width = prompt_bt.shape
    length_b = _integers("lengths", np.full((rows,), width, np.int32) if lengths is None else lengths)
    if length_b.shape != (rows,):
        raise ValueError(f"lengths has shape {length_b.shape}; give ({rows},), one length per prompt")
    if is_known(length_b):
        values_b = np.asarray(length_b)
        outside = np.flatnonzero((values_b < least) | (values_b > width))
        if outside.size:
            row = outside[0]
            raise ValueError(f"prompt {row} has length {values_b[row]}; give {least} to {width}, the width of prompts")
    return prompt_bt, length_b


def as_limits(max_new_tokens: Any, rows: int) -> Any:
    """Returns ``max_new_tokens`` as integers ``[rows]``."""
    holds, wanted = (lambda x: (x >= 1) & (x < 2**31)), "an integer of at least 1 and below 2**31, or one per row"
    array = _array("max_new_tokens", max_new_tokens)
    if array.dtype == bool or not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (rows,)):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; give {wanted}: ({rows},)")
    if is_known(array) and not np.all(holds(np.asarray(array))):
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; give {wanted}")
    return jnp.broadcast_to(array, (rows,)) if not is_known(array) else np.broadcast_to(np.asarray(array), (rows,))


def check_positions(target: LanguageModel, drafter: Drafter | None, prompt: int, final: int) -> None:
    """Raises ValueError if a text is longer than the target or the drafter can read."""
    limits = {"target": target.max_positions, "drafter": None if drafter is None else drafter.max_positions}
    for name, limit in limits.items():
        if limit is not None and final > limit:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens {final - prompt} need {final} positions; the {name} "
                f"has {limit}: shorten the prompt or ask for fewer tokens"
            )


def allocated_slots(slots: Any, needed: int | None, width: int, known: bool, past: int) -> int:
    """Returns the slots per row: those asked for, or what fits, in a bucket if values are known."""
    if slots is not None and (isinstance(slots, bool) or not isinstance(slots, (int, np.integer))):
        raise TypeError(f"slots is {slots!r}; give an integer, or None for what fits")
    # Shapes are static, so a limit that is traced cannot say how many slots there are.
    if needed is None:
        if slots is None:
            raise ValueError("max_new_tokens is traced and slots is None; give slots=, since shapes must be known")
        needed = width
    if needed > 2**30:
        raise ValueError(
            f"max_new_tokens needs {needed} slots with the prompt and 2**30 is the most: ask for fewer tokens"
        )
    if slots is None:
        return bucket(needed, _SMALLEST_SLOTS) if known else needed
    if slots < needed:
        raise ValueError(
            f"slots is {slots}; the prompt (padded to {width}), max_new_tokens and {past} places past the end need "
            f"{needed}: allocate more slots or ask for fewer tokens (places are num_draft with fixed=True, else at "
            f"least {UNOBSERVED})"
        )
    return int(slots)


def check_logprobs(logprobs: Any, top: Any, vocab: int) -> int:
    """Returns how many alternatives are asked for; raises if the two arguments disagree."""
    if not isinstance(logprobs, bool):
        raise TypeError(f"logprobs is {logprobs!r}; give True or False, and the number of alternatives as top_logprobs")
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= vocab:
        raise ValueError(f"top_logprobs is {top!r}; give an integer from 0 to {vocab}, the size of the vocabulary")
    if top and not logprobs:
        raise ValueError(f"top_logprobs is {top} and logprobs is False; give logprobs=True, too")
    return top


def as_costs(costs: Any, drafts: tuple[int, ...]) -> Any:
    """Returns the costs of rounds of so many drafts, float32 ``[rounds]``; assumed ones if there are none."""
    array = _numbers("costs", assumed(drafts) if costs is None else costs)
    if array.shape != (len(drafts),):
        raise ValueError(
            f"costs has shape {array.shape}; give ({len(drafts)},), the time of a round of {drafts} drafts over that "
            "of a plain one"
        )
    if is_known(array) and not np.all(np.asarray(array) > 0):
        raise ValueError(f"costs are {np.asarray(array).tolist()}; they must be above 0, and 1 for a plain round")
    return array.astype(np.float32)


def is_known(tree: Any) -> bool:
    """Returns whether no array of the tree is traced."""
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


def check_model(name: str, model: Any) -> None:
    """Raises TypeError unless ``model`` is a language model."""
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{name} is a {type(model).__name__}; give a specjax.LanguageModel, as specjax.load returns it")


def check_rule(verify: Any, drafter: Drafter | None) -> None:
    """Checks a verification rule.

    Raises:
      TypeError: ``verify`` is no rule.
      ValueError: the drafter proposes trees, and the rule takes chains only, or other trees.
    """
    if isinstance(verify, type) or not (callable(verify) and hasattr(verify, "shares_noise")):
        raise TypeError(f"verify is {verify!r}; give a rule, such as specjax.verify.block")
    if depth_of(drafter) is not None and not getattr(verify, "trees", False):
        raise ValueError(
            f"the drafter proposes trees and verify is {verify!r}, a rule for chains; give a rule for trees, or a "
            "drafter of chains"
        )
    siblings = getattr(drafter, "siblings", None)
    if depth_of(drafter) is not None and getattr(verify, "paths", False) and siblings not in ("chosen", "paths"):
        raise ValueError(
            f"the drafter's siblings is {siblings!r} and verify takes drawn trees of independent paths alone; give a "
            "drafter with siblings='paths', or verify=specjax.verify.traversal"
        )


_DRAFTER = ("num_draft", "capture", "vocab_size", "max_positions", "init", "observe", "propose")


def check_drafter(target: LanguageModel, drafter: Drafter | None) -> int:
    """Returns how many tokens the drafter proposes; raises unless it is a drafter for the target."""
    if drafter is None:
        return 0
    # A class in place of an instance, and an object of the old contract, are the likeliest mistakes.
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
    # An index past the last layer would otherwise be an IndexError while the loop is traced.
    layers = target.num_layers
    if layers is not None and any(not -1 <= index <= layers for index in drafter.capture):
        raise ValueError(
            f"the drafter reads the target's hidden states {drafter.capture} and the target has {layers} layers: 0 is "
            f"the embedding, {layers} the last layer's output, -1 that of the final norm; use a drafter made for it"
        )
    check_tree(target, drafter)
    return g


def check_tokens(prompt_bt: np.ndarray, length_b: np.ndarray, vocab: int, name: str = "prompt") -> None:
    """Raises ValueError unless all tokens before the rows' ends are the target's."""
    inside_bt = np.arange(prompt_bt.shape[1])[None] < length_b[:, None]
    wrong = np.argwhere(inside_bt & ((prompt_bt < 0) | (prompt_bt >= vocab)))
    if wrong.size:
        row, place = wrong[0]
        raise ValueError(
            f"{name} {row} holds token {prompt_bt[row, place]}; the target's ids are 0 to {vocab - 1}: encode it with "
            "the target's tokenizer"
        )


def as_stop_tokens(stop_tokens: Any, rows: int, vocab: int) -> Any:
    """Returns the ids ``[rows, k]``, padded with -1 to a bucket if they are known."""
    array = _array("stop_tokens", stop_tokens)
    if array.size:  # NumPy gives an empty list the dtype float64
        _check_integers("stop_tokens", array)
    if array.ndim > 2 or (array.ndim == 2 and array.shape[0] != rows):
        raise ValueError(
            f"stop_tokens has shape {array.shape}; give a flat sequence of token ids, or [{rows}, k], -1 being none"
        )
    # -1 pads lists of different lengths, so it is good per row; in one list for all it would be a mistake.
    per_row = array.ndim == 2
    if not is_known(array):
        return array if per_row else jnp.broadcast_to(array.reshape(1, -1), (rows, array.size))
    array = np.asarray(array)
    if array.size and not ((-1 if per_row else 0) <= array.min() and array.max() < vocab):
        raise ValueError(f"stop_tokens are {array.tolist()}; the target's ids are 0 to {vocab - 1}")
    array_bk = np.broadcast_to(
        np.atleast_2d(array) if array.ndim < 2 else array, (rows, array.shape[-1] if array.ndim else 1)
    )
    padded = bucket(max(array_bk.shape[1], 1), _STOP_TOKENS)
    return np.pad(array_bk.astype(np.int32), ((0, 0), (0, padded - array_bk.shape[1])), constant_values=-1)


# name -> (holds for all values, what the values must be)
_RANGES = {
    "temperature": (lambda x: np.isfinite(x) & (x >= 0), "finite and at least 0 (0 is greedy)"),
    "top_k": (lambda x: (x >= 0) & (x < 2**31), "at least 0 (0 keeps all tokens) and below 2**31"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 (keeps all tokens) to 1"),
    "repetition_penalty": (lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 changes nothing), or None"),
    "presence_penalty": (np.isfinite, "finite (0 changes nothing), or None"),
    "frequency_penalty": (np.isfinite, "finite (0 changes nothing), or None"),
    "seed": (lambda x: (x >= 0) & (x < 2**32), "from 0 to 2**32 - 1"),
}
_INTEGER = ("top_k", "seed")


def check_sampling(sampling: Sampling, rows: int, vocab: int) -> None:
    """Raises ValueError or TypeError unless all sampling parameters are in their ranges."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is a {type(sampling).__name__}; give a specjax.Sampling")
    for name, (holds, wanted) in _RANGES.items():
        if name in PENALTIES and getattr(sampling, name) is None:
            continue
        value = getattr(sampling, name)
        if name == "seed" and is_key(value):
            if value.shape not in ((), (rows,)):
                raise ValueError(f"seed has shape {value.shape}; give one key, or one per row: ({rows},)")
            continue
        array = _integers(name, value) if name in _INTEGER else _numbers(name, value)
        if array.shape not in ((), (rows,)):
            raise ValueError(f"{name} has shape {array.shape}; give one number, or one per row: ({rows},)")
        if is_known(array) and not np.all(holds(_as_sampled(name, array))):
            raise ValueError(f"{name} is {np.asarray(array).tolist()}; it must be {wanted}")
    if sampling.logit_bias is None:
        return
    # A bias of -inf bans a token. A row in which all tokens are banned would have no distribution.
    bias = _numbers("logit_bias", sampling.logit_bias)
    if bias.shape not in ((vocab,), (rows, vocab)):
        raise ValueError(f"logit_bias has shape {bias.shape}; give ({vocab},) or ({rows}, {vocab})")
    if is_known(bias):
        bias = np.atleast_2d(_as_sampled("logit_bias", bias))
        if np.isnan(bias).any() or np.isposinf(bias).any() or np.isneginf(bias).all(-1).any():
            raise ValueError("logit_bias holds nan, +inf, or -inf for every token; -inf may ban some tokens, not all")


def _as_sampled(name: str, array: Any) -> np.ndarray:
    """Returns the values that the loop will see: float32 rounds 1e-50 to 0, and 1e39 to infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(array) if name in _INTEGER else np.asarray(array).astype(np.float32)
