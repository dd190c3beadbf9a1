"""LoRA adapters in peft's folders, merged into the tensors of their base model as these are read.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``. For a module of the base model with the weight
W [out, in], the adapter holds A [r, in] and B [out, r], and the merged weight is W + s B A (Hu et al. 2021, "LoRA"),
where s is alpha / r, or alpha / sqrt(r) with ``use_rslora``. With a magnitude m [out] it is the rows of W + s B A,
each with the length m (Liu et al. 2024, "DoRA").
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specjax.checks import check_integer, check_positive, errors_name
from specjax.hf.computed import Computed, Readable, Rows, rows_of
from specjax.hf.formats.parts import FLOATS
from specjax.hf.keys import Keys, read_json, warn_unknown
from specjax.hf.multimodal import other_part
from specjax.hf.safetensors import Tensor, open_file

_LOG = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it into its base model with peft, and save that"

# Keys that change what is merged, each with the values that change nothing.
_OFF = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
}
# Keys that say how the adapter was made, or what its tensors say themselves.
_IGNORED = (
    *("auto_mapping", "bias", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type", "velora_config"),
)
# With these, peft trains the adapter of a base model whose weights it has changed.
_NEW_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<end>\.weight|\.bias)?"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened.

    Attributes:
      path: the folder.
      tensors: the adapter's tensors, by the names of peft without "base_model.model.".
      scale: returns the factor of a module's B A, and the rank that the config gives the module.
      use_dora: whether modules have magnitudes.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    scale: Callable[[str], tuple[float, int]]
    use_dora: bool


def base_model(folder: Path) -> str | None:
    """Returns the name of an adapter's base model, or "" if its config has none; None if the folder is no adapter's."""
    if not (folder / CONFIG).is_file():
        return None
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def open_adapter(folder: Path) -> Adapter:
    """Opens an adapter's folder.

    Raises:
      ValueError: a file is missing or damaged, or the adapter is of a kind that is not merged here.
    """
    # 1. Pickles are not opened, and other kinds of adapters have other tensors.
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of an adapter, as peft writes it")
    raw = read_json(folder / CONFIG)
    with errors_name(folder / CONFIG):
        scale, use_dora = _read_config(raw)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder / WEIGHTS} does not exist; load the adapter with peft and save it again with save_pretrained, "
            "which writes this file (pickles are never opened)"
        )
    # 2. Names.
    tensors = {}
    for tensor in open_file(folder / WEIGHTS):
        name = tensor.name.removeprefix("base_model.model.")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, and must be floats; save it again"
            )
        tensors[name] = tensor
    return Adapter(folder, tensors, scale, use_dora)


def _read_config(raw: Mapping[str, Any]) -> tuple[Callable[[str], tuple[float, int]], bool]:
    """Reads ``adapter_config.json``; returns ``Adapter.scale`` and ``Adapter.use_dora``."""
    # 1. The kind. A key that is unknown may switch on a variant, unless its value is off or text.
    keys = Keys(raw, CONFIG)
    kind = keys.take("peft_type", None)
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}, and only 'LORA' adapters are merged here; {_MERGE}")
    use_dora, rs = keys.flag("use_dora", False), keys.flag("use_rslora", False)
    start = keys.take("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_NEW_BASE):
        raise ValueError(
            f"init_lora_weights is {start!r}, so the adapter belongs to a base model with other weights; save it with "
            "path_initial_model_for_weight_conversion, or " + _MERGE
        )
    sizes = keys.integer("r", 8), keys.number("lora_alpha", 8)
    ranks, alphas = (_take_pattern(keys, name) for name in ("rank_pattern", "alpha_pattern"))
    keys.ignore("base_model_name_or_path", *_IGNORED)
    for key in keys.unknown({}):
        if raw[key] not in _OFF.get(key, (None, False)) and (key in _OFF or not isinstance(raw[key], str)):
            raise ValueError(f"{key} is {raw[key]!r}, which is not merged here; {_MERGE}")
    warn_unknown("adapter_config.json", (key for key in keys.unknown({}) if isinstance(raw[key], str)))

    # 2. Modules may have a rank and an alpha of their own: those of the first pattern that fits.
    def scale(module: str) -> tuple[float, int]:
        rank = next((value for pattern, value in ranks.items() if pattern.match(module)), sizes[0])
        alpha = next((value for pattern, value in alphas.items() if pattern.match(module)), sizes[1])
        return alpha / (math.sqrt(rank) if rs else rank), rank

    return scale, use_dora


def _take_pattern(keys: Keys, key: str) -> dict[re.Pattern, Any]:
    """Takes an object of numbers by patterns of modules' names."""
    value = keys.take(key, None)
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{key} is {value!r}; it must be an object of numbers by names of modules")
    found = {}
    for pattern, number in (value or {}).items():
        if key == "rank_pattern":
            check_integer(f"{key}.{pattern}", number, 1)
        else:
            check_positive(f"{key}.{pattern}", number)
        try:
            found[re.compile(rf"(.*\.)?({pattern})$")] = number
        except re.error as error:
            raise ValueError(f"{key} has {pattern!r}, which is no pattern ({error})") from None
    return found


