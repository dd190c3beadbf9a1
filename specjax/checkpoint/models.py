"""Checkpoint folders, which hold ``config.json``, ``tokenizer.json``, ``params/`` (Orbax) and ``metrics.json``.

``load`` opens Hugging Face folders and GGUF files too.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer

from specjax.checkpoint.fetched import model_path
from specjax.checkpoint.finite import check_finite
from specjax.checkpoint.new_folder import end_of_links, new_folder, write_json
from specjax.checks import errors_name
from specjax.hf.config import decoder_config, read_config
from specjax.hf.gguf import is_gguf
from specjax.hf.names import ParameterPath, parameters
from specjax.hf.safetensors import holds_weights
from specjax.hf.weights import Parameter, open_weights
from specjax.quantized import Kind, check_kind, is_quantized, quantize_leaf, quantize_params
from specjax.sharding import RULES, Rules, shard, shardings
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params, decoder_model
from specjax.types import LanguageModel

_LEAST_BUFFER = 64 * 10**6  # bytes that Orbax may read or write at a time
_LEAST_CHUNK = 4 * 2**20  # bytes
_OF_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA")  # files in each ``params/``
_SMALL = (".json", ".jinja", ".md", ".png")  # no file of weights
_CHUNKS = 64  # about how many chunks an array of more than _LEAST_CHUNK * _CHUNKS bytes has


def default_dtype() -> jnp.dtype:
    """Returns the dtype to compute in: bfloat16, but float32 on a CPU, since most CPUs multiply float32 faster."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def save(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    params: Any,
    tokenizer: Tokenizer | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder. A folder that is there is replaced when the new one is complete.

    In a job of several processes, all processes call this function, with one folder that all see. Each writes the
    parameters that it holds. To write an ``Opened`` model:
    ``save(path, opened.config, opened.model.params, opened.tokenizer)``.

    Args:
      path: the folder.
      config: the content of ``config.json``, in Hugging Face's keys.
      params: nested dicts of arrays, as ``specjax.transformer.init_params`` returns them.
      tokenizer: the tokenizer; None writes none.
      metrics: the content of ``metrics.json``; None writes no such file.

    Raises:
      ValueError: the config is not of a supported model, or the parameters are other than the config describes.
    """
    check_not_quantized(params)
    check_params(params, abstract_params(decoder_config(config)))
    with _folder_of_all(path) as folder:
        if jax.process_index() == 0:
            write_json(folder / "config.json", config)
            if metrics is not None:
                write_json(folder / "metrics.json", metrics)
            if tokenizer is not None:
                (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
                if tokenizer.encode_special_tokens:  # tokenizer.json has no place for it
                    write_json(folder / "tokenizer_config.json", {"split_special_tokens": True})
        save_params(folder, params)


@contextlib.contextmanager
def _folder_of_all(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the first process's ``new_folder`` to all processes. The folder is in its place when they leave."""
    # The first process alone makes and renames the folder. Its name has the process id, so the others must be told.
    with new_folder(path) if jax.process_index() == 0 else contextlib.nullcontext() as folder:
        name = np.frombuffer((b"" if folder is None else folder.name.encode()).ljust(256, b"\0"), np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(name)).tobytes().rstrip(b"\0").decode()
        yield end_of_links(path).with_name(told)
    multihost_utils.sync_global_devices("specjax.checkpoint.save")


