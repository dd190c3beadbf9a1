"""The cache: writes at offsets of each row's own, growth, and garbage past a row's length that nobody sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from specjax import cache as cache_lib
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params

SLOTS = 12
_write = jax.jit(cache_lib.write)


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 5, 9), (9, 8, 7), (3, 3, 9)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_equals_the_twin(start, dtype):
    """Up to the last slot; the new values are rounded to the cache's dtype."""
    rng = np.random.default_rng(0)
    before = jnp.asarray(rng.normal(size=(3, 2, SLOTS, 4)), dtype)
    new = rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
    after = _write(before, new, jnp.asarray(start, jnp.int32))
    assert after.dtype == dtype
    np.testing.assert_array_equal(after, reference_model.write(before, new, start))


def test_a_write_of_the_whole_row():
    new = np.random.default_rng(0).normal(size=(2, 1, SLOTS, 4)).astype(np.float32)
    np.testing.assert_array_equal(cache_lib.write(jnp.ones((2, 1, SLOTS, 4)), new, jnp.zeros(2, jnp.int32)), new)


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
    cache = cache_lib.allocate(layers=2, rows=3, slots=SLOTS, kv_heads=1, widths=(9,), dtype=jnp.dtype("float32"))
    assert [[x.shape for x in layer] for layer in cache.layers] == [[(3, 1, SLOTS, 9)]] * 2


def test_allocate_gives_each_layer_empty_arrays():
    cache = cache_lib.allocate(layers=3, rows=2, slots=SLOTS, kv_heads=5, widths=(4, 4), dtype=jnp.dtype("bfloat16"))
    assert [len(layer) for layer in cache.layers] == [2, 2, 2]
    for array in jax.tree.leaves(cache):
        assert (array.shape, array.dtype) == ((2, 5, SLOTS, 4), jnp.bfloat16)
        assert not np.any(array)


@pytest.mark.parametrize("widths", [(4, 4), (4, 6), (9,)], ids=["keys and values", "wider values", "latents"])
def test_grow_keeps_what_is_there_and_adds_empty_slots(widths):
    cache = cache_lib.allocate(2, 3, SLOTS, 2, widths, jnp.dtype("float32"))
    cache = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype), cache)
    grown = cache_lib.grow(cache, 20)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(grown), strict=True):
        assert (*new.shape[:3], new.dtype) == (3, 2, 20, old.dtype)
        assert new.shape[3] == old.shape[3]
        np.testing.assert_array_equal(new[:, :, :SLOTS], old)
        assert not np.any(new[:, :, SLOTS:])
    same = cache_lib.grow(cache, SLOTS)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, cache))


@pytest.mark.parametrize("slots", [SLOTS - 1, 1, 0, -1])
def test_a_cache_does_not_shrink(slots):
    cache = cache_lib.allocate(1, 1, SLOTS, 1, (2,), jnp.dtype("float32"))
    with pytest.raises(ValueError, match=rf"from {SLOTS} to {slots} slots.* at least {SLOTS}"):
        cache_lib.grow(cache, slots)


# Garbage in a decoder's cache.

CONFIG = DecoderConfig(19, 16, 24, 2, 4, 2, max_position_embeddings=64)
_forward = jax.jit(
    lambda model, tokens_bt, cache, start_b: model.forward(model.params, tokens_bt, cache, start_b),
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
        behind = jnp.arange(x.shape[2])[None] >= jnp.asarray(length_b)[:, None]
        return jnp.where(behind[:, None, :, None], jnp.asarray(value, x.dtype), x)

    return jax.tree.map(spoil, cache)


@pytest.mark.parametrize("slots", [24, 300])
@pytest.mark.parametrize("value", [1e30, float(np.finfo(np.float32).max), -float(np.finfo(np.float32).max)])
def test_garbage_past_a_rows_length_changes_no_bit(model, slots, value):
    """In an unused cache, and behind ragged rows as rejected drafts leave it."""
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


def test_a_grown_cache_goes_on_with_the_same_logits(model):
    rng = np.random.default_rng(1)
    prompt, block = (jnp.asarray(rng.integers(0, 19, (3, t)), jnp.int32) for t in (8, 4))
    zero, length = jnp.zeros(3, jnp.int32), jnp.asarray([8, 2, 5], jnp.int32)
    small = _forward(model, prompt, model.init_cache(3, 24), zero).cache
    large = _forward(model, prompt, model.init_cache(3, 300), zero).cache
    grown = _forward(model, block, cache_lib.grow(small, 300), length)
    fresh = _forward(model, block, large, length)
    np.testing.assert_allclose(grown.logits_btv, fresh.logits_btv, atol=1e-6, rtol=0)
