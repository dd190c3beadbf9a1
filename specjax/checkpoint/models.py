"""Self-contained checkpoint folders: ``config.json``, ``tokenizer.json``, ``params/`` (Orbax), ``metrics.json``."""

import contextlib
import functools
import json
import math
import os
import shutil
import time
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

from specjax.checks import check_integer
from specjax.hf.config import decoder_config, read_config
from specjax.hf.keys import read_json
from specjax.hf.names import ParameterPath, parameters
from specjax.hf.weights import Parameter, open_weights
from specjax.sharding import RULES, Rules, shardings
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import abstract_params, decoder_model
from specjax.types import LanguageModel

_LEAST_BUFFER = 64 * 10**6
_LEAST_CHUNK, _CHUNKS = 4 * 2**20, 64  # bytes, and about how many an array of more has


def default_dtype() -> jnp.dtype:
    """Returns the dtype to compute in: bfloat16, but float32 on a CPU, where bfloat16 is 13 times slower."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def save(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    params: Any,
    tokenizer: Tokenizer | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder, replacing one that is there only once the new one is whole.

    Several processes all call it, with a folder that all see, and each writes the parameters that it holds. What
    ``specjax.open`` opened is written by ``save(path, opened.config, opened.model.params, opened.tokenizer)``.

    Args:
      path: the folder.
      config: what ``config.json`` is to hold, Hugging Face's keys.
      params: nested dict of arrays, as ``specjax.transformer.init_params`` returns.
      tokenizer: the tokenizer; None writes none.
      metrics: what ``metrics.json`` is to hold; None writes none.

    Raises:
      ValueError: the config is of no supported model, or the parameters are not those it describes.
    """
    check_params(params, abstract_params(decoder_config(config)))
    with _folder_of_all(path) as folder:
        if jax.process_index() == 0:
            write_json(folder / "config.json", config)
            if metrics is not None:
                write_json(folder / "metrics.json", metrics)
            if tokenizer is not None:
                tokenizer.save(str(folder / "tokenizer.json"))
        save_params(folder, params)


@contextlib.contextmanager
def _folder_of_all(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the ``new_folder`` of the first process to all of them; it is in its place when they leave."""
    with new_folder(path) if jax.process_index() == 0 else contextlib.nullcontext() as folder:
        name = np.frombuffer((b"" if folder is None else folder.name.encode()).ljust(256, b"\0"), np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(name)).tobytes().rstrip(b"\0").decode()
        yield Path(path).absolute().with_name(told)
    multihost_utils.sync_global_devices("specjax.checkpoint.save")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, replace: bool = True) -> Iterator[Path]:
    """Yields a folder to fill, which takes the place of ``path`` once it is whole.

    When anything fails it is removed, and ``path`` stays as it was. A run that is killed leaves beside it a hidden
    folder that ends in ``.partial``.

    Raises:
      ValueError: ``path`` exists in the end, and is not to be replaced.
    """
    path = Path(path).absolute()
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if not os.path.lexists(path):
            partial.rename(path)
        elif not replace:
            raise ValueError(f"{path} has come to exist meanwhile; remove it or give another name")
        else:
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        _remove(partial)


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of a save that failed may still be writing."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people and programs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_params(folder: Path, params: Any) -> None:
    """Writes ``params/``, from several processes each its parts; all must call it.

    JAX arrays of a CPU are written as they lie, with buffers of no more than the largest. Large ones are cut along all
    dimensions into chunks, since a reader of a slice reads, and holds, the whole of each chunk that it touches.
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
) -> LanguageModel:
    """Opens a checkpoint folder, or a Hugging Face folder with safetensors.

    Parameters go to their devices one by one; of a Hugging Face folder, files are mapped and never read whole.

    Args:
      path: the folder.
      dtype: dtype of parameters and computation; None means ``default_dtype()``.
      mesh: the parameters are split over it as ``specjax.shard`` does, each process holding its own parts alone; None
        is the default device.
      rules: as for ``specjax.shard``.
      ignore_config_keys: keys to read ``config.json`` without, such as ("auto_map",), to get past a refusal of what a
        key says. A dot leads into an object: "rope_scaling.factor". Keys that are not there do no harm.

    Raises:
      ValueError: the folder or a file of it is missing, truncated, of an unsupported model, or does not fit its
        ``config.json``; or the mesh or the rules do not fit the model.
      TypeError: as ``specjax.shard``.
    """
    return load_described(Path(path).absolute(), dtype, mesh, rules, ignore_config_keys)[0]


