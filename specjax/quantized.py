"""Weight-only quantisation: kernels in 8 or 4 bits with scales, in place of floating-point kernels.

States, caches and sums stay floating-point. A pass at few rows takes as long as reading its weights, so it becomes
shorter as the weights' bytes do. ``specjax.transformer.products`` multiplies by a ``Quantized`` kernel without making a
floating-point copy of it. docs/quantization.md has the figures.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from specjax.types import Axis

Kind = Literal["int8", "int4", "fp8"]
KINDS: tuple[str, ...] = get_args(Kind)
GROUP = 128  # entries of an input axis that share a scale in int4: 4.25 bits a weight
_DTYPES = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # -128 and -8 are left out, so that q and -q are both there
T = TypeVar("T")


@struct.dataclass
class Quantized:
    """A kernel as small numbers and scales: entry = value * scale.

    int8 and fp8 have one scale for each output. int4 has one for each output and group of ``GROUP`` inputs. There the
    input axis is split in two, because XLA:TPU reads such a kernel straight into a product, but writes a dequantised
    copy if it has to split the axis itself.

    Attributes:
      values: int8 or float8_e4m3fn in the kernel's shape, or int4 in which ``in`` is split into groups and ``GROUP``.
      scales: float32 in the shape of ``values`` without the axis that shares a scale. Example: a kernel ``[256, 64]``
        has values ``[256, 64]`` and scales ``[64]`` in int8, and ``[2, 128, 64]`` and ``[2, 64]`` in int4.
      axis: the kernel's input axis, from the end: -2 in ``[in, out]``, -1 in ``[out, in]``.
      dtype: the dtype that the kernel had, and in which states are multiplied.
    """

    values: Array
    scales: Array
    axis: int = struct.field(pytree_node=False)
    dtype: jnp.dtype = struct.field(pytree_node=False)

    @property
    def grouped(self) -> bool:
        """Whether the input axis is split into groups."""
        return self.values.dtype == jnp.int4

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        if not self.grouped:
            return self.values.shape
        shape, at = self.values.shape, self.values.ndim + self.axis - 1
        return (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def entries(self) -> Array:
        """The kernel's entries, float32 in the shape of ``values``."""
        scales = jnp.broadcast_to(jnp.expand_dims(self.scales, self.axis), self.values.shape)
        return self.values.astype(jnp.float32) * scales

    def __getitem__(self, key: Any) -> "Quantized":
        """``kernel[...]`` is the kernel, so that a parameter is read in one way whatever it holds."""
        if key is not ...:
            raise TypeError(f"a quantised kernel has no entry {key!r}; use specjax.dequantize")
        return self

    def dequantize(self) -> Array:
        """Returns the kernel in its own shape and dtype."""
        return self.entries.astype(self.dtype).reshape(self.shape)

    def split_axes(self, axes: tuple[Axis, ...]) -> Any:
        """Returns the kernel with the axes of each array in its place, given the axes of the kernel."""
        at = len(axes) + self.axis
        before, given, after = axes[:at], axes[at], axes[at + 1 :]
        if not self.grouped:
            return dataclasses.replace(self, values=axes, scales=(*before, *after))
        # A part of a split axis holds whole groups.
        groups = self.scales.shape[self.axis]
        given = (given[0], math.gcd(given[1], groups)) if isinstance(given, tuple) else given
        return dataclasses.replace(self, values=(*before, given, None, *after), scales=(*before, given, *after))


def quantize(model: T, kind: Kind) -> T:
    """Returns the model or drafter with its kernels quantised.

    Kernels of linear layers, experts and embeddings are quantised. Norms, biases, routers, learned positions and the
    up-projections of latent attention stay as they are. A table of embeddings is int8 in the kind int4, too: tokens are
    looked up in it one by one, and it often is the output head. Generated text is exact with respect to the quantised
    target: it has that model's distribution.

    Args:
      model: a ``LanguageModel`` of ``specjax.transformer``, or a drafter. Its arrays may be abstract
        (``jax.eval_shape``) or on a mesh.
      kind: "int8" (one scale for each output), "int4" (one for each output and 128 inputs) or "fp8" (float8_e4m3fn, one
        for each output).

    Raises:
      TypeError: ``model`` is neither a model nor a drafter.
      ValueError: ``kind`` is none of these; the model is quantised, or none of its parameters can be; int4, and the
        inputs of a kernel are no multiple of 128; or fp8, and the default device is a GPU without it.
    """
    check_kind(kind)
    return _with_params(model, lambda params: quantize_params(params, kind))


def dequantize(model: T) -> T:
    """Returns a model or drafter whose quantised kernels are floating-point again, with the quantised values."""
    return _with_params(model, dequantize_params)


