"""GGUF files, as the Hugging Face folders that they stand for.

- ``open_gguf``: config and tensors of a file. ``open_vocabulary``: tokenizer, stop tokens and chat templates.
- ``file`` reads the parts of a file, ``architectures`` has keys and names of each family, ``tensors`` dequantises,
  ``vocabulary`` and ``splits`` make the tokenizer.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specjax.checks import errors_name
from specjax.hf.computed import Readable
from specjax.hf.gguf.architectures import config_of, parts_of
from specjax.hf.gguf.file import Header, open_header
from specjax.hf.gguf.file import is_gguf as is_gguf
from specjax.hf.gguf.tensors import readable
from specjax.hf.gguf.vocabulary import Vocabulary as Vocabulary


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An opened GGUF file, of which no tensor is read yet.

    Attributes:
      header: what the file says before its data.
      config: the content of a ``config.json``, without stop tokens.
    """

    header: Header
    config: dict[str, Any]

    def tensors(self) -> dict[str, Readable]:
        """Returns the tensors of a Hugging Face folder by their names.

        Raises:
          ValueError: a tensor has a type that is not read, or two tensors have one name.
        """
        with errors_name(self.header.path):
            found = [readable(part) for part in parts_of(self.header, self.config)]
            tensors = {tensor.name: tensor for tensor in found}
            if len(tensors) < len(found):
                raise ValueError("two tensors have one name in the family; download the file again")
            return tensors


def open_gguf(path: Path, ignore_config_keys: Iterable[str] = ()) -> GGUF:
    """Opens a GGUF file. Its vocabulary is not looked at.

    Args:
      path: the file; of a model in several files, the first.
      ignore_config_keys: keys of the metadata to leave out.

    Raises:
      ValueError: the file is missing, damaged, of an architecture that is not supported, or incomplete; or the package
        gguf is not installed.
    """
    header = open_header(path)
    with errors_name(path):
        return GGUF(header, config_of(header, ignore_config_keys))


def open_vocabulary(path: Path) -> Vocabulary:
    """Opens the vocabulary of a GGUF file, whatever its architecture is.

    Raises:
      ValueError: the file is missing or damaged, its vocabulary is damaged, or the package gguf is not installed.
    """
    header = open_header(path)
    with errors_name(path):
        return Vocabulary(header)
