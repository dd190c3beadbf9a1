"""From Hugging Face folders and GGUF files to checkpoint folders, and back to Hugging Face folders."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specjax.checkpoint.fetched import model_path
from specjax.checkpoint.models import (
    check_dtype,
    check_params,
    load_params,
    read_params,
    save_params,
    stored_params,
)
from specjax.checkpoint.new_folder import new_folder, write_json
from specjax.checkpoint.text_parts import TextParts, open_text_parts
from specjax.checks import errors_name
from specjax.hf.config import read_config
from specjax.hf.families import FAMILIES, sources
from specjax.hf.gguf import is_gguf
from specjax.hf.safetensors import holds_weights, write_tensors
from specjax.hf.weights import Parameter, open_weights, tensors_of
from specjax.transformer.decoder import abstract_params

# Files of the tokenizer, of chat templates and of generation. They are copied unchanged if the source has them.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "processor_config.json",
)

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes."""


def convert_hf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: jnp.dtype | str | None = None,
    progress: Progress = lambda done, total: None,
    ignore_config_keys: Iterable[str] = (),
    adapter: str | os.PathLike | None = None,
) -> tuple[str, ...]:
    """Writes a checkpoint folder from a Hugging Face folder or a GGUF file.

    Tensors are read one by one. Memory holds one copy of the parameters and, for a moment, one more tensor.

    Args:
      source: a folder with ``config.json`` and safetensors, or as for ``specjax.load``.
      destination: the folder to make.
      dtype: dtype of the parameters. None keeps the dtype of each tensor; float64 becomes float32, and quantised
        tensors get the dtype of their scales, or bfloat16 if these are float32.
      progress: called after each parameter, as ``progress(done, total)`` in bytes.
      ignore_config_keys: as for ``specjax.load``. The config that is written does not have these keys.
      adapter: as for ``specjax.load``. Other files than the weights are the base model's.

    Returns:
      Lines of text: which tensors made which parameters, which were left out, and which files were copied.

    Raises:
      ValueError: the source is not a folder of a supported model or is damaged; or the destination exists.
      OSError: the destination cannot be written. No part of it is left.
    """
    # 1. Everything that can be refused without reading a weight is refused first.
    source, destination = model_path(source).absolute(), Path(destination).absolute()
    text = _check_ends(source, destination)
    wanted = None if dtype is None else check_dtype(dtype)
    if (source / "params").is_dir() and not holds_weights(source):
        raise ValueError(f"{source} is a checkpoint folder; specjax.open opens it, and export_hf converts it back")
    weights = open_weights(source, ignore_config_keys, None if adapter is None else Path(adapter).absolute())

    def abstract(parameter: Parameter) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype if wanted is None else wanted)

    expected = jax.tree.map(abstract, weights.params, is_leaf=lambda x: isinstance(x, Parameter))
    check_params(expected, abstract_params(weights.config))
    # 2. Progress counts bytes, since parameters differ in size by orders of magnitude.
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(expected)]
    done = 0

    def on_read(size: int) -> None:
        nonlocal done
        done += size
        progress(done, sum(sizes))

    # 3. The host's memory holds the parameters: a model that is converted need not fit an accelerator.
    with new_folder(destination, replace=False) as folder, jax.default_device(jax.local_devices(backend="cpu")[0]):
        companions = _write_companions(source, folder, text)
        stop_tokens = {"eos_token_id": list(text.stop_tokens)} if is_gguf(source) and text.stop_tokens else {}
        write_json(folder / "config.json", _config(weights.raw | stop_tokens, jax.tree.leaves(expected)))
        with errors_name(source):
            params = read_params(weights.params, expected, on_read)
        save_params(folder, params)
    lines = [*weights.report, f"copied: {', '.join(companions) or 'nothing'}"]
    if "tokenizer.json" not in companions:
        lines.append("there is no tokenizer.json: load the tokenizer with transformers and save it next to params/")
    return tuple(lines)


def export_hf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: jnp.dtype | str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> tuple[Path, ...]:
    """Writes a Hugging Face folder, which ``transformers`` loads, from a checkpoint folder.

    Args:
      source: a checkpoint folder.
      destination: the folder to make.
      dtype: dtype of the tensors; None keeps the stored dtypes.
      shard_bytes: the most bytes of tensors in one file. A larger tensor has a file of its own.

    Returns:
      The paths of the files that were copied and of the safetensors files and their index.

    Raises:
      ValueError: the source is not a checkpoint folder or is damaged; or the destination exists.
      OSError: the destination cannot be written. No part of it is left.
    """
    # 1. Everything that can be refused without reading a weight is refused first.
    source, destination = Path(source).absolute(), Path(destination).absolute()
    text = _check_ends(source, destination)
    if not (source / "params").is_dir():
        raise ValueError(f"{source} has no params/; give a checkpoint folder, such as convert_hf and save write")
    config, raw = read_config(source / "config.json")
    wanted = abstract_params(config)
    stored = stored_params(source, wanted)
    check_params(stored, wanted)
    if dtype is not None:
        floating = check_dtype(dtype)
        stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, floating), stored)
    # 2. The host's memory holds the parameters, as in ``convert_hf``.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = load_params(source, stored)
        tensors = tensors_of(sources(raw["model_type"], config), params)
        with new_folder(destination, replace=False) as folder:
            companions = _write_companions(source, folder, text)
            write_json(folder / "config.json", _config(raw, jax.tree.leaves(stored)))
            # Otherwise transformers picks the tokenizer's class by model_type, which this tokenizer need not fit.
            if "tokenizer_config.json" not in companions and "tokenizer.json" in companions:
                write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
            files = write_tensors(folder, tensors, shard_bytes)
    return tuple(destination / name for name in [*companions, *(file.name for file in files)])


def _check_ends(source: Path, destination: Path) -> TextParts:
    """Returns what the source says of text.

    Raises ValueError unless the source can be read, its small files included, and the destination is free.
    """
    if not source.is_dir() and not is_gguf(source):
        raise ValueError(f"{source} is not a folder or GGUF file; give a model's")
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists; remove it or give another name")
    return open_text_parts(source)


def _write_companions(source: Path, folder: Path, text: TextParts) -> list[str]:
    """Writes the tokenizer and copies the files of ``_COMPANIONS`` that there are; returns their names.

    The tokenizer is written as it was opened: with all added tokens, and without truncation, padding and dropout.
    """
    if text.config is not None:
        write_json(folder / _COMPANIONS[0], text.config)
        there = [Path(_COMPANIONS[0])]
    else:
        there = _copy_companions(source, folder)
    if text.tokenizer is not None:
        # Its own ``save`` raises a plain Exception if the disk is full.
        (folder / "tokenizer.json").write_text(text.tokenizer.to_str(pretty=True), encoding="utf-8")
    return ["tokenizer.json"] * (text.tokenizer is not None) + [file.as_posix() for file in there]


def _copy_companions(source: Path, folder: Path) -> list[Path]:
    """Copies the files of ``_COMPANIONS`` that there are; returns their names."""
    there = [file.relative_to(source) for name in _COMPANIONS for file in sorted(source.glob(name)) if file.is_file()]
    for file in there:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    return there


def _config(raw: dict[str, Any], leaves: list[Any]) -> dict[str, Any]:
    """Returns a ``config.json`` for parameters that are not quantised. Its dtype is that of the largest parameter."""
    left = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype", "quantization_config")}
    largest = max(leaves, key=lambda leaf: leaf.size)
    usual = {"architectures": [FAMILIES[raw["model_type"]].architecture]}
    return usual | left | {"torch_dtype": str(largest.dtype)}
