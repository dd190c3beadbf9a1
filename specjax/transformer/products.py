"""Products of states with kernels, for the few rows that decoding has."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from specjax.quantized import Quantized

Kernel = Array | Quantized
Multiply = Callable[[Array, Kernel], Array]
_MOST_ROWS_OF_PARTS = 64  # at 128 inputs a group, parts of more rows than this are larger than the kernel in bfloat16


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
    default = multiply = functools.partial(_dense, dtype=dtype, axis=1 if transposed else 0)
    gpu = None
    if isinstance(kernel, Quantized):
        default = multiply = functools.partial(_grouped if kernel.grouped else _scaled, dtype=dtype)
        if kernel.grouped and x.size <= _MOST_ROWS_OF_PARTS * x.shape[-1]:
            gpu = functools.partial(_by_groups, dtype=dtype)
    if x.size == x.shape[-1]:
        # A single row would leave the matrix unit: XLA multiplies and adds on the vector unit, which takes 2.7 times as
        # long on a TPU v5e. On a GPU it writes products as large as the kernel to memory. A second, equal row prevents
        # both. A CPU has no such unit.
        default = functools.partial(_twice, default)
        gpu = gpu and functools.partial(_twice, gpu)
    if default is multiply and gpu is None:
        return multiply(x, kernel)
    others = {"cuda": gpu, "rocm": gpu} if gpu else {}
    return lax.platform_dependent(x, kernel, cpu=multiply, default=default, **others)


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


def _twice(multiply: Multiply, x: Array, kernel: Kernel) -> Array:
    two = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
    return multiply(two, kernel)[0].reshape(*x.shape[:-1], -1)


def _dense(x: Array, kernel: Kernel, dtype: jnp.dtype, axis: int) -> Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _scaled(x: Array, kernel: Kernel, dtype: jnp.dtype) -> Array:
    # One scale for each output: it multiplies the sum. XLA reads the small values and converts them in the product.
    y = _dense(x, kernel.values.astype(x.dtype), jnp.dtype("float32"), 2 + kernel.axis)
    return (y * jnp.broadcast_to(kernel.scales, y.shape)).astype(dtype)


def _grouped(x: Array, kernel: Kernel, dtype: jnp.dtype) -> Array:
    # The sum goes over groups and their entries. Without a reshape of the kernel, XLA:TPU dequantises in the product.
    entries = kernel.entries.astype(x.dtype)
    x = x.reshape(*x.shape[:-1], *entries.shape[:2])
    sums = ((x.ndim - 2, x.ndim - 1), (0, 1))
    return lax.dot_general(x, entries, (sums, ((), ())), preferred_element_type=dtype)


def _by_groups(x: Array, kernel: Kernel, dtype: jnp.dtype) -> Array:
    # One product for each group, scaled and added: XLA:GPU writes the dequantised kernel of `_grouped` to memory.
    groups, group = kernel.values.shape[:2]
    # XLA:GPU would merge the products of equal states, and write dequantised copies of merged kernels. The barrier
    # prevents it.
    x, values = lax.optimization_barrier((x, kernel.values))
    shape, x_mgi, values = x.shape[:-1], x.reshape(-1, groups, group), values.astype(x.dtype)
    y_gmo = lax.dot_general(x_mgi, values, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32)
    return (
        jnp.sum(y_gmo * jnp.broadcast_to(kernel.scales[:, None], y_gmo.shape), axis=0).astype(dtype).reshape(*shape, -1)
    )
