"""The law of texts from trees of drafts, through the loop and the caches, as ``test_laws.py`` has it for chains."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from test_laws import (
    AGAINST,
    DECODER_ROWS,
    FILTERED,
    PENALIZED,
    PLAIN,
    TARGET,
    assisted,
    emitted,
    p_value,
    random_table,
)
from trees import BUSHY, STAR, TreeDrafter, ranks_along

from specjax import verify

SLOTS = 24
PATHS = (-1, 0, -1, 2)  # two paths of two drafts
DRAWN = TreeDrafter(jnp.asarray(random_table(1)))
CASES = {
    "drawn, recursive": (DRAWN, verify.recursive),
    "drawn, traversal": (DRAWN, verify.traversal),
    "drawn, walk": (DRAWN, verify.walk),
    "drawn, ragged, traversal": (dataclasses.replace(DRAWN, ragged=True), verify.traversal),
    "drawn from a bad table, recursive": (TreeDrafter(jnp.asarray(AGAINST)), verify.recursive),
    "chosen, recursive": (dataclasses.replace(DRAWN, ranks=ranks_along(BUSHY, 5)), verify.recursive),
    "chosen, traversal": (dataclasses.replace(DRAWN, ranks=ranks_along(BUSHY, 5)), verify.traversal),
    "chosen, walk": (dataclasses.replace(DRAWN, ranks=ranks_along(BUSHY, 6)), verify.walk),
    "paths, multipath": (dataclasses.replace(DRAWN, parents=PATHS), verify.multipath),
}
SETTINGS = dict.fromkeys(CASES, PLAIN) | {
    "drawn, ragged, traversal": FILTERED,
    "drawn, recursive": PENALIZED,
    "chosen, walk": PENALIZED,
    "paths, multipath": FILTERED,
}
texts_of = functools.partial(emitted, slots=SLOTS)


@pytest.mark.parametrize("name", CASES)
def test_joint_law(name):
    (drafter, rule), settings = CASES[name], SETTINGS[name]
    p = p_value(texts_of(TARGET, drafter, rule, settings), TARGET, settings)
    print(f"p = {p:.4f}")
    assert p > 1e-3


WITHOUT = dataclasses.replace(DRAWN, replacement=False)


@pytest.mark.parametrize("rule", [verify.recursive, verify.traversal], ids=["recursive", "traversal"])
def test_joint_law_of_siblings_that_differ(rule):
    assert p_value(texts_of(TARGET, WITHOUT, rule, PLAIN), TARGET, PLAIN) > 1e-3


def test_joint_law_of_a_decoder_with_a_window():
    target, _ = assisted()
    texts = texts_of(target, DRAWN, verify.traversal, PLAIN, rows_per_prompt=DECODER_ROWS)
    assert p_value(texts, target, PLAIN) > 1e-3


# Faults.


def without_mask(params, feed, cache, capture=()):
    return TARGET.forward(params, dataclasses.replace(feed, parents_bt=None), cache, capture)


def says_independent(proposal, target_btv, draws):
    """Siblings that differ, verified as if they had been drawn independently."""
    return verify.recursive(dataclasses.replace(proposal, replacement=True), target_btv, draws)


says_independent.shares_noise, says_independent.trees = False, True
FAULTS = {
    "a tree is read as a chain": (TARGET.replace(forward=without_mask), DRAWN, verify.recursive),
    "a path that is not gathered": (TARGET.replace(gather=lambda cache, feed, path_bt: cache), DRAWN, verify.walk),
    "siblings that differ, as if independent": (
        TARGET,
        TreeDrafter(jnp.asarray(AGAINST), STAR, replacement=False),
        says_independent,
    ),
}


@pytest.mark.parametrize(("target", "drafter", "rule"), FAULTS.values(), ids=FAULTS)
def test_fault_is_seen(target, drafter, rule):
    p = p_value(texts_of(target, drafter, rule, PLAIN), TARGET, PLAIN)
    print(f"p = {p:.2e}")
    assert p < 1e-6


def test_penalties_that_count_siblings_are_seen(monkeypatch):
    """Each place counts all drafts with smaller indices, as in a chain."""
    import specjax.sampling

    right = specjax.sampling.penalize
    monkeypatch.setattr(specjax.sampling, "penalize", lambda *args: right(*args[:5]))
    other = dataclasses.replace(DRAWN, ranks=ranks_along(BUSHY, 4))
    assert p_value(texts_of(TARGET, other, verify.walk, PENALIZED), TARGET, PENALIZED) < 1e-6
