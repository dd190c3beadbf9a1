"""P-EAGLE heads in the layouts of speculators and SpecForge: those of EAGLE-3 heads, with a mask.

The tensor ``mask_hidden`` ``[1, 1, m * target's d]`` is the learned state. The token of the mask is ``mask_token_id``,
or ``pard_token`` or ``ptd_token_id`` in configs for vLLM.
"""

from collections.abc import Mapping
from typing import Any

from specjax.checks import check_integer

KIND, MASK = "peagle", "mask_token_id"
_ARCHITECTURE, _EAGLE_3 = "PEagleDraftModel", ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_TOKENS = (MASK, "pard_token", "ptd_token_id")


def is_peagle(raw: Mapping[str, Any]) -> bool:
    """Returns whether a ``config.json`` is that of a P-EAGLE head. For vLLM, it is an EAGLE-3 head's with a mask."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    masked = name in _EAGLE_3 and any(raw.get(key) is not None for key in _TOKENS)
    return raw.get("speculators_model_type") == KIND or name == _ARCHITECTURE or masked


def split_config(raw: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the config of the EAGLE-3 head that a P-EAGLE head is, and the token of the mask.

    Raises:
      ValueError: there is no such token, or there are two.
    """
    found = {key: raw[key] for key in _TOKENS if raw.get(key) is not None}
    if len(set(map(str, found.values()))) != 1:
        raise ValueError(
            f"the token of the mask is {found or None}; give {MASK}, the token that the head was trained with"
        )
    (token, *_) = found.values()
    check_integer(MASK, token, 0)
    eagle = {key: raw[key] for key in raw if key not in _TOKENS}
    if "speculators_model_type" in raw:
        return eagle | {"speculators_model_type": "eagle3"}, token
    return eagle | ({"architectures": [_EAGLE_3[0]]} if eagle["architectures"] == [_ARCHITECTURE] else {}), token
