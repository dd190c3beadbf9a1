"""What a folder says about generation: the tokens that end a text, and defaults of sampling."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specjax.hf.keys import read_json
from specjax.text.tokenizer import load_tokenizer, read_special_tokens

# Objects of a config that may describe the text model of a multimodal one.
_TEXT_CONFIGS = ("text_config", "decoder", "generator")
# Parameters of sampling: which numbers each may be, and the same in words.
_SAMPLING: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "that is finite and at least 0 (0 is greedy)"),
    "top_k": (
        lambda x: -1 <= x < 2**31 and x == int(x),
        "that is whole, at least -1 and below 2**31 (0, -1: no limit)",
    ),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 (keeps all tokens) to 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "that is finite and above 0 (1 changes nothing)"),
}


def load_stop_tokens(path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a text; empty if the folder names none.

    The ids are all that the folder names, in this order, each once:

    1. ``eos_token_id`` of ``generation_config.json``;
    2. ``eos_token_id`` of ``config.json``, and of ``text_config``, ``decoder`` and ``generator`` in it;
    3. the token ``eos_token``, which ``specjax.text.read_special_tokens`` finds.

    An id below 0 names no token.

    Args:
      path: the folder.
      tokenizer: the folder's tokenizer. None opens it if ``eos_token`` is named.

    Raises:
      ValueError: a file is damaged, or ``eos_token_id`` is neither a token id nor a list of token ids.
    """
    folder = Path(path)
    tokens: list[int] = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        if file.is_file():
            for value in _eos_token_ids(read_json(file)):
                ids = value if isinstance(value, list) else [value]
                if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                    raise ValueError(f"{file}: eos_token_id is {value!r}; it must be a token id or a list of token ids")
                tokens += ids
    eos = read_special_tokens(folder).named.get("eos_token")
    if eos is not None and tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    if eos is not None and tokenizer is not None:
        token = tokenizer.token_to_id(eos.content)
        tokens += [] if token is None else [token]
    return tuple(dict.fromkeys(token for token in tokens if token >= 0))


def _eos_token_ids(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields ``eos_token_id`` of a config and of the text model's config in it."""
    for part in (config, *(config.get(name) for name in _TEXT_CONFIGS)):
        if isinstance(part, Mapping) and part.get("eos_token_id") is not None:
            yield part["eos_token_id"]


def load_generation_defaults(path: str | os.PathLike) -> dict[str, float | int]:
    """Returns the parameters of ``specjax.Sampling`` that ``generation_config.json`` recommends.

    These are ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty``, where they are there and not
    null. A ``top_k`` of -1 is 0, as in vLLM, and whole numbers may be written as floats. With ``do_sample: false``, the
    temperature is 0: greedy. A folder without the file recommends nothing.

    Raises:
      ValueError: the file is damaged, or a value is no number or out of range.
    """
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return {}
    config = read_json(file)
    cure = "correct the file, or leave out generation_defaults"
    sampled = config.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise ValueError(f"{file}: do_sample is {sampled!r}; it must be true or false: {cure}")
    defaults = {name: config[name] for name in _SAMPLING if config.get(name) is not None}
    for name, value in defaults.items():
        holds, wanted = _SAMPLING[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not holds(value):
            raise ValueError(f"{file}: {name} is {value!r}; it must be a number {wanted}: {cure}")
    if sampled is False:
        defaults["temperature"] = 0.0
    if "top_k" in defaults:
        defaults["top_k"] = max(0, int(defaults["top_k"]))
    if defaults.get("repetition_penalty") == 1:  # changes nothing, and would compile the penalties
        del defaults["repetition_penalty"]
    return defaults
