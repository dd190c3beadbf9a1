"""The GPU's attention kernel, run step by step on the CPU, and the masks of blocks, against NumPy twins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from specjax.transformer import flash
from specjax.transformer.attend import attend, places_seen
from specjax.types import Feed

OPTIONS = {
    "plain": {},
    "soft cap": {"cap": 0.8, "scale": 1.7},
    "window of seven": {"window": 7},
    "window of 256": {"window": 256},
    "window of one": {"window": 1},
    "window wider than the cache": {"window": 10_000, "cap": 0.5},
    "chunks of three": {"chunk": 3},
    "chunks of 256, a window in them": {"chunk": 256, "window": 200},
    "sinks": {"sinks_n": np.array([-1.0, 0.5, 2.0, 30.0], np.float32), "cap": 2.0},
}
FORMS = ["xla", "kernel"]


def run(form, monkeypatch):
    """Returns ``attend`` in one of its two forms."""
    if form == "xla":
        return jax.jit(attend, static_argnames=("scale", "window", "chunk", "cap", "value_width"))
    kernel = flash.attend
    monkeypatch.setattr(flash, "attend", lambda *args, **kwargs: kernel(*args, **kwargs, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    return attend


def arrays(rng, *shapes, dtype=jnp.float32):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def feed(start, count, width, parents=None):
    start, count = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (len(start),)) for x in (start, count))
    parents = None if parents is None else jnp.asarray(parents, jnp.int32)
    return Feed(jnp.zeros((len(start), width), jnp.int32), start, count, parents)


def paths(parents):
    """Returns, for each place, the places from the first to it."""
    found = []
    for place, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), place])
    return found


def wanted(query, keys, values, start, parents, window=None, **options):
    """Attends from each place over the row in which the prefix and the place's path stand one after the other."""
    out = []
    for path in paths(parents):
        slots = [*range(start), *(start + place for place in path)]
        position = np.array([len(slots) - 1])
        place = slice(path[-1], path[-1] + 1)
        out.append(reference_model.attend(query[:, place], keys[:, slots], values[:, slots], position, window=window,
                                          **options))  # fmt: skip
    return np.concatenate(out, axis=1)


def check(attend, rng, places, shape, *, value_width=None, dtype=jnp.float32, atol=1e-5, **options):
    """Compares every real place with the twin, and returns the output."""
    n, k, h, slots = shape
    b, t = places.tokens_bt.shape
    query, keys, values = arrays(rng, (b, n, t, h), (b, k, slots, h), (b, k, slots, h), dtype=dtype)
    options = {"scale": h**-0.5, **options}
    latent = {} if value_width is None else {"value_width": value_width}
    out = attend(query, keys, values if value_width is None else None, places, **options, **latent)
    values = values if value_width is None else keys[..., :value_width]
    assert out.shape == (b, n, t, values.shape[-1]) and out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    for row in range(b):
        count, start = int(places.count_b[row]), int(places.start_b[row])
        parents = range(-1, t - 1) if places.parents_bt is None else np.asarray(places.parents_bt[row])
        rows = (np.asarray(x[row], np.float32) for x in (query, keys, values))
        twin = wanted(next(rows), next(rows), next(rows), start, parents, **options)
        np.testing.assert_allclose(np.asarray(out[row, :, :count], np.float32), twin[:, :count], atol=atol, rtol=0)
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_all_lengths(form, options, monkeypatch):
    """An empty prefix, a row that rests, a part of the places real, and lengths about the steps and their shares."""
    places = feed([0, 300, 0, 63, 64, 65, 597], [3, 0, 0, 2, 3, 3, 3], 3)
    check(run(form, monkeypatch), np.random.default_rng(0), places, (4, 2, 16, 600), **options)


