"""Rotary positions as ``config.json`` describes them: every scaling becomes a table of frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checks import check_positive
from specjax.hf.keys import Keys
from specjax.transformer.config import MAX_SIZE, Rope

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def take_rope(
    keys: Keys, theta: float = 10000.0, kinds: Mapping[str, float | None] | None = None, partial: bool = False
) -> dict[str, dict[str, Any]]:
    """Takes the keys that describe rotary positions, in the spelling of transformers 4 or 5.

    Args:
      keys: of a config.json.
      theta: the family's base where the config names none.
      kinds: layer types that may have parameters of their own, and their bases where the config names none; None
        stands for that of the config.
      partial: the family may rotate a part of each head.

    Returns:
      The parameters of each kind, or of all layers under "".

    Raises:
      ValueError: a value is of another type, both spellings are there and differ, or a head is rotated in part.
    """
    raw, scaling = keys.take("rope_parameters", None), keys.take("rope_scaling", None)
    if None not in (raw, scaling) and raw != scaling:
        raise ValueError(f"rope_parameters is {raw!r}, but rope_scaling {scaling!r}; give one of them")
    raw = scaling if raw is None else raw
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"rope_parameters or rope_scaling is {raw!r}; it must be an object")
    common = {"rope_theta": keys.number("rope_theta", theta)}
    if "partial_rotary_factor" in keys:
        common["partial_rotary_factor"] = keys.number("partial_rotary_factor")
    if not kinds or raw.keys().isdisjoint(kinds):
        ropes = {"": common | raw}
    else:
        if unknown := sorted(raw.keys() - kinds.keys()):
            raise ValueError(f"rope_parameters has {unknown} beside layer types; supported: {sorted(kinds)}")
        ropes = {}
        for kind, base in kinds.items():
            own = raw.get(kind)
            own = {} if own is None else own
            if not isinstance(own, dict):
                raise ValueError(f"rope_parameters has {own!r} for {kind!r}; it must be an object")
            ropes[kind] = common | ({} if base is None else {"rope_theta": base}) | own
    for rope in ropes.values():
        if not partial and rope.get("partial_rotary_factor", 1.0) != 1:
            raise ValueError(
                f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; models of this family rotate whole heads"
            )
    return ropes


def read_rope(
    parameters: dict[str, Any], width: int, max_positions: int, interleaved: bool = False
) -> tuple[Rope, int]:
    """Computes frequencies from parameters of ``take_rope``.

    Args:
      parameters: of ``take_rope``, for one kind of layers.
      width: entries of a head.
      max_positions: the config's longest text.
      interleaved: see ``Rope``.

    Returns:
      The rotary positions, and the longest text that they serve.

    Raises:
      ValueError: the type, or a key of it, is unknown, or a value is out of range.

    References:
      linear: Chen et al. 2023, position interpolation. dynamic, yarn: Peng et al. 2023, YaRN. llama3: Llama team
      2024. longrope: Ding et al. 2024.
    """
    keys = Keys(parameters, "rope_parameters")
    kind = keys.take("rope_type", None)
    legacy = keys.take("type", None)
    kind = legacy if kind is None else kind
    if kind is None:
        kind = "default"
    elif kind == "su":
        kind = "longrope"
    if kind not in TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(TYPES)}")
    theta, partial = keys.number("rope_theta"), keys.number("partial_rotary_factor", 1.0)
    rotated = int(width * partial)
    if rotated % 2 or not 2 <= rotated <= width:
        raise ValueError(
            f"rotary positions turn {rotated} of the {width} entries of a head (partial_rotary_factor {partial}); "
            "the number must be even, and at most all"
        )
    scale, dynamic = 1.0, None
    with np.errstate(over="ignore", invalid="ignore"):  # the outcome is checked
        frequency = float(theta) ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if kind == "linear":
            frequency = frequency / keys.number("factor")
        elif kind == "dynamic":
            factor = float(keys.number("factor"))
            keys.take("original_max_position_embeddings", None)  # transformers scales from max_position_embeddings
            if rotated == 2:
                raise ValueError("rope_type 'dynamic' needs more than one rotated pair of entries")
            dynamic = (float(theta), factor, max_positions)
            max_positions = _stretched(max_positions, factor)
        elif kind == "llama3":
            frequency = _llama3(frequency, keys, max_positions)
        elif kind == "yarn":
            frequency, scale, max_positions = _yarn(frequency, keys, float(theta), max_positions)
        elif kind == "longrope":
            frequency, scale, max_positions = _longrope(frequency, keys, max_positions)
        keys.finish()
        if not np.all(np.isfinite(frequency.astype(np.float32))):
            raise ValueError(f"rope_theta {theta} and rope_type {kind!r} give frequencies that float32 does not hold")
    return Rope(tuple(frequency.tolist()), scale, interleaved, dynamic), max_positions


def attention_scale(parameters: dict[str, Any]) -> float:
    """Returns what YaRN multiplies the query-key products with in DeepSeek's decoders (``mscale_all_dim``).

    Args:
      parameters: those that ``read_rope`` has read.

    Raises:
      ValueError: the scale needs a factor, and there is none.
    """
    weight, factor = parameters.get("mscale_all_dim"), parameters.get("factor")
    if not weight:
        return 1.0
    if factor is None:
        raise ValueError(f"rope_parameters has mscale_all_dim {weight} but no factor; give one")
    return _mscale(factor, weight) ** 2


def _original(keys: Keys, default: int) -> int:
    original = keys.integer("original_max_position_embeddings", None, optional=True)
    return default if original is None else original


def _stretched(positions: int, factor: float) -> int:
    longest = int(positions * factor)
    if not 1 <= longest <= MAX_SIZE:
        raise ValueError(f"rope factor {factor} makes {longest} positions of {positions}; at most {MAX_SIZE} can be")
    return longest


def _llama3(frequency: np.ndarray, keys: Keys, max_positions: int) -> np.ndarray:
    factor, low, high = (keys.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(f"high_freq_factor {high} must be above low_freq_factor {low}")
    turns = _original(keys, max_positions) * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequency: np.ndarray, keys: Keys, theta: float, max_positions: int) -> tuple[np.ndarray, float, int]:
    original = _original(keys, max_positions)
    factor = keys.number("factor", None, optional=True)
    factor = max_positions / original if factor is None else factor
    scale = keys.number("attention_factor", None, optional=True)
    mscale, mscale_all_dim = _weight(keys, "mscale"), _weight(keys, "mscale_all_dim")
    if scale is None and mscale and mscale_all_dim:
        scale = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    scale = _mscale(factor, 1.0) if scale is None else scale
    fast, slow = keys.number("beta_fast", None, optional=True) or 32, keys.number("beta_slow", None, optional=True) or 1
    truncate = keys.flag("truncate", True)
    if theta <= 1:
        raise ValueError(f"rope_theta is {theta}; rope_type 'yarn' needs one above 1")
    width = 2 * len(frequency)

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    stretched = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    frequency = frequency / factor * stretched + frequency * (1 - stretched)
    return frequency, float(scale), max(max_positions, _stretched(original, factor))


def _weight(keys: Keys, key: str) -> float | None:
    """Takes a number above 0; 0 stands for none, as null does."""
    value = keys.take(key, None)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return None
    check_positive(key, value)
    return value


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(frequency: np.ndarray, keys: Keys, max_positions: int) -> tuple[np.ndarray, float, int]:
    """Uses the factors for short texts, and no longer texts: past that length the model rotates *all* tokens by other
    factors, so that the cache of what was read would have to be made anew."""
    original = _original(keys, max_positions)
    short, long = keys.take("short_factor"), keys.take("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if not isinstance(factors, list) or len(factors) != len(frequency):
            raise ValueError(f"{name} must be a list of {len(frequency)} numbers, got {factors!r}")
        for factor in factors:
            check_positive(name, factor)
    given = keys.number("factor", None, optional=True)
    factor = max_positions / original if given is None else given
    if original != max_positions and factor != max_positions / original:  # of two minds: transformers 4 takes the ratio
        raise ValueError(
            f"rope factor {factor} is not max_position_embeddings / original_max_position_embeddings, {max_positions} "
            f"/ {original}; remove it"
        )
    scale = keys.number("attention_factor", None, optional=True)
    if scale is None and factor > 1 and original == 1:
        raise ValueError("original_max_position_embeddings is 1; rope_type 'longrope' needs more")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequency / np.asarray(short, np.float64), float(scale), original