def save_params(folder: Path, params: Any) -> None:
    """Writes ``params/``. In a job of several processes all must call this function; each writes its parts.

    Arrays in the memory of a CPU are written without a copy, with buffers no larger than the largest array. Large
    arrays are cut into chunks along all dimensions: a reader of a slice holds every chunk that the slice touches.
    """
    buffer = max(_LEAST_BUFFER, *(leaf.nbytes + 1 for leaf in jax.tree.leaves(params)))
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=buffer / 1e9)  # type: ignore  (any number will do)
    chunks = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=max(_LEAST_CHUNK, x.nbytes // _CHUNKS)), params)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "params", args=ocp.args.StandardSave(params, save_args=chunks))
    if jax.process_index() == 0:  # Orbax wrote the folder's absolute path there
        (folder / "params" / "commit_success.txt").unlink(missing_ok=True)


def load(
    path: str | os.PathLike,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    ignore_config_keys: Iterable[str] = (),
    quantize: Kind | None = None,
    adapter: str | os.PathLike | None = None,
) -> LanguageModel:
    """Opens the model of a checkpoint folder, of a Hugging Face folder with safetensors, or of a GGUF file.

    Parameters go to their devices one by one. Safetensors and GGUF files are mapped into memory and never read whole.

    Args:
      path: the folder, the file, or a name that ``specjax fetch`` knows, such as "smollm2".
      dtype: dtype of parameters and computation; None means ``default_dtype()``.
      mesh: the mesh to split the parameters over, as ``specjax.shard`` does. Each process holds only its own parts.
        None is the default device.
      rules: as for ``specjax.shard``.
      ignore_config_keys: keys of ``config.json`` to leave out, such as ("auto_map",). Use it to open a model that was
        refused because of such a key. A dot names a key inside an object: "rope_scaling.factor". Keys that are not
        there are no error.
      quantize: "int8", "int4" or "fp8", as for ``specjax.quantize``; None keeps the weights as they are. Of safetensors
        files, each parameter is quantised before the next is read.
      adapter: the folder of a LoRA adapter, as peft writes it, to merge into the weights of a Hugging Face folder or
        GGUF file as they are read.

    Raises:
      ValueError: the folder or a file of it is missing, truncated, of an unsupported model, or does not fit its
        ``config.json``; a weight is not finite in ``dtype``; the mesh or the rules do not fit the model; or as for
        ``specjax.quantize``.
      TypeError: as for ``specjax.shard``.
    """
    return load_with_config(model_path(path).absolute(), dtype, mesh, rules, ignore_config_keys, quantize, adapter)[0]


def load_with_config(
    path: Path,
    dtype: jnp.dtype | str | None,
    mesh: Mesh | None,
    rules: Rules,
    ignore_config_keys: Iterable[str],
    quantize: Kind | None = None,
    adapter: str | os.PathLike | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """Returns the model as ``load`` does, and the keys of ``config.json`` that describe the model."""
    dtype = check_dtype(default_dtype() if dtype is None else dtype)
    if quantize is not None:
        check_kind(quantize)
    file = is_gguf(path)
    if not file and not path.is_dir():
        raise ValueError(
            f"{path} is not a folder or GGUF file; give a folder with config.json and params/, or with "
            "safetensors files"
        )
    if not file and is_checkpoint(path):
        if adapter is not None:
            raise ValueError(
                f"adapter is {str(adapter)!r}, and {path} holds its weights in params/; give the Hugging Face folder "
                "that they were converted from, or convert that again with the adapter"
            )
        config, raw = read_config(path / "config.json", ignore_config_keys)
        params = load_params(path, _decoder_with_places(config, dtype, mesh, rules))
        with errors_name(path):
            jax.tree_util.tree_map_with_path(check_finite, params)
        params = params if quantize is None else quantize_params(params, quantize)
        return _placed(decoder_model(config, params), mesh, rules), raw
    weights = open_weights(path, ignore_config_keys, None if adapter is None else Path(adapter).absolute())
    with errors_name(path):
        places = _decoder_with_places(weights.config, dtype, mesh, rules)
        params = read_params(weights.params, places, quantize=quantize)
    return _placed(decoder_model(weights.config, params), mesh, rules), weights.raw


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder's weights are in ``params/``, and not in safetensors files. The weights alone decide.

    Raises:
      ValueError: the folder holds both; or neither, though ``metrics.json`` says that it was a checkpoint.
    """
    ours, theirs = (path / "params").is_dir(), holds_weights(path)
    if ours and theirs and any((path / "params" / name).is_file() for name in _OF_ORBAX):
        raise ValueError(f"{path} holds two models, in params/ and in safetensors files; move one of them away")
    small = all(file.suffix in _SMALL for file in path.iterdir())
    if not ours and not theirs and small and (path / "metrics.json").is_file():
        raise ValueError(f"{path / 'params'} does not exist; the checkpoint is incomplete, copy or convert it again")
    return ours and not theirs


def _placed(model: LanguageModel, mesh: Mesh | None, rules: Rules) -> LanguageModel:
    """Returns the model with quantised parameters on the mesh. The others are read onto it."""
    return shard(model, mesh, rules) if mesh is not None and is_quantized(model.params) else model


def _decoder_with_places(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh | None, rules: Rules) -> Any:
    """Returns the parameters' shapes and dtypes, with shardings if there is a mesh."""
    return with_places(decoder_model(config, abstract_params(config, dtype)), mesh, rules)


def with_places(model: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """Returns the parameters' shapes and dtypes, with shardings if there is a mesh.

    Args:
      model: a model or drafter with a field ``params``; its leaves need only shape and dtype.
      mesh, rules: as for ``load``, errors included.
    """
    if mesh is None:
        return model.params
    places = shardings(model, mesh, rules).params
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.params, places)


def check_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """Returns the dtype of that name; raises ValueError unless it is float32, bfloat16 or float16."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16") from None
    if known not in map(jnp.dtype, ("float32", "bfloat16", "float16")):
        raise ValueError(f"dtype is {known}; give float32, bfloat16 or float16")
    return known


def check_not_quantized(params: Any) -> None:
    """Raises ValueError if parameters are quantised: no folder keeps them so."""
    if is_quantized(params):
        raise ValueError(
            "the parameters are quantised, and checkpoints hold weights as they were trained; save those, and give "
            "quantize= when you open the folder"
        )


def check_params(params: Any, wanted: Any) -> None:
    """Raises ValueError unless the parameters have the paths and shapes of ``wanted``, in whatever dtypes."""
    given, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, wanted)
    )
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise ValueError(
                f"parameter {name} is {given.get(name, 'missing')}, and config.json asks for "
                f"{wanted.get(name, 'none')}; give the parameters of that config"
            )


def load_params(path: Path, abstract: Any) -> Any:
    """Reads ``params/`` in the dtypes of ``abstract``, onto its shardings or the default device.

    Few arrays are read at a time: Orbax holds an array twice until the array is on its device.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), abstract)
    with _name_damage(path):
        buffer = max(_LEAST_BUFFER, _largest_read(path, expected) + 1)
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=buffer / 1e9)  # type: ignore  (as for saving)
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path / "params", args=ocp.args.StandardRestore(expected))


