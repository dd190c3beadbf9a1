"""Writes ``specjax/hf/class_keys.json`` from the config classes of the installed transformers.

Run it after a family is added: ``python tests/class_keys.py``.
"""

import dataclasses
import json
from pathlib import Path

from specjax.hf.class_keys import NO_EFFECT
from specjax.hf.families import FAMILIES
from specjax.hf.multimodal import MULTIMODAL

OTHERS = MULTIMODAL
FILE = Path(__file__).parent.parent / "specjax" / "hf" / "class_keys.json"


def class_keys(kind):
    """Returns the fields of the class of a ``model_type``, less those without effect, with their defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    effective = FAMILIES[kind].effective if kind in FAMILIES else frozenset()
    left_out = {*NO_EFFECT, "is_encoder_decoder"} - effective
    return {key: plain(fields[key]) for key in sorted(fields) if key not in left_out}


def plain(value):
    """Returns a value as JSON has it: tuples become lists, and infinity an object, as transformers writes it."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return {"__float__": "Infinity"} if value == float("inf") else value


if __name__ == "__main__":
    table = {kind: class_keys(kind) for kind in sorted({*FAMILIES, *OTHERS})}
    FILE.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n", encoding="utf-8")
