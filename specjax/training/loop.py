"""The optimiser loop: resumable to the bit, since a step depends on nothing but its number and the state."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from specjax.training.objectives import Objective
from specjax.training.recipe import Stage
from specjax.types import LanguageModel


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019) with warm-up, linear decay to zero, and clipping at norm 1."""
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, stage.peak_learning_rate, stage.warmup_steps),
            optax.schedules.linear_schedule(stage.peak_learning_rate, 0.0, stage.steps - stage.warmup_steps),
        ],
        [stage.warmup_steps],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=stage.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def fit(
    objective: Objective,
    params: Any,
    stage: Stage,
    batch: Callable[[int], np.ndarray],
    folder: Path,
    *,
    teacher: LanguageModel | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    save_every: int = 100,
) -> tuple[Any, list[float]]:
    """Runs one stage, continuing from the newest checkpoint in ``folder``.

    Args:
      objective: what to minimise.
      params: where a fresh run starts.
      stage: what to run.
      batch: ``batch(step)`` returns int32 ``[rows, sequence]``, a function of the step alone.
      folder: of this stage's checkpoints; a run that was stopped goes on from there and computes the same losses,
        to the last bit, as one that was not.
      teacher: the model to imitate, if the objective wants one.
      on_step: called with the number of steps done and the loss of each step, those of an earlier run included.
      save_every: steps between checkpoints.

    Returns:
      The parameters and the loss of every step.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    optimizer = make_optimizer(stage)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens_bt, teacher):
        loss, grads = jax.value_and_grad(objective)(params, tokens_bt, teacher)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jax.tree.map(jnp.array, params)  # a copy: updates donate it
    opt_state = optimizer.init(params)
    history: list[float] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        newest = manager.latest_step()
        if newest is not None:
            restored = manager.restore(
                newest,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore({"params": params, "opt_state": opt_state}),
                    history=ocp.args.JsonRestore(),
                ),
            )
            params, opt_state = restored["state"]["params"], restored["state"]["opt_state"]
            history = restored["history"]["losses"]
        for step, loss in enumerate(history):
            on_step(step + 1, loss)
        for step in range(len(history), stage.steps):
            params, opt_state, loss = update(params, opt_state, batch(step), teacher)
            history.append(float(loss))
            if not np.isfinite(history[-1]):
                raise FloatingPointError(f"the loss is {history[-1]} at step {step}; lower peak_learning_rate")
            on_step(step + 1, history[-1])
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                manager.save(
                    step + 1,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave({"params": params, "opt_state": opt_state}),
                        history=ocp.args.JsonSave({"losses": history}),
                    ),
                )
    return params, history
