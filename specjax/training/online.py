"""Drafts that keep up with a policy: the draft is trained on the policy's own rollouts, between its updates."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from specjax.drafters.block import BlockDrafter
from specjax.drafters.dflash import DFlashHead
from specjax.drafters.feature import FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.model import ModelDrafter
from specjax.engine.programs import classes_key
from specjax.engine.rollout import Rollout
from specjax.platforms import platform_of
from specjax.quantized import is_quantized
from specjax.training.blocks import block_objective
from specjax.training.loop import adamw
from specjax.training.losses import LOSSES
from specjax.training.objectives import DraftObjective, head_objective, medusa_objective, model_objective
from specjax.types import Drafter, LanguageModel


@struct.dataclass
class DraftState:
    """A draft in training.

    Attributes:
      drafter: drafts with the newest parameters, in their own dtypes.
      params: the parameters that are trained, float32; None in place of integers, such as a draft vocabulary.
      optimizer: the optimiser's state.
    """

    drafter: Any
    params: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class DraftTrainer:
    """Trains a draft on rollouts, a few steps after each update of the policy; hashable.

    ``update`` compiles once. New rollouts, a new policy and the trained draft itself have the shapes of the old ones,
    so neither it nor ``specjax.rollout`` compiles anew.

    A step reads the completions once with the policy as it is now: the states and logits that the rollout saw are those
    of the policy before its update, and the next rollout will see other ones. The draft learns the policy's raw law
    (temperature 1, no filter), at the tokens of completions alone.

    Attributes:
      loss: "kl", "total_variation" or "next_token", as in recipes.
      learning_rate: of AdamW, constant.
      weight_decay: of matrices.
      rows: completions of a step; None: all of a rollout in one step. Example, 64 completions and 16 rows: an update
        takes 4 steps.
      passes: how often an update goes through the rollout.

    Raises:
      ValueError: an attribute is out of its range.
    """

    loss: str = "kl"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    rows: int | None = None
    passes: int = 1

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; give one of {', '.join(LOSSES)}")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate!r} and weight_decay {self.weight_decay!r}; give a rate above 0 "
                "and a decay of at least 0"
            )
        for name, value in (("rows", 1 if self.rows is None else self.rows), ("passes", self.passes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give an integer of at least 1")

    def init(self, drafter: Drafter) -> DraftState:
        """Returns the state before the first step.

        Args:
          drafter: a ``FeatureDrafter`` (EAGLE and MTP heads), ``MedusaDrafter``, ``BlockDrafter`` of a DFlash or DSpark
            head, or ``ModelDrafter``. Its arrays are not changed.

        Raises:
          TypeError: there is no objective for this kind of drafter.
          ValueError: the drafter's parameters are quantised.
        """
        _objective(self.loss, drafter)
        params = _params_of(drafter)
        if is_quantized(params):
            raise ValueError("the drafter's parameters are quantised; train a draft of floating-point ones")
        trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32) if _is_float(x) else None, params)
        return DraftState(drafter, trained, self._optimizer().init(trained))

    def update(self, state: DraftState, target: LanguageModel, rollout: Rollout) -> tuple[DraftState, dict[str, Array]]:
        """Trains the draft on a rollout. Pure, and usable inside the caller's own ``jit``.

        Args:
          state: from ``init`` or an earlier update.
          target: the policy as it will sample next.
          rollout: completions, of this policy or the one before its update.

        Returns:
          The state, and float32 scalars: "loss", the mean over the steps, each before it was taken; and how the draft
          did in the rollout: "acceptance_rate" and "tokens_per_round".

        Raises:
          ValueError: the completions do not divide into steps of ``rows``, or are too short for the draft's chains.
        """
        rows, total = self.rows or len(rollout.lengths), len(rollout.lengths)
        if total % rows:
            raise ValueError(f"the rollout has {total} completions and rows is {rows}; give a divisor of {total}")
        with platform_of((state, target, rollout)):
            classes = classes_key(target, state.drafter)
            return _update(self, state, target, rollout, classes=classes)

    def _optimizer(self) -> optax.GradientTransformation:
        return adamw(self.learning_rate, self.weight_decay)


@functools.partial(jax.jit, static_argnums=0, static_argnames="classes")
def _update(trainer: DraftTrainer, state: DraftState, target: LanguageModel, rollout: Rollout, *, classes: int):
    del classes  # only a part of the key under which jit keeps the program
    objective, optimizer = _objective(trainer.loss, state.drafter), trainer._optimizer()
    total = rollout.tokens.shape[0]
    rows = trainer.rows or total
    most = target.max_positions or rollout.tokens.shape[1]

    def groups(array: Array) -> Array:
        """Returns ``[steps, rows, ..]``. A step has completions of as many prompts as there are, so rows alternate."""
        return jnp.swapaxes(array[:, :most].reshape(rows, total // rows, -1), 0, 1)

    def step(carry: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        trained, moments = carry

        def loss(trained: Any) -> Array:
            params = _merged(_params_of(state.drafter), trained)
            return objective(params, batch[0], target, batch[1])

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, moments = optimizer.update(gradients, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    batches = jax.tree.map(lambda x: jnp.tile(groups(x), (trainer.passes, 1, 1)), (rollout.tokens, rollout.mask))
    (trained, moments), losses = jax.lax.scan(step, (state.params, state.optimizer), batches)
    stats = rollout.stats
    metrics = {
        "loss": losses.mean(),
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_round": stats.tokens_per_round,
    }
    old = _params_of(state.drafter)
    params = jax.tree.map(lambda own, new: new.astype(own.dtype), old, _merged(old, trained))
    return DraftState(_with_params(state.drafter, params), trained, moments), metrics


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _merged(params: Any, trained: Any) -> Any:
    """Returns the trained parameters, and those of ``params`` that are not trained."""
    return jax.tree.map(lambda own, new: own if new is None else new, params, trained)


def _params_of(drafter: Any) -> Any:
    return drafter.model.params if isinstance(drafter, ModelDrafter) else drafter.params


def _with_params(drafter: Any, params: Any) -> Any:
    if isinstance(drafter, ModelDrafter):
        return dataclasses.replace(drafter, model=dataclasses.replace(drafter.model, params=params))
    return drafter.replace(params=params)


def _objective(loss: str, drafter: Any) -> DraftObjective:
    """Returns what to minimise for a drafter; raises TypeError if there is nothing."""
    if type(drafter) is FeatureDrafter:
        # Of a tree, chains as long as its paths.
        return head_objective(loss, drafter.head, drafter.tree_depth or drafter.num_draft)
    if type(drafter) is MedusaDrafter:
        return medusa_objective(loss, len(drafter.params))
    if type(drafter) is BlockDrafter and isinstance(drafter.head, DFlashHead):
        return block_objective(loss, drafter.head, None)
    if type(drafter) is ModelDrafter:
        return model_objective(loss, drafter.model)
    kind = type(drafter).__name__
    if isinstance(drafter, BlockDrafter):
        kind += f" of a {type(drafter.head).__name__}"
    raise TypeError(
        f"drafter is a {kind}, for which there is no training; give a FeatureDrafter, MedusaDrafter, BlockDrafter of a "
        "DFlash or DSpark head, or ModelDrafter. Of a Cascade, train the part"
    )
