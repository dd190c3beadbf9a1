"""What a model's folder or GGUF file says of text: its tokenizer, its stop tokens and its chat template."""

import dataclasses
import os
from pathlib import Path

from tokenizers import Tokenizer

from specjax.checkpoint.generation import load_stop_tokens
from specjax.checks import errors_name
from specjax.hf.gguf import is_gguf, open_gguf
from specjax.text.chat import ChatTemplate, find_chat_template
from specjax.text.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class TextParts:
    """The parts, as ``Opened`` describes them. Stop tokens may lie past the model's vocabulary."""

    tokenizer: Tokenizer | None = None
    stop_tokens: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None


def open_text_parts(path: Path) -> TextParts:
    """Opens the parts; of a path that does not exist, none.

    Raises:
      ValueError: a file is damaged, or a GGUF file has a tokenizer that is not read.
    """
    if is_gguf(path):
        vocabulary = open_gguf(path).vocabulary
        with errors_name(path):
            sources = vocabulary.chat_templates()
            template = ChatTemplate(sources, vocabulary.named(), "tokenizer.chat_template") if sources else None
            return TextParts(vocabulary.tokenizer(), vocabulary.stop_tokens(), template)
    there = path.is_dir()
    tokenizer = load_tokenizer(path) if os.path.lexists(path / "tokenizer.json") else None
    template = find_chat_template(path) if there else None
    return TextParts(tokenizer, load_stop_tokens(path, tokenizer) if there else (), template)
