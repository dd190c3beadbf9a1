"""What the formats share: the stored tensors of a weight, packed integers, and which scale belongs to which entry."""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from specjax.hf.computed import Rows
from specjax.hf.safetensors import Tensor

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOATS = (*HALVES, np.dtype(np.float32))
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
EXPONENTS = np.dtype(ml_dtypes.float8_e8m0fnu)
INT8, INT32, UINT8 = np.dtype(np.int8), np.dtype(np.int32), np.dtype(np.uint8)
INTEGERS = (INT32, np.dtype(np.int64))


class Parts:
    """The stored tensors of one weight. Each is checked as it is taken."""

    def __init__(self, tensors: Mapping[str, Tensor], base: str):
        """``base`` is what the names of the weight's tensors have in common, such as "model.layers.0.mlp.up_proj."."""
        self.base, self.taken, self._tensors = base, set[str](), tensors

    def __contains__(self, end: str) -> bool:
        return self.base + end in self._tensors

    def take(self, end: str, dtypes: tuple[np.dtype, ...], *shapes: tuple[int | None, ...]) -> Tensor:
        """Returns the tensor whose name ends in ``end``.

        Args:
          end: what follows ``base`` in the name.
          dtypes: the dtypes that it may have.
          *shapes: the shapes that it may have; None stands for any size. Without them, any shape is right.

        Raises:
          ValueError: the tensor is missing, or has another dtype or shape.
        """
        name = self.base + end
        if name not in self._tensors:
            raise ValueError(f"tensor {name!r} of a quantised weight is missing; download the files again")
        tensor = self._tensors[name]
        fits = not shapes or any(_fits(tensor.shape, shape) for shape in shapes)
        if tensor.dtype not in dtypes or not fits:
            wanted = " or ".join(map(str, dtypes)) + "".join(f" {shape}" for shape in shapes)
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tensor.shape}, and must be {wanted.replace('None', 'any')}: the "
                "weights are of another format than quantization_config says, or damaged; download both again"
            )
        self.taken.add(name)
        return tensor

    def find(self, end: str, dtypes: tuple[np.dtype, ...], *shapes: tuple[int | None, ...]) -> Tensor | None:
        """Returns the tensor as ``take`` does, or None if there is none."""
        return self.take(end, dtypes, *shapes) if end in self else None


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, given) for given, size in zip(shape, wanted, strict=True))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpacks integers that follow each other in the bits of words, lowest bits first.

    Example, bits = 4: entry 0 is bits 0 to 3 of word 0, entry 8 is bits 0 to 3 of word 1. With bits = 3, entry 10 is
    bits 30 and 31 of word 0 and bit 0 of word 1.

    Args:
      words: int32 [..., n].
      bits: bits of an integer, 1 to 8.
      count: integers in a row, at most ``32 * n // bits``.

    Returns:
      uint8 [..., count], from 0 to ``2 ** bits - 1``.
    """
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (stream[..., None] >> shifts) & np.uint8(2**bits - 1)
        return fields.reshape(*stream.shape[:-1], -1)[..., :count]
    flags = np.unpackbits(stream, axis=-1, count=count * bits, bitorder="little")
    return flags.reshape(*stream.shape[:-1], count, bits) @ (np.uint8(1) << np.arange(bits, dtype=np.uint8))


def words_of(count: int, bits: int) -> int:
    """Returns how many words hold ``count`` integers."""
    return -(-count * bits // 32)


def to_floats(tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
    """Reads scales as float32. Bytes are exponents: b stands for 2^(b - 127) (OCP microscaling, E8M0).

    Raises:
      ValueError: an exponent is 255, which stands for no number.
    """
    array = tensor.read() if rows == slice(None) else tensor.read()[rows]  # no rows of a scalar
    if array.dtype not in (UINT8, EXPONENTS):
        return array.astype(np.float32)
    exponents = array.view(np.uint8).astype(np.int32)
    if (exponents == 255).any():
        raise ValueError(f"{tensor.file}: tensor {tensor.name!r} has a scale that is no number; download it again")
    return np.ldexp(np.float32(1), exponents - 127)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which scale belongs to which entry of a matrix: entry (r, c) has the scale (r // height, column_of[c]).

    Attributes:
      height: rows that share a scale.
      column_of: int [columns].
    """

    height: int
    column_of: np.ndarray

    def spread(self, scales: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Returns the scale of each entry of some rows, or of each row if all its entries have the same scale.

        Args:
          scales: [rows of scales, columns of scales].
          start, stop: the rows.

        Returns:
          [stop - start, columns], or [stop - start, 1].
        """
        rows = scales[np.arange(start, stop) // self.height]
        return rows if scales.shape[1] == 1 else rows[:, self.column_of]


def scaled(grid: Grid, numbers: Rows, scales: np.ndarray, zeros: np.ndarray | None = None) -> Rows:
    """Returns the function that computes rows of ``(numbers - zeros) * scales`` in float32.

    Args:
      grid: which scale belongs to which entry.
      numbers: reads rows of stored numbers as float32.
      scales, zeros: float32 [rows of scales, columns of scales].
    """

    def compute(start: int, stop: int) -> np.ndarray:
        values = numbers(start, stop)
        if zeros is not None:
            values -= grid.spread(zeros, start, stop)
        values *= grid.spread(scales, start, stop)
        return values

    return compute


def stored_dtype(scales: Tensor) -> np.dtype:
    """Returns the dtype of a dequantised weight: that of its scales if they have 16 bits, and bfloat16 otherwise."""
    return scales.dtype if scales.dtype in HALVES else np.dtype(ml_dtypes.bfloat16)


def groups_of(parts: Parts, end: str, columns: int, size: int, count: int) -> np.ndarray:
    """Reads the group of each column, int [columns].

    Args:
      parts: the weight's tensors.
      end: the end of the name of the tensor that holds the groups. Without this tensor, groups follow each other.
      columns: the weight's columns.
      size: columns of a group.
      count: the number of groups.

    Raises:
      ValueError: a group is not from 0 to ``count - 1``.
    """
    tensor = parts.find(end, INTEGERS, (columns,))
    if tensor is None:
        return np.arange(columns) // size
    groups = tensor.read()
    if (groups == -1).all():  # compressed-tensors' mark for groups that follow each other
        return np.arange(columns) // size
    if groups.size and not (0 <= groups.min() and groups.max() < count):
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} has groups from {groups.min()} to {groups.max()}, and the weight "
            f"has the groups 0 to {count - 1}; download it again"
        )
    return groups.astype(np.intp)