def _with_params(model: T, change: Callable[[Any], Any]) -> T:
    """Returns a model or drafter with ``change(params)`` in place of its parameters, and of those of its parts."""
    if not dataclasses.is_dataclass(model) or isinstance(model, type):
        raise TypeError(f"model is {model!r}; give a LanguageModel or a drafter")
    # A caller's own functions multiply by arrays, whatever names its parameters have.
    home = getattr(model, "forward", type(model)).__module__
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(model):
        part = getattr(model, field.name)
        if field.name == "params":
            if not home.startswith("specjax."):
                raise ValueError(
                    f"the model or drafter is of {home}, whose parameters specjax cannot quantise; give one of "
                    "specjax.transformer or specjax.drafters"
                )
            parts["params"] = change(part)
        elif field.metadata.get("pytree_node", True) and dataclasses.is_dataclass(part):
            parts[field.name] = _with_params(part, change)
    return dataclasses.replace(model, **parts)  # type: ignore  (T is not known to be a dataclass)


def quantize_params(params: Any, kind: Kind) -> Any:
    """Returns a tree of parameters with quantised kernels; see ``quantize``."""
    if is_quantized(params):
        raise ValueError("the model is quantised already; quantise the model that it was made of")
    quantized = jax.tree_util.tree_map_with_path(functools.partial(quantize_leaf, kind), params)
    if not is_quantized(quantized):
        raise ValueError(
            "none of the model's parameters can be quantised: only models of specjax.transformer and draft heads can"
        )
    return quantized


def dequantize_params(params: Any) -> Any:
    """Returns a tree of parameters without quantised kernels."""
    return jax.tree.map(lambda x: x.dequantize() if isinstance(x, Quantized) else x, params, is_leaf=_is_quantized)


def is_quantized(tree: Any) -> bool:
    """Returns whether a tree has quantised kernels."""
    return any(map(_is_quantized, jax.tree.leaves(tree, is_leaf=_is_quantized)))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def quantize_leaf(kind: Kind, path: tuple[Any, ...], array: Any) -> Any:
    """Returns a parameter, quantised if it is a kernel; ``path`` is its place in the tree, as JAX names it.

    Raises:
      ValueError: int4, and the kernel's inputs do not divide into groups.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    axis = _input_axis(names)
    if axis is None:
        return array
    kind = "int8" if axis == -1 and kind == "int4" else kind
    if kind == "int4" and array.shape[axis] % GROUP:
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path)} has {array.shape[axis]} inputs, and int4 has groups of {GROUP}; "
            "give int8, which fits all widths"
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(_quantize, kind=kind, axis=axis), array)
    return _quantize(array, kind=kind, axis=axis)


def _input_axis(names: list[str]) -> int | None:
    """Returns a kernel's input axis, from the end; None for parameters that stay as they are.

    Small kernels whose outputs decide much stay: the router's, a shared expert's gate, and those that make the decays
    and rates of recurrent layers.
    """
    parent, name = names[-2:] if len(names) > 1 else ("", "")
    small = parent in ("gate", "shared_expert_gate", "step_proj", "rate_proj")
    if (name == "kernel" and not small) or (parent == "experts" and not name.endswith("_bias")):
        return -2
    return -1 if (parent, name) == ("embed_tokens", "weight") else None


@functools.partial(jax.jit, static_argnames=("kind", "axis"))
def _quantize(kernel: Array, kind: Kind, axis: int) -> Quantized:
    dtype, entries = kernel.dtype, kernel.astype(jnp.float32)
    if kind == "int4":
        at = entries.ndim + axis
        entries = entries.reshape(*entries.shape[:at], -1, GROUP, *entries.shape[at + 1 :])
    # Where all entries are zero, any scale will do that keeps the quotient finite.
    scales = jnp.maximum(jnp.max(jnp.abs(entries), axis=axis) / _LARGEST[kind], jnp.finfo(jnp.float32).tiny)
    values = entries / jnp.broadcast_to(jnp.expand_dims(scales, axis), entries.shape)
    values = values if kind == "fp8" else jnp.round(values)
    return Quantized(values.astype(_DTYPES[kind]), scales, axis, dtype)


def check_kind(kind: Any) -> None:
    """Raises ValueError unless a kernel can be quantised in this way on the default device."""
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; give {', '.join(KINDS)}, or None for the weights as they are")
    if kind != "fp8":
        return
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # of CUDA devices, such as "9.0"
    if re.fullmatch(r"\d+\.\d+", capability) and float(capability) < 8.9:
        raise ValueError(
            f"quantize is 'fp8', and {device.device_kind} has compute capability {capability}; float8_e4m3fn needs 8.9 "
            "or higher: give int8"
        )
