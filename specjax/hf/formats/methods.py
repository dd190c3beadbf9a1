"""Which format a ``quantization_config`` names, and what to do with the formats that are not read."""

from collections.abc import Iterable, Mapping
from typing import Any

from specjax.checks import check_integer
from specjax.hf.formats.compressed import read_compressed
from specjax.hf.formats.decode import Format
from specjax.hf.formats.float8 import Float8
from specjax.hf.formats.integers import AWQ, GPTQ
from specjax.hf.formats.mxfp4 import MXFP4
from specjax.hf.keys import Keys

_WHERE = "quantization_config"

# What to do with a folder whose format is not read.
_DEQUANTISE = "load it with transformers, call model.dequantize() and then model.save_pretrained(folder)"
_ORIGINAL = 'open the folder of floats that it was made from; quantize="int8" or "int4" makes that small, too'
_CURES = {
    "bitsandbytes": _DEQUANTISE,
    "higgs": _DEQUANTISE,
    "auto-round": 'export it with format="auto_gptq" or "llm_compressor", or ' + _ORIGINAL,
    "gguf": _ORIGINAL,
    **dict.fromkeys(
        (
            *("aqlm", "bitnet", "eetq", "fouroversix", "fp_quant", "gemma", "hqq", "metal", "modelopt", "mxfp8"),
            *("nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"),
        ),
        _ORIGINAL,
    ),
}


def read_format(raw: Mapping[str, Any]) -> Format | None:
    """Returns how the quantised weights of a folder are stored, or None if its config does not say so.

    Args:
      raw: the content of ``config.json``.

    Raises:
      ValueError: the format is not read, or a key is unknown or asks for something that is not computed.
    """
    # Every key may change how the weights are read, so unknown keys are refused (``finish``).
    quantization = raw.get(_WHERE)
    if quantization is None or quantization == {}:
        return None
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{_WHERE} is {quantization!r}; it must be an object with a quant_method")
    keys = Keys(quantization, _WHERE)
    method = keys.take("quant_method", quantization)
    if keys.peek("load_in_4bit") or keys.peek("load_in_8bit"):  # as older versions of transformers wrote it
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(f"{_WHERE} has quant_method {method!r}, which is not read; {_instead(method)}")
    return _READERS[method](keys)


def _instead(method: Any) -> str:
    """Returns the end of a message that refuses a method."""
    cure = _CURES.get(method, _ORIGINAL) if isinstance(method, str) else _ORIGINAL
    return f"supported: {', '.join(map(repr, sorted(_READERS)))}. Instead, {cure}"


# Ends of names of tensors that only one method writes.
_MARKS = {
    **dict.fromkeys((".SCB", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"), "bitsandbytes"),
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".qweight": "gptq",
    ".weight_packed": "compressed-tensors",
}


def check_named(names: Iterable[str]) -> None:
    """Raises ValueError if tensors without a ``quantization_config`` are quantised, by their names."""
    for name in names:
        method = next((method for mark, method in _MARKS.items() if name.endswith(mark)), None)
        if method in _READERS:
            raise ValueError(
                f"tensor {name!r} is quantised, and config.json has no {_WHERE} to say how; download config.json "
                f"again, or give it one with quant_method {method!r} and the keys of quantize_config.json"
            )
        if method is not None:
            raise ValueError(f"tensor {name!r} is quantised by {method}, which is not read; {_instead(method)}")


def _gptq(keys: Keys) -> GPTQ:
    # 1. The layout. GPTQModel writes its name under two keys.
    layout = keys.take("format", None) or keys.take("checkpoint_format", None) or "gptq"
    keys.only("checkpoint_format", layout, None)
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"{_WHERE} has the format {layout!r}; supported: 'gptq' and 'gptq_v2'. Instead, {_ORIGINAL}")
    keys.only("method", "gptq")
    keys.only("pack_dtype", "int32")
    keys.only("is_marlin_format", False, None)
    keys.only("awq_gemm_checkpoint", False, None)
    # 2. Numbers. With rules for single modules, each weight's shapes say what holds for it.
    bits = keys.take("bits")
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise ValueError(f"bits is {bits!r} in {_WHERE}; supported for 'gptq': 2, 3, 4 and 8")
    size = _group_size(keys)
    ordered = not keys.flag("desc_act", False)
    mixed = bool(keys.take("dynamic", None))
    # 3. How the numbers were found, and where computing them began.
    keys.ignore("sym", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware")
    keys.ignore("dataset", "tokenizer", "batch_size", "pad_token_id", "model_seqlen", "max_input_length", "mse")
    keys.ignore("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize")
    keys.ignore("backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "cache_block_outputs")
    keys.ignore("model_name_or_path", "model_file_base_name", "meta", "lm_head", "quantizer", "modules_to_not_convert")
    keys.finish()
    offset = 1 if layout == "gptq" else 0
    return GPTQ(None if mixed else bits, size, ordered, offset)


def _awq(keys: Keys) -> AWQ:
    layout = keys.take("version", None) or keys.take("format", None) or "gemm"
    layout = layout.lower() if isinstance(layout, str) else layout
    keys.ignore("format", "checkpoint_format")
    backend = keys.take("backend", None)
    if layout not in ("gemm", "gemv") or backend == "llm-awq":
        raise ValueError(
            f"{_WHERE} has version {layout!r} and backend {backend!r}; supported for 'awq': the versions 'gemm' and "
            f"'gemv' of AutoAWQ. Instead, {_ORIGINAL}"
        )
    keys.only("bits", 4)
    keys.only("w_bit", 4)
    keys.only("zero_point", True)
    size = _group_size(keys, "q_group_size" if "q_group_size" in keys else "group_size")
    keys.only("method", "awq")
    keys.only("pack_dtype", "int32")
    keys.ignore("modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "meta")
    keys.ignore("sym", "desc_act", "lm_head")
    keys.finish()
    return AWQ(size, layout)


def _group_size(keys: Keys, key: str = "group_size") -> int:
    """Takes the number of inputs in a group, or -1 for all inputs."""
    size = keys.take(key, 128)
    if size != -1:
        check_integer(key, size, 1)
    return int(size)


def _fp8(keys: Keys) -> Float8:
    block = keys.take("weight_block_size", None)
    if block is not None and (not isinstance(block, list) or len(block) != 2):
        raise ValueError(f"weight_block_size is {block!r} in {_WHERE}; it must be null or two sizes")
    for size in block or ():
        check_integer("weight_block_size", size, 1)
    keys.only("fmt", "e4m3")
    keys.ignore("activation_scheme", "scale_fmt", "modules_to_not_convert", "modules_to_convert", "ignored_layers")
    keys.ignore("dequantize", "kv_cache_scheme")
    keys.only("expert_dtype", "fp8", None)
    keys.finish()
    return Float8(None if block is None else (block[0], block[1]))


def _fbgemm(keys: Keys) -> Float8:
    keys.ignore("activation_scale_ub", "modules_to_not_convert")
    keys.finish()
    return Float8(None)


def _mxfp4(keys: Keys) -> MXFP4:
    keys.ignore("modules_to_not_convert", "dequantize")
    keys.finish()
    return MXFP4()


_READERS = {
    "awq": _awq,
    "compressed-tensors": read_compressed,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
