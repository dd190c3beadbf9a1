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
    # As JSON has them: tuples become lists.
    return json.loads(json.dumps({key: fields[key] for key in sorted(fields) if key not in left_out}))


if __name__ == "__main__":
    table = {kind: class_keys(kind) for kind in sorted({*FAMILIES, *OTHERS})}
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
