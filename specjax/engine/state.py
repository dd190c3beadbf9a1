"""What the loop carries, and what a caller may do with it between rounds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from specjax.engine.adapt import Adapt
from specjax.engine.arguments import is_known
from specjax.engine.request import Request
from specjax.sharding import gathered
from specjax.types import Cache, Generation, Stats


@struct.dataclass
class Logprobs:
    """Log-probabilities of what was emitted, by slot; 0 elsewhere. ``Generation`` says what each is.

    Attributes:
      own_bs: float32.
      warped_bs: float32.
      top_tokens_bsn: int32, or None.
      top_bsn: float32, or None.
    """

    own_bs: Array
    warped_bs: Array
    top_tokens_bsn: Array | None
    top_bsn: Array | None

    @classmethod
    def empty(cls, rows: int, slots: int, top: int) -> "Logprobs":
        """Returns zeros, with the ``top`` likeliest tokens of each place unless that is 0."""
        zero_bs = jnp.zeros((rows, slots), jnp.float32)
        if not top:
            return cls(zero_bs, zero_bs, None, None)
        return cls(zero_bs, zero_bs, jnp.zeros((rows, slots, top), jnp.int32), jnp.zeros((rows, slots, top)))


@struct.dataclass
class State:
    """Everything the loop carries. Rows are independent slots, and the first axis of every array.

    Attributes:
      tokens_bs: int32, prompt and emitted tokens, zeros past a row's length.
      length_b: int32, tokens of each row.
      done_b: bool; such a row rests: it emits nothing and is not fed.
      cache: the target's, holding the first ``length_b - 1`` tokens of each row.
      draft: the drafter's own state.
      stats: counts so far.
      request: what was asked for; constant during rounds.
      keys_b: one key per row; constant.
      logprobs: of what was emitted, or None.
      adapt: what is known of drafting, or None if all rounds take all drafts.
      num_draft: g of the drafter that the state was made for.
      assumed: static, whether the costs of rounds are assumed ones, which ``run`` replaces by measured ones.
    """

    tokens_bs: Array
    length_b: Array
    done_b: Array
    cache: Cache
    draft: Any
    stats: Stats
    request: Request
    keys_b: Array
    logprobs: Logprobs | None
    adapt: Adapt | None
    num_draft: int = struct.field(pytree_node=False)
    assumed: bool = struct.field(pytree_node=False, default=False)

    @property
    def generation(self) -> Generation:
        """What was generated so far."""
        logs = self.logprobs
        return Generation(
            tokens=self.tokens_bs,
            lengths=self.length_b,
            prompt_lengths=self.request.prompt_length_b,
            stats=self.stats,
            logprobs=None if logs is None else logs.own_bs,
            warped_logprobs=None if logs is None else logs.warped_bs,
            top_tokens=None if logs is None else logs.top_tokens_bsn,
            top_logprobs=None if logs is None else logs.top_bsn,
        )


def stop(state: State, rows: ArrayLike) -> State:
    """Ends rows where they are, such as those whose text met a stop string. They can be extended or replaced.

    Args:
      state: from ``prefill`` or a round.
      rows: bool ``[rows]``, or integers: the rows to end.

    Raises:
      ValueError: a row is out of range, or the mask is of another shape.
    """
    return dataclasses.replace(state, done_b=state.done_b | _mask(rows, state.done_b.shape[0]))


def insert(state: State, rows: ArrayLike, other: State) -> State:
    """Replaces rows that are done by the rows of another state, in their order.

    Args:
      state: the state whose rows are replaced.
      rows: integers ``[k]``, different ones.
      other: ``k`` rows from ``prefill`` with the same target, drafter, ``slots`` and kinds of arguments.

    Raises:
      ValueError: a row is out of range, named twice or still running, or the states do not fit each other.
    """
    # 1. What shapes alone can say.
    index_k: Any = np.asarray(rows) if is_known(rows) else rows
    if index_k.ndim != 1 or not jnp.issubdtype(index_k.dtype, jnp.integer):
        raise ValueError(f"rows is {rows!r}; give a flat sequence of integers, one for each row of other")
    total, count = state.length_b.shape[0], other.length_b.shape[0]
    if index_k.shape[0] != count:
        raise ValueError(f"rows names {index_k.shape[0]} rows and other has {count}; give one for each")
    # 2. What is known outside jit. A row named twice would get one of two rows at random.
    if isinstance(index_k, np.ndarray):
        if len(set(index_k.tolist())) < count or index_k.min() < 0 or index_k.max() >= total:
            raise ValueError(f"rows are {index_k.tolist()}; give different ones from 0 to {total - 1}")
        if is_known(state.done_b):
            running = index_k[~gathered(state.done_b)[index_k]]
            if running.size:
                raise ValueError(f"row {running[0]} still runs; end it by specjax.stop, or replace it when it is done")
    # 3. Rows are the first axis of every array, so one rule copies them all.
    _check_fit(state, other)
    return jax.tree.map(lambda all_rows, new: all_rows.at[jnp.asarray(index_k)].set(new), state, other)


def _check_fit(state: State, other: State) -> None:
    """Raises ValueError unless the rows of both states have the same shapes."""
    slots = state.tokens_bs.shape[1], other.tokens_bs.shape[1]
    if slots[0] != slots[1]:
        raise ValueError(f"the states have {slots[0]} and {slots[1]} slots; give both prefills the same slots=")
    # The structure differs with the target's cache, the drafter's state, and what is None among the arguments.
    if jax.tree.structure(state) != jax.tree.structure(other):
        raise ValueError(
            "the states are of different kinds; make both with the same target, drafter and kinds of arguments "
            "(logprobs, penalties, logit_bias, seeds or keys, fixed, costs)"
        )
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True)
    for (path, leaf), twin in leaves:
        if leaf.shape[1:] != twin.shape[1:] or leaf.dtype != twin.dtype:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} is {leaf.shape} {leaf.dtype} in state and {twin.shape} {twin.dtype} in other; only the rows "
                "may differ: make both with the same target, drafter and number of stop tokens"
            )


def _mask(rows: Any, total: int) -> Array:
    """Returns bool ``[rows]`` from a mask or from rows' numbers."""
    given = np.asarray(rows) if is_known(rows) else rows
    if given.dtype == bool:
        if given.shape != (total,):
            raise ValueError(f"rows is a mask of shape {given.shape}; give ({total},), or the rows' numbers")
        return jnp.asarray(given)
    if given.ndim > 1 or (given.size and not jnp.issubdtype(given.dtype, jnp.integer)):
        raise ValueError(f"rows is {rows!r}; give a bool mask of shape ({total},), or the rows' numbers")
    if isinstance(given, np.ndarray) and given.size and not (0 <= given.min() and given.max() < total):
        raise ValueError(f"rows are {given.tolist()}; give numbers from 0 to {total - 1}")
    return jnp.zeros((total,), bool).at[jnp.asarray(given, jnp.int32).reshape(-1)].set(True)
