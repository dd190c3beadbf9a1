"""Tensors of a Hugging Face model folder: what is read and written against other readers and writers, and refusals."""

import errno
import json
import os
import re
import resource
import struct
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from specjax.hf.safetensors import Tensor, TensorSpec, open_tensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RNG = np.random.default_rng(0)


def any_bits(dtype, *shape):
    """Random bits read as the dtype, NaNs and infinities included; 0 and 1 for booleans."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return RNG.integers(0, 2 if dtype.kind == "b" else 256, count, dtype=np.uint8).view(dtype).reshape(shape)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, data=b"", length=None):
    """A safetensors file by the letter of the format; ``header`` may be any JSON value or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def shard_folder(folder, shards, weight_map=None):
    """Writes files of arrays with the library, and an index that names them all unless one is given."""
    for name, arrays in shards.items():
        safetensors.numpy.save_file(arrays, folder / name)
    if weight_map is None:
        weight_map = {tensor: name for name, arrays in shards.items() for tensor in arrays}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def spec(name, array):
    return TensorSpec(name, array.dtype, array.shape, lambda: array)


def refusal(folder):
    with pytest.raises(ValueError) as refused:
        open_tensors(folder)
    return str(refused.value)


A, B = np.arange(2, dtype=np.float32), np.arange(3, dtype=np.int64)

# What is read.

# code -> the NumPy dtype that stores the same bits; the codes are those of the format.
CODES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}


@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_every_dtype_and_shape(tmp_path, code, shape):
    """Bit for bit, behind another tensor of odd length, so that the data are unaligned."""
    array = any_bits(CODES[code], *shape)
    header = {"a": entry("U8", [1], [0, 1]), "b": entry(code, shape, [1, 1 + array.nbytes])}
    (tmp_path / SINGLE).write_bytes(file_of(header, b"\7" + bits(array)))
    tensor = open_tensors(tmp_path)["b"]
    assert (tensor.name, tensor.dtype, tensor.shape) == ("b", np.dtype(CODES[code]), shape)
    read = tensor.read()
    assert (read.dtype, read.shape, read.flags.writeable) == (np.dtype(CODES[code]), shape, False)
    assert bits(read) == bits(array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32"])
def test_unaligned_data_reach_the_device(tmp_path, dtype):
    array = (np.arange(6) % 5).astype(dtype).reshape(2, 3)
    header = {"a": entry("U8", [1], [0, 1]), "b": entry(code_of(dtype), [2, 3], [1, 1 + array.nbytes])}
    raw = file_of(header, b"\7" + bits(array))
    (tmp_path / SINGLE).write_bytes(raw)
    tensor = open_tensors(tmp_path)["b"]
    assert tensor.offset % 8 == (len(raw) - array.nbytes) % 8
    assert bits(np.asarray(jax.device_put(tensor.read()))) == bits(array)


def code_of(dtype):
    return next(code for code, other in CODES.items() if np.dtype(other) == np.dtype(dtype))


def test_floats_mean_what_torch_means(tmp_path):
    """The bits of a file that torch wrote, read as numbers; each of the 256 patterns of the float8 types."""
    torch = pytest.importorskip("torch")
    import safetensors.torch

    every = torch.arange(256, dtype=torch.uint8)
    names = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    tensors = {name: every.clone().view(getattr(torch, name)) for name in names}
    tensors["bfloat16"] = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16)
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    opened = open_tensors(tmp_path)
    assert opened.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert opened[name].dtype == np.dtype(name)
        np.testing.assert_array_equal(opened[name].read().astype(np.float32), tensor.float().numpy())


def test_shards_are_one_folder(tmp_path):
    shard_folder(tmp_path, {"x.safetensors": {"a": A}, "y.safetensors": {"b": B, "c": A + 1}})
    opened = open_tensors(str(tmp_path))
    assert {name: tensor.file.name for name, tensor in opened.items()} == {
        "a": "x.safetensors",
        "b": "y.safetensors",
        "c": "y.safetensors",
    }
    for name, array in {"a": A, "b": B, "c": A + 1}.items():
        np.testing.assert_array_equal(opened[name].read(), array)


def test_a_tensor_that_the_index_does_not_name_is_there(tmp_path):
    shard_folder(tmp_path, {"x.safetensors": {"a": A, "b": B}}, {"a": "x.safetensors"})
    assert set(open_tensors(tmp_path)) == {"a", "b"}


