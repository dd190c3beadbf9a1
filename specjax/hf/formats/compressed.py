"""compressed-tensors, the format of llm-compressor: integers or float8 with scales, by groups of modules."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from specjax.checks import check_integer
from specjax.hf.computed import Computed, Rows, rows_of
from specjax.hf.formats.parts import (
    FLOAT8,
    FLOATS,
    INT8,
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
from specjax.hf.keys import Keys
from specjax.hf.safetensors import Tensor

Strategy = Literal["tensor", "channel", "group", "block"]
_STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "block")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are quantised: the key ``weights`` of a config group.

    Attributes:
      bits: bits of a number.
      is_float: whether numbers are float8_e4m3fn, not integers.
      strategy: which entries share a scale.
      group_size: inputs of a group, for the strategy "group".
      block: rows and columns of a block, for the strategy "block".
      symmetric: whether there are no zero points.
      reordered: whether ``weight_g_idx`` says which group an input belongs to.
    """

    bits: int
    is_float: bool
    strategy: Strategy
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    reordered: bool

    def shapes(self, out: int, columns: int) -> list[tuple[int, ...]]:
        """Returns the shapes that the scales of a weight [out, columns] may have. The first is a matrix."""
        if self.strategy == "tensor":
            return [(1, 1), (1,), ()]
        if self.strategy == "channel":
            return [(out, 1), (out,)]
        height, width = self.block or (1, self.group_size or 1)
        return [(-(-out // height), -(-columns // width))]

    def grid(self, parts: Parts, out: int, columns: int) -> Grid:
        """Returns which scale belongs to which entry; raises ValueError if a group is none of the weight's."""
        if self.strategy == "group":
            size = self.group_size or 1
            return Grid(1, groups_of(parts, "_g_idx", columns, size, -(-columns // size)))
        if self.block is not None:
            return Grid(self.block[0], np.arange(columns) // self.block[1])
        return Grid(1 if self.strategy == "channel" else max(1, out), np.zeros(columns, np.intp))


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Weights ``X.weight`` [out, in] of the formats that hold numbers with scales in ``X.weight_scale``.

    - pack-quantized: ``X.weight_packed`` int32 [out, in * bits / 32], integers plus 2^(bits - 1), with
      ``X.weight_shape`` [2]. Zero points, if any, are int32 [out * bits / 32, groups], packed in the same way, or int8.
    - int-quantized, float-quantized, naive-quantized: ``X.weight`` itself is int8 or float8_e4m3fn.

    Attributes:
      groups: names of modules and how these are quantised, in the config's order.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]

    def base(self, tensor: Tensor) -> str | None:
        """Returns what names of a weight's tensors have in common, if this is the first of them."""
        if tensor.name.endswith(".weight_packed"):
            return tensor.name.removesuffix("_packed")
        return tensor.name if tensor.dtype in (INT8, FLOAT8) and tensor.name.endswith(".weight") else None

    def why_left_out(self, tensor: Tensor) -> str | None:
        """Returns why a tensor that belongs to no weight is not needed, or None."""
        if tensor.name.endswith(".weight_zero_point") and not tensor.read().astype(np.float32).any():
            return "zero points that are all zero"
        return None

    def weight(self, parts: Parts) -> Computed:
        """Returns the weight [out, in] that some tensors stand for; raises ValueError if they do not fit together."""
        scheme = self._scheme(parts.base.removesuffix(".weight"))
        # 1. The numbers: packed, or as they are.
        if "_packed" in parts:
            out, columns, numbers = _packed(parts, scheme)
        else:
            tensor = parts.take("", (FLOAT8,) if scheme.is_float else (INT8,), (None, None))
            (out, columns), numbers = tensor.shape, lambda: rows_of(tensor)
        # 2. Their scales and zero points, and the order of groups.
        shapes = scheme.shapes(out, columns)
        scales = parts.take("_scale", FLOATS, *shapes)
        zeros = None if scheme.symmetric else _zeros(parts, scheme, shapes)
        if scheme.strategy == "group" and (scheme.reordered or "_g_idx" in parts):
            parts.take("_g_idx", INTEGERS, (columns,))

        def open() -> Rows:
            matrix = to_floats(scales).reshape(shapes[0])
            points = None if zeros is None else _read_zeros(zeros, scheme, shapes[0])
            return scaled(scheme.grid(parts, out, columns), numbers(), matrix, points)

        return Computed(parts.base, stored_dtype(scales), (out, columns), open)

    def _scheme(self, module: str) -> Scheme:
        """Returns how a module is quantised: as the first group says that names it, or else its class."""
        for named in (_names, _names_class, _names_other_class):
            for targets, scheme in self.groups:
                if any(named(target, module) for target in targets):
                    return scheme
        raise ValueError(
            f"{module} is quantised, but is in no group of quantization_config's config_groups; download both again"
        )


def _names(target: str, module: str) -> bool:
    """Returns whether a target is the name of a module, or a pattern of its name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _names_class(target: str, module: str) -> bool:
    """Returns whether a target is the class of a module, which is "Embedding" or else "Linear"."""
    return target == ("Embedding" if _embeds(module) else "Linear")


def _names_other_class(target: str, module: str) -> bool:
    """Returns whether a target is a class of the folder's own code, which a module may have that does not embed."""
    return target.isidentifier() and target[0].isupper() and target != "Embedding" and not _embeds(module)


def _embeds(module: str) -> bool:
    return module.rpartition(".")[2].startswith(("embed_tokens", "wte"))


def _packed(parts: Parts, scheme: Scheme) -> tuple[int, int, Callable[[], Rows]]:
    """Returns the sizes of a packed weight, and a function that maps it."""
    # The shape is stored, since a row may not fill its last word.
    sizes = parts.take("_shape", INTEGERS, (2,)).read()
    out, columns = (int(size) for size in sizes)
    if min(out, columns) < 0:
        raise ValueError(f"tensor {parts.base + '_shape'!r} is [{out}, {columns}], and must hold two sizes")
    packed = parts.take("_packed", (INT32,), (out, words_of(columns, scheme.bits)))
    middle = np.float32(2 ** (scheme.bits - 1))

    def open() -> Rows:
        words = packed.read()
        return lambda start, stop: unpack(words[start:stop], scheme.bits, columns).astype(np.float32) - middle

    return out, columns, open


def _zeros(parts: Parts, scheme: Scheme, shapes: list[tuple[int, ...]]) -> Tensor:
    """Returns the tensor of the zero points: packed along the outputs, or one in each entry."""
    dtypes = (FLOAT8,) if scheme.is_float else (INT8,)
    tensor = parts.take("_zero_point", (*dtypes, INT32))
    if tensor.dtype == INT32 and "_packed" in parts:
        return parts.take("_zero_point", (INT32,), (words_of(shapes[0][0], scheme.bits), shapes[0][1]))
    return parts.take("_zero_point", dtypes, *shapes)


def _read_zeros(tensor: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    """Reads zero points as float32, in the shape of the scales."""
    if tensor.dtype != INT32:
        return tensor.read().astype(np.float32).reshape(shape)
    fields = unpack(tensor.read().T, scheme.bits, shape[0]).T
    return fields.astype(np.float32) - np.float32(2 ** (scheme.bits - 1))


# The config.

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
_CURE = "; decompress the model with llm-compressor or transformers, or open the folder of floats it was made from"


def read_compressed(keys: Keys) -> CompressedTensors:
    """Reads the keys of a ``quantization_config`` whose method is compressed-tensors.

    Raises:
      ValueError: the format is another, or a key is unknown or asks for something that is not computed.
    """
    # 1. What applies to all groups. Weights that were transformed need products of the states at run time.
    whole = _take_format(keys, "format")
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        value = keys.take(key, None)
        if isinstance(value, Mapping) and value.get("format") == "dense":  # no sparsity, in words
            value = None
        if value:
            raise ValueError(f"quantization_config has a {key}, {value!r}, which is not computed{_CURE}")
    status = keys.take("quantization_status", "compressed")
    if status != "compressed":
        raise ValueError(
            f"quantization_status is {status!r} in quantization_config, and only 'compressed' weights are read; save "
            "the model with save_compressed=True"
        )
    keys.ignore("ignore", "kv_cache_scheme", "global_compression_ratio", "version", "run_compressed", "dequantize")
    keys.ignore("use_optimized_inference")
    # 2. The groups.
    groups = keys.take("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"config_groups is {groups!r} in quantization_config; it must be an object of groups")
    keys.finish()
    return CompressedTensors(tuple(_read_group(name, group, whole) for name, group in groups.items()))


def _take_format(keys: Keys, key: str) -> str:
    """Takes the name of a format; raises ValueError if it is none that is read."""
    name = keys.take(key, None)
    if name is not None and name not in _FORMATS:
        raise ValueError(f"{key} is {name!r} in quantization_config; supported: {', '.join(_FORMATS)}{_CURE}")
    return name or ""


def _read_group(name: str, raw: Any, whole: str) -> tuple[tuple[str, ...], Scheme]:
    """Reads one of the ``config_groups``."""
    where = f"config_groups.{name}"
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} is {raw!r} in quantization_config; it must be an object with targets and weights")
    group = Keys(raw, f"quantization_config.{where}")
    targets = group.take("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{where} has targets {targets!r} in quantization_config; they must be a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{where} has the target {target!r}, which is no pattern ({error})") from None
    _take_format(group, "format")
    # Only weights are quantised here: states stay in floating point.
    group.ignore("input_activations", "output_activations")
    weights = group.take("weights")
    group.finish()
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where} has weights {weights!r} in quantization_config; they must be an object")
    return tuple(targets), _read_scheme(Keys(weights, f"quantization_config.{where}.weights"))


def _read_scheme(keys: Keys) -> Scheme:
    """Reads how the weights of a group are quantised."""
    # 1. Numbers. Other widths of packed integers have had two layouts.
    bits, kind = keys.integer("num_bits", 8), keys.take("type", "int")
    if kind not in ("int", "float") or bits not in ((2, 4, 8) if kind == "int" else (8,)):
        raise ValueError(
            f"weights of type {kind!r} with num_bits {bits} in quantization_config; supported: integers of 2, 4 or 8 "
            f"bits and floats of 8{_CURE}"
        )
    # 2. Which entries share a scale. Without a strategy, the group size says so.
    size = keys.take("group_size", None)
    strategy = keys.take("strategy", None) or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy is {strategy!r} in quantization_config; supported: {', '.join(_STRATEGIES)}{_CURE}")
    if strategy == "group":
        check_integer("group_size", size, 1)
    block = _take_block(keys) if strategy == "block" else None
    keys.ignore("block_structure")
    order = keys.take("actorder", None)
    # 3. The rest says how the numbers were found.
    keys.only("dynamic", False, None)
    symmetric = keys.flag("symmetric", True)
    keys.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    keys.finish()
    reordered = order in ("group", "dynamic") or order is True
    return Scheme(bits, kind == "float", strategy, size if strategy == "group" else None, block, symmetric, reordered)


def _take_block(keys: Keys) -> tuple[int, int]:
    """Takes the sizes of a block, such as [128, 128] or "128x128"."""
    block = keys.take("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        block = [int(size) for size in block.split("x")]
    if not isinstance(block, list) or len(block) != 2:
        raise ValueError(f"block_structure is {block!r} in quantization_config; it must be two sizes")
    for size in block:
        check_integer("block_structure", size, 1)
    return block[0], block[1]