def stored_params(path: Path, wanted: Any) -> Any:
    """Returns shapes and dtypes of the parameters in ``params/``, in nested dicts with the structure of ``wanted``."""
    with _name_damage(path):
        stored = _metadata(path)
        found = {names: stored[tuple(map(str, names))] for names in parameters(wanted)}
        return unflatten_dict({names: jax.ShapeDtypeStruct(x.shape, x.dtype) for names, x in found.items()})


@contextlib.contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Turns every error that Orbax and TensorStore raise for missing or truncated files into a ValueError."""
    try:
        yield
    except Exception as error:  # they raise many types, and for one fault now this one, now that one
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path / 'params'} cannot be read as the parameters that config.json describes ({reason}); "
            "it is truncated, damaged or of another model: copy or convert it again"
        ) from error


def _metadata(path: Path) -> dict[tuple[str, ...], Any]:
    """Returns Orbax's metadata of each array in ``params/``, by its path. In these paths, numbers are strings."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "params").item_metadata
    if metadata is None:
        raise ValueError("there is no _METADATA")
    return {tuple(map(str, names)): array for names, array in parameters(dict(metadata.tree)).items()}


def _largest_read(path: Path, expected: Any) -> int:
    """Returns the most bytes that reading one device's part of one array may take, over all arrays.

    A part that begins within a chunk touches up to two chunks more than its own length fills. Example: chunks of 10
    entries, a part of 25: at most 25 + 2 * 10 = 45 entries are read.
    """
    stored = _metadata(path)

    def touched(names: ParameterPath, like: jax.ShapeDtypeStruct) -> int:
        array = stored[tuple(map(str, names))]
        part, chunk = like.sharding.shard_shape(like.shape), array.storage.chunk_shape
        wholes = (min(-(-n // of) * of, wide + 2 * of) for n, wide, of in zip(array.shape, part, chunk, strict=True))
        return math.prod(wholes) * max(array.dtype.itemsize, like.dtype.itemsize)  # Orbax may count either dtype's

    return max(touched(*parameter) for parameter in parameters(expected).items())


def read_params(
    params: Any, abstract: Any, on_read: Callable[[int], None] = lambda size: None, quantize: Kind | None = None
) -> Any:
    """Reads the ``Parameter`` leaves of a tree one by one, in the dtypes of ``abstract``, onto its shardings or the
    default device.

    ``on_read(size)`` is called after each, with its bytes. ``quantize``: each is quantised so after it was read.

    Raises:
      ValueError: as for ``Parameter.read``, or a number is not finite.
    """

    def read(path: tuple[Any, ...], parameter: Parameter, like: jax.ShapeDtypeStruct) -> Any:
        def part(index: Any = ()) -> np.ndarray:
            array = parameter.read(like.dtype, index)
            check_finite(path, array)
            return array

        if like.sharding is None:
            array = jax.device_put(part())
        else:
            array = jax.make_array_from_callback(parameter.shape, like.sharding, part)
        jax.block_until_ready(array)  # or the host would read all parameters before the first is on its device
        on_read(array.nbytes)
        return array if quantize is None else jax.block_until_ready(quantize_leaf(quantize, path, array))

    return jax.tree_util.tree_map_with_path(read, params, abstract, is_leaf=lambda x: isinstance(x, Parameter))