def test_links_to_other_folders_are_followed(tmp_path):
    """Hugging Face's cache: a snapshot's files are links to ``../../blobs/<hash>``."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shard_folder(blobs, {"x.safetensors": {"a": A}})
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"{len(file.name)}abcdef")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    np.testing.assert_array_equal(open_tensors(snapshot)["a"].read(), A)
    (blobs / f"{len('x.safetensors')}abcdef").unlink()
    assert re.search(r"x\.safetensors cannot be read \(No such file.*download it again", refusal(snapshot))


def test_the_single_file_wins_over_an_index(tmp_path):
    shard_folder(tmp_path, {"x.safetensors": {"a": A}})
    safetensors.numpy.save_file({"b": B}, tmp_path / SINGLE)
    assert list(open_tensors(tmp_path)) == ["b"]


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    safetensors.numpy.save_file({"a": A}, folder / SINGLE)
    np.testing.assert_array_equal(open_tensors(folder)["a"].read(), A)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_pages_that_are_looked_at_are_in_memory(tmp_path):
    rows, row = 64, 2**20
    header = file_of({"a": entry("U8", [rows, row], [0, rows * row])})
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * row)
    before = resident()
    array = open_tensors(tmp_path)["a"].read()
    assert array[rows // 2, ::4096].sum() == 0
    assert resident() - before < 16 * row
    assert array[:, ::4096].sum() == 0
    assert resident() - before > 48 * row, "the whole array was looked at, so this test can tell"
    del array
    assert resident() - before < 16 * row


def test_a_file_that_changed_after_it_was_opened(tmp_path):
    safetensors.numpy.save_file({"a": A}, tmp_path / SINGLE)
    tensor = open_tensors(tmp_path)["a"]
    os.truncate(tensor.file, tensor.offset + 4)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a' cannot be read.*open it again"):
        tensor.read()
    tensor.file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a' cannot be read.*No such file"):
        tensor.read()


# What is refused: files.

ONE = {"a": entry()}
TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
DEEP = 100_000

# file, what the message says
DAMAGED = {
    "no bytes": (b"", "0 bytes long"),
    "seven bytes": (b"\0" * 7, "7 bytes long"),
    "another kind of file": (b"<!DOCTYPE html><html>", "21 bytes long, of which its header would take"),
    "a header of no bytes": (file_of(b""), "not valid JSON"),
    "a header of 2**64 - 1 bytes": (file_of(ONE, bytes(8), 2**64 - 1), "18446744073709551623"),
    "a header one byte past the end": (file_of(ONE, length=len(json.dumps(ONE)) + 1), "its header would take"),
    "a header cut short": (file_of(ONE, bytes(8), 20), "not valid JSON"),
    "cut within the data": (file_of(TWO, bytes(15)), r"end at byte \d+ and the file at"),
    "cut behind the header": (file_of(ONE), r"end at byte \d+ and the file at"),
    "more than the tensors": (file_of(ONE, bytes(9)), r"end at byte \d+ and the file at"),
    "a hole": (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor 'b' begins at byte"),
    "a hole at the start": (file_of({"a": entry(offsets=(8, 16))}, bytes(16)), "tensor 'a' begins at byte"),
    "an overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensor 'b' begins at byte"),
    "one place for two": (file_of({"a": entry(), "b": entry()}, bytes(8)), "tensor '[ab]' begins at byte"),
    "too few bytes": (file_of({"a": entry(shape=(3,))}, bytes(8)), r"'a', F32 \[3\], takes 12 bytes.*\[0, 8\]"),
    "backward": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), r"takes 8 bytes.*\[8, 0\]"),
    "a negative offset": (file_of({"a": entry(offsets=(-1, 7))}, bytes(8)), r"'a' has data_offsets \[-1, 7\]"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, bytes(8)), r"data_offsets \[0, 4, 8\]"),
    "offsets that are no list": (file_of({"a": entry() | {"data_offsets": 8}}, bytes(8)), "data_offsets 8"),
    "a negative size": (file_of({"a": entry(shape=(-2,))}, bytes(8)), r"'a' has shape \[-2\]"),
    "a fraction": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), r"'a' has shape \[2\.0\]"),
    "NaN": (file_of({"a": entry(shape=(float("nan"),))}, bytes(8)), r"'a' has shape \[nan\]"),
    "a truth": (file_of({"a": entry("U8", (True,), (0, 1))}, bytes(1)), r"'a' has shape \[True\]"),
    "a shape that is no list": (file_of({"a": entry() | {"shape": "2"}}, bytes(8)), "'a' has shape '2'"),
    "an overflow to the right size": (file_of({"a": entry(shape=(2**62, 4, 2))}, bytes(8)), "'a' has shape"),
    "an overflow of none": (file_of({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "'a' has shape"),
    "a size past 64 bits": (file_of({"a": entry(shape=(0, 2**64), offsets=(0, 0))}), "'a' has shape"),
    "a size of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "an offset of 4300 digits": (
        file_of({"a": entry(offsets=(10**4299, 10**4299 + 8))}, bytes(8)),
        r"data_offsets \[10000.*\.\.\.",
    ),
    "65 dimensions": (file_of({"a": entry("U8", [1] * 65, (0, 1))}, bytes(1)), "'a' has shape"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "just the keys"),
    "an unknown key": (file_of({"a": entry() | {"scale": 2}}, bytes(8)), "just the keys.*'shape'"),
    "an entry that is a list": (file_of({"a": ["F32", [2], [0, 8]]}, bytes(8)), "just the keys"),
    "an unknown dtype": (file_of({"a": entry("Q4_K")}, bytes(8)), "tensor 'a' has dtype 'Q4_K'; convert it.*BF16"),
    "four-bit floats": (file_of({"a": entry("F4", (16,))}, bytes(8)), "tensor 'a' has dtype 'F4'; convert it"),
    "a dtype that is no string": (file_of({"a": entry(dtype=["F32"])}, bytes(8)), r"dtype \['F32'\]"),
    "metadata of numbers": (file_of({"__metadata__": {"format": 1}}), "__metadata__ is {'format': 1}"),
    "metadata that is a list": (file_of({"__metadata__": []}), r"__metadata__ is \[\]"),
    "an array": (file_of([]), "a list and must be an object"),
    "not JSON": (file_of(b"{'a'}"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff":{}}'), "not valid JSON.*0xff"),
    "a lone surrogate": (file_of({"\ud800": entry()}, bytes(8)), "not valid JSON.*surrogates"),
    "a name twice": (file_of(b'{"a":{},"a":{}}'), "key 'a' occurs twice"),
    "a key twice": (file_of(b'{"a":{"dtype":"F32","dtype":"I32"}}'), "key 'dtype' occurs twice"),
    "nested too deep": (file_of(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), "nested too deep"),
    "nested too deep to show": (file_of({"a": entry(shape=([[[[[[[[]]]]]]]],))}), r"'a' has shape \[\[\[\[\[\["),
    "a header past any use": (file_of(b" " * (2**25 + 1)), "33554433 bytes long and may be 33554432"),
}


@pytest.mark.parametrize(("raw", "says"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path, raw, says):
    """In a file of its own and in a shard; the message names the file, is short, and says what to do."""
    (tmp_path / SINGLE).write_bytes(raw)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / SINGLE}: ")
    assert re.search(says, message)
    assert re.search("download it again|convert it to one of", message)
    assert len(message) < len(str(tmp_path)) + 600
    (tmp_path / SINGLE).rename(tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert refusal(tmp_path) == message.replace(SINGLE, "x.safetensors", 1)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    assert re.search(rf"{name} is a Git LFS pointer.*git lfs pull", refusal(tmp_path))


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_what_is_not_a_file_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    assert f"{tmp_path / name} is not a regular file" in refusal(tmp_path)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    assert f"{tmp_path / name} is not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_file_that_may_not_be_read(tmp_path, name, monkeypatch):
    (tmp_path / name).touch()

    def deny(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)  # permissions do not bind root
    assert f"{tmp_path / name} cannot be read (Permission denied)" in refusal(tmp_path)


# What is refused: folders and indices.


@pytest.mark.parametrize(
    ("folder", "says"),
    [("absent", "No such file"), ("file", "Not a directory"), ("zero\0byte", "null byte"), ("x" * 300, "too long")],
)
def test_what_is_not_a_folder_is_refused(tmp_path, folder, says):
    (tmp_path / "file").touch()
    message = refusal(tmp_path / folder)
    assert repr(str(tmp_path / folder)) in message
    assert says in message


OTHERS = {
    **dict.fromkeys(("pytorch_model.bin", "a.pt", "a.pth", "a.ckpt"), r"sandbox.*save_pretrained\(folder\)"),
    **dict.fromkeys(("flax_model.msgpack", "tf_model.h5"), "download the model's safetensors"),
    "a.gguf": r"a GGUF file opens by its own path",
    "model-00001-of-00002.safetensors": r"need their index, download model\.safetensors\.index\.json",
    "medusa_lm_head.safetensors": "load_drafter opens them as medusa:DIR",
    "adapter_model.safetensors": "with adapter=this folder",
    "consolidated.safetensors": "download the files that have transformers' names",
    "model.fp16.safetensors": r"call it model\.safetensors",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_are_named_with_a_cure_and_never_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    message = refusal(tmp_path)
    assert name in message
    assert re.search(OTHERS[name], message)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    assert re.search(r"holds neither model\.safetensors nor .*index\.json, only \[\]", refusal(tmp_path))
    (tmp_path / "notes.txt").touch()
    assert "only ['notes.txt']" in refusal(tmp_path)


OUTSIDE = ["../x.safetensors", "/etc/hostname", "sub/x.safetensors", "./x.safetensors", ".", "..", "", "x\0", "x" * 300]

# the index's bytes, what the message says
INDICES = {
    "no bytes": (b"", "not valid JSON"),
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"weight_map":{"\xff":"x.safetensors"}}', "not valid JSON.*0xff"),
    "nested too deep": (b"[" * DEEP, "nested too deep"),
    "5000 digits": (b"9" * 5000, "not valid JSON"),
    "an array": (b"[]", "a list and must be an object"),
    "a name twice": (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "key 'a' occurs twice"),
    "no weight_map": (b'{"metadata":{}}', "weight_map is None"),
    "a weight_map that is a list": (b'{"weight_map":["a"]}', r"weight_map is \['a'\]"),
    "a number for a file": (b'{"weight_map":{"a":1}}', "weight_map is {'a': 1}"),
    "a map for a file": (b'{"weight_map":{"a":{"file":"x.safetensors"}}}', "weight_map is {'a': {'file'"),
    "a file that is absent": (b'{"weight_map":{"a":"z.safetensors"}}', "'z.safetensors', which is not in that folder"),
    "a lone surrogate": (b'{"weight_map":{"a":"\\udcff"}}', "not valid JSON.*surrogates"),
    "a tensor that is absent": (b'{"weight_map":{"c":"x.safetensors"}}', "'x.safetensors' holds tensor 'c', which it"),
    "a tensor of another file": (
        b'{"weight_map":{"a":"y.safetensors","b":"x.safetensors"}}',
        "'y.safetensors' holds tensor 'a', which it does not",
    ),
    **{
        f"outside: {name[:20]!r}": (
            json.dumps({"weight_map": {"a": name}}).encode(),
            re.escape(f"the file {name[:20]!r}"[:-1]) + ".*which is not in that folder",
        )
        for name in OUTSIDE
    },
}


@pytest.mark.parametrize(("raw", "says"), INDICES.values(), ids=INDICES.keys())
def test_damaged_indices_are_refused(tmp_path, raw, says):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "x.safetensors", folder / "sub" / "x.safetensors", folder / "x.safetensors"):
        safetensors.numpy.save_file({"a": A}, file)
    safetensors.numpy.save_file({"b": B}, folder / "y.safetensors")
    (folder / INDEX).write_bytes(raw)
    message = refusal(folder)
    assert message.startswith(f"{folder / INDEX}: ")
    assert re.search(says, message)
    assert "download it again" in message
    assert len(message) < len(str(folder)) + 600


@pytest.mark.parametrize("holder", ["x.safetensors", "y.safetensors"])
def test_of_a_tensor_in_two_files_the_index_says_which_holds(tmp_path, holder):
    shards = {"x.safetensors": {"a": A, "c": A}, "y.safetensors": {"a": A + 1, "b": B}}
    shard_folder(tmp_path, shards, {"a": holder, "b": "y.safetensors", "c": "x.safetensors"})
    opened = open_tensors(tmp_path)
    assert opened.keys() == {"a", "b", "c"}
    np.testing.assert_array_equal(opened["a"].read(), A if holder == "x.safetensors" else A + 1)


def test_a_tensor_in_two_files_that_the_index_does_not_name_is_refused(tmp_path):
    shards = {"x.safetensors": {"a": A, "c": A}, "y.safetensors": {"a": A, "b": B}}
    shard_folder(tmp_path, shards, {"b": "y.safetensors", "c": "x.safetensors"})
    assert re.search(r"y\.safetensors: tensor 'a' is in x\.safetensors as well", refusal(tmp_path))


# What is written.

ARRAYS = {f"layers.{i}.{code}": any_bits(dtype, 3, 5) for i, (code, dtype) in enumerate(CODES.items())} | {
    "scalar": any_bits(np.float32),
    "empty": np.zeros((0, 4), np.float16),
    'naïve "name"\n': any_bits(np.int8, 7),
    "of another order": any_bits(np.float32, 4, 6).T[::2],
}


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100, 1], ids=str)
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    files = write_tensors(tmp_path, [spec(name, array) for name, array in ARRAYS.items()], shard_bytes)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert (len(files) == 1) == (shard_bytes == 5 * 10**9)
    opened = open_tensors(tmp_path)
    assert opened.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = opened[name].read()
        assert (read.dtype, read.shape, bits(read)) == (array.dtype, array.shape, bits(array))
        assert read.flags.aligned


def test_the_library_reads_what_is_written(tmp_path):
    (file,) = write_tensors(tmp_path, [spec(name, array) for name, array in ARRAYS.items()])
    assert file == tmp_path / SINGLE
    described = dict(safetensors.deserialize(file.read_bytes()))
    assert described.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (tuple(described[name]["shape"]), bytes(described[name]["data"])) == (array.shape, bits(array))
        assert described[name]["dtype"] == code_of(array.dtype)
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_file_equals_the_library_s_byte_for_byte(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    names = ["bool", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"]
    names += ["float8_e4m3fn", "float8_e5m2"]
    arrays = {f"{i}.{name}": any_bits(name, 3, 5) for i in (1, 0) for name in names}
    tensors = {
        name: torch.frombuffer(bytearray(bits(array)), dtype=getattr(torch, str(array.dtype))).reshape(3, 5)
        for name, array in arrays.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    (file,) = write_tensors(tmp_path, [spec(name, array) for name, array in arrays.items()])
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_files_are_filled_as_transformers_fills_them(tmp_path):
    hub = pytest.importorskip("huggingface_hub.serialization._base")
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(0, 60, 12).tolist()
        arrays = {f"{i}": np.zeros(size, np.uint8) for i, size in enumerate(sizes)}
        split = hub.split_state_dict_into_shards_factory(
            arrays,
            get_storage_size=lambda array: array.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=50,
        )
        folder = tmp_path / str(seed)
        folder.mkdir()
        files = write_tensors(folder, [spec(name, array) for name, array in arrays.items()], 50)
        assert split.is_sharded
        assert [file.name for file in files] == [*split.filename_to_tensors, INDEX]
        index = json.loads((folder / INDEX).read_text())
        assert index == {"metadata": {"total_size": sum(sizes)}, "weight_map": split.tensor_to_filename}


def test_a_model_of_transformers_there_and_back(tmp_path):
    """Read what ``save_pretrained`` wrote, write it again, and let transformers load that."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    model.save_pretrained(theirs, max_shard_size="4KB")
    opened = open_tensors(theirs)
    state = model.state_dict()
    assert opened.keys() == state.keys()
    for name, tensor in opened.items():
        np.testing.assert_array_equal(tensor.read(), state[name].numpy())
    model.config.save_pretrained(ours)
    write_tensors(ours, opened.values(), 4000)
    loaded = transformers.LlamaForCausalLM.from_pretrained(ours)
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name].numpy())


