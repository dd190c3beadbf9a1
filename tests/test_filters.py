"""Top-k and top-p: every way to search a threshold finds the one that a sort finds."""

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
IGNORED = np.zeros((ROWS, 1), bool)
WAYS = {
    "one bit": functools.partial(filters.search_all, bits=1),
    "several bits": functools.partial(filters.search_all, bits=3),
    "unrolled": functools.partial(filters.search_all, bits=3, unrolled=True),
    "among the largest": filters.among_largest,
}


def weights(seed, spread=4.0):
    """Weights of which the highest is 1; multiples of 2**-14, so that sums in float32 are exact in any order."""
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCAB)) * spread
    return (np.round(np.exp(logits - logits.max(1, keepdims=True)) * 2**14) / 2**14).astype(np.float32)


def sorted_twin(weights_v, top_k, top_p):
    """The least weight that is kept, by a sort; 0 keeps all."""
    down = np.sort(weights_v.astype(np.float64))[::-1]
    kth = down[min(top_k, len(down)) - 1] if top_k else 0.0
    if 0 < len(down) < top_k:
        kth = 0.0
    if top_p == 1:
        return kth
    kept = down[down >= kth]
    wanted = float(np.float32(top_p) * np.float32(kept.sum()))
    return max(kth, kept[np.searchsorted(np.cumsum(kept), wanted)])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_every_way_keeps_what_a_sort_keeps(way, seed):
    """Of a vocabulary of 301, 8 buckets keep 4 entries each: rows that keep more need a search of all entries."""
    weights_xv = weights(seed)
    total_x1 = weights_xv.sum(1, keepdims=True)
    with mock.patch.object(filters, "BUCKETS", 8):
        found = np.asarray(jax.jit(way)(weights_xv, total_x1, TOP_K, TOP_P, IGNORED))
    for row in range(ROWS):
        wanted = sorted_twin(weights_xv[row], TOP_K[row, 0], TOP_P[row, 0])
        np.testing.assert_array_equal(weights_xv[row] >= found[row], weights_xv[row] >= wanted, err_msg=f"row {row}")


def test_buckets_alone_suffice_for_few_tokens(monkeypatch):
    """No entry outside of the buckets' largest is then looked at; one distribution that needs more is searched."""
    weights_xv = weights(5)
    searched = []
    monkeypatch.setattr(filters, "BUCKETS", 32)
    search = filters.search_all

    def spy(*args, **options):
        jax.debug.callback(lambda: searched.append(1))
        return search(*args, **options)

    monkeypatch.setattr(filters, "search_all", spy)
    args = weights_xv, weights_xv.sum(1, keepdims=True)
    jax.block_until_ready(filters.among_largest(*args, np.full_like(TOP_K, 3), np.full_like(TOP_P, 0.9), IGNORED))
    jax.effects_barrier()
    assert not searched
    jax.block_until_ready(filters.among_largest(*args, np.full_like(TOP_K, 290), np.full_like(TOP_P, 1), IGNORED))
    jax.effects_barrier()
    assert searched


def test_rows_do_not_see_whether_others_need_all_entries(monkeypatch):
    monkeypatch.setattr(filters, "BUCKETS", 32)
    weights_xv = jnp.asarray(weights(6) + 1e-3 * np.random.default_rng(0).random((ROWS, VOCAB), np.float32))
    total_x1 = weights_xv.sum(1, keepdims=True)
    top_p = np.full_like(TOP_P, 0.3)
    alone = filters.among_largest(weights_xv, total_x1, np.full_like(TOP_K, 4), top_p, IGNORED)
    beside = filters.among_largest(
        weights_xv, total_x1, np.where(np.arange(ROWS) == 3, 290, 4)[:, None], top_p, IGNORED
    )
    others = np.arange(ROWS) != 3
    np.testing.assert_array_equal(np.asarray(alone)[others], np.asarray(beside)[others])


def test_a_large_vocabulary_takes_one_step_over_all_entries():
    """The lowered programs differ by platform: buckets on a TPU, none of a GPU's loops inside of a branch."""
    shapes = [jax.ShapeDtypeStruct((2, n), t) for n, t in ((40000, "float32"), (1, "float32"), (1, "int32"))]
    args = [shapes[0], shapes[1], shapes[2], shapes[1], jax.ShapeDtypeStruct((2, 1), bool)]
    traced = jax.jit(filters.least_kept).trace(*args)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert "2048" in text["tpu"] and "2048" not in text["cpu"]
    assert "stablehlo.while" in text["cpu"] and "stablehlo.while" not in text["cuda"]
