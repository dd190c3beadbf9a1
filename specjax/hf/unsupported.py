"""What is said of a ``model_type`` that specjax does not compute: the nearest that it does, and what is missing."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from specjax.hf.class_keys import NO_EFFECT, UNDECLARED

_ALIKE = 0.5  # the least share of common keys at which one model_type is called near to another
_SHOWN = 8  # keys in a message
_ENCODER_DECODER = "an encoder reads the prompt, and specjax has decoders only"
_ENCODER = "it is an encoder, which does not continue texts"
_INDEXED = (
    "each query sees only the tokens that a learned indexer chooses (index_topk), which specjax does not compute; use "
    "a model of full attention, such as DeepSeek-V3.1"
)
_LEFT_OUT = NO_EFFECT | {"auto_map", "quantization_config"}
# Keys of older configs, which transformers 5 writes as one.
_OLD: dict[str, str] = dict.fromkeys(("rope_theta", "rope_scaling"), "rope_parameters")
_RECURRENT = "it has recurrent layers without MLPs"

# What a model computes that the decoder does not, and the supported model_type that is nearest to it.
_MISSING: Mapping[str, tuple[str | None, str]] = {
    "gemma3n": ("gemma4", "several residual streams (AltUp), low-rank residual blocks (LAuReL) and sparse activations"),
    "gemma3n_text": (
        "gemma4_text",
        "several residual streams (AltUp), low-rank residual blocks (LAuReL) and sparse activations",
    ),
    "deepseek_v4": ("deepseek_v3", "attention over a compressed cache, and several residual streams"),
    "deepseek_v32": ("deepseek_v3", _INDEXED),
    "glm_moe_dsa": ("glm4_moe", _INDEXED),
    "kimi_linear": ("deepseek_v3", "delta attention whose state decays by a rate of each channel"),
    "mamba": (None, _RECURRENT),
    "mamba2": (None, _RECURRENT),
    **dict.fromkeys(("bart", "mbart", "t5", "mt5", "umt5", "t5gemma", "pegasus", "whisper"), (None, _ENCODER_DECODER)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "modernbert", "distilbert", "electra"), (None, _ENCODER)),
}


def unsupported(raw: Mapping[str, Any], tables: Mapping[str, Collection[str]]) -> str:
    """Returns the message that refuses a ``model_type``: what is missing, the nearest that is supported, and all.

    The nearest has the most keys in common with the config, if that is half of all keys of the two, or else a name
    that is spelt alike.

    Args:
      raw: the content of ``config.json``.
      tables: the keys of each supported ``model_type`` that may change the model. None are known of an empty table.
    """
    kind = raw.get("model_type", "llama")
    name = kind if isinstance(kind, str) else ""
    # 1. What is known of this model_type.
    nearest, reason = _MISSING.get(name, (None, ""))
    # 2. Otherwise its keys: what the nearest does not have may be what is missing.
    if not reason:
        given = {key for key in raw if key not in _LEFT_OUT and raw[key] not in (None, UNDECLARED.get(key))}
        keys = {_OLD.get(key, key) for key in given}
        alike = {other: len(keys & {*table}) / len(keys | {*table}) for other, table in tables.items() if table}
        nearest = max(alike, key=lambda other: (alike[other], _spelling(name, other)), default=None)
        if nearest is None or alike[nearest] < _ALIKE:
            nearest = next(iter(difflib.get_close_matches(name, sorted(tables), 1, 0.6)), None)
        elif others := sorted(keys - {*tables[nearest]}):
            more = f" and {len(others) - _SHOWN} more keys" if len(others) > _SHOWN else ""
            reason = f"its config has {', '.join(others[:_SHOWN])}{more}, which {nearest!r} does not have"
    missing = f": {reason}" if reason else ""
    near = f"; the nearest that is supported is {nearest!r}, which computes something else" if nearest in tables else ""
    return f"model_type {kind!r} is not supported{missing}{near}; supported: {', '.join(sorted(tables))}"


def _spelling(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
