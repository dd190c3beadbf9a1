"""Self-contained checkpoint folders: ``config.json``, ``tokenizer.json``, ``params/`` (Orbax), ``metrics.json``."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from specjax.drafters.model import ModelDrafter
from specjax.transformer.config import DecoderConfig, check_integer, read_config
from specjax.transformer.decoder import abstract_params, decoder_model
from specjax.types import Drafter, LanguageModel


def default_dtype() -> jnp.dtype:
    """Returns the dtype to compute in: bfloat16, but float32 on a CPU, where bfloat16 is 13 times slower."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def save(
    path: str | os.PathLike, config: DecoderConfig, params: Any, tokenizer: Tokenizer, metrics: dict[str, Any]
) -> None:
    """Writes a checkpoint folder, replacing one that is there only once the new one is whole."""
    path = Path(path).absolute()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "config.json", config.to_hf())
    _write_json(partial / "metrics.json", metrics)
    tokenizer.save(str(partial / "tokenizer.json"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", params)
    (partial / "params" / "commit_success.txt").unlink(missing_ok=True)  # Orbax wrote the folder's absolute path there
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load(path: str | os.PathLike, dtype: jnp.dtype | str | None = None) -> LanguageModel:
    """Opens a checkpoint folder.

    Args:
      path: the folder.
      dtype: dtype of parameters and computation; None means ``default_dtype()``.

    Raises:
      ValueError: the folder or a file of it is missing, truncated, or does not fit its ``config.json``.
    """
    dtype = default_dtype() if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype}; give a floating one, such as float32 or bfloat16")
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a checkpoint folder with config.json and params/")
    config = read_config(path / "config.json")
    if not (path / "params").is_dir():
        raise ValueError(f"{path / 'params'} does not exist; the checkpoint is incomplete, copy or convert it again")
    expected = abstract_params(config)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            params = checkpointer.restore(path / "params", expected)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is absent or cut short
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path / 'params'} cannot be read as the parameters that config.json describes ({reason}); "
                "it is truncated or of another model, copy or convert it again"
            ) from error
    return decoder_model(config, jax.tree.map(lambda x: x.astype(dtype), params))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens the tokenizer of a checkpoint folder.

    Raises:
      ValueError: ``tokenizer.json`` is missing or damaged.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a checkpoint folder must hold one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} is not a tokenizer ({error}); copy it again") from None


def load_drafter(
    path: str | os.PathLike, target: LanguageModel, num_draft: int = 4, dtype: jnp.dtype | str | None = None
) -> Drafter:
    """Opens a checkpoint folder as a drafter for ``target``.

    Raises:
      ValueError: as for ``load``, or the two vocabularies differ in size, or ``num_draft`` is below 1.
    """
    check_integer("num_draft", num_draft, 1)
    model = load(path, dtype)
    if model.vocab_size != target.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens and the target one of {target.vocab_size}; "
            "give a drafter that shares the target's tokenizer"
        )
    return ModelDrafter(model, num_draft)