def load_described(
    path: Path, dtype: jnp.dtype | str | None, mesh: Mesh | None, rules: Rules, ignore_config_keys: Iterable[str]
) -> tuple[LanguageModel, dict[str, Any]]:
    """Returns what ``load`` does, and the keys of ``config.json`` that describe the model."""
    dtype = check_dtype(default_dtype() if dtype is None else dtype)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give one with config.json and params/, or with safetensors files")
    if (path / "params").is_dir():
        config, raw = read_config(path / "config.json", ignore_config_keys)
        return decoder_model(config, load_params(path, _placed(config, dtype, mesh, rules))), raw
    if (path / "metrics.json").is_file():
        raise ValueError(f"{path / 'params'} does not exist; the checkpoint is incomplete, copy or convert it again")
    weights = open_weights(path, ignore_config_keys)
    params = read_params(weights.params, _placed(weights.config, dtype, mesh, rules))
    return decoder_model(weights.config, params), weights.raw


def _placed(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh | None, rules: Rules) -> Any:
    """Returns the parameters' shapes and dtypes, and where each goes if there is a mesh."""
    return placed(decoder_model(config, abstract_params(config, dtype)), mesh, rules)


def placed(model: Any, mesh: Mesh | None, rules: Rules) -> Any:
    """Returns the parameters' shapes and dtypes, and where each goes if there is a mesh.

    Args:
      model: a model or drafter of one's own ``params``, whose leaves have shapes and dtypes.
      mesh, rules: as for ``load``, errors too.
    """
    if mesh is None:
        return model.params
    places = shardings(model, mesh, rules).params
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model.params, places)


def check_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """Returns a floating dtype by its name; raises ValueError if it is another."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16") from None
    if known not in map(jnp.dtype, ("float32", "bfloat16", "float16")):
        raise ValueError(f"dtype is {known}; give float32, bfloat16 or float16")
    return known


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

    A few at a time, since Orbax holds what it reads twice over until it is on the device.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), abstract)
    with _reading(path):
        buffer = max(_LEAST_BUFFER, _largest_read(path, expected) + 1)
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=buffer / 1e9)  # type: ignore  (as for saving)
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path / "params", args=ocp.args.StandardRestore(expected))


def stored_params(path: Path, wanted: Any) -> Any:
    """Returns shapes and dtypes of the parameters in ``params/``, as nested dicts of the paths of ``wanted``."""
    with _reading(path):
        stored = _metadata(path)
        found = {names: stored[tuple(map(str, names))] for names in parameters(wanted)}
        return unflatten_dict({names: jax.ShapeDtypeStruct(x.shape, x.dtype) for names, x in found.items()})


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes a ValueError of all that Orbax and TensorStore raise for files that are absent or cut short."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path / 'params'} cannot be read as the parameters that config.json describes ({reason}); "
            "it is truncated, damaged or of another model, copy or convert it again"
        ) from error


def _metadata(path: Path) -> dict[tuple[str, ...], Any]:
    """Returns what Orbax says of each array in ``params/``, by its path. Numbers of layers are strings there."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "params").item_metadata
    if metadata is None:
        raise ValueError("there is no _METADATA")
    return {tuple(map(str, names)): array for names, array in parameters(dict(metadata.tree)).items()}


def _largest_read(path: Path, expected: Any) -> int:
    """Returns a bound on the bytes of the chunks that a device's part of an array touches."""
    stored = _metadata(path)

    def touched(names: ParameterPath, like: jax.ShapeDtypeStruct) -> int:
        array = stored[tuple(map(str, names))]
        part, chunk = like.sharding.shard_shape(like.shape), array.storage.chunk_shape
        wholes = (min(-(-n // of) * of, wide + 2 * of) for n, wide, of in zip(array.shape, part, chunk, strict=True))
        return math.prod(wholes) * array.dtype.itemsize

    return max(touched(*parameter) for parameter in parameters(expected).items())


def read_params(params: Any, abstract: Any, on_read: Callable[[int], None] = lambda size: None) -> Any:
    """Reads the ``Parameter`` of a tree one by one in the dtypes of ``abstract``, onto its shardings or the default
    device.

    ``on_read`` is told the bytes of each.
    """

    def read(parameter: Parameter, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.sharding is None:
            array = jax.device_put(parameter.read(like.dtype))
        else:
            part = functools.partial(parameter.read, like.dtype)
            array = jax.make_array_from_callback(parameter.shape, like.sharding, part)
        jax.block_until_ready(array)
        on_read(array.nbytes)
        return array

    return jax.tree.map(read, params, abstract, is_leaf=lambda x: isinstance(x, Parameter))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens the tokenizer of a checkpoint folder.

    Raises:
      ValueError: ``tokenizer.json`` is missing or damaged.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a checkpoint folder must hold one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} is not a tokenizer ({error}); copy it again") from None


def load_stop_tokens(path: str | os.PathLike) -> tuple[int, ...]:
    """Returns the tokens that end a text: ``eos_token_id`` of ``generation_config.json``, else of ``config.json``.

    Raises:
      ValueError: a file is damaged, or names something else than one token id or a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if not file.is_file():
            continue
        tokens = read_json(file).get("eos_token_id")
        if tokens is None:
            continue
        tokens = tokens if isinstance(tokens, list) else [tokens]
        for token in tokens:
            check_integer(f"{file}: eos_token_id", token, 0)
        return tuple(tokens)
    return ()
