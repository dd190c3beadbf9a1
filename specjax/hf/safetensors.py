"""The tensors of a Hugging Face model folder, read lazily and written one at a time.

A safetensors file has three parts (https://github.com/huggingface/safetensors#format):

1. eight little-endian bytes: the length of the header;
2. the header, a JSON object ``{name: {dtype, shape, data_offsets}}`` with an optional ``__metadata__``;
3. the data, without holes.

Example, a header of 72 bytes and one tensor of 16 bytes: data_offsets are [0, 16], its data are bytes 80 to 95 of the
file, and the file has 96 bytes.

A folder holds ``model.safetensors``, or several such files and ``model.safetensors.index.json``. The index's
``weight_map`` says which file holds which tensor.

Headers are checked here and not by the ``safetensors`` library. The library takes the last of two entries of one name,
does not say which tensor has an unknown dtype, and cannot read bfloat16 or float8 with NumPy.
"""

import dataclasses
import functools
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# What a folder without weights under the usual names may hold in their place, and what to do. The first that fits.
_CURES = {
    r"model-\d+-of-\d+\.safetensors": f"the shards need their index, download {_INDEX}",
    r"medusa_lm_head\.safetensors": "these are Medusa heads, no model: load_drafter opens them as medusa:DIR",
    r"adapter_model\.(safetensors|bin)": "an adapter is no model; open its base model with adapter=this folder",
    r"consolidated.*\.safetensors": (
        "its tensors have other names than transformers'; download the files that have transformers' names, too"
    ),
    r".*\.safetensors": f"if one of these holds the whole model, call it {_SINGLE}; else download the folder again",
    r".*\.(bin|pt|pth|ckpt|pkl)": (
        "pickled weights are never opened: in a sandbox, load them with transformers and write them with "
        "save_pretrained(folder)"
    ),
    r".*\.gguf": "a GGUF file opens by its own path: give that of one of these",
    r".*\.(msgpack|h5)": "weights of Flax and TensorFlow are never opened: download the model's safetensors",
}
_POINTER = b"version https://git-lfs"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})

# The most bytes of JSON that are read. Python's objects take up to 24 times the bytes of their JSON, so a header
# must not be of any length. 32 MiB are enough to name a quarter of a million tensors.
_MOST_JSON = 2**25

# In the order of the reference writer, which writes later dtypes first: wide ones before narrow ones, so that every
# tensor is aligned.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}

