"""Products of states with kernels, for the few rows that decoding has."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from specjax.platforms import by_platform
from specjax.quantized import Quantized

Kernel = Array | Quantized
Way = Callable[..., Array]
_FEW_ROWS = 64  # with more, sums of groups are larger than a dequantised kernel, and blocks write their sums too often


def product(x: Array, kernel: Kernel, dtype: jnp.dtype | None = None, *, transposed: bool = False) -> Array:
    """Returns ``x @ kernel``.

    Args:
      x: floats ``[.., in]``.
      kernel: floats ``[in, out]`` or quantised ones.
      dtype: dtype of the result, to which the sum is not rounded before. None: that of ``x``.
      transposed: the kernel is ``[out, in]``.

    Returns:
      ``[.., out]``.
    """
    dtype = x.dtype if dtype is None else dtype
    halves = isinstance(kernel, Array) and x.dtype == jnp.bfloat16
    if isinstance(kernel, Quantized):
        ways = _quantized_ways(kernel, few=x.size <= _FEW_ROWS * x.shape[-1])
    else:
        axis = 1 if transposed else 0
        dense = functools.partial(_dense, axis=axis)
        ways = {"cpu": functools.partial(_rounded, axis=axis) if halves else dense, "default": dense}
    if x.size == x.shape[-1]:
        # A single row would leave the matrix unit: XLA multiplies and adds on the vector unit, which takes 2.7 times as
        # long on a TPU v5e. On a GPU it writes products as large as the kernel to memory. A second, equal row prevents
        # both. A CPU has such a unit for bfloat16 at most.
        alone = () if halves else ("cpu",)
        ways = {name: way if name in alone else functools.partial(_twice, way) for name, way in ways.items()}
    ways = {name: functools.partial(way, dtype=dtype) for name, way in ways.items()}
    if isinstance(kernel, Array) and x.size > x.shape[-1] and not halves:
        return ways["default"](x, kernel)
    return by_platform(x, kernel, **ways)


def ragged_product(x_nd: Array, kernels: Kernel, sizes_e: Array, expert_n: Array) -> Array:
    """Returns the products of rows, sorted by expert, with the kernels ``[e, in, out]`` of their experts.

    Args:
      x_nd: floats, the rows.
      kernels: one for each expert.
      sizes_e: integers, how many rows each expert has.
      expert_n: integers, the expert of each row. Rows of none, past the last expert's, may get anything.
    """
    if not isinstance(kernels, Quantized):
        return lax.ragged_dot(x_nd, kernels, sizes_e)
    if kernels.grouped:
        return lax.ragged_dot(x_nd, kernels.dequantize(), sizes_e)
    y = lax.ragged_dot(x_nd, kernels.values.astype(x_nd.dtype), sizes_e, preferred_element_type=jnp.float32)
    return (y * jnp.take(kernels.scales, expert_n, axis=0, mode="clip")).astype(x_nd.dtype)


def rows(table: Kernel, index: Array) -> Array:
    """Returns the rows of a table ``[v, d]`` at integers ``[..]``: ``[.., d]``."""
    if not isinstance(table, Quantized):
        return jnp.take(table, index, axis=0)
    # One row alone would be a slice, for which XLA:TPU copies the table into another layout in each pass.
    wanted = jnp.broadcast_to(index.reshape(1, -1), (2, index.size)) if index.size == 1 else index
    chosen = dataclasses.replace(
        table, **{k: jnp.take(getattr(table, k), wanted, axis=0) for k in ("values", "scales")}
    )
    found = chosen.dequantize()
    return found[0].reshape(*index.shape, -1) if index.size == 1 else found


def _quantized_ways(kernel: Quantized, few: bool) -> dict[str, Way]:
    """Returns the way to multiply that reads the fewest bytes, by platform. ``few``: there are few rows of states."""
    default = _grouped if kernel.grouped else _scaled
    ways: dict[str, Way] = {"cpu": _block_by_block if few else default, "default": default}
    return ways | {"cuda": _by_groups, "rocm": _by_groups} if few and kernel.grouped else ways


def _twice(way: Way, x: Array, kernel: Kernel, dtype: jnp.dtype) -> Array:
    two = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
    return way(two, kernel, dtype=dtype)[0].reshape(*x.shape[:-1], -1)


def _dense(x: Array, kernel: Array, axis: int, dtype: jnp.dtype) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _rounded(x: Array, kernel: Array, axis: int, dtype: jnp.dtype) -> Array:
    # XLA:CPU has fast products of bfloat16, some in matrix units, but only for sums in float32.
    return _dense(x, kernel, axis, jnp.dtype("float32")).astype(dtype)


def _scaled(x: Array, kernel: Quantized, dtype: jnp.dtype) -> Array:
    # One scale for each output: it multiplies the sum. XLA reads the small values and converts them in the product.
    y = _dense(x, kernel.values.astype(x.dtype), 2 + kernel.axis, jnp.dtype("float32"))
    return (y * jnp.broadcast_to(kernel.scales, y.shape)).astype(dtype)


def _grouped(x: Array, kernel: Quantized, dtype: jnp.dtype) -> Array:
    # The sum goes over groups and their entries. XLA:TPU dequantises in the product if the kernel need not be reshaped
    # and the states come, after a barrier, in the shape of the kernel's groups.
    entries = kernel.entries.astype(x.dtype)
    shape, x_mgi = x.shape[:-1], lax.optimization_barrier(x.reshape(-1, *entries.shape[:2]))
    y_mo = lax.dot_general(x_mgi, entries, (((1, 2), (0, 1)), ((), ())), preferred_element_type=dtype)
    return y_mo.reshape(*shape, -1)


def _by_groups(x: Array, kernel: Quantized, dtype: jnp.dtype) -> Array:
    # One product for each group, scaled and added: XLA:GPU writes the dequantised kernel of `_grouped` to memory.
    groups, group = kernel.values.shape[:2]
    # XLA:GPU would merge the products of equal states, and write dequantised copies of merged kernels. The barrier
    # prevents it.
    x, values = lax.optimization_barrier((x, kernel.values))
    shape, x_mgi, values = x.shape[:-1], x.reshape(-1, groups, group), values.astype(x.dtype)
    y_gmo = lax.dot_general(x_mgi, values, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32)
    y_mo = jnp.sum(y_gmo * jnp.broadcast_to(kernel.scales[:, None], y_gmo.shape), axis=0)
    return y_mo.astype(dtype).reshape(*shape, -1)


def _block_by_block(x: Array, kernel: Quantized, dtype: jnp.dtype) -> Array:
    # XLA:CPU converts a whole kernel before a product: in each call or, hoisted out of the loop over rounds, for good.
    # Of a block, the converted copy stays in the CPU's caches. The blocks are contiguous.
    shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    multiply = functools.partial(_dense, dtype=jnp.dtype("float32"))
    if kernel.axis == -1:
        blocks = _split(kernel.values)
        width = blocks.shape[1]

        def outputs(i: Array, y: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(y, multiply(x, blocks[i].astype(x.dtype), 1), i * width, 1)

        add = outputs
    else:
        blocks = kernel.values if kernel.grouped else _split(kernel.values)
        width = blocks.shape[1]

        def inputs(i: Array, y: Array) -> Array:
            part = multiply(lax.dynamic_slice_in_dim(x, i * width, width, 1), blocks[i].astype(x.dtype), 0)
            return y + (part * jnp.broadcast_to(kernel.scales[i], part.shape) if kernel.grouped else part)

        add = inputs
    y = jnp.zeros((x.shape[0], kernel.shape[1 + kernel.axis]), jnp.float32)
    y = lax.fori_loop(jnp.int32(0), jnp.int32(blocks.shape[0]), add, y)
    y = y if kernel.grouped else y * jnp.broadcast_to(kernel.scales, y.shape)
    return y.astype(dtype).reshape(*shape, -1)


def _split(values: Array) -> Array:
    """Returns ``[n, m]`` in blocks of at most 128 rows: ``[blocks, rows, m]``."""
    rows = next(rows for rows in range(min(128, values.shape[0]), 0, -1) if values.shape[0] % rows == 0)
    return values.reshape(-1, rows, values.shape[1])
