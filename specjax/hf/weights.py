"""Parameters from the tensors of a Hugging Face folder, read one at a time; and tensors from parameters."""

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from specjax.checks import errors_name
from specjax.hf.adapter import base_model, merge, open_adapter
from specjax.hf.computed import Readable
from specjax.hf.config import config_of_gguf, read_config
from specjax.hf.contents import kinds_of_tensors
from specjax.hf.families import FAMILIES, sources, table_names
from specjax.hf.formats import Format, check_named, decode, is_plain, read_format
from specjax.hf.formats import why_left_out as why_left_out_by_formats
from specjax.hf.gguf import is_gguf, open_gguf
from specjax.hf.keys import key_names
from specjax.hf.multimodal import other_part
from specjax.hf.names import (
    CONV1D,
    ParameterPath,
    Piece,
    Source,
    parameters,
    path_row,
    why_left_out,
)
from specjax.hf.safetensors import Tensor, TensorSpec, holds_weights, open_tensors
from specjax.hf.stacks import split_stacks
from specjax.transformer.config import DecoderConfig

_LOG = logging.getLogger(__name__)
PLAIN = frozenset(map(jnp.dtype, ("float64", "float32", "float16", "bfloat16")))
"""Dtypes of plain weights, which are read as they are."""

_COMPARED = 2**24  # bytes of a table that are compared at a time


class Words(NamedTuple):
    """Words of messages about tensors that are not the model's."""

    asks: str
    cure: str


