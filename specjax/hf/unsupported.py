"""What is said of a ``model_type`` that specjax does not compute: the nearest that it does, and what is missing."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_ENCODER_DECODER = "an encoder reads the prompt, and specjax has decoders only"
_ENCODER = "it is an encoder, which does not continue texts"
_INDEXED = (
    "each query sees only the tokens that a learned indexer chooses (index_topk), which specjax does not compute; use "
    "a model of full attention, such as DeepSeek-V3.1"
)
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


def unsupported(kind: Any, supported: Collection[str]) -> str:
    """Returns the message that refuses a ``model_type``: what is missing, the nearest that is supported, and all."""
    missing, nearest = "", None
    if isinstance(kind, str):
        nearest, reason = _MISSING.get(kind, (None, ""))
        missing = f": {reason}" if reason else ""
        if nearest not in supported and not reason:
            nearest = next(iter(difflib.get_close_matches(kind, sorted(supported), 1, 0.6)), None)
    near = (
        f"; the nearest that is supported is {nearest!r}, which computes something else" if nearest in supported else ""
    )
    return f"model_type {kind!r} is not supported{missing}{near}; supported: {', '.join(sorted(supported))}"
