"""The tensors of a GGUF file under the names and in the layouts of Hugging Face folders.

Plain tensors are read as from safetensors files. The package ``gguf`` dequantises the rows of other tensors as they are
read. Two changes of llama.cpp's converter are undone: the order of rows (``order``), and 1 that was added to norms
(``shift``).
"""

import dataclasses
import functools
import math

import ml_dtypes
import numpy as np

from specjax.hf.computed import Computed, Readable, Rows
from specjax.hf.gguf.file import Header, Stored, need_gguf, num_bytes
from specjax.hf.safetensors import Tensor, show

_PLAIN = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
"""Types of quantised tensors that are read. Their scales are float16."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a Hugging Face folder as a part of a GGUF file's.

    Attributes:
      name: its Hugging Face name.
      stored: the GGUF file's tensor.
      shape: its shape; one or two axes.
      first: the first of its rows in the file's tensor, whose axes but the last count as one. A stack of experts
        [8, 64, 32] has 512 rows, and expert 2 begins at row 128. Rows of a vector are its numbers.
      order: the rows, counted from ``first``, in the order of the Hugging Face tensor; None leaves the order.
      shift: is added to every number.
    """

    name: str
    stored: Stored
    shape: tuple[int, ...]
    first: int = 0
    order: np.ndarray | None = None
    shift: float = 0.0


def readable(part: Part) -> Readable:
    """Returns the tensor of a part.

    Raises:
      ValueError: its type is not read.
    """
    stored, kind = part.stored, need_gguf().GGMLQuantizationType(part.stored.kind).name
    if kind not in (*_PLAIN, *QUANTISED):
        raise ValueError(
            f"tensor {show(stored.name)} is {kind}; supported: {', '.join((*_PLAIN, *QUANTISED))}: download another "
            "quantisation of the model, such as Q4_K_M"
        )
    dtype = _PLAIN.get(kind, np.dtype(np.float16))
    if kind in _PLAIN and part.order is None and not part.shift:
        offset = stored.offset + part.first * stored.shape[-1] * dtype.itemsize
        return Tensor(stored.file, part.name, dtype, part.shape, offset)
    return Computed(part.name, dtype, part.shape, functools.partial(_open, part, kind))


def _open(part: Part, kind: str) -> Rows:
    """Maps a tensor, and returns the function that dequantises its rows. One row of a vector is one number."""
    gguf, stored = need_gguf(), part.stored
    size = num_bytes(stored.file, stored.name, stored.kind, stored.shape)
    raw = Tensor(stored.file, stored.name, np.dtype(np.uint8), (size,), stored.offset).read()
    wide = len(part.shape) > 1
    raw = raw.reshape(math.prod(stored.shape[:-1]) if wide else 1, -1)

    def numbers(rows: np.ndarray) -> np.ndarray:
        if kind in _PLAIN:
            return np.ascontiguousarray(rows).view(_PLAIN[kind]).astype(np.float32)
        return gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType(stored.kind))

    def read(start: int, stop: int) -> np.ndarray:
        first = part.first
        taken = slice(first + start, first + stop) if part.order is None else first + part.order[start:stop]
        return (numbers(raw[taken]) if wide else numbers(raw)[0][taken]) + np.float32(part.shift)

    return read


def values(header: Header, name: str) -> np.ndarray | None:
    """Returns the numbers of a small tensor as float32, or None if the file lacks it."""
    stored = header.tensors.get(name)
    return None if stored is None else np.asarray(readable(Part(name, stored, stored.shape)).read(), np.float32)
