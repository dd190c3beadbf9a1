"""The cache: writes at offsets of each row's own, and garbage past a row's length that nobody sees."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from jitted import jit
from test_platforms import known

from specjax import cache as cache_lib
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

SLOTS = 12


def _looped(stored, new, start_b):
    with mock.patch.object(cache_lib, "MOST_UNROLLED_ROWS", 1):
        return cache_lib.row_by_row(stored, new, start_b)


WAYS = {"unrolled": cache_lib.row_by_row, "looped": _looped, "scattered": cache_lib.scattered}
IN_DTYPES = [(way, dtype) for way in WAYS for dtype in (jnp.float32, jnp.bfloat16)]
WAYS["integers"] = cache_lib.as_integers


@pytest.mark.parametrize(("way", "dtype"), [*IN_DTYPES, ("integers", jnp.bfloat16)])
@pytest.mark.parametrize("start", [(0, 0, 0), (0, 5, 9), (9, 8, 7), (3, 3, 9)])
def test_each_way_of_writing_equals_the_twin(way, start, dtype):
    """Up to the last slot; each array has its own width."""
    rng = np.random.default_rng(0)
    before, new = (
        tuple(jnp.asarray(rng.normal(size=(3, 2, slots, width)), dtype) for width in (4, 6)) for slots in (SLOTS, 3)
    )
    written = jax.jit(WAYS[way])(before, new, jnp.asarray(start, jnp.int32))
    for after, old, block in zip(written, before, new, strict=True):
        assert after.dtype == dtype
        np.testing.assert_array_equal(after, reference_model.write(old, block, start))


@pytest.mark.parametrize("rows", [3, cache_lib.MOST_UNROLLED_ROWS + 2])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_kept_path_moves_to_the_slots_after_the_rows_end(platform, rows):
    """In plain Python, and by the ways of both platforms; other slots stay as they are."""
    rng, places = np.random.default_rng(rows), 6
    stored = tuple(rng.normal(size=(rows, 2, 16, width)).astype(np.float32) for width in (4, 8))
    start_b = rng.integers(0, 16 - places + 1, size=rows).astype(np.int32)
    path_bt = np.sort(rng.integers(0, places, size=(rows, 4)), axis=1).astype(np.int32)
    with known(platform):
        found = jit(cache_lib.gather_slots, static_argnums=3)(stored, start_b, path_bt, places)
    for array, moved in zip(stored, found, strict=True):
        wanted = array.copy()
        for row, start in enumerate(start_b):
            wanted[row, :, start : start + 4] = array[row][:, start + path_bt[row]]
        np.testing.assert_array_equal(moved, wanted)


def test_a_write_of_the_whole_row_in_the_dtype_of_the_cache():
    new = np.random.default_rng(0).normal(size=(2, 1, SLOTS, 4)).astype(np.float32)
    (after,) = cache_lib.update((jnp.ones((2, 1, SLOTS, 4), jnp.bfloat16),), (new,), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(after, new.astype(jnp.bfloat16))


def test_a_cpu_converts_no_cache_of_bfloat16():
    """The check is first shown the way that does."""

    def is_converted(way):
        stored, new = (jnp.zeros((3, 2, slots, 4), jnp.bfloat16) for slots in (SLOTS, 1))
        compiled = jax.jit(way, donate_argnums=0).lower((stored,), (new,), jnp.zeros(3, jnp.int32)).compile()
        return f"f32[3,2,{SLOTS},4]" in compiled.as_text()

    assert is_converted(cache_lib.row_by_row) and not is_converted(cache_lib.update)


def test_programs_do_not_grow_with_rows():
    """More rows are written in a loop: the program of 1024 rows is as long as that of 64."""

    def length(rows):
        stored, new = (jnp.zeros((rows, 1, slots, 4)) for slots in (SLOTS, 3))
        lowered = jax.jit(cache_lib.update).lower((stored,), (new,), jnp.zeros(rows, jnp.int32))
        return len(lowered.as_text().splitlines())

    assert length(1024) == length(64) < 2 * length(2)


@pytest.mark.parametrize("widths", [(4, 4), (4, 6), (9,)], ids=["keys and values", "wider values", "latents"])
def test_update_writes_each_array_of_a_layer(widths):
    rng = np.random.default_rng(1)
    stored, new = (
        tuple(rng.normal(size=(3, 2, slots, width)).astype(np.float32) for width in widths) for slots in (SLOTS, 3)
    )
    start = jnp.asarray([0, 5, 9], jnp.int32)
    updated = cache_lib.update(stored, new, start)
    assert len(updated) == len(widths)
    for after, before, block in zip(updated, stored, new, strict=True):
        np.testing.assert_array_equal(after, reference_model.write(before, block, start))
    assert cache_lib.update(None, new, start) is new, "a block without a cache is all there is"
    with pytest.raises(ValueError, match="zip"):
        cache_lib.update(stored, (*new, new[0]), start)


def test_layers_of_latents_have_one_array():
    layer = cache_lib.allocate(rows=3, slots=SLOTS, kv_heads=1, widths=(9,), dtype=jnp.dtype("float32"))
    assert [x.shape for x in layer] == [(3, 1, SLOTS, 9)]


def test_allocate_gives_a_layer_empty_arrays():
    layer = cache_lib.allocate(rows=2, slots=SLOTS, kv_heads=5, widths=(4, 4), dtype=jnp.dtype("bfloat16"))
    assert len(layer) == 2
    for array in layer:
        assert (array.shape, array.dtype) == ((2, 5, SLOTS, 4), jnp.bfloat16)
        assert not np.any(array)


# Garbage in a decoder's cache.

CONFIG = DecoderConfig(19, 16, 24, 2, 4, 2, max_position_embeddings=64)
_forward = jit(
    lambda model, tokens_bt, cache, start_b: model.forward(model.params, whole_feed(tokens_bt, start_b), cache),
)


@pytest.fixture(scope="module")
def model():
    params = init_params(CONFIG, jax.random.key(0))
    return decoder_model(CONFIG, jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, params))


def filled(model, rows, slots, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), model.init_cache(rows, slots))


def past(length_b, cache, value):
    """Returns the cache with ``value`` in every slot past a row's length."""

    def spoil(x):
        past_bs = jnp.arange(x.shape[2])[None] >= jnp.asarray(length_b)[:, None]
        return jnp.where(past_bs[:, None, :, None], jnp.asarray(value, x.dtype), x)

    return jax.tree.map(spoil, cache)


