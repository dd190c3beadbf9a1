"""GGUF files, as the Hugging Face folders that they stand for.

- ``open_gguf``: config, tensors, tokenizer, stop tokens and chat templates of a file.
- ``file`` reads the parts of a file, ``architectures`` has keys and names of each family, ``tensors`` dequantises,
  ``vocabulary`` and ``splits`` make the tokenizer.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specjax.hf.computed import Readable
from specjax.hf.gguf.architectures import config_of, parts_of
from specjax.hf.gguf.file import Header, open_header
from specjax.hf.gguf.file import is_gguf as is_gguf
from specjax.hf.gguf.tensors import readable
from specjax.hf.gguf.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An opened GGUF file, of which no tensor is read yet.

    Attributes:
      header: what the file says before its data.
      config: the content of a ``config.json``.
      vocabulary: tokenizer, stop tokens and chat templates.
    """

    header: Header
    config: dict[str, Any]
    vocabulary: Vocabulary

    def tensors(self) -> dict[str, Readable]:
        """Returns the tensors of a Hugging Face folder by their names.

        Raises:
          ValueError: a tensor has a type that is not read, or two tensors have one name.
        """
        try:
            found = [readable(part) for part in parts_of(self.header, self.config)]
        except ValueError as error:
            raise ValueError(f"{self.header.path}: {error}") from None
        tensors = {tensor.name: tensor for tensor in found}
        if len(tensors) < len(found):
            raise ValueError(f"{self.header.path}: two tensors have one name in the family; download the file again")
        return tensors


def open_gguf(path: Path, ignore_config_keys: Iterable[str] = ()) -> GGUF:
    """Opens a GGUF file.

    Args:
      path: the file; of a model in several files, the first.
      ignore_config_keys: keys of the metadata to leave out.

    Raises:
      ValueError: the file is missing, damaged, of an architecture that is not supported, or incomplete; or the package
        gguf is not installed.
    """
    header = open_header(path)
    try:
        vocabulary, config = Vocabulary(header), config_of(header, ignore_config_keys)
        stop_tokens = vocabulary.stop_tokens()
        return GGUF(header, config | ({"eos_token_id": list(stop_tokens)} if stop_tokens else {}), vocabulary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