def test_arrays_of_jax_are_written(tmp_path):
    array = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    write_tensors(tmp_path, [TensorSpec("a", array.dtype, array.shape, lambda: np.asarray(array))])
    np.testing.assert_array_equal(open_tensors(tmp_path)["a"].read(), np.asarray(array))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    made, alive = [], []

    def make():
        array = np.zeros(1000, np.float32)
        made.append(weakref.ref(array))
        alive.append(sum(ref() is not None for ref in made))
        return array

    write_tensors(tmp_path, [TensorSpec(f"{i}", np.dtype(np.float32), (1000,), make) for i in range(6)], 12_000)
    assert alive == [1] * 6


# What is not written.

F32 = np.dtype(np.float32)

# tensors, what the message says
UNWRITABLE = {
    "none": ([], "no tensors to write"),
    "two of one name": ([spec("a", A), spec("b", A), spec("a", B)], "name 'a' is taken"),
    "the name of the metadata": ([spec("__metadata__", A)], "name '__metadata__' is taken, by .* the format"),
    "a name that is not Unicode": ([spec("\ud800", A)], "not valid Unicode"),
    "128-bit complex numbers": ([spec("a", np.zeros(2, complex))], "'a' has dtype complex128; convert it.*float32"),
    "objects": ([spec("a", np.array([None]))], "'a' has dtype object"),
    "big-endian numbers": ([spec("a", A.astype(">f4"))], "'a' has dtype >f4"),
    "another shape": (
        [spec("a", A), TensorSpec("b", F32, (3,), lambda: A)],
        r"tensor 'b' was announced as float32 \(3,\) and read as float32 \(2,\)",
    ),
    "another dtype": (
        [spec("a", A), TensorSpec("b", np.dtype(np.int32), (2,), lambda: A)],
        r"tensor 'b' was announced as int32 \(2,\) and read as float32 \(2,\)",
    ),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 8], ids=["one file", "shards"])
