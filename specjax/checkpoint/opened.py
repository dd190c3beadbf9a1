"""``specjax.open``: a model's folder or file with everything that generation needs of it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specjax.checkpoint.fetched import model_path
from specjax.checkpoint.models import load_with_config
from specjax.checkpoint.text_parts import open_text_parts
from specjax.quantized import Kind
from specjax.sharding import RULES, Rules
from specjax.text.chat import ChatTemplate
from specjax.types import LanguageModel

# Keys of ``config.json`` that describe how the parameters were stored, not the model.
_OF_STORAGE = ("dtype", "torch_dtype", "quantization_config")


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened model, the result of ``specjax.open``.

    Attributes:
      path: the folder or GGUF file.
      model: the model.
      tokenizer: the tokenizer, or None if there is none.
      stop_tokens: ids of the tokens that end a text; empty if the folder names none. Ids past the model's vocabulary,
        which cannot occur, are left out.
      chat_template: lays a conversation out as text, or None if the folder has no template.
      config: the keys of ``config.json`` that describe the model and its stop tokens, for ``specjax.save``.
    """

    path: Path
    model: LanguageModel = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False)
    stop_tokens: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = dataclasses.field(default=None, repr=False)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def need_chat_template(self) -> ChatTemplate:
        """Returns the chat template; raises ValueError if the folder has none."""
        if self.chat_template is None:
            where = "chat_template.jinja nor a chat_template in tokenizer_config.json"
            if self.path.is_file():
                raise ValueError(f"{self.path} has no tokenizer.chat_template; use Session.complete")
            raise ValueError(f"{self.path} has neither {where}; add the model's, or use Session.complete")
        return self.chat_template

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises ValueError if the folder has none."""
        if self.tokenizer is None:
            file = (self.path.parent if self.path.is_file() else self.path) / "tokenizer.json"
            raise ValueError(f"{file} does not exist; add the model's, or generate from tokens: specjax.generate")
        return self.tokenizer


def open(
    path: str | os.PathLike,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    ignore_config_keys: Iterable[str] = (),
    quantize: Kind | None = None,
    adapter: str | os.PathLike | None = None,
) -> Opened:
    """Opens a checkpoint folder, a Hugging Face folder with safetensors, or a GGUF file.

    The result holds the model, the tokenizer, the stop tokens and the chat template. ``specjax.load`` opens only the
    model, and takes the same arguments.

    Args:
      path: the folder, the file, or a name that ``specjax fetch`` knows, such as "smollm2".
      dtype: dtype of parameters and computation; None means ``specjax.default_dtype()``.
      mesh: the mesh to split the parameters over, as ``specjax.shard`` does; None is the default device.
      rules: as for ``specjax.shard``.
      ignore_config_keys: as for ``specjax.load``.
      quantize: "int8", "int4" or "fp8", as for ``specjax.quantize``; None keeps the weights as they are.
      adapter: as for ``specjax.load``. Tokenizer and chat template are the base model's.

    Raises:
      ValueError: a file of the folder is damaged; or as for ``specjax.load``. A missing ``tokenizer.json`` or chat
        template is no error.
      TypeError: as for ``specjax.shard``.
    """
    path = model_path(path).absolute()
    # 1. The small files come first: an error in one of them should not wait for the parameters.
    text = open_text_parts(path)
    # 2. The config goes with the model, so that ``specjax.save`` can write both. It says how the model computes, not
    # how this folder stored it. Stop tokens may come from another file, so they are put into the config.
    model, raw = load_with_config(path, dtype, mesh, rules, ignore_config_keys, quantize, adapter)
    config = {key: value for key, value in raw.items() if key not in _OF_STORAGE}
    stop_tokens = tuple(token for token in text.stop_tokens if token < model.vocab_size)
    if stop_tokens:
        config["eos_token_id"] = list(stop_tokens)
    return Opened(path, model, text.tokenizer, stop_tokens, text.chat_template, config)