def merge(
    adapter: Adapter,
    tensors: Mapping[str, Readable],
    table_names: Callable[[Iterable[str]], Mapping[str, str]],
    transposed: Collection[str],
) -> dict[str, Readable]:
    """Returns a model's tensors with an adapter merged into them.

    Changes of a multimodal model's other parts are left out, with a warning.

    Args:
      adapter: the adapter.
      tensors: the tensors of the base model, by their names in the family's table.
      table_names: returns the name that each tensor has in the table.
      transposed: names of weights that are stored as [in, out].

    Raises:
      ValueError: the adapter has a tensor without its partner, of another shape, of an unknown kind, or for a module
        that the model does not have.
    """
    # 1. The adapter's tensors by module; whole tensors, which were trained themselves, by name.
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        if match := _PART.fullmatch(name):
            end = ".bias" if match["end"] == ".bias" else ""
            modules.setdefault(match["module"], {})[match["part"] + end] = tensor
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    weights = {module: f"{module}.weight" for module in modules}
    known = table_names([*weights.values(), *whole])
    # 2. Of a multimodal model, only the text part is opened.
    left_out = {name: reason for name in known if (reason := other_part(known[name]))}
    for reason in sorted(set(left_out.values())):
        _LOG.warning("%s changes %s; the change is left out", adapter.path / WEIGHTS, reason)
    # 3. Trained tensors take the place of the model's; modules are merged after that.
    merged = dict(tensors)
    with errors_name(adapter.path / WEIGHTS):
        for name, tensor in whole.items():
            if name not in left_out:
                merged[known[name]] = _trained(known[name], tensor, merged)
        for module, parts in modules.items():
            name = known[weights[module]]
            if weights[module] in left_out:
                continue
            merged |= _merged(module, name, parts, merged, adapter, name in transposed)
    return merged


def _of_model(name: str, tensors: Mapping[str, Readable]) -> Readable:
    """Returns a tensor of the model; raises ValueError if there is none."""
    if name not in tensors:
        raise ValueError(
            f"the adapter changes {name!r}, which the model does not have; give the base model that it was trained "
            "for, or " + _MERGE
        )
    return tensors[name]


def _trained(name: str, tensor: Tensor, tensors: Mapping[str, Readable]) -> Tensor:
    """Returns a tensor that the adapter holds whole, if it can take the place of the model's."""
    shape = _of_model(name, tensors).shape
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {tensor.name!r} is {tensor.shape}, and the model's is {shape}: the adapter is of another model, "
            f"or of one whose vocabulary was changed; {_MERGE}"
        )
    return tensor


def _merged(
    module: str,
    name: str,
    parts: Mapping[str, Tensor],
    tensors: Mapping[str, Readable],
    adapter: Adapter,
    transposed: bool,
) -> dict[str, Readable]:
    """Returns the weight of a module with the adapter's parts merged into it, and its bias if that changes, too.

    Args:
      module: the module's name, as in the adapter.
      name: the name of its weight, in the family's table.
      parts: the adapter's tensors, such as "lora_A".
      tensors: the model's.
      adapter: the adapter.
      transposed: whether the weight is stored as [in, out].
    """
    # 1. What there is, and of which shapes. The embedding's parts have names of their own, and its weight is [in, out].
    weight, (scale, rank) = _of_model(name, tensors), adapter.scale(module)
    kind = "lora_embedding_" if "lora_embedding_A" in parts else "lora_"
    transposed = transposed or kind == "lora_embedding_"
    if len(weight.shape) != 2:
        raise ValueError(f"{module} has a weight of shape {weight.shape}, and only matrices are merged here; {_MERGE}")
    out, columns = weight.shape[::-1] if transposed else weight.shape
    wanted: dict[str, tuple[int, ...]] = {f"{kind}A": (rank, columns), f"{kind}B": (out, rank)}
    if adapter.use_dora:
        wanted["lora_magnitude_vector"] = (out,)
        if transposed:
            raise ValueError(f"use_dora is true, and {module} stores its weight as [in, out]; {_MERGE}")
    if "lora_B.bias" in parts:
        wanted["lora_B.bias"] = (out,)
    for part in sorted(wanted.keys() | parts.keys()):
        given, shape = parts[part].shape if part in parts else "missing", wanted.get(part, "none")
        if given != shape:
            raise ValueError(
                f"{part} of {module} is {given}, and must be {shape}: the adapter is damaged, or of another model or "
                "rank; download it again"
            )
    # 2. The weight, by rows.
    down, up, length = parts[f"{kind}A"], parts[f"{kind}B"], parts.get("lora_magnitude_vector")
    rows = functools.partial(_open_merged, weight, down, up, length, np.float32(scale), transposed)
    merged: dict[str, Readable] = {name: Computed(name, weight.dtype, weight.shape, rows)}
    # 3. The bias.
    if (extra := parts.get("lora_B.bias")) is not None:
        at = name.removesuffix("weight") + "bias"
        bias = _of_model(at, tensors)
        merged[at] = Computed(at, bias.dtype, bias.shape, functools.partial(_open_bias, bias, extra, np.float32(scale)))
    return merged


def _open_merged(
    weight: Readable, down: Tensor, up: Tensor, length: Tensor | None, scale: np.float32, transposed: bool
) -> Rows:
    """Maps a weight and the adapter's parts, and returns the function that computes merged rows."""
    base = rows_of(weight)
    a, b = (tensor.read().astype(np.float32) for tensor in (down, up))
    lengths = None if length is None else length.read().astype(np.float32)

    def compute(start: int, stop: int) -> np.ndarray:
        change = (b @ a[:, start:stop]).T if transposed else b[start:stop] @ a
        rows = base(start, stop) + scale * change
        if lengths is not None:
            rows *= (lengths[start:stop] / np.linalg.norm(rows, axis=1))[:, None]
        return rows

    return compute


def _open_bias(bias: Readable, extra: Tensor, scale: np.float32) -> Rows:
    """Maps a bias and what an adapter adds to it, and returns the function that computes entries."""
    base, more = rows_of(bias), extra.read().astype(np.float32)
    return lambda start, stop: base(start, stop) + scale * more[start:stop]
