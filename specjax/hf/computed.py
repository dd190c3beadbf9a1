"""Tensors that are computed from stored tensors as they are read."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from specjax.hf.safetensors import Tensor

_BLOCK = 2**19  # entries that are computed at a time: 2 MiB of float32, which a core caches

Rows = Callable[[int, int], np.ndarray]
"""``rows(start, stop)`` returns float32 [stop - start, ...], the entries of these rows."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """A tensor that a folder does not hold as it is: packed numbers with scales, or a weight with an adapter.

    It has the attributes of a ``Tensor``, and can be read in blocks of rows.

    Attributes:
      name: the name of the tensor that a plain folder would have.
      dtype: the dtype that a plain folder would have. Values are computed in float32.
      shape: the tensor's shape; at least one axis.
      open: maps the stored tensors and returns the function that computes rows.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    open: Callable[[], Rows]

    def read(self) -> np.ndarray:
        """Returns the whole tensor as float32.

        Raises:
          ValueError: a stored tensor has values that it must not have, or its file has changed.
        """
        out = np.empty(self.shape, np.float32)
        for start, stop, block in self.blocks(0, self.shape[0]):
            out[start:stop] = block
        return out

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields rows in blocks of 2 MiB or one row: the first row, the row after the last, and the rows as float32.

        Raises:
          ValueError: as for ``read``.
        """
        compute, step = self.open(), max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            yield begin, end, compute(begin, end)


Readable = Tensor | Computed
"""A tensor of a folder, whether stored or computed."""


def rows_of(tensor: Readable) -> Rows:
    """Maps a tensor once, and returns the function that reads its rows as float32."""
    if isinstance(tensor, Computed):
        return tensor.open()
    array = tensor.read()
    return lambda start, stop: array[start:stop].astype(np.float32)