@pytest.mark.parametrize("slots", [24, 300])
@pytest.mark.parametrize("value", [1e30, float(np.finfo(np.float32).max), -float(np.finfo(np.float32).max)])
def test_garbage_past_a_rows_length_changes_no_bit(model, slots, value):
    """In an unused cache, and past ragged rows as rejected drafts leave it."""
    rng = np.random.default_rng(0)
    length = jnp.asarray([1, 8, 5], jnp.int32)
    prompt = jnp.asarray(rng.integers(0, 19, (3, 8)), jnp.int32)
    block = jnp.asarray(rng.integers(0, 19, (3, 4)), jnp.int32)
    zero = jnp.zeros(3, jnp.int32)

    clean = _forward(model, prompt, model.init_cache(3, slots), zero)
    dirty = _forward(model, prompt, filled(model, 3, slots, value), zero)
    np.testing.assert_array_equal(dirty.logits_btv, clean.logits_btv)

    clean = _forward(model, block, past(length, clean.cache, 0.0), length)
    dirty = _forward(model, block, past(length, dirty.cache, value), length)
    assert np.isfinite(clean.logits_btv).all()
    np.testing.assert_array_equal(dirty.logits_btv, clean.logits_btv)

    inside = _forward(model, block, past(length - 1, clean.cache, 2.0), length)
    assert (np.abs(inside.logits_btv - clean.logits_btv).max((1, 2)) > 1e-3).all(), "the last slot is not read"
