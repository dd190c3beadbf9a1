"""Damaged model folders: each opens within its files' bounds or is refused by name, and nothing else happens.

What opens is held against the ``safetensors`` library. Run with ``-s`` to see how many were tried and refused.
"""

import collections
import json
import re
import resource
import struct
import sys
import time

import numpy as np
import pytest
import safetensors

from specjax.hf.safetensors import open_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
    "model.norm": {"dtype": "BF16", "shape": [5], "data_offsets": [48, 58]},
    "scale": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [58, 59]},
    "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [59, 59]},
    "mask": {"dtype": "BOOL", "shape": [1, 2, 3], "data_offsets": [59, 65]},
}
DATA = np.random.default_rng(0).integers(0, 2, 65, dtype=np.uint8).tobytes()
WEIGHT_MAP = {"a.b": "x.safetensors", "a.c": "y.safetensors", "a.d": "y.safetensors"}

# What takes the place of a value of a header or an index.
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 4, 48, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**400),
    *(
        0.0,
        1.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "a",
        "F32",
        "F64",
        "BF16",
        "F4",
        "F6_E2M3",
        "Q8_0",
        "U128",
    ),
    *("x.safetensors", "y.safetensors", "../x.safetensors", "/dev/zero", "/dev/stdin", ".", "..", "sub", "sub/x"),
    *("x.safetensors\0", "\ud800", "\udcff", "é" * 300, "\\x.safetensors", "__metadata__", INDEX, [], {}, [[]], [{}]),
    *([0], [-1], [0, 0], [48, 0], [2**63, 2**63], [0, 2**62], [1] * 64, [1] * 65, [0] * 1000, {"a": "b"}, {"a": {}}),
]


def dump(value):
    return json.dumps(value).encode()


def file_of(raw, data=DATA, length=None):
    return struct.pack("<Q", len(raw) if length is None else length % 2**64) + raw + data


VALID = file_of(dump(HEADER))


