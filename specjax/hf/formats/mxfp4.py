"""MXFP4, as gpt-oss stores its experts: numbers of 4 bits, 32 of which share a power of two.

Reference: OCP Microscaling Formats (MX) Specification 1.0, E2M1 elements with E8M0 scales.
"""

import dataclasses

import ml_dtypes
import numpy as np

from specjax.hf.computed import Computed, Rows
from specjax.hf.formats.parts import UINT8, Parts, to_floats
from specjax.hf.safetensors import Tensor

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_E2M1, -_E2M1])  # by sign bit, two bits of exponent, one bit of mantissa


@dataclasses.dataclass(frozen=True)
class MXFP4:
    """A stack of kernels ``X`` [experts, in, out], stored as ``X_blocks`` and ``X_scales``.

    ``X_blocks`` is uint8 [experts, out, groups, 16]: byte k of a group holds inputs 2k (low bits) and 2k + 1 of its 32.
    ``X_scales`` is uint8 [experts, out, groups]: b stands for 2^(b - 127).

    The weight is what transformers' plain folder holds under the name ``X``: in "experts.gate_up_proj" of gpt-oss,
    [experts, hidden_size, 2 * intermediate_size], the even outputs are the gate's and the odd ones the up-projection's.
    So a table of names needs no row for this format. ``Computed.blocks(e, e + 1)`` reads
    expert e alone.
    """

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them."""
        return tensor.name.removesuffix("_blocks") if tensor.name.endswith("_blocks") else None

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None."""
        return None

    def weight(self, parts: Parts) -> Computed:
        """Returns the stack that some tensors stand for; raises ValueError if they do not fit together."""
        blocks = parts.take("_blocks", (UINT8,), (None, None, None, 16))
        experts, out, groups, _ = blocks.shape
        scales = parts.take("_scales", (UINT8,), (experts, out, groups))

        def open() -> Rows:
            packed = blocks.read()

            def compute(start: int, stop: int) -> np.ndarray:
                pairs = packed[start:stop]
                values = np.empty((stop - start, out, groups, 32), np.float32)
                values[..., 0::2] = _VALUES[pairs & 15]
                values[..., 1::2] = _VALUES[pairs >> 4]
                values *= to_floats(scales, slice(start, stop))[..., None]
                return values.reshape(stop - start, out, groups * 32).swapaxes(1, 2)

            return compute

        return Computed(parts.base, np.dtype(ml_dtypes.bfloat16), (experts, groups * 32, out), open)