@pytest.mark.parametrize(("tensors", "says"), UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_what_cannot_be_written_leaves_no_file(tmp_path, tensors, says, shard_bytes):
    with pytest.raises(ValueError, match=says):
        write_tensors(tmp_path, tensors, shard_bytes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_bytes", [0, -1, 1.5, True, "5GB"])
def test_the_size_of_files_is_checked(tmp_path, shard_bytes):
    with pytest.raises(ValueError, match=f"shard_bytes must be an integer of at least 1, got {shard_bytes!r}"):
        write_tensors(tmp_path, [spec("a", A)], shard_bytes)


def test_metadata_are_checked_and_may_be_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"metadata must map strings to strings, got \{'step': 3\}"):
        write_tensors(tmp_path, [spec("a", A)], metadata={"step": 3})
    (file,) = write_tensors(tmp_path, [spec("a", A)], metadata={})
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() is None


@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-00001-of-00002.safetensors", SINGLE + ".partial"])
def test_files_that_are_there_are_kept(tmp_path, name):
    """The single file would hide shards written beside it, and an index files that it does not name."""
    (tmp_path / name).write_bytes(b"kept")
    with pytest.raises(ValueError, match=f"already holds \\['{name}'\\]; give an empty folder"):
        write_tensors(tmp_path, [spec("a", A)])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"kept")]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"absent' cannot be read as a folder \(No such file"):
        write_tensors(tmp_path / "absent", [spec("a", A)])


