"""Quantised weights as their formats store them, by slow packers, and the same weights dequantised by loops."""

import ml_dtypes
import numpy as np

FLOAT8 = ml_dtypes.float8_e4m3fn
SIGNED = {4: (-8, 8), 8: (-128, 128)}


def pack(rows, bits):
    """Packs non-negative integers [n, m] along the last axis into int32 words, bit by bit, lowest bits first."""
    count = -(-rows.shape[1] * bits // 32)
    words = np.zeros((rows.shape[0], count), np.uint32)
    for r in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            for k in range(bits):
                place = c * bits + k
                words[r, place // 32] |= np.uint32((int(rows[r, c]) >> k & 1) << place % 32)
    return words.view(np.int32)


def dequantise(numbers, zeros, scales, group):
    """Returns ``(number - zero) * scale`` of each entry; ``group(r, c)`` is the place of its scale."""
    out = np.empty(numbers.shape, np.float32)
    for r in range(numbers.shape[0]):
        for c in range(numbers.shape[1]):
            at = group(r, c)
            zero = np.float32(0) if zeros is None else np.float32(zeros[at])
            out[r, c] = (np.float32(numbers[r, c]) - zero) * np.float32(scales[at])
    return out


def scales_of(rng, *shape, dtype=np.float16):
    return rng.uniform(0.005, 0.02, shape).astype(dtype)


def gptq(rng, out, columns, bits=4, size=32, order=False, index=True, offset=1, bias=False):
    """Stored tensors of ``X.`` and the weight."""
    size = columns if size == -1 else size
    groups = -(-columns // size)
    group_of = np.arange(columns) // size
    if order:
        group_of = rng.permutation(group_of)
    numbers = rng.integers(0, 2**bits, (out, columns))
    zeros = rng.integers(offset, 2**bits, (out, groups))
    scales = scales_of(rng, out, groups)
    stored = {
        "qweight": np.ascontiguousarray(pack(numbers, bits).T),
        "qzeros": pack((zeros - offset).T, bits),
        "scales": np.ascontiguousarray(scales.T),
    }
    if index:
        stored["g_idx"] = group_of.astype(np.int32)
    if bias:
        stored["bias"] = np.zeros(out, np.float16)
    return stored, dequantise(numbers, zeros, scales, lambda r, c: (r, group_of[c]))


def awq(rng, out, columns, size=32, gemv=False):
    size = columns if size == -1 else size
    groups = columns // size
    numbers, zeros = rng.integers(0, 16, (out, columns)), rng.integers(0, 16, (out, groups))
    scales = scales_of(rng, out, groups)
    weight = dequantise(numbers, zeros, scales, lambda r, c: (r, c // size))
    if gemv:
        padded = np.zeros((2, out, 16), np.int64)
        padded[0, :, :groups] = zeros
        wide = np.zeros((out, 16), np.float16)
        wide[:, :groups] = scales
        return {"qweight": pack(numbers, 4), "qzeros": pack(padded[0], 4), "scales": wide}, weight

    def shuffled(rows):
        """Each eight columns in the order 0, 2, 4, 6, 1, 3, 5, 7."""
        columns = [8 * (c // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[c % 8] for c in range(rows.shape[1])]
        return pack(rows[:, columns], 4)

    return {
        "qweight": shuffled(numbers.T),
        "qzeros": shuffled(zeros.T),
        "scales": np.ascontiguousarray(scales.T),
    }, weight


def compressed(
    rng, out, columns, bits=4, strategy="group", size=32, block=None, zeros=None, packed=True, order=False, kind="int"
):
    """Stored tensors of ``X.weight``; ``zeros`` is None, "packed" or "plain"."""
    group_of = np.arange(columns) // size if strategy == "group" else None
    if order:
        group_of = rng.permutation(group_of)
    if strategy == "tensor":
        shape, group = (1,), lambda r, c: (0,)
    elif strategy == "channel":
        shape, group = (out, 1), lambda r, c: (r, 0)
    elif strategy == "group":
        shape, group = (out, -(-columns // size)), lambda r, c: (r, group_of[c])
    else:
        shape, group = (-(-out // block[0]), -(-columns // block[1])), lambda r, c: (r // block[0], c // block[1])
    scales = scales_of(rng, *shape, dtype=ml_dtypes.bfloat16)
    if kind == "float":
        numbers = rng.normal(size=(out, columns)).astype(FLOAT8)
    else:
        numbers = rng.integers(*SIGNED[bits], (out, columns))
    points = None if zeros is None else rng.integers(*SIGNED[bits], shape)
    stored = {"_scale": scales}
    if packed:
        stored |= {"_packed": pack(numbers + 2 ** (bits - 1), bits), "_shape": np.array([out, columns])}
    else:
        stored[""] = numbers if kind == "float" else numbers.astype(np.int8)
    if zeros == "packed":
        stored["_zero_point"] = np.ascontiguousarray(pack((points + 2 ** (bits - 1)).T, bits).T)
    elif zeros == "plain":
        stored["_zero_point"] = points.astype(np.int8)
    if order:
        stored["_g_idx"] = group_of.astype(np.int32)
    return stored, dequantise(numbers, points, scales, group)


def float8(rng, out, columns, scales="tensor", block=None, end="_scale", dtype=np.float32):
    shape, group = {
        "scalar": ((), lambda r, c: ()),
        "tensor": ((1,), lambda r, c: (0,)),
        "vector": ((out,), lambda r, c: (r,)),
        "channel": ((out, 1), lambda r, c: (r, 0)),
        "block": ((-(-out // 16), -(-columns // 24)), lambda r, c: (r // 16, c // 24)),
    }[scales]
    if dtype == ml_dtypes.float8_e8m0fnu:
        factors = 2.0 ** rng.integers(-9, -4, shape)
    else:
        factors = rng.uniform(0.005, 0.02, shape)
    factors = np.asarray(factors).astype(dtype)
    numbers = rng.normal(size=(out, columns)).astype(FLOAT8)
    return {"": numbers, end: factors}, dequantise(numbers, None, factors, group)


def mxfp4(rng, experts, out, columns):
    """Stored tensors of a stack, and the stack [experts, columns, out]."""
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    codes, exponents = (
        rng.integers(0, 16, (experts, out, columns)),
        rng.integers(118, 124, (experts, out, columns // 32)),
    )
    stack = np.empty((experts, columns, out), np.float32)
    blocks = np.zeros((experts, out, columns // 32, 16), np.uint8)
    for e, o, c in np.ndindex(codes.shape):
        code = int(codes[e, o, c])
        sign = -1 if code & 8 else 1
        stack[e, c, o] = sign * values[code & 7] * 2.0 ** (int(exponents[e, o, c // 32]) - 127)
        blocks[e, o, c // 32, c % 32 // 2] |= code << 4 * (c % 2)
    return {"_blocks": blocks, "_scales": exponents.astype(np.uint8)}, stack
