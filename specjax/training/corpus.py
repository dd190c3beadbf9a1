"""The corpus of a draft: shards of its target's own text, which are written once, and texts of the user's own."""

import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from specjax.checkpoint.opened import Opened
from specjax.text.files import read_lines, read_text
from specjax.training.data import encode_texts
from specjax.training.own_text import Document, cut_loop

HELD_OUT_EVERY, HELD_OUT = 8, 64  # every 8th document is held out from the first one on, until there are 64


class OwnText:
    """Documents that a target wrote, in a folder of shards.

    A shard is a function of its number, appears whole, and is written once. So a sampling that was stopped goes on with
    the first shard that is missing, and ends with the same bits. Loops are cut (``cut_loop``), and documents that are
    equal to an earlier one do not count.

    Args:
      folder: the shards' folder, ``shard-00000.npz`` and so on: ``tokens`` ``[n]`` of uint16 or uint32, and the
        ``lengths`` and ``starts`` of its documents.
      write: ``write(number)`` returns the documents of a shard.
      vocab_size: of the target.

    Attributes:
      documents: those of the shards that were taken so far, each text once.
      shards: how many were taken.
    """

    def __init__(self, folder: Path, write: Callable[[int], list[Document]], vocab_size: int):
        self._folder, self._write = folder, write
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._seen: set[bytes] = set()
        self.documents: list[Document] = []
        self.shards = 0

    @property
    def _file(self) -> Path:
        return self._folder / f"shard-{self.shards:05}.npz"

    @property
    def is_there(self) -> bool:
        """Whether the next shard was written before."""
        return self._file.is_file()

    def take(self) -> int:
        """Takes the next shard, which is written unless it is there, and returns how many tokens it adds.

        Raises:
          ValueError: the shard is damaged.
        """
        file = self._file
        if not self.is_there:
            self._sample(file)
        new = []
        for document in _read_shard(file):
            key = document.tokens.tobytes()
            if key not in self._seen:
                self._seen.add(key)
                new.append(document)
        self.documents += new
        self.shards += 1
        return sum(len(document.tokens) for document in new)

    def _sample(self, file: Path) -> None:
        documents = [Document(cut_loop(tokens), start) for tokens, start in self._write(self.shards)]
        documents = [each for each in documents if len(each.tokens) > each.start]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        tokens = [document.tokens for document in documents]
        with partial.open("wb") as stream:
            np.savez(
                stream,
                tokens=np.concatenate([np.zeros(0, np.int32), *tokens]).astype(self._dtype),
                lengths=np.asarray([len(each) for each in tokens], np.uint32),
                starts=np.asarray([document.start for document in documents], np.uint32),
            )
        partial.replace(file)

    @property
    def tokens(self) -> int:
        """How many tokens the documents have."""
        return sum(len(document.tokens) for document in self.documents)

    @property
    def held_out(self) -> list[Document]:
        """The documents that are not trained on."""
        return self.documents[: HELD_OUT_EVERY * HELD_OUT : HELD_OUT_EVERY]

    @property
    def trained(self) -> np.ndarray:
        """int32 ``[n]``, the tokens of all other documents, one after the other."""
        first = HELD_OUT_EVERY * HELD_OUT
        kept = [each.tokens for i, each in enumerate(self.documents) if i % HELD_OUT_EVERY or i >= first]
        return np.concatenate([np.zeros(0, np.int32), *kept]).astype(np.int32)


def _read_shard(file: Path) -> list[Document]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tokens, lengths, starts = (arrays[name].astype(np.int32) for name in ("tokens", "lengths", "starts"))
        pieces = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return [Document(piece, int(start)) for piece, start in zip(pieces, starts, strict=True)]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no shard of sampled text ({error}); remove it, and it is sampled again") from None


def encode_files(files: Iterable[Path], opened: Opened) -> np.ndarray:
    """Returns int32 ``[n]``, the tokens of a user's own texts by a target's tokenizer.

    A file whose name ends in ``.jsonl`` holds one JSON object a line: ``{"messages": [...]}``, a conversation that the
    target's chat template lays out, or ``{"text": "..."}``. Any other file is one text.

    Raises:
      ValueError: a file cannot be read, is not UTF-8, or holds no text; a line is something else; or the target has no
        chat template.
    """
    tokenizer, pieces = opened.need_tokenizer(), []
    for file in files:
        jsonl = file.suffix.lower() == ".jsonl"
        lines = read_lines(file) if jsonl else [(str(file), read_text(file))]
        if not any(line.strip() for _, line in lines):
            raise ValueError(f"{file} is empty; give a file with text")
        for place, line in lines:
            try:
                pieces.append(_encode_line(json.loads(line), opened) if jsonl else encode_texts(tokenizer, [line]))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: {error}") from None
    return np.concatenate([np.zeros(0, np.int32), *pieces])


def _encode_line(value: Any, opened: Opened) -> np.ndarray:
    tokenizer = opened.need_tokenizer()
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return encode_texts(tokenizer, [value["text"]])
    if not isinstance(value, dict) or "messages" not in value:
        raise ValueError(
            'it must be an object such as {"messages": [{"role": "user", "content": "Hi"}]} or {"text": "Hi"}'
        )
    template = opened.need_chat_template()
    return np.asarray(template.encode(tokenizer, value["messages"], add_generation_prompt=False), np.int32)