# Values from files go through this into messages, since they may have any length and depth.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
show = _short.repr


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet.

    Attributes:
      file: the file.
      name: the tensor's name.
      dtype: its NumPy dtype; bfloat16 and float8 are dtypes of ``ml_dtypes``.
      shape: its shape.
      offset: the byte of the file at which its data begin, counted from the start of the file.
    """

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Returns a read-only array ``shape`` of ``dtype``, mapped from the file and possibly unaligned.

        Each call makes a new map. Only pages that are used are loaded. They leave memory when the array and its views
        do. The file must not be shortened before that.

        Raises:
          ValueError: the file is missing, or was shortened after it was opened.
        """
        if 0 in self.shape:  # NumPy before 2.2 cannot map zero bytes at the end of a page
            empty = np.empty(self.shape, self.dtype)
            empty.flags.writeable = False
            return empty
        try:
            return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.file}: tensor {show(self.name)} cannot be read ({error}); the file has changed, open it again"
            ) from None


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to write. Its array is made when it is written.

    Attributes:
      name: the tensor's name.
      dtype: the NumPy dtype of the array.
      shape: the shape of the array.
      read: ``read()`` makes the array.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_tensors(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Opens the tensors of a Hugging Face model folder. Only the headers of files are read.

    If there are both ``model.safetensors`` and an index, the single file is used, as in transformers. Of a tensor in
    several shards, the index says which one holds. A tensor that the index does not name must be in one shard.

    Returns:
      The tensors by their names.

    Raises:
      ValueError: the folder, its index or a file of it is missing, cannot be read, or is damaged; a file lies
        outside the folder; a tensor that the index does not name lies in two files; a tensor does not lie where the
        index says; a dtype has no NumPy counterpart; or the weights are of another format, which is never opened.
    """
    # 1. One file needs no index.
    folder = Path(folder)
    present = _list_folder(folder)
    if _SINGLE in present:
        return {tensor.name: tensor for tensor in open_file(folder / _SINGLE)}
    if _INDEX not in present:
        raise ValueError(_what_else(folder, present))
    # 2. Open every file that the index names. The listing of the folder is what keeps names such as "../x" out.
    index = folder / _INDEX
    weight_map = _read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in present:
            raise ValueError(
                f"{index}: weight_map names the file {show(shard)}, which is not in that folder; "
                "download it again, with all files in the folder of the index"
            )
        for tensor in open_file(folder / shard):
            if weight_map.get(tensor.name, shard) != shard:  # superseded by the tensor of another file
                continue
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise damage(tensor.file, f"tensor {show(tensor.name)} is in {other} as well")
            tensors[tensor.name] = tensor
    # 3. The files and the index must agree, or the folder is a mixture of two downloads.
    for name, shard in weight_map.items():
        if name not in tensors:
            raise damage(index, f"weight_map says that {show(shard)} holds tensor {show(name)}, which it does not")
    return tensors


def write_tensors(
    folder: str | os.PathLike,
    tensors: Iterable[Tensor | TensorSpec],
    shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> list[Path]:
    """Writes tensors as transformers' ``save_pretrained`` does. Memory holds one tensor at a time.

    Files appear under their names when all are complete, the index last. If anything fails, no file is left.

    Args:
      folder: an existing folder without safetensors files.
      tensors: the tensors, which are split over files in this order.
      shard_bytes: the most bytes of tensors in one file. A larger tensor has a file of its own.
      metadata: the ``__metadata__`` of each file. transformers requires the key ``format``.

    Returns:
      The files: ``model.safetensors``; or ``model-00001-of-00003.safetensors`` and so on, then the index.

    Raises:
      ValueError: the folder is missing or holds safetensors files; there are no tensors, or two of one name; a dtype
        has no counterpart in the format; a tensor's array differs from its announced shape or dtype; or another
        argument is wrong.
      OSError: a file cannot be written, for example because the disk is full.
    """
    # 1. Check everything before the first byte is written.
    folder, tensors = Path(folder), list(tensors)
    held = [name for name in _list_folder(folder) if ".safetensors" in name]
    if held:
        raise ValueError(f"{folder} already holds {show(held)}; give an empty folder")
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes must be an integer of at least 1, got {shard_bytes!r}")
    if not _maps_to_strings(metadata := dict(metadata)):
        raise ValueError(f"metadata must map strings to strings, got {metadata!r}")
    _check_tensors(tensors)

    # 2. The number of files is in each file's name, so the split comes before any writing.
    shards = _split(tensors, shard_bytes)
    last = len(shards)
    names = [f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(1, last + 1)] if last > 1 else [_SINGLE]
    writers: dict[Path, Callable[[BufferedWriter], object]] = {
        folder / name: functools.partial(_write_file, shard, _header(shard, metadata))
        for name, shard in zip(names, shards, strict=True)
    }
    # 3. The index is written last: a reader that finds it finds all files.
    if last > 1:
        index = {
            "metadata": {"total_size": sum(_num_bytes(tensor) for tensor in tensors)},
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        writers[folder / _INDEX] = lambda stream: stream.write(text)
    _write_all(writers)
    return list(writers)


# Reading.


def _list_folder(folder: Path) -> list[str]:
    """Returns the names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{str(folder)!r} cannot be read as a folder ({reason}); give one that can") from None


def holds_weights(folder: Path) -> bool:
    """Returns whether there are safetensors that ``open_tensors`` would open."""
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def _what_else(folder: Path, present: list[str]) -> str:
    """Returns the message for a folder without safetensors, which says what it does hold, and what to do."""
    for pattern, cure in _CURES.items():
        if others := [name for name in present if re.fullmatch(pattern, name)]:
            return f"{folder} holds neither {_SINGLE} nor {_INDEX}, but {show(others)}; {cure}"
    return (
        f"{folder} holds neither {_SINGLE} nor {_INDEX}, only {show(present)}; give the folder of a model, or "
        "download it again"
    )


def damage(file: Path, what: str) -> ValueError:
    """Returns the error for a file whose content cannot be right."""
    return ValueError(f"{file}: {what}; the file is damaged, cut short or of another kind, download it again")


@contextmanager
def open_regular(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Yields the file and its size in bytes."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
            raise ValueError(f"{file} is not a regular file; download it again")
        with file.open("rb") as stream:
            # A clone without Git LFS has small text files in place of the weights: the commonest damage of all.
            if stream.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{file} is a Git LFS pointer in place of the data; run `git lfs pull` in its folder")
            stream.seek(0)
            yield stream, os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); download it again, or allow reading it") from None


def _read_json(file: Path, stream: BinaryIO, length: int, encoding: str = "utf-8") -> dict[str, Any]:
    """Reads a JSON object of ``length`` bytes from a stream."""
    if length > _MOST_JSON:
        raise damage(file, f"its JSON is {length} bytes long and may be {_MOST_JSON}")
    try:
        value = json.loads(stream.read(length).decode(encoding), object_pairs_hook=_unique)
    except RecursionError:
        raise damage(file, "its JSON is nested too deep") from None
    except ValueError as error:
        raise damage(file, f"it is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise damage(file, f"its JSON is a {type(value).__name__} and must be an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object's keys and values; raises ValueError if a key occurs twice or a text is not Unicode."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {show(key)} occurs twice")
        for text in (key, item):
            if isinstance(text, str):
                text.encode()  # half of a surrogate pair, which json.loads lets pass, raises UnicodeEncodeError
        value[key] = item
    return value


def _read_weight_map(index: Path) -> dict[str, str]:
    """Returns an index's file name of each tensor name."""
    with open_regular(index) as (stream, size):
        weight_map = _read_json(index, stream, size, "utf-8-sig").get("weight_map")
    if not _maps_to_strings(weight_map):
        raise damage(index, f"weight_map is {show(weight_map)} and must map names of tensors to names of files")
    return weight_map


def open_file(file: Path) -> list[Tensor]:
    """Opens the tensors of one file, in the order of their data.

    Raises:
      ValueError: as for ``open_tensors``.
    """
    # 1. The header. Its length comes from the file, so it is compared with the file's size before it is read.
    with open_regular(file) as (stream, size):
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        if start > size:
            raise damage(file, f"it is {size} bytes long, of which its header would take {start}")
        header = _read_json(file, stream, length)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _maps_to_strings(metadata):
        raise damage(file, f"__metadata__ is {show(metadata)} and must map strings to strings")
    # 2. The entries, in the order of their data. The data must be one unbroken run to the end of the file: holes and
    # overlaps could hide other content, and a file that was cut short ends early.
    tensors = [_check_entry(file, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, _num_bytes(tensor)))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise damage(file, f"tensor {show(tensor.name)} begins at byte {tensor.offset}, and should at {end}")
        end += _num_bytes(tensor)
    if end != size:
        raise damage(file, f"its tensors end at byte {end} and the file at byte {size}")
    return tensors


def _check_entry(file: Path, start: int, name: str, entry: Any) -> Tensor:
    """Returns the tensor of one entry of a header, whose data offsets count from byte ``start``."""
    what = f"tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise damage(file, f"{what} is {show(entry)} and must have just the keys {sorted(_ENTRY_KEYS)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{file}: {what} has dtype {show(code)}; convert it to one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[code]
    # NumPy's own bounds. A shape with a zero could pass them unnoticed and fail later, so zeros count as ones.
    if not _are_sizes(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise damage(file, f"{what} has shape {show(shape)}, which no array can have")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise damage(file, f"{what} has data_offsets {show(offsets)}, which must be two positions in the file")
    tensor = Tensor(file, name, dtype, tuple(shape), start + offsets[0])
    size = _num_bytes(tensor)
    if offsets[1] - offsets[0] != size:
        raise damage(file, f"{what}, {code} {shape}, takes {size} bytes, and its data_offsets are {offsets}")
    return tensor


def _maps_to_strings(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _num_bytes(tensor: Tensor | TensorSpec) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


# Writing.


def _check_tensors(tensors: list[Tensor | TensorSpec]) -> None:
    """Raises ValueError unless the tensors can be written."""
    if not tensors:
        raise ValueError("there are no tensors to write; give at least one")
    seen = {"__metadata__"}
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"the name {tensor.name!r} is taken, by another tensor or by the format; give another")
        seen.add(tensor.name)
        if tensor.dtype not in _CODES:
            supported = ", ".join(str(dtype) for dtype in _CODES)
            raise ValueError(f"tensor {tensor.name!r} has dtype {tensor.dtype}; convert it to one of {supported}")


def _split(tensors: list[Tensor | TensorSpec], shard_bytes: int) -> list[list[Tensor | TensorSpec]]:
    """Splits tensors over files in order, as ``huggingface_hub.split_torch_state_dict_into_shards`` does."""
    shards, current, filled = [], [], 0
    for tensor in tensors:
        size = _num_bytes(tensor)
        if size > shard_bytes:  # alone, without closing the current file
            shards.append([tensor])
            continue
        if filled + size > shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += size
    if current:
        shards.append(current)
    for shard in shards:
        shard.sort(key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name))
    return shards


def _header(tensors: list[Tensor | TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Returns the first two parts of a file: the header's length, and the header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _num_bytes(tensor)
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a tensor's name or the metadata is not valid Unicode ({error}); change it") from None
    raw += b" " * (-len(raw) % 8)  # so that the data are aligned
    return len(raw).to_bytes(8, "little") + raw


def _write_file(tensors: list[Tensor | TensorSpec], header: bytes, stream: BufferedWriter) -> None:
    stream.write(header)
    for tensor in tensors:
        stream.write(_bytes_of(tensor))  # a name for the array would keep it alive while the next is made


def _bytes_of(tensor: Tensor | TensorSpec) -> memoryview:
    """Makes a tensor's array and returns its bytes."""
    array = np.asarray(tensor.read())
    if array.shape != tuple(tensor.shape) or array.dtype != tensor.dtype:
        raise ValueError(
            f"tensor {tensor.name!r} was announced as {tensor.dtype} {tuple(tensor.shape)} and read as {array.dtype} "
            f"{array.shape}; make the two agree"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_all(writers: Mapping[Path, Callable[[BufferedWriter], object]]) -> None:
    """Writes all files or none. Each is written under another name; then all are renamed in order."""
    partial = {file: file.with_name(file.name + ".partial") for file in writers}
    try:
        for file, write in writers.items():
            try:
                with partial[file].open("xb") as stream:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())  # or a crash after the renaming could leave an empty file
            except OSError as error:
                reason = f"{file} could not be written ({error.strerror or error}); nothing of it is kept"
                raise OSError(error.errno, reason) from error
        for file in writers:
            partial[file].rename(file)
    except BaseException:
        for file in writers:
            file.unlink(missing_ok=True)
            partial[file].unlink(missing_ok=True)
        raise
