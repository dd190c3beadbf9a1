"""Reads the ``config.json`` of a Hugging Face folder as a ``DecoderConfig``, with the reader of its family."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specjax.hf.class_keys import CLASS_KEYS, NO_EFFECT, UNDECLARED
from specjax.hf.families import FAMILIES, RENAMED
from specjax.hf.gguf import GGUF, is_gguf, open_gguf
from specjax.hf.keys import CONFIG, Keys, key_names, read_json, switch, warn_unknown, without_keys
from specjax.hf.multimodal import MULTIMODAL, take_text
from specjax.hf.unsupported import unsupported
from specjax.transformer.config import DecoderConfig


def decoder_config(raw: Mapping[str, Any], strict: bool = False) -> DecoderConfig:
    """Reads the keys of a Hugging Face ``config.json``.

    Keys that transformers' config class does not have cannot change what transformers computes. One warning names all
    such keys, and they are ignored. A key that the class has and the decoder does not understand must have the class's
    default.

    Args:
      raw: the content of the file.
      strict: refuse keys that the class does not have, unless they are null, false or text. In a recipe such keys are
        misspelt; in the config of a draft head they may be the draft head's.

    Raises:
      ValueError: the ``model_type`` is not supported; a key is missing; or a key that might change the forward pass
        has a value that the decoder does not compute.
    """
    config, _, unknown = read_keys(raw, strict)
    warn_unknown("config.json", unknown)
    return config


def read_keys(
    raw: Mapping[str, Any], strict: bool = False, name: str = CONFIG
) -> tuple[DecoderConfig, dict[str, Any], tuple[str, ...]]:
    """Returns the decoder's config, the raw config of the text part, and the names of unknown keys, without a warning.

    Args:
      raw, strict: as for ``decoder_config``.
      name: what messages call the config; it begins with ``CONFIG``.

    Raises:
      ValueError: as for ``decoder_config``.
    """
    # 1. A multimodal model has the text part's config inside its own.
    kind = raw.get("model_type", "llama")
    if isinstance(kind, str) and kind in MULTIMODAL:
        keys = _all_keys(raw, name, MULTIMODAL[kind].architecture, MULTIMODAL[kind].code)
        text = take_text(keys, raw, MULTIMODAL[kind])
        outer = unknown_keys(keys, kind)
        try:
            config, text, unknown = read_keys(text, strict, name)
        except ValueError as error:
            raise ValueError(f"text_config: {error}") from None
        return config, text, (*outer, *unknown)
    # 2. A family under another name.
    if isinstance(kind, str) and kind in RENAMED:
        other = RENAMED[kind]
        keys = _all_keys(raw, name, other.architecture, other.code)
        for key, value in other.implied.items():
            keys.only(key, value)
        left = {key: raw[key] for key in raw if key not in ("architectures", "auto_map", *other.implied)}
        return read_keys({**left, "model_type": other.family}, strict, name)
    # 3. The family.
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(unsupported(raw, {**dict.fromkeys(RENAMED, ()), **CLASS_KEYS}))
    # 4. The family's reader takes the keys that it understands. The tables of class_keys.py judge the others.
    keys = _all_keys(raw, name, FAMILIES[kind].architecture, FAMILIES[kind].code, FAMILIES[kind].effective)
    config = FAMILIES[kind].read(keys)
    return config, {**raw, "model_type": kind}, unknown_keys(keys, kind, strict)


def unknown_keys(keys: Keys, kind: str, strict: bool = False) -> tuple[str, ...]:
    """Returns the names of keys that were never taken and that the class of a ``model_type`` does not have.

    Raises:
      ValueError: a key that the class has, or that transformers reads although no class has it, asks for something
        that is not computed; or as for ``strict`` of ``decoder_config``.
    """
    unknown = keys.unknown({**UNDECLARED, **CLASS_KEYS[kind]})
    return keys.switched_off() if strict else unknown


def _all_keys(
    raw: Mapping[str, Any], name: str, architecture: str, code: str | None, effective: frozenset[str] = frozenset()
) -> Keys:
    """Returns the keys of a config, less the keys that have no effect on logits.

    The last three arguments are those of ``Family``.

    Raises:
      ValueError: the config is of another architecture, or brings code of its own.
    """
    # The code of a folder may have another name for the class.
    if raw.get("architectures") not in (None, [], [architecture], [f"{code}ForCausalLM"]):
        raise ValueError(
            f"architectures is {raw['architectures']!r}; supported for model_type {raw.get('model_type')!r}: "
            f"[{architecture!r}]{switch('architectures')}"
        )
    _check_code(raw, code)
    keys = Keys(raw, name)
    keys.ignore("auto_map", "quantization_config", *(NO_EFFECT - effective))
    return keys


def _check_code(raw: Mapping[str, Any], taken_over: str | None) -> None:
    """Raises ValueError if the folder brings code that may compute something else than transformers' own.

    ``taken_over``: see ``Family.code``.
    """
    code = raw.get("auto_map")
    if not code:
        return
    # A folder's code for its tokenizer does not change the model.
    entries = code.items() if isinstance(code, Mapping) else [("AutoModel", code)]
    for name, value in entries:
        of_model = name.startswith(("AutoConfig", "AutoModel"))
        known = taken_over and re.fullmatch(rf"(.*\.)?{taken_over}(Config|Model|For\w+)", str(value))
        if of_model and not known:
            raise ValueError(
                f"auto_map is {code!r}: the folder brings code of its own, which is never run and may compute "
                f"something else than the model_type says{switch('auto_map')}"
            )


def read_config(path: Path, ignore_config_keys: Iterable[str] = ()) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a ``config.json``, or the metadata of a GGUF file.

    Args:
      path: the file.
      ignore_config_keys: as for ``without_keys``; of a GGUF file, also keys of its metadata.

    Returns:
      The decoder's config, and the keys that describe the model; for a multimodal model, the keys of its text part.

    Raises:
      ValueError: the file is missing, is not a JSON object, or describes a model that ``decoder_config`` refuses.
      TypeError: ``ignore_config_keys`` is a string.
    """
    ignored = key_names(ignore_config_keys)
    if is_gguf(path):
        return config_of_gguf(open_gguf(path, ignored), ignored)
    return _config_of(path, without_keys(read_json(path), ignored), CONFIG)


def config_of_gguf(file: GGUF, ignore_config_keys: Iterable[str]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns what ``read_config`` does, of a GGUF file that is open."""
    return _config_of(file.header.path, without_keys(file.config, ignore_config_keys), f"{CONFIG} of the metadata")


def _config_of(path: Path, raw: dict[str, Any], name: str) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns what ``read_config`` does, of the content of the file; messages call the content ``name``."""
    if "model_type" not in raw:
        raise ValueError(f'{path} has no model_type; add the model\'s, such as "llama"')
    try:
        config, text, unknown = read_keys(raw, name=name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:  # from the repr of a value, for a message
        raise ValueError(f"{path}: a value is nested too deeply to be a model's; write the file again") from None
    warn_unknown(path, unknown)
    return config, text
