"""What a model's folder or GGUF file says of text: its tokenizer, its stop tokens and its chat template."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specjax.checkpoint.generation import load_stop_tokens
from specjax.checks import errors_name
from specjax.hf.gguf import Vocabulary, is_gguf, open_vocabulary
from specjax.hf.gguf.vocabulary import BESIDE
from specjax.text.chat import ChatTemplate, find_chat_template
from specjax.text.files import read_text
from specjax.text.tokenizer import load_tokenizer, tokenizer_of


@dataclasses.dataclass(frozen=True)
class TextParts:
    """The parts, as ``Opened`` describes them. Stop tokens may lie past the model's vocabulary.

    Of a GGUF file, ``config`` is the content of the ``tokenizer_config.json`` that a folder has.
    """

    tokenizer: Tokenizer | None = None
    stop_tokens: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None
    config: dict[str, Any] | None = None


def open_text_parts(path: Path) -> TextParts:
    """Opens the parts; of a path that does not exist, none.

    Raises:
      ValueError: a file is damaged, or a GGUF file has a tokenizer that is not read.
    """
    if is_gguf(path):
        vocabulary = open_vocabulary(path)
        with errors_name(path):
            sources = vocabulary.chat_templates()
            template = ChatTemplate(sources, vocabulary.named(), "tokenizer.chat_template") if sources else None
            tokenizer = _tokenizer(path.parent / "tokenizer.json", vocabulary)
            return TextParts(tokenizer, vocabulary.stop_tokens(), template, vocabulary.config())
    there = path.is_dir()
    tokenizer = load_tokenizer(path) if os.path.lexists(path / "tokenizer.json") else None
    template = find_chat_template(path) if there else None
    return TextParts(tokenizer, load_stop_tokens(path, tokenizer) if there else (), template)


def _tokenizer(beside: Path, vocabulary: Vocabulary) -> Tokenizer | None:
    """Returns the tokenizer of a GGUF file, or None if the file has no vocabulary.

    A ``tokenizer.json`` beside the file is the model's own, so it is used instead, if its tokens are the file's.
    """
    if beside.is_file():
        tokenizer = tokenizer_of(str(beside), read_text(beside))
        vocabulary.check(beside, tokenizer)
        return tokenizer
    described = vocabulary.described()
    if described is None:
        return None
    return tokenizer_of("what the metadata describe", json.dumps(described), BESIDE)
