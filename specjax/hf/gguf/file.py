"""The parts of a GGUF file: its metadata, and which tensors lie where.

A GGUF file has four parts (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:

1. the bytes "GGUF", the version, the number of tensors and the number of metadata keys;
2. the metadata: for each key its name, the type of its value, and the value;
3. for each tensor its name, shape (the fastest axis first), type, and offset into the data;
4. the data. Each tensor begins at a multiple of ``general.alignment``, 32 if the file does not say.

Example, a Q4_1 tensor [3, 64]: it has 3 * 64 / 32 = 6 blocks of 20 bytes, so it takes 120 bytes, and the next tensor
begins 128 bytes after it.

The header is read here and not by ``gguf.GGUFReader``. The reader trusts every count in a file: a wrong one makes it
loop until memory is full, or return fewer bytes than the shape says. Types, sizes of blocks and dequantisation are the
package's.
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from specjax.hf.safetensors import damage, open_regular, show

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")

# The numbers of the format's types of values.
_SCALARS = {
    0: np.dtype(np.uint8),
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    3: np.dtype(np.int16),
    4: np.dtype(np.uint32),
    5: np.dtype(np.int32),
    6: np.dtype(np.float32),
    7: np.dtype(np.bool_),
    10: np.dtype(np.uint64),
    11: np.dtype(np.int64),
    12: np.dtype(np.float64),
}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_LEAST_KEY, _LEAST_TENSOR = 13, 24  # bytes that a metadata key and an entry of a tensor take at least


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as a GGUF file describes it.

    Attributes:
      file: the file.
      name: its name there, such as "blk.0.attn_q.weight".
      kind: the number of its type (``gguf.GGMLQuantizationType``).
      shape: its shape; the last axis is contiguous.
      offset: the byte of the file at which its data begin.
    """

    file: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
      path: the file.
      metadata: the values by their keys: numbers, truth values, texts, lists of texts, and arrays of numbers.
      tensors: the tensors by their names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file: it has the ending, or begins as such a file."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def need_gguf() -> Any:
    """Returns the package ``gguf``.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF files need the package gguf ({error}); pip install 'specjax[gguf]'") from None
    return gguf


def open_header(path: Path) -> Header:
    """Reads the header of a GGUF file; of a model in several files, the headers of all, from the first one's path.

    Raises:
      ValueError: a file is missing, cannot be read, is damaged or of a version that is not known; a tensor is in two
        files; or the path is not the first one's.
    """
    header = _open_one(path)
    count, number = _split_number(header, "count", 1), _split_number(header, "no", 0)
    if count < 2:
        return header
    # 1. The names of parts are part of the format: the header says only how many there are.
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise ValueError(f"{path} is a part of a model in {count} files; name it like x-00001-of-{count:05d}.gguf")
    if number != 0 or int(named["no"]) != 1:
        raise ValueError(f"{path} is not the first of {count} files; give {named['stem']}-00001-of-{count:05d}.gguf")
    # 2. The first file has all metadata, and any of them may hold any tensor.
    tensors = dict(header.tensors)
    for i in range(2, count + 1):
        part = path.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise ValueError(f"{part} does not exist, and the model is in {count} files; download all of them")
        other = _open_one(part)
        if twice := sorted(tensors.keys() & other.tensors.keys()):
            raise damage(part, f"tensor {show(twice[0])} is in an earlier part as well")
        tensors |= other.tensors
    expected = _split_number(header, "tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(f"{path}: the parts hold {len(tensors)} tensors and should {expected}; download all again")
    return Header(path, header.metadata, tensors)


def _split_number(header: Header, key: str, default: int) -> int:
    """Returns a number of the metadata about parts."""
    value = header.metadata.get(f"split.{key}", default)
    if type(value) is not int or value < 0:
        raise damage(header.path, f"split.{key} is {show(value)} and must be a whole number")
    return value


def _open_one(path: Path) -> Header:
    """Reads the header of one file."""
    with open_regular(path) as (stream, size):
        if stream.read(4) != _MAGIC:
            raise damage(path, "it does not begin with the bytes GGUF")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data, size).header()


class _Cursor:
    """Reads a file from front to back. Every count is compared with the bytes that are left before it is used."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self._path, self._data, self._size, self._at = path, data, size, len(_MAGIC)

    def header(self) -> Header:
        """Reads everything before the data, and checks where the data lie."""
        # 1. Counts.
        version = self._number("I")
        if version not in _VERSIONS:
            order = " of the other byte order" if version & 0xFFFF == 0 else ""
            raise ValueError(
                f"{self._path} is GGUF version {version}{order}; supported: 2 and 3, little-endian; download a newer "
                "file of the model, or convert it again"
            )
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        # 2. Metadata.
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_keys, _LEAST_KEY, "metadata keys")):
            key = self._text("a metadata key")
            if key in metadata:
                raise damage(self._path, f"the metadata key {show(key)} occurs twice")
            metadata[key] = self._value(key, self._number("I"))
        # 3. Tensors.
        entries = [self._entry() for _ in range(self._count(num_tensors, _LEAST_TENSOR, "tensors"))]
        return Header(self._path, metadata, self._place(entries, metadata.get("general.alignment", 32)))

    def _number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._size:
            raise damage(self._path, f"it ends at byte {self._size}, in the middle of its header")
        return self._data[start : self._at]

    def _count(self, count: int, least: int, what: str) -> int:
        """Returns a count of things that take ``least`` bytes each, if the file has as many bytes."""
        if count * least > self._size - self._at:
            raise damage(self._path, f"{count} {what} do not fit into its {self._size} bytes")
        return count

    def _text(self, what: str) -> str:
        raw = self._bytes(self._count(self._number("Q"), 1, f"bytes of {what}"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise damage(self._path, f"{what} is not UTF-8 ({error.reason} in {show(raw)})") from None

    def _value(self, key: str, kind: int) -> Any:
        """Reads the value of a key."""
        what = f"the value of {show(key)}"
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY:
            number = self._scalars(what, kind, 1)[0]
            # The shortest decimal that is this float32: the number that the model's config had, such as 1e-05.
            return float(str(number)) if number.dtype == np.float32 else number.item()
        kind, count = self._number("I"), self._number("Q")
        if kind != _STRING:
            return self._scalars(what, kind, count)
        return [self._text(what) for _ in range(self._count(count, 8, f"texts of {show(key)}"))]

    def _scalars(self, what: str, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise damage(self._path, f"{what} has the unknown type {kind}")
        dtype = _SCALARS[kind]
        raw = self._bytes(self._count(count, dtype.itemsize, f"numbers of {what}") * dtype.itemsize)
        if dtype == np.bool_ and max(raw, default=0) > 1:
            raise damage(self._path, f"{what} is neither true nor false")
        return np.frombuffer(raw, dtype.newbyteorder("<"))

    def _entry(self) -> tuple[str, int, tuple[int, ...], int]:
        """Reads the name, type, shape and offset of one tensor."""
        name = self._text("a tensor's name")
        axes = self._number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise damage(self._path, f"tensor {show(name)} has {axes} axes and may have 1 to {_MOST_AXES}")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        if 0 in shape or math.prod(shape) >= 2**60:
            raise damage(self._path, f"tensor {show(name)} has shape {shape}, which no tensor can have")
        return name, self._number("I"), shape, self._number("Q")

    def _place(self, entries: Iterable[tuple[str, int, tuple[int, ...], int]], alignment: Any) -> dict[str, Stored]:
        """Returns the tensors, whose data must follow each other without holes and lie within the file."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise damage(self._path, f"general.alignment is {show(alignment)} and must be a power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        end = 0
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                raise damage(self._path, f"there are two tensors {show(name)}")
            if offset != end:
                raise damage(
                    self._path, f"tensor {show(name)} begins at byte {offset} of the data, and should at {end}"
                )
            size = num_bytes(self._path, name, kind, shape)
            if start + offset + size > self._size:
                raise damage(
                    self._path, f"tensor {show(name)} ends at byte {start + offset + size} and the file at {self._size}"
                )
            tensors[name] = Stored(self._path, name, kind, shape, start + offset)
            end = -(-(offset + size) // alignment) * alignment
        return tensors


def num_bytes(path: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    """Returns how many bytes a tensor takes.

    Raises:
      ValueError: the type is not known, or its blocks do not fit the shape.
    """
    gguf = need_gguf()
    sizes = {each.value: size for each, size in gguf.GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ValueError(
            f"{path}: tensor {show(name)} has the unknown type {kind}; install a newer version of the package gguf, or "
            "download another quantisation of the model, such as Q4_K_M"
        )
    block, size = sizes[kind]
    if shape[-1] % block:
        raise damage(path, f"tensor {show(name)}, {shape}, has rows that are no multiple of its blocks of {block}")
    return math.prod(shape) // block * size
