"""What the folders of all draft heads share: parameters are read and checked, copies of the target's tables found."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specjax.checkpoint.models import read_params, with_places
from specjax.hf.weights import Parameter
from specjax.quantized import Kind
from specjax.sharding import Rules, gathered, shard
from specjax.types import LanguageModel

_COMPARED = 1024  # rows at a time: a whole table of the target need not fit the host twice
D = TypeVar("D")


def read_onto(mesh: Mesh | None, rules: Rules, drafter: D, params: Any, quantize: Kind | None = None) -> D:
    """Returns the drafter with its parameters read. Each process reads the parts that its devices hold.

    Args:
      mesh, rules: as for ``specjax.load``, errors included.
      drafter: a drafter with shapes and dtypes in place of parameters.
      params: a tree of ``Parameter`` in the same structure.
      quantize: as for ``specjax.load``.
    """
    assert dataclasses.is_dataclass(drafter) and not isinstance(drafter, type)
    read = read_params(params, with_places(drafter, mesh, rules), quantize=quantize)
    drafter = dataclasses.replace(drafter, params=read)
    return drafter if mesh is None or quantize is None else shard(drafter, mesh, rules)


def is_targets_embedding(table_vd: Parameter, target: LanguageModel) -> bool:
    """Returns whether a stored embedding ``[v, d]`` equals the target's, bit for bit in the target's dtype.

    The target must have ``embed``.
    """
    assert target.embed is not None
    embed = target.embed
    return _equal(table_vd, lambda start, end: embed(target.params, jnp.arange(start, end, dtype=jnp.int32)[None])[0])


def is_targets_head(kernel_dv: Parameter, target: LanguageModel) -> bool:
    """Returns whether a stored output head ``[d, v]`` equals the target's, bit for bit in the target's dtype.

    The target must have ``embed`` and ``unembed``. Its output head is known only as a function. Row i of the head's
    kernel is the logits of unit vector i.
    """
    assert target.unembed is not None
    unembed, like = target.unembed, target.embedding_spec
    if kernel_dv.shape != (like.shape[-1], target.vocab_size):
        return False

    def rows(start: int, end: int) -> jax.Array:
        unit_bd = jax.nn.one_hot(jnp.arange(start, end), like.shape[-1], dtype=like.dtype)
        # An accelerator's default precision would round the kernel's entries.
        with jax.default_matmul_precision("highest"):
            return unembed(target.params, unit_bd[None])[0].astype(like.dtype)

    return _equal(kernel_dv, rows)


def drop_targets_tables(params: Any, own: dict[str, bool], target: LanguageModel) -> dict[str, bool]:
    """Drops the embedding and output head of a draft head that equal the target's, which are then used.

    Args:
      params: of ``Parameter``, changed in place.
      own: "own_embedding" and "own_head", whether the folder has them.
      target: the model to draft for, with ``embed`` and ``unembed``.

    Returns:
      ``own``, of what is left.
    """
    own = dict(own)
    if own["own_embedding"] and is_targets_embedding(params["embed_tokens"]["weight"], target):
        own["own_embedding"] = False
        del params["embed_tokens"]
    if own["own_head"] and is_targets_head(params["lm_head"]["kernel"], target):
        own["own_head"] = False
        del params["lm_head"]
    return own


def check_draft_ids(params: Any, draft_vocab_size: int | None) -> None:
    """Raises ValueError unless ``draft_of_v``, if it is there, holds each of ``draft_vocab_size`` draft ids once."""
    if "draft_of_v" in params:
        draft_of_v, count = np.asarray(params["draft_of_v"]), draft_vocab_size or 0
        if not np.array_equal(np.sort(draft_of_v[draft_of_v >= 0]), np.arange(count)):
            raise ValueError(f"draft_of_v must hold each draft id from 0 to {count - 1} once, and -1 elsewhere")


def speculators_about(kind: str, num_draft: int, target_name: str | None) -> dict[str, Any]:
    """Returns ``speculators_config``, which names the target and says how to draft.

    Args:
      kind: ``speculators_model_type``.
      num_draft: tokens per round.
      target_name: the target's name or path; None if it is not known.
    """
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_draft}
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
        "verifier": {"name_or_path": target_name, "architectures": []},
    }


def _equal(parameter: Parameter, rows: Callable[[int, int], jax.Array]) -> bool:
    """Returns whether a stored table equals the target's; ``rows(start, end)`` computes rows of the target's."""
    for start in range(0, parameter.shape[0], _COMPARED):
        end = min(start + _COMPARED, parameter.shape[0])
        known = gathered(rows(start, end))
        if not np.array_equal(parameter.read(known.dtype, (slice(start, end),)), known):
            return False
    return True