@pytest.mark.skipif(sys.platform == "win32", reason="limits are of POSIX")
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
def test_a_write_that_the_system_refuses(tmp_path, shard_bytes):
    """The first file fits the limit on file sizes, where there are several; the second does not."""
    tensors = [spec("a", np.zeros(10_000, np.float32)), spec("b", np.zeros(20_000, np.float32))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(OSError, match=r"model.*\.safetensors could not be written \(File too large\)") as failed:
            write_tensors(tmp_path, tensors, shard_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", range(3))
def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch, failing):
    """Space that runs out only when the system writes its buffers, in each of two shards and their index."""
    synced, fsync = [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    name = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX][failing]
    with pytest.raises(OSError, match=rf"{name} could not be written \(No space left on device\)") as failed:
        write_tensors(tmp_path, [spec("a", A), spec("b", B)], 24)
    assert failed.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_renaming_that_fails_leaves_no_file(tmp_path, monkeypatch):
    renamed, rename = [], Path.rename

    def fail(path, target):
        renamed.append(target.name)
        if len(renamed) == 2:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"model-00002-of-00002"):
        write_tensors(tmp_path, [spec("a", A), spec("b", B)], 24)
    assert not list(tmp_path.iterdir())


def test_no_file_bears_its_name_before_all_are_whole(tmp_path):
    """Whatever ends the process while tensors are made leaves nothing that looks like a model."""
    seen = []

    def make():
        seen.append(sorted(file.name for file in tmp_path.iterdir()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return A

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path, [TensorSpec(f"{i}", F32, (2,), make) for i in range(4)], 8)
    partial = [f"model-0000{i}-of-00004.safetensors.partial" for i in (1, 2, 3)]
    assert seen == [partial[:1], partial[:2], partial[:3]]
    assert not list(tmp_path.iterdir())


def test_tensors_of_a_folder_are_written_as_they_are(tmp_path):
    """``Tensor`` serves as what to write: a folder is copied into other shards without a copy in memory."""
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    safetensors.numpy.save_file({"a": A, "b": B}, tmp_path / "from" / SINGLE)
    opened = open_tensors(tmp_path / "from")
    assert all(isinstance(tensor, Tensor) for tensor in opened.values())
    write_tensors(tmp_path / "to", opened.values(), 24)
    again = open_tensors(tmp_path / "to")
    assert [again[name].file.name for name in "ab"] == [
        "model-00002-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    np.testing.assert_array_equal(again["a"].read(), A)
    np.testing.assert_array_equal(again["b"].read(), B)