def nodes(value, path=()):
    """Yields the path of every value below the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def edited(rng, value):
    """Returns a copy of which one value, at any depth, is replaced, removed, renamed, doubled or nudged."""
    value = json.loads(json.dumps(value))
    paths = list(nodes(value))
    path = paths[rng.integers(len(paths))]
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, other = path[-1], VALUES[rng.integers(len(VALUES))]
    match rng.integers(5):
        case 0:
            parent[key] = other
        case 1:
            del parent[key]
        case 2 if isinstance(parent, dict):
            parent[str(other)[:50]] = parent.pop(key)
        case 3 if isinstance(parent, dict):
            parent[str(other)[:50]] = parent[key]
        case 3:
            parent.insert(key, parent[key])
        case _ if type(parent[key]) is int:
            parent[key] += int(rng.integers(-9, 9))
        case _:
            parent[key] = [parent[key]]
    return value


def flipped(rng, raw, low, high):
    """Returns the bytes with one to three of those in ``low .. high - 1`` set anew."""
    raw = bytearray(raw)
    for place in rng.integers(low, high, rng.integers(1, 4)):
        raw[place] = rng.choice([rng.integers(256), raw[place] ^ (1 << rng.integers(8)), *b'0123456789-."[]{},: \\'])
    return bytes(raw)


def spliced(rng, raw):
    """Returns the bytes with a stretch of them removed, doubled, or put elsewhere."""
    start, stop = sorted(rng.integers(0, len(raw) + 1, 2))
    to = rng.integers(0, len(raw) + 1)
    return [raw[:start] + raw[stop:], raw[:stop] + raw[start:], raw[:to] + raw[start:stop] + raw[to:]][rng.integers(3)]


def header_edits(rng):
    header = HEADER
    for _ in range(rng.integers(1, 4)):
        header = edited(rng, header) or HEADER
    return file_of(dump(header))


def offset_edits(rng):
    """Headers that are well formed, with other shapes, dtypes and offsets: most are wrong, some are right."""
    header, end = {}, 0
    for i in range(rng.integers(1, 5)):
        code, width = [("U8", 1), ("F16", 2), ("F32", 4), ("F64", 8), ("BF16", 2)][rng.integers(5)]
        shape = rng.integers(0, 4, rng.integers(0, 4)).tolist()
        begin, end = end, end + int(np.prod(shape, dtype=int)) * width
        header[f"{i}"] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    size = end
    if rng.random() < 0.7:
        entry = header[f"{rng.integers(len(header))}"]
        entry["data_offsets"][rng.integers(2)] += int(rng.integers(-3, 4))
    size += int(rng.choice([0, 0, 0, -1, 1]))
    names = rng.permutation(list(header)).tolist()
    return file_of(dump({name: header[name] for name in names}), bytes(max(size, 0)))


def lengths(rng):
    length = len(VALID) - len(DATA) - 8
    other = rng.choice([length + int(rng.integers(-20, 90)), 1 << int(rng.integers(0, 63)), -1, -8, 100_000_000, 2**25])
    return file_of(dump(HEADER), length=int(other))


SINGLES = {
    "flips in the header": lambda rng: flipped(rng, VALID, 8, len(VALID) - len(DATA)),
    "flips anywhere": lambda rng: flipped(rng, VALID, 0, len(VALID)),
    "edits of the header": header_edits,
    "other shapes and offsets": offset_edits,
    "truncations": lambda rng: VALID[: rng.integers(len(VALID))],
    "splices": lambda rng: spliced(rng, VALID),
    "other lengths of the header": lengths,
    "noise": lambda rng: file_of(rng.bytes(rng.integers(0, 40)), rng.bytes(rng.integers(0, 40))),
}

INDEX_JSON = {"metadata": {"total_size": 30}, "weight_map": WEIGHT_MAP}

INDICES = {
    "edits of the index": lambda rng: dump(edited(rng, INDEX_JSON)),
    "flips in the index": lambda rng: flipped(rng, dump(INDEX_JSON), 0, len(dump(INDEX_JSON))),
    "truncations of the index": lambda rng: dump(INDEX_JSON)[: rng.integers(len(dump(INDEX_JSON)))],
    "splices of the index": lambda rng: spliced(rng, dump(INDEX_JSON)),
    "another value for the index": lambda rng: dump(VALUES[rng.integers(len(VALUES))]),
}

DTYPES = {
    **{"BOOL": "bool", "F32": "float32", "BF16": "bfloat16", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"},
    **{
        "F16": "float16",
        "F64": "float64",
        "I8": "int8",
        "I32": "int32",
        "I16": "int16",
        "U32": "uint32",
        "U16": "uint16",
    },
}
# Why a file is refused that the library takes.
STRICTER = "occurs twice|must have just the keys|convert it to one of|which no array can have"

TRIES = 1000
outcomes = collections.defaultdict(collections.Counter)


def refusal(folder):
    with pytest.raises(ValueError) as refused:
        open_tensors(folder)
    return str(refused.value)


def write(file, raw):
    file.unlink(missing_ok=True)  # some file systems wait for the disk when a file is written over
    file.write_bytes(raw)


def attempt(folder, kind, files):
    """Opens the folder and reads all of it; returns the tensors, or None if it is refused by a message that fits."""
    outcomes[kind]["tried"] += 1
    try:
        tensors = open_tensors(folder)
    except ValueError as error:
        outcomes[kind]["refused"] += 1
        assert any(str(file) in str(error) for file in files), error
        assert len(str(error)) < 1500 + len(str(folder))
        return None
    for name, tensor in tensors.items():
        assert name == tensor.name
        size = tensor.file.stat().st_size
        array = tensor.read()
        assert 8 <= tensor.offset <= tensor.offset + array.nbytes <= size
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        stored = tensor.file.read_bytes()[tensor.offset : tensor.offset + array.nbytes]
        assert np.ascontiguousarray(array).tobytes() == stored
    return tensors


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(autouse=True)
def bounds():
    """No kind of damage takes long or much memory."""
    peak, start = peak_bytes(), time.process_time()
    yield
    assert peak_bytes() - peak < 2 * 10**8
    assert time.process_time() - start < 30


@pytest.mark.parametrize("kind", SINGLES)
def test_damaged_files(tmp_path, kind):
    """What opens here opens in the library, with the same contents; what does not, neither, but for ``STRICTER``."""
    rng = np.random.default_rng(list(kind.encode()))
    file = tmp_path / SINGLE
    for _ in range(TRIES):
        write(file, SINGLES[kind](rng))
        tensors = attempt(tmp_path, kind, [file])
        try:
            theirs = dict(safetensors.deserialize(file.read_bytes()))
        except safetensors.SafetensorError:
            assert tensors is None
            continue
        if tensors is None:
            assert re.search(STRICTER, refusal(tmp_path))
            continue
        assert theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert DTYPES[theirs[name]["dtype"]] == tensor.dtype.name
            assert tuple(theirs[name]["shape"]) == tensor.shape
            assert bytes(theirs[name]["data"]) == np.ascontiguousarray(tensor.read()).tobytes()


@pytest.mark.parametrize("kind", INDICES)
def test_damaged_indices(tmp_path, kind):
    """What opens holds just the tensors of files of the folder."""
    rng = np.random.default_rng(list(kind.encode()))
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    entry = lambda start: {"dtype": "U8", "shape": [10], "data_offsets": [start, start + 10]}
    shards = {"x.safetensors": ["a.b"], "y.safetensors": ["a.c", "a.d"]}
    for name, held in shards.items():
        raw = file_of(dump({key: entry(10 * i) for i, key in enumerate(held)}), bytes(10 * len(held)))
        for place in (folder, tmp_path, folder / "sub"):
            (place / name).write_bytes(raw)
    for _ in range(TRIES):
        write(folder / INDEX, INDICES[kind](rng))
        tensors = attempt(folder, kind, list(folder.iterdir()))
        for tensor in (tensors or {}).values():
            assert tensor.file.parent == folder
            assert tensor.name in shards[tensor.file.name]


def test_the_valid_folder_opens(tmp_path):
    """What is damaged above is whole before."""
    (tmp_path / SINGLE).write_bytes(VALID)
    tensors = attempt(tmp_path, "nothing", [])
    assert tensors is not None
    assert tensors.keys() == HEADER.keys() - {"__metadata__"}


def test_enough_was_tried():
    """Every kind was tried in full, and most but not all of it was refused."""
    for kind, counts in outcomes.items():
        print(f"\n{kind:30} {counts['tried']:5} tried {counts['refused']:5} refused", end="")
    damaged = [counts for kind, counts in outcomes.items() if kind != "nothing"]
    tried, refused = (sum(counts[what] for counts in damaged) for what in ("tried", "refused"))
    print(f"\n{'all':30} {tried:5} tried {refused:5} refused")
    if len(damaged) < len(SINGLES) + len(INDICES):
        pytest.skip("counts what the other tests of this file tried")
    assert tried == TRIES * len(damaged)
    assert 0.5 * tried < refused < 0.97 * tried
    assert all(counts["refused"] > 0.2 * TRIES for counts in damaged)
