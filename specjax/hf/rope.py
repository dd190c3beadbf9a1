"""Rotary positions of a ``config.json``. Every kind of scaling becomes a table of frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from specjax.checks import check_positive
from specjax.hf.keys import Keys
from specjax.transformer.config import MAX_SIZE, Rope

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


def take_rope(
    keys: Keys,
    theta: float = 10000.0,
    kinds: Mapping[str, float | None] | None = None,
    partial: bool = False,
    axes: bool = False,
) -> dict[str, dict[str, Any]]:
    """Takes the keys that describe rotary positions, in the spelling of transformers 4 or 5.

    Args:
      keys: the keys of a ``config.json``.
      theta: the family's base, used if the config names none.
      kinds: layer types that may have their own parameters, each with its base, used if the config names none. A base
        of None is the config's base for all layers.
      partial: whether the family may rotate only a part of each attention head.
      axes: whether the family's positions have axes, as ``without_axes`` says.

    Returns:
      The parameters of each layer type; or, under "", the parameters of all layers.

    Raises:
      ValueError: a value is of another type; both spellings are there and differ; or attention heads are rotated in
        part although ``partial`` is false.
    """
    # 1. One object under two names. Folders saved by several versions may have both.
    raw, scaling = keys.take("rope_parameters", None), keys.take("rope_scaling", None)
    if None not in (raw, scaling) and raw != scaling:
        raise ValueError(f"rope_parameters is {raw!r}, but rope_scaling {scaling!r}; give one of them")
    raw = scaling if raw is None else raw
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"rope_parameters or rope_scaling is {raw!r}; it must be an object")
    raw = without_axes(raw) if axes else raw
    # 2. transformers 4 has these two keys at the top level; 5 has them in the object, which wins.
    common = {"rope_theta": keys.number("rope_theta", theta)}
    if (factor := keys.number("partial_rotary_factor", None, optional=True)) is not None:
        common["partial_rotary_factor"] = factor
    # 3. The object is flat, or has an object for each layer type.
    if not kinds or raw.keys().isdisjoint(kinds):
        ropes = {"": common | raw}
    else:
        if unknown := sorted(raw.keys() - kinds.keys()):
            raise ValueError(f"rope_parameters has {unknown} next to layer types; supported: {sorted(kinds)}")
        ropes = {}
        for kind, base in kinds.items():
            own = raw.get(kind)
            own = {} if own is None else own
            if not isinstance(own, dict):
                raise ValueError(f"rope_parameters has {own!r} for {kind!r}; it must be an object")
            ropes[kind] = common | ({} if base is None else {"rope_theta": base}) | own
    # 4. Only the attention of some families rotates a part of each head. One type does in all families.
    for rope in ropes.values():
        if not partial and rope.get("rope_type") != "proportional" and rope.get("partial_rotary_factor", 1.0) != 1:
            raise ValueError(
                f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; models of this family rotate whole "
                "attention heads"
            )
    return ropes


def read_rope(
    parameters: dict[str, Any], width: int, max_positions: int, interleaved: bool = False
) -> tuple[Rope, int]:
    """Computes frequencies from the parameters that ``take_rope`` returned.

    Args:
      parameters: the parameters of one layer type.
      width: entries of an attention head.
      max_positions: the config's longest text, in tokens.
      interleaved: see ``Rope``.

    Returns:
      The rotary positions, and the longest text that they serve, in tokens.

    Raises:
      ValueError: the type or one of its keys is unknown, or a value is out of range.

    References:
      linear: Chen et al. 2023, position interpolation. dynamic, yarn: Peng et al. 2023, YaRN. llama3: Llama team
      2024. longrope: Ding et al. 2024.
    """
    # 1. The type, which has two keys and an old name.
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
    # 2. How many entries rotate: they rotate in pairs.
    theta, partial = keys.number("rope_theta"), keys.number("partial_rotary_factor", 1.0)
    rotated = 2 * int(width * partial // 2) if kind == "proportional" else int(round(width * partial, 6))
    if rotated % 2 or not 2 <= rotated <= width:
        raise ValueError(
            f"rotary positions turn {rotated} of the {width} entries of an attention head (partial_rotary_factor "
            f"{partial}); the number must be even, and at most all"
        )
    # 3. The frequencies, in float64 on the host, so that all devices use the same. Each branch takes its own keys, and
    # ``finish`` refuses the others: every key here changes the model.
    scale, dynamic = 1.0, None
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked below
        frequency = float(theta) ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if kind == "linear":
            frequency = frequency / keys.number("factor")
        elif kind == "dynamic":
            factor = float(keys.number("factor"))
            keys.take("original_max_position_embeddings", None)  # transformers scales from max_position_embeddings
            if rotated == 2:
                raise ValueError("rope_type 'dynamic' needs more than one rotated pair of entries")
            dynamic = (float(theta), factor, max_positions)
            max_positions = _stretch(max_positions, factor)
        elif kind == "llama3":
            frequency = _llama3(frequency, keys, max_positions)
        elif kind == "yarn":
            frequency, scale, max_positions = _yarn(frequency, keys, float(theta), max_positions)
        elif kind == "proportional":
            # Frequencies fall as if the whole head turned. Pairs past the part do not turn at all.
            pairs = np.arange(0, width, 2, dtype=np.float64)
            frequency = np.where(pairs < rotated, float(theta) ** (-pairs / width), 0) / keys.number("factor", 1.0)
        elif kind == "longrope":
            frequency, scale, max_positions = _longrope(frequency, keys, max_positions)
        keys.finish()
        if not np.all(np.isfinite(frequency.astype(np.float32))):
            raise ValueError(f"rope_theta {theta} and rope_type {kind!r} give frequencies that float32 does not hold")
    return Rope(tuple(frequency.tolist()), scale, interleaved, dynamic), max_positions


def without_axes(parameters: Any) -> Any:
    """Returns rotary parameters without the axes of multimodal models (Wang et al. 2024, Qwen2-VL, section 2.1).

    A place of an image has a position on each of three axes, and each axis rotates some of the pairs. The three
    positions of a token of text are equal, so the axes make no difference.
    """
    if not isinstance(parameters, Mapping):
        return parameters
    rope = {key: value for key, value in parameters.items() if key not in ("mrope_section", "mrope_interleaved")}
    return rope | {key: "default" for key in ("rope_type", "type") if rope.get(key) == "mrope"}


def attention_scale(parameters: dict[str, Any]) -> float:
    """Returns the factor by which YaRN scales query-key products in DeepSeek's decoders (``mscale_all_dim``).

    Args:
      parameters: the parameters that were given to ``read_rope``.

    Raises:
      ValueError: ``mscale_all_dim`` is there and ``factor`` is not.
    """
    weight, factor = parameters.get("mscale_all_dim"), parameters.get("factor")
    if not weight:
        return 1.0
    if factor is None:
        raise ValueError(f"rope_parameters has mscale_all_dim {weight} but no factor; give one")
    return _mscale(factor, weight) ** 2


def _original(keys: Keys, default: int) -> int:
    """Takes the longest text of the first training, before scaling."""
    original = keys.integer("original_max_position_embeddings", None, optional=True)
    return default if original is None else original


def _stretch(positions: int, factor: float) -> int:
    """Returns the longest text after scaling; raises ValueError if it is out of range."""
    longest = int(positions * factor)
    if not 1 <= longest <= MAX_SIZE:
        raise ValueError(f"rope factor {factor} makes {longest} positions of {positions}; at most {MAX_SIZE} can be")
    return longest


def _llama3(frequency: np.ndarray, keys: Keys, max_positions: int) -> np.ndarray:
    """Divides low frequencies by the factor, keeps high ones, and blends those between."""
    factor, low, high = (keys.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high < low:
        raise ValueError(f"high_freq_factor {high} must be at least low_freq_factor {low}")
    turns = _original(keys, max_positions) * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low  # equal in Llama 4
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequency: np.ndarray, keys: Keys, theta: float, max_positions: int) -> tuple[np.ndarray, float, int]:
    """Returns frequencies, the scale of rotated entries, and the longest text (Peng et al. 2023, section 3)."""
    # 1. How far texts are stretched, and the attention's temperature that goes with it (section 3.4).
    original = _original(keys, max_positions)
    factor = keys.number("factor", None, optional=True)
    factor = max_positions / original if factor is None else factor
    scale = keys.number("attention_factor", None, optional=True)
    mscale, mscale_all_dim = _weight(keys, "mscale"), _weight(keys, "mscale_all_dim")
    if scale is None and mscale and mscale_all_dim:
        scale = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    scale = _mscale(factor, 1.0) if scale is None else scale
    # 2. Pairs of entries that turn more than ``fast`` times over the original text keep their frequency. Pairs that
    # turn less than ``slow`` times are interpolated. Between the two, frequencies are blended (section 3.2).
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
    return frequency, float(scale), max(max_positions, _stretch(original, factor))


def _weight(keys: Keys, key: str) -> float | None:
    """Takes a number above 0, or None for null or 0."""
    value = keys.take(key, None)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return None
    check_positive(key, value)
    return value


def _mscale(factor: float, weight: float) -> float:
    """Returns YaRN's scale of attention for a stretching factor."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(frequency: np.ndarray, keys: Keys, max_positions: int) -> tuple[np.ndarray, float, int]:
    """Uses the factors for short texts, and serves no longer texts.

    Past the original length, the model rotates *all* tokens by other factors, also those that are in the cache.
    """
    # 1. One factor for each pair of entries.
    original = _original(keys, max_positions)
    short, long = keys.take("short_factor"), keys.take("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if not isinstance(factors, list) or len(factors) != len(frequency):
            raise ValueError(f"{name} must be a list of {len(frequency)} numbers, got {factors!r}")
        for factor in factors:
            check_positive(name, factor)
    # 2. The stretching factor sets the scale below. transformers 4 ignores the key and takes the ratio, so a key that
    # says something else has two readings.
    given = keys.number("factor", None, optional=True)
    factor = max_positions / original if given is None else given
    if original != max_positions and factor != max_positions / original:
        raise ValueError(
            f"rope factor {factor} is not max_position_embeddings / original_max_position_embeddings, {max_positions} "
            f"/ {original}; remove it"
        )
    # 3. The scale of rotated entries; its formula divides by the logarithm of the original length.
    scale = keys.number("attention_factor", None, optional=True)
    if scale is None and factor > 1 and original == 1:
        raise ValueError("original_max_position_embeddings is 1; rope_type 'longrope' needs more")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequency / np.asarray(short, np.float64), float(scale), original
