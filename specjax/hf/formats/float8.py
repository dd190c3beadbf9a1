"""Float8 weights with scales: one for the tensor, for each output, or for each block."""

import dataclasses

import numpy as np

from specjax.hf.computed import Computed, Rows, rows_of
from specjax.hf.formats.parts import EXPONENTS, FLOAT8, FLOATS, Grid, Parts, scaled, stored_dtype, to_floats
from specjax.hf.safetensors import Tensor


@dataclasses.dataclass(frozen=True)
class Float8:
    """A weight ``X`` [out, in] in float8_e4m3fn with scales in ``X_scale_inv`` or ``X_scale``.

    Both names mean a factor, whatever they say. The shape of the scales says which entries share one: none or one
    entry is one scale for the tensor, [out] or [out, 1] one for each output, and else there is one for each block.

    Attributes:
      block: rows and columns of a block, or None.
    """

    block: tuple[int, int] | None

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them."""
        return tensor.name if tensor.dtype == FLOAT8 else None

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None."""
        return None

    def weight(self, parts: Parts) -> Computed:
        """Returns the weight [out, in] that some tensors stand for; raises ValueError if they do not fit together."""
        numbers = parts.take("", (FLOAT8,), (None, None))
        out, columns = numbers.shape
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (out,), (out, 1)]
        if self.block is not None:
            height, width = self.block
            shapes.append((-(-out // height), -(-columns // width)))
        end = "_scale" if "_scale" in parts else "_scale_inv"
        scales = parts.take(end, (*FLOATS, EXPONENTS), *shapes)
        # A block comes first: it may have the shape of another kind, and then means the same.
        if self.block is not None and scales.shape == shapes[-1]:
            grid = Grid(self.block[0], np.arange(columns) // self.block[1])
        else:
            grid = Grid(1 if scales.shape[:1] == (out,) else max(1, out), np.zeros(columns, np.intp))

        def open() -> Rows:
            factors = to_floats(scales)
            factors = factors if factors.ndim == 2 else factors.reshape(-1, 1)
            return scaled(grid, rows_of(numbers), factors)

        return Computed(parts.base, stored_dtype(scales), (out, columns), open)
