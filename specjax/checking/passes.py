"""Passes that a text is fed in."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from specjax.checking.shapes import BLOCK

Block = tuple[int, Any, Any]
"""A pass over so many places: how many of each row are real, and how many of these stay."""


def counts(rng: np.random.Generator, rows: int, least: int) -> Iterator[Any]:
    """Yields counts of each row without end, from ``least`` to the whole block; first, different ones."""
    yield np.arange(rows, dtype=np.int32) % BLOCK + least
    while True:
        yield rng.integers(least, BLOCK + 1, rows).astype(np.int32)


def prompt(rng: np.random.Generator, rows: int, slots: int) -> Iterator[Block]:
    """Yields two wide passes and then short ones without end, rows of different counts."""
    half, row_b = slots // 2, np.arange(rows, dtype=np.int32)
    first_b = np.maximum(half - 3 - row_b * (half // rows), 1)
    second_b = np.where(row_b == 0, 0, 1 + row_b * 3 % (half - 1))
    yield half, first_b, first_b
    yield half, second_b, second_b
    for n_b in counts(rng, rows, 0):
        yield BLOCK, n_b, n_b


def mixed(rng: np.random.Generator, rows: int) -> Iterator[Block]:
    """Yields passes of everything at once, without end."""
    while True:
        width = int(rng.choice([1, BLOCK]))
        count_b = rng.integers(0, width + 1, rows).astype(np.int32)
        yield width, count_b, rng.integers(0, count_b + 1).astype(np.int32)
