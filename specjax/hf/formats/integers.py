"""GPTQ and AWQ: integers of a few bits, packed into int32, with a scale and a zero point for each group of inputs.

A weight ``X.weight`` [out, in] is stored as ``X.qweight``, ``X.qzeros`` and ``X.scales``, and for GPTQ often
``X.g_idx``. An entry is ``(integer - zero point) * scale``.
"""

import dataclasses
from typing import Literal

import numpy as np

from specjax.hf.computed import Computed, Rows
from specjax.hf.formats.parts import (
    FLOATS,
    INT32,
    INTEGERS,
    Grid,
    Parts,
    groups_of,
    scaled,
    stored_dtype,
    to_floats,
    unpack,
    words_of,
)
from specjax.hf.safetensors import Tensor

# AWQ's order: place p of a word holds column _AWQ_ORDER[p] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = np.argsort(_AWQ_ORDER)


def _base(tensor: Tensor) -> str | None:
    return tensor.name.removesuffix("qweight") if tensor.name.endswith(".qweight") else None


def _why_left_out(tensor: Tensor) -> str | None:
    """Returns why a tensor is not needed, or None: writers give every layer a bias, of zeros if it had none."""
    if tensor.name.endswith(".bias") and tensor.dtype in FLOATS and not tensor.read().any():
        return "a bias of zeros, which quantising added"
    return None


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """The format of AutoGPTQ and GPTQModel: integers are packed along the inputs, zero points along the outputs.

    Tensors: ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales`` [groups,
    out], ``g_idx`` int32 [in] (the group of each input; without it, groups follow each other).

    Attributes:
      bits: 2, 3, 4 or 8; None reads it from each weight's shapes, for configs with rules per module.
      group_size: inputs of a group; -1 for all. If ``bits`` is None, a module may have groups of another size.
      ordered: whether groups follow each other unless ``g_idx`` says otherwise.
      offset: what is added to a stored zero point: 1 in the format "gptq", 0 in "gptq_v2".
    """

    bits: int | None
    group_size: int
    ordered: bool
    offset: int

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them."""
        return _base(tensor)

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None."""
        return _why_left_out(tensor)

    def weight(self, parts: Parts) -> Computed:
        """Returns the weight [out, in] that some tensors stand for; raises ValueError if they do not fit together."""
        # 1. Sizes. With ``g_idx`` the number of inputs is known; the packed size gives it otherwise.
        packed = parts.take("qweight", (INT32,), (None, None))
        out = packed.shape[1]
        scales = parts.take("scales", FLOATS, (None, out))
        zeros = parts.take("qzeros", (INT32,), (scales.shape[0], None))
        bits = self.bits or _bits_of(parts, zeros.shape[1], out)
        columns = parts.take("g_idx", INTEGERS, (None,)).shape[0] if "g_idx" in parts else packed.shape[0] * 32 // bits
        parts.take("qweight", (INT32,), (words_of(columns, bits), out))
        # 2. Groups.
        size = self._inputs_of_group(parts.base, columns, scales.shape[0])
        count = -(-columns // size)
        parts.take("scales", FLOATS, (count, out))
        parts.take("qzeros", (INT32,), (count, words_of(out, bits)))
        if not self.ordered and "g_idx" not in parts:
            parts.take("g_idx", INTEGERS, (columns,))  # raises: desc_act needs it

        def open() -> Rows:
            words = packed.read()
            grid = Grid(1, groups_of(parts, "g_idx", columns, size, count))
            points = unpack(zeros.read(), bits, out).T.astype(np.float32) + np.float32(self.offset)

            def numbers(start: int, stop: int) -> np.ndarray:
                return unpack(words[:, start:stop].T, bits, columns).astype(np.float32)

            return scaled(grid, numbers, to_floats(scales).T, points)

        return Computed(parts.base + "weight", stored_dtype(scales), (out, columns), open)

    def _inputs_of_group(self, base: str, columns: int, groups: int) -> int:
        """Returns the inputs of a group of a weight: the config's, or those of a rule for its module."""
        size = max(1, columns) if self.group_size == -1 else self.group_size
        if self.bits is not None or -(-columns // size) == groups:
            return size
        if groups == 0 or columns % groups:
            raise ValueError(
                f"tensor {base + 'scales'!r} has {groups} groups for {columns} inputs; the config's groups have {size} "
                "of them, and no other size divides them; download it again"
            )
        return max(1, columns // groups)


def _bits_of(parts: Parts, words: int, out: int) -> int:
    """Returns the bits of a weight's integers, from the words in which ``out`` zero points are packed."""
    bits = next((bits for bits in (2, 3, 4, 8) if words == words_of(out, bits)), None)
    if bits is None:
        raise ValueError(
            f"tensor {parts.base + 'qzeros'!r} has {words} words for {out} zero points, which are not of 2, 3, 4 or 8 "
            "bits; download it again"
        )
    return bits


@dataclasses.dataclass(frozen=True)
class AWQ:
    """The formats "gemm" and "gemv" of AutoAWQ, with 4 bits.

    - gemm: ``qweight`` int32 [in, out / 8] and ``qzeros`` int32 [groups, out / 8], packed along the outputs, in each
      word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` [groups, out].
    - gemv: ``qweight`` int32 [out, in / 8] and ``qzeros`` int32 [out, words], packed along the inputs and groups;
      ``scales`` [out, 8 * words]. The last words are padding.

    Attributes:
      group_size: inputs of a group, or -1 for all.
      layout: which of the two.
    """

    group_size: int
    layout: Literal["gemm", "gemv"]

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them."""
        return _base(tensor)

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None."""
        return _why_left_out(tensor)

    def weight(self, parts: Parts) -> Computed:
        """Returns the weight [out, in] that some tensors stand for; raises ValueError if they do not fit together."""
        # 1. Sizes and groups.
        packed = parts.take("qweight", (INT32,), (None, None))
        wide = packed.shape[1] * 8
        out, columns = (wide, packed.shape[0]) if self.layout == "gemm" else (packed.shape[0], wide)
        size = max(1, columns) if self.group_size == -1 else self.group_size
        count = -(-columns // max(1, size))
        if self.layout == "gemm":
            zeros = parts.take("qzeros", (INT32,), (count, packed.shape[1]))
            scales = parts.take("scales", FLOATS, (count, out))
        else:
            zeros = parts.take("qzeros", (INT32,), (out, None))
            scales = parts.take("scales", FLOATS, (out, 8 * zeros.shape[1]))
            if scales.shape[1] < count:
                parts.take("scales", FLOATS, (out, count))  # raises: there are fewer scales than groups

        def open() -> Rows:
            words, points, factors = packed.read(), zeros.read(), to_floats(scales)
            grid = Grid(1, np.arange(columns) // size)
            if self.layout == "gemv":
                points = unpack(points, 4, count).astype(np.float32)
                return scaled(grid, lambda a, b: unpack(words[a:b], 4, columns).astype(np.float32), factors, points)

            def numbers(start: int, stop: int) -> np.ndarray:
                first = start // 8  # whole words, of which some columns may not be asked for
                columns_of = _in_order(words[:, first : -(-stop // 8)])
                return columns_of[:, start - 8 * first : stop - 8 * first].T.astype(np.float32)

            return scaled(grid, numbers, factors.T, _in_order(points).T.astype(np.float32))

        return Computed(parts.base + "weight", stored_dtype(scales), (out, columns), open)


def _in_order(words: np.ndarray) -> np.ndarray:
    """Unpacks AWQ's words [n, m] as uint8 [n, 8 * m]."""
    fields = unpack(words, 4, 8 * words.shape[1]).reshape(*words.shape, 8)
    return fields[..., _AWQ_PLACES].reshape(words.shape[0], -1)
