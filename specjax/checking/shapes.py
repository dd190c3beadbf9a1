"""What shapes and dtypes say of a model: passes are traced and not computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.types import Cache, LanguageModel, Output, whole_feed

BLOCK = 5
"""Places of a short pass."""

_BROKEN = "the model breaks the contract of specjax.LanguageModel"


def broken_model(clause: str) -> ValueError:
    """Returns the error that names a clause."""
    return ValueError(f"{_BROKEN}: {clause}")


def _same_leaves(tree: Any, other: Any) -> bool:
    """Returns whether two trees hold the same objects in the same places."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        return False
    return all(x is y for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def states_to_compare(target: LanguageModel) -> tuple[int, ...]:
    """Returns the hidden states to compare: those that the model says it has."""
    if target.num_layers is not None:
        return (0, target.num_layers, -1)
    return () if target.unembed is None else (-1,)


def check_shapes(target: LanguageModel, rows: int, slots: int, capture: tuple[int, ...]) -> None:
    """Traces a pass and checks what comes out of it; computes nothing."""
    empty = jax.eval_shape(lambda: target.init_cache(rows, slots))
    check_rows_first(f"init_cache({rows}, {slots})", empty, rows, broken_model)
    # One more row, in case another axis of the cache happens to be as long as the first.
    check_rows_first(
        f"init_cache({rows + 1}, {slots})",
        jax.eval_shape(lambda: target.init_cache(rows + 1, slots)),
        rows + 1,
        broken_model,
    )
    feed = whole_feed(jnp.zeros((rows, BLOCK), jnp.int32))

    def run(params: Any) -> Output:
        given = {"params": params, "cache": target.init_cache(rows, slots)}
        before = jax.tree.map(lambda x: x, given)  # in containers of its own
        output = dataclasses.replace(target, params=given["params"]).read(feed, given["cache"], capture)
        for name, tree in given.items():
            if not _same_leaves(tree, before[name]):
                raise broken_model(f"forward mutates its argument {name}; return new values in output.cache alone")
        return output

    try:
        output = jax.eval_shape(run, target.params)
    except Exception as error:
        if str(error).startswith(_BROKEN):
            raise
        raise broken_model(
            f"forward(params, feed, cache, capture={capture}) raised {type(error).__name__}: {error}"
        ) from error
    shape = (rows, BLOCK, target.vocab_size)
    logits = output.logits_btv
    if logits.shape != shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise broken_model(
            f"logits_btv is {logits.shape} and {logits.dtype}; return floating {shape}, rows, places, vocabulary"
        )
    _check_features(output.features, rows, capture)

    def keep(params: Any) -> Cache:
        return target.keep(run(params).cache, feed, feed.count_b)

    name = "forward returned a cache" if target.commit is None else "commit returned a cache"
    check_same_tree(name, jax.eval_shape(keep, target.params), "init_cache's", empty, broken_model)


def _check_features(features: Any, rows: int, capture: tuple[int, ...]) -> None:
    good = isinstance(features, tuple) and len(features) == len(capture)
    if not good or any(x.ndim != 3 or x.shape[:2] != (rows, BLOCK) for x in features):
        got = [x.shape for x in jax.tree.leaves(features)]
        raise broken_model(
            f"features has the shapes {got} for capture={capture}; return a tuple with one [b, t, d] state per index"
        )


def check_rows_first(name: str, tree: Any, rows: int, broken: Any) -> None:
    """Raises unless every leaf has the rows as its first axis."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            raise broken(
                f"{name}{jax.tree_util.keystr(path)} has the shape {leaf.shape}; its first axis must be the {rows} "
                "rows (for one index of all rows: keep an index per row)"
            )


def check_same_tree(name: str, got: Any, other: str, want: Any, broken: Any) -> None:
    """Raises unless two trees have the same structure, shapes and dtypes, as the carry of a loop must."""
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise broken(
            f"{name} of the structure {jax.tree.structure(got)}, and {other} is {jax.tree.structure(want)}; keep one"
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise broken(
                f"{name} with {x.shape} and {x.dtype} at {jax.tree_util.keystr(path)}, and {other} has {y.shape} and "
                f"{y.dtype} there; keep shapes and dtypes"
            )