@pytest.mark.parametrize(("n", "k", "h", "t", "slots"), [
    (1, 1, 16, 1, 20), (8, 2, 80, 5, 300), (6, 6, 32, 1, 257), (4, 1, 48, 17, 100), (2, 2, 64, 33, 1500),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_any_heads_widths_and_slots(form, n, k, h, t, slots, monkeypatch):
    places = feed([slots - t, slots // 3], t, t)
    check(run(form, monkeypatch), np.random.default_rng(1), places, (n, k, h, slots))


@pytest.mark.parametrize("form", FORMS)
def test_values_in_the_keys(form, monkeypatch):
    places = feed([0, 250], [5, 4], 5)
    check(run(form, monkeypatch), np.random.default_rng(2), places, (4, 1, 80, 300), value_width=64)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, monkeypatch):
    places = feed([0, 250, 9], [5, 4, 0], 5)
    check(run(form, monkeypatch), np.random.default_rng(3), places, (4, 2, 64, 300), dtype=jnp.bfloat16, atol=0.02)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_trees(form, options, monkeypatch):
    parents = [[-1, 0, 0, 1, 1, 2, 5], [-1, -1, 0, 1, 2, 4, 5], [-1, 0, 1, 2, 3, 4, 5]]
    places = feed([0, 250, 9], [7, 7, 5], 7, parents)
    check(run(form, monkeypatch), np.random.default_rng(4), places, (4, 2, 16, 300), **options)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9, 33])
def test_a_place_sees_its_ancestors(t):
    rng = np.random.default_rng(t)
    parents = np.array([[-1, *(rng.integers(max(i - 3, -1), i) for i in range(1, t))] for _ in range(3)] +
                       [range(-1, t - 1)])  # fmt: skip
    seen = np.zeros((4, t, t), bool)
    for row in range(4):
        for place, path in enumerate(paths(parents[row])):
            seen[row, place, path] = True
    places = feed([5] * 4, t, t, parents)
    np.testing.assert_array_equal(places_seen(places), seen)
    chain = places_seen(dataclasses.replace(places, parents_bt=None))
    np.testing.assert_array_equal(chain, seen[3:])


def test_the_kernel_reads_no_slot_past_the_step_that_holds_a_rows_length(monkeypatch):
    """NaN reaches the output where it is read, since its weight of 0 makes NaN. Rows do not widen each other's part."""
    rng = np.random.default_rng(5)
    query, keys, values = arrays(rng, (2, 2, 2, 16), (2, 1, 900, 16), (2, 1, 900, 16))
    clean = keys, values
    keys, values = (x.at[0, :, 128:].set(jnp.nan).at[0, :, 126:128].set(y[0, :, 126:128]) for x, y in
                    zip(clean, clean, strict=True))  # fmt: skip
    attend = run("kernel", monkeypatch)
    places = feed([126, 800], 2, 2)
    out = attend(query, keys, values, places, scale=0.3)
    np.testing.assert_array_equal(out, attend(query, *clean, places, scale=0.3))
    beyond = attend(query, keys, values, feed([129, 800], 2, 2), scale=0.3)
    assert np.isnan(beyond[0]).any() and np.isfinite(beyond[1]).all()


def test_a_rows_bits_do_not_depend_on_its_neighbours(monkeypatch):
    rng = np.random.default_rng(6)
    query, keys, values = arrays(rng, (2, 2, 2, 16), (2, 1, 900, 16), (2, 1, 900, 16))
    attend = run("kernel", monkeypatch)
    outs = [attend(query, keys, values, feed([126, other], [2, count], 2), scale=0.3)[0]
            for other, count in [(0, 2), (898, 2), (400, 0)]]  # fmt: skip
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def lowered_for_cuda(t, h=64, parents=None):
    b, n, k, slots = 2, 8, 2, 2048
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((b, n, t, h), (b, k, slots, h), (b, k, slots, h))]
    places = jax.eval_shape(lambda: feed([0] * b, t, t))
    traced = jax.jit(lambda query, keys, values, places: attend(query, keys, values, places, scale=0.1)).trace(
        *shapes, places
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer versions lower the kernel beside a GPU only")
def test_a_narrow_feed_on_a_gpu_is_one_kernel(monkeypatch):
    """Wide feeds, odd widths and a choice by hand take XLA, which has two products for each window."""
    narrow = lowered_for_cuda(5)
    assert "stablehlo.dot_general" not in narrow and "flash_decoding" in narrow
    for other in (lowered_for_cuda(64), lowered_for_cuda(5, h=12)):
        assert other.count("stablehlo.dot_general") == 8 and "flash_decoding" not in other
    monkeypatch.setenv("SPECJAX_ATTENTION", "xla")
    assert lowered_for_cuda(5).count("stablehlo.dot_general") == 8


def test_without_pallas_attention_takes_xla(monkeypatch):
    monkeypatch.setattr(flash, "_pallas", lambda: None)
    assert lowered_for_cuda(5).count("stablehlo.dot_general") == 8


def test_on_a_mesh_attention_takes_xla():
    """The compiler would gather the caches for a kernel. Parts that ``shard_map`` has made already are no reason."""
    shape = jnp.zeros((2, 2, 8, 16))
    assert flash.serves(shape, shape, 16)
    for axes, served in ({"data": 1, "tensor": 2}, False), ({"data": 1, "tensor": 1}, True):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))):
            assert flash.serves(shape, shape, 16) == served


def test_a_choice_that_there_is_not(monkeypatch):
    monkeypatch.setenv("SPECJAX_ATTENTION", "flash")
    with pytest.raises(ValueError, match="SPECJAX_ATTENTION is 'flash'; set it to"):
        lowered_for_cuda(5)