_OF_FOLDER = Words(
    "config.json asks for",
    "the weights are of another model than config.json, or of one that specjax does not know; download both again",
)
_OF_FILE = Words(
    "the metadata ask for", "the file is damaged, or of a model that specjax does not know; download it again"
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that is not read yet.

    Attributes:
      shape: its shape.
      dtype: the dtype of its tensors; float32 for float64, and for quantised tensors the dtype of their scales, or
        bfloat16 if these are float32.
      read: ``read(dtype, index=())`` loads the parameter, or the part that ``index``, a tuple of slices, selects. It
        holds only the result in memory; for quantised tensors, blocks of 2 MiB or one row more.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    read: Callable[..., np.ndarray]


def whole_parameter(array: np.ndarray) -> Parameter:
    """Returns the parameter of an array that is there already."""

    def read(dtype: Any, index: tuple[slice, ...] = ()) -> np.ndarray:
        return array[index].astype(dtype)

    return Parameter(array.shape, jnp.dtype(array.dtype), read)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The model in a Hugging Face folder.

    Attributes:
      config: the decoder's config.
      raw: the keys of ``config.json``; for a multimodal model, the keys of its text part.
      params: nested dicts of ``Parameter``.
      report: lines of text: which tensors make which parameters, and which are left out and why.
    """

    config: DecoderConfig
    raw: dict[str, Any]
    params: Any
    report: tuple[str, ...]


def open_weights(folder: Path, ignore_config_keys: Iterable[str] = (), adapter: Path | None = None) -> Weights:
    """Opens a folder with ``config.json`` and safetensors, or a GGUF file. Data are read by ``Parameter.read``.

    Args:
      folder: the folder, or the file.
      ignore_config_keys: as for ``specjax.load``.
      adapter: the folder of a LoRA adapter to merge into the model, or None.

    Raises:
      ValueError: a file is missing or damaged; the model is not supported; a tensor is missing, is unknown, or has
        another shape or dtype than the config says; or the adapter is not the model's.
    """
    # 1. Config and tensors.
    if is_gguf(folder):
        ignored = key_names(ignore_config_keys)
        file = open_gguf(folder, ignored)
        config, raw = config_of_gguf(file, ignored)
        tensors, form, words = file.tensors(), None, _OF_FILE
    else:
        config, raw, tensors, form = _open_folder(folder, ignore_config_keys, adapter)
        words = _OF_FOLDER
    # 2. An adapter, whose errors name its own folder.
    if adapter is not None:
        names = functools.partial(table_names, raw["model_type"])
        wanted = sources(raw["model_type"], config)
        transposed = [name for name, source in wanted.items() if source.pieces[0].layout == CONV1D]
        tensors = merge(open_adapter(adapter), _with_both_tables(config, raw, tensors), names, transposed)
    with errors_name(folder):
        return _with_head(config, raw, tensors, form, words)


def _open_folder(
    folder: Path, ignore_config_keys: Iterable[str], adapter: Path | None
) -> tuple[DecoderConfig, dict[str, Any], dict[str, Readable], Format | None]:
    """Returns the config of a model's folder twice, as ``read_config`` does, and its tensors as ``plain_tensors`` does.

    Raises:
      ValueError: as for ``open_weights``.
    """
    # 1. Weights that are no model's, or not all of it, would be refused for the wrong reason.
    base = base_model(folder)
    if base is not None and not holds_weights(folder):
        of = f"an adapter of {base!r}" if base else "an adapter"
        raise ValueError(f"{folder} is {of}, no model; open the folder of its base model, with adapter={str(folder)!r}")
    found = open_tensors(folder)
    if adapter is None and any(folder.glob("adapter_model.*")):
        raise ValueError(
            f"{folder} holds an adapter next to a model; give adapter={str(folder)!r} to merge it, or move it away"
        )
    kinds = kinds_of_tensors(found)
    if kinds and "model" not in kinds:
        raise ValueError(f"{folder} holds a draft head, no model; load_drafter opens it as {kinds[0]}:{folder}")
    # 2. The config says which tensors the model needs, and the table of its family how they are called.
    config, raw = read_config(folder / "config.json", ignore_config_keys)
    wanted = sources(raw["model_type"], config)
    with errors_name(folder):
        return config, raw, *plain_tensors(raw, found, wanted, functools.partial(table_names, raw["model_type"]))


def _with_both_tables(
    config: DecoderConfig, raw: Mapping[str, Any], tensors: Mapping[str, Readable]
) -> Mapping[str, Readable]:
    """Returns the tensors of a model with its embedding and output head, which may be one table of the folder.

    An adapter that changes one of two tied tables unties them: peft leaves the other as it was.
    """
    table, head = _table_and_head(raw)
    shared = tensors.get(table, tensors.get(head)) if config.tie_word_embeddings else None
    return tensors if shared is None else {table: shared, head: shared, **tensors}


def _table_and_head(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the names of the embedding and of the output head in the table of a family."""
    names = FAMILIES[raw["model_type"]].names
    return names["embed_tokens.weight"][0], names["lm_head.kernel"][0]


def _with_head(
    config: DecoderConfig, raw: dict[str, Any], tensors: dict[str, Readable], form: Format | None, words: Words
) -> Weights:
    """Returns the model with the output head that the folder holds, whatever ``tie_word_embeddings`` says.

    As in transformers 5, the model is tied if the config says so and the folder holds one table, under either name, or
    two equal ones. Two tables that differ are both used.
    """
    table, head = _table_and_head(raw)
    if config.tie_word_embeddings and head in tensors:
        if table not in tensors or tensors[table] is tensors[head]:
            tensors = {table if name == head else name: tensors[name] for name in tensors}
        elif not _are_equal(tensors[table].read(), tensors[head].read()):
            _LOG.warning("tie_word_embeddings is true, but tensor %r differs from %r; both are used", head, table)
            untied = {"tie_word_embeddings": False}
            config, raw = dataclasses.replace(config, **untied), raw | untied
    wanted = sources(raw["model_type"], config)
    left_out = check_tensors(tensors, wanted, functools.partial(_why_left_out, config, raw), form, words)
    return Weights(config, raw, parameters_of(tensors, wanted), tuple(_report(wanted, left_out)))


def _are_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays hold the same numbers. Mapped files are read up to the first block that differs."""
    if one.shape != other.shape:
        return False
    # Bytes compare many times faster than bfloat16. Zeros of two signs count as a difference, which is harmless.
    known = (lambda x: x.view(np.uint8)) if one.dtype == other.dtype else (lambda x: x.astype(np.float64))
    one, other, size = one.reshape(-1), other.reshape(-1), _COMPARED // one.itemsize
    blocks = (slice(start, start + size) for start in range(0, one.size, size))
    return all(np.array_equal(known(one[block]), known(other[block])) for block in blocks)


def _why_left_out(config: DecoderConfig, raw: Mapping[str, Any], name: str) -> str | None:
    """Returns why the decoder does not need a tensor, or None if there is no known reason."""
    next_tokens = raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 0))
    if reason := why_left_out(name, config, next_tokens) or other_part(name):
        return reason
    return why_left_out_by_formats(name) if raw.get("quantization_config") else None


def plain_tensors(
    raw: Mapping[str, Any],
    found: Mapping[str, Tensor],
    wanted: Collection[str],
    table_names: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {name: name for name in names},
) -> tuple[dict[str, Readable], Format | None]:
    """Returns the tensors that a plain folder would hold, by their names in the family's table.

    A ``quantization_config`` next to plain floats is a left-over of dequantising, and has no effect.

    Args:
      raw: the content of ``config.json``.
      found: the folder's tensors, by their own names.
      wanted: the tensors that the model needs.
      table_names: returns the name that each tensor has in the table.

    Returns:
      The tensors, and how the quantised ones among them are stored; None if all are plain.

    Raises:
      ValueError: the tensors are quantised in a way that is not read, or do not fit together; or two tensors have one
        name in the table.
    """
    # 1. What there is decides, not what the config says.
    found, form = split_stacks(found, wanted, table_names, _block_rows(raw)), None
    if is_plain({known: found[name] for name, known in table_names(found).items()}, wanted, PLAIN):
        decoded: Mapping[str, Readable] = found
        if raw.get("quantization_config"):
            _LOG.warning("quantization_config in config.json has no effect: all tensors of the model are plain floats")
    else:
        form = read_format(raw)
        if form is None:
            check_named(found)
        decoded = found if form is None else decode(found, form)
    # 2. Their names in the table.
    tensors, own = {}, {}
    for name, known in table_names(decoded).items():
        if known in own:
            raise ValueError(f"tensors {own[known]!r} and {name!r} are both {known!r}; save the model again")
        tensors[known], own[known] = decoded[name], name
    return tensors, form


def _block_rows(raw: Mapping[str, Any]) -> int | None:
    """Returns the rows of a block of float8 that has one scale; None if there are no such blocks."""
    quantization = raw.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    return block[0] if isinstance(block, list) and block and isinstance(block[0], int) else None


def check_tensors(
    tensors: Mapping[str, Readable],
    wanted: Mapping[str, Source],
    why: Callable[[str], str | None],
    form: Format | None = None,
    words: Words = _OF_FOLDER,
) -> dict[str, str]:
    """Checks a folder's tensors against the tensors that a model is made of.

    Args:
      tensors: the folder's, by their names in the family's table.
      wanted: the tensors that the model needs.
      why: returns why a tensor may be left out, or None if it may not.
      form: how the quantised tensors were stored, or None.
      words: of messages.

    Returns:
      The reason for each tensor that is left out.

    Raises:
      ValueError: a tensor is missing, is unknown, or has another shape or dtype than it must have.
    """
    # 1. Every tensor that the model needs is there.
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]!r}; {words.cure}")
    # 2. Each has the right shape and a dtype whose values are known: float8 without scales would be misread.
    for name, source in wanted.items():
        tensor = tensors[name]
        if tensor.shape != source.shape:
            raise ValueError(f"tensor {name!r} is {tensor.shape}; {words.asks} {source.shape}; {words.cure}")
        if tensor.dtype not in PLAIN:
            floats = ", ".join(sorted(map(str, PLAIN)))
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}, and nothing says how it is quantised; supported without a "
                f"quantization_config in config.json: {floats}"
            )
    # 3. A tensor that nothing explains may change the model, so it is an error.
    left_out = {name: why(name) for name in sorted(tensors.keys() - wanted.keys())}
    if form is not None:
        stored = {name: tensors[name] for name, reason in left_out.items() if reason is None}
        left_out |= {name: form.why_left_out(tensor) for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    extra = [name for name, reason in left_out.items() if reason is None]
    if extra:
        raise ValueError(f"{len(extra)} tensors are unknown, such as {extra[0]!r}; {words.cure}")
    return {name: reason for name, reason in left_out.items() if reason is not None}


def parameters_of(tensors: Mapping[str, Readable], wanted: Mapping[str, Source]) -> Any:
    """Returns nested dicts of ``Parameter`` from tensors that ``check_tensors`` accepted."""
    places: dict[ParameterPath, list[tuple[Readable, Piece]]] = {}
    for name, source in wanted.items():
        for piece in source.pieces:
            places.setdefault(piece.parameter, []).append((tensors[name], piece))
    return unflatten_dict({path: _parameter(parts) for path, parts in places.items()})


def _parameter(parts: list[tuple[Readable, Piece]]) -> Parameter:
    """Returns a parameter that is made of pieces of tensors: of one piece, or of one for each expert, in order."""
    dtype = functools.reduce(jnp.promote_types, (tensor.dtype for tensor, _ in parts))
    dtype = jnp.dtype("float32") if dtype == jnp.float64 else dtype
    stacked = parts[0][1].expert is not None
    shape = (len(parts), *parts[0][1].shape) if stacked else parts[0][1].shape

    def read(dtype: Any, index: tuple[slice, ...] = ()) -> np.ndarray:
        index += (slice(None),) * (len(shape) - len(index))
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        out = _empty_aligned(tuple(map(len, ranges)), jnp.dtype(dtype))
        # Pieces are copied straight into the result, so a part of a stack reads only the experts that lie in it.
        # Numbers that the dtype cannot hold are named by whoever checks the result (``specjax.checkpoint``).
        with np.errstate(over="ignore", invalid="ignore"):
            for tensor, piece in parts:
                if piece.expert is None:
                    _copy(tensor, piece, index, out)
                elif piece.expert in ranges[0]:
                    _copy(tensor, piece, index[1:], out[ranges[0].index(piece.expert)])
        return out

    return Parameter(shape, dtype, read)


def _copy(tensor: Readable, piece: Piece, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Copies the part of a piece that ``index`` selects into an array; of a computed tensor, a block at a time."""
    # 1. Stored tensors are mapped, so only what is copied is read. Parts by heads mix rows.
    layout = piece.layout
    if isinstance(tensor, Tensor) or layout.by_head or layout.by_key_head or layout.middle:
        np.copyto(out, piece.of(tensor.read())[index], casting="same_kind")
        return
    # 2. A row of the tensor is an entry along this axis of the parameter.
    axis = 1 if piece.layout.transpose and len(piece.shape) == 2 else 0
    first = piece.start if piece.layout.axis == 0 else 0
    start, stop, _ = index[axis].indices(piece.shape[axis])
    others = (*index[:axis], slice(None), *index[axis + 1 :])
    for begin, end, block in tensor.blocks(first + start, first + stop):
        if piece.layout.axis != 0:
            part = piece.of(block)
        else:
            part = block.swapaxes(-1, -2) if piece.layout.transpose else block
        place = (slice(None),) * axis + (slice(begin - first - start, end - first - start),)
        np.copyto(out[place], part[others], casting="same_kind")


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array at an address that is a multiple of 64. JAX uses it on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _report(wanted: Mapping[str, Source], left_out: Mapping[str, str]) -> Iterator[str]:
    """Yields the lines of ``Weights.report``."""
    # One line for a row of the table, not for a tensor: layers and experts repeat the same.
    rows = Counter(source.row for source in wanted.values())
    ours: dict[str, dict[str, None]] = {}
    for source in wanted.values():
        for piece in source.pieces:
            ours.setdefault(source.row, {})[path_row(piece.parameter)] = None
    for row, count in rows.items():
        yield f"{count:>6} x {row} -> {', '.join(ours[row])}"
    for reason, count in Counter(left_out.values()).items():
        example = next(name for name, why in left_out.items() if why == reason)
        yield f"{count:>6} left out: {reason} ({example})"


def tensors_of(wanted: Mapping[str, Source], params: Any) -> list[TensorSpec]:
    """Returns the tensors of these parameters for a Hugging Face folder. Each array is made when it is written.

    Args:
      wanted: the tensors to make, and the pieces of parameters in each.
      params: nested dicts of arrays.
    """
    arrays = parameters(params)
    specs = []
    for name, source in wanted.items():
        held = [arrays[piece.parameter] for piece in source.pieces]
        dtype = jnp.dtype(functools.reduce(jnp.promote_types, (array.dtype for array in held)))
        specs.append(TensorSpec(name, dtype, source.shape, functools.partial(_tensor, source, held, dtype)))
    return specs


def _tensor(source: Source, held: list[Any], dtype: jnp.dtype) -> np.ndarray:
    """Returns a tensor's array. ``held`` has the parameter of each of its pieces."""
    out = np.empty(source.shape, dtype)
    for array, piece in zip(held, source.pieces, strict=True):
        piece.put(out, np.asarray(array if piece.expert is None else array[piece.expert]))
    return out
