"""Top-k, top-p and min-p: every way to search a threshold finds the one that a sort finds."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import filters

ROWS, VOCAB = 12, 301
TOP_K = np.array([0, 1, 3, 50, 0, 0, 7, 400, 0, 20, 3, 0], np.int32)[:, None]
TOP_P = np.array([1, 1, 1, 1, 0.1, 0.9, 0.5, 0.8, 0.999, 0.3, 1e-6, 0.6], np.float32)[:, None]
MIN_P = np.array([0, 0, 0, 0, 0, 0, 0.4, 0, 0.01, 0, 0, 0.2], np.float32)[:, None]
UNUSED = np.zeros((ROWS, 1), bool)
ALL = filters.Filters(TOP_K, TOP_P, MIN_P, UNUSED)
WAYS = {
    "one bit": functools.partial(filters.among_all, bits=1),
    "several bits": functools.partial(filters.among_all, bits=3),
    "unrolled": functools.partial(filters.among_all, bits=3, unrolled=True),
    "among the largest": filters.among_largest,
}


def weights(seed, spread=4.0):
    """Weights of which the highest is 1; multiples of 2**-14, so that sums in float32 are exact in any order."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCAB)) * spread
    return (np.round(np.exp(logits - logits.max(1, keepdims=True)) * 2**14) / 2**14).astype(np.float32)


def top_k_top_p(top_k, top_p):
    """The same two filters for all rows."""
    return filters.Filters(np.full_like(TOP_K, top_k), np.full_like(TOP_P, top_p), np.zeros_like(MIN_P), UNUSED)


def sorted_twin(weights_v, top_k, top_p, min_p):
    """The least weight that is kept, by a sort; 0 keeps all."""
    down = np.sort(weights_v.astype(np.float64))[::-1]
    kth = down[min(top_k, len(down)) - 1] if top_k else 0.0
    if 0 < len(down) < top_k:
        kth = 0.0
    if top_p == 1:
        return max(kth, min_p)
    kept = down[down >= kth]
    wanted = float(np.float32(top_p) * np.float32(kept.sum()))
    return max(kth, kept[np.searchsorted(np.cumsum(kept), wanted)], min_p)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_every_way_keeps_what_a_sort_keeps(way, seed):
    """Of a vocabulary of 301, 4 buckets keep 8 entries each, then 16 keep 4: rows that keep more search all entries."""
    weights_xv = weights(seed)
    total_x1 = weights_xv.sum(1, keepdims=True)
    with mock.patch.object(filters, "LEVELS", ((4, 8), (16, 4))):
        found = jax.jit(way)(weights_xv, total_x1, ALL)
    for row in range(ROWS):
        wanted = sorted_twin(weights_xv[row], TOP_K[row, 0], TOP_P[row, 0], MIN_P[row, 0])
        kept = weights_xv[row] >= np.asarray(found.least)[row]
        np.testing.assert_array_equal(kept, weights_xv[row] >= wanted, err_msg=f"row {row}")
        assert np.asarray(found.total)[row] == weights_xv[row][kept].sum(), f"row {row}"


@pytest.mark.parametrize(("top_k", "searched"), [(3, []), (40, [256]), (290, [256, VOCAB])])
def test_more_is_searched_only_if_it_is_needed(monkeypatch, top_k, searched):
    """32 entries of 4 buckets are searched first, then 256 of 64, then all 301."""
    weights_xv, seen = weights(5)[:1], []
    monkeypatch.setattr(filters, "LEVELS", ((4, 8), (64, 4)))
    search = filters._search

    def spy(weights_xn, *args, **options):
        jax.debug.callback(lambda: seen.append(weights_xn.shape[1]))
        return search(weights_xn, *args, **options)

    monkeypatch.setattr(filters, "_search", spy)
    asked = jax.tree.map(lambda x: x[:1], top_k_top_p(top_k, 1))
    jax.block_until_ready(filters.among_largest(weights_xv, weights_xv.sum(1, keepdims=True), asked))
    jax.effects_barrier()
    assert seen == [32, *searched]


def test_rows_do_not_see_whether_others_need_all_entries(monkeypatch):
    monkeypatch.setattr(filters, "LEVELS", ((4, 8), (16, 4)))
    weights_xv = jnp.asarray(weights(6) + 1e-3 * np.random.default_rng(0).random((ROWS, VOCAB), np.float32))
    total_x1 = weights_xv.sum(1, keepdims=True)
    alone = filters.among_largest(weights_xv, total_x1, top_k_top_p(4, 0.3))
    more = top_k_top_p(np.where(np.arange(ROWS) == 3, 290, 4)[:, None], 0.3)
    beside = filters.among_largest(weights_xv, total_x1, more)
    others = np.arange(ROWS) != 3
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[others], np.asarray(other)[others])


def test_a_large_vocabulary_takes_one_step_over_all_entries():
    """The lowered programs differ by platform: buckets on a TPU, none of a GPU's loops inside of a branch."""
    number, count, flag = (jax.ShapeDtypeStruct((2, 1), dtype) for dtype in ("float32", "int32", "bool"))
    asked = filters.Filters(top_k=count, top_p=number, min_p=number, unused=flag)
    traced = jax.jit(filters.keep).trace(jax.ShapeDtypeStruct((2, 40000), "float32"), number, asked)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert "2048" in text["tpu"] and "2048" not in text["cpu"]
    assert "stablehlo.while" in text["cpu"] and "stablehlo.while" not in text["cuda"]
