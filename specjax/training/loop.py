"""The optimiser loop: resumable to the bit, since a step depends on nothing but its number and the state."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array

from specjax.training.recipe import Stage

Loss = Callable[[Any, Array], Array]


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
    loss: Loss,
    params: Any,
    stage: Stage,
    batch: Callable[[int], np.ndarray],
    folder: Path,
    on_step: Callable[[int, float], None],
    save_every: int = 100,
) -> tuple[Any, list[float]]:
    """Runs one stage, continuing from the newest checkpoint in ``folder``.

    Args:
      loss: ``loss(params, tokens_bt) -> scalar``.
      params: where a fresh run starts.
      stage: what to run.
      batch: ``batch(step)`` returns int32 ``[rows, sequence]``, a function of the step alone.
      folder: of this stage's checkpoints; a run that was stopped goes on from there and computes the same losses,
        to the last bit, as one that was not.
      on_step: called with the number of steps done and the loss of each step, those of an earlier run included.
      save_every: steps between checkpoints.

    Returns:
      The parameters and the loss of every step.
    """
    optimizer = make_optimizer(stage)

    @jax.jit
    def update(params, opt_state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state = {"params": params, "opt_state": optimizer.init(params)}
    losses: list[float] = []
    log = folder / "losses.json"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        done = manager.latest_step()
        if done is not None:
            restored = manager.restore(
                done, args=ocp.args.Composite(state=ocp.args.StandardRestore(state), losses=ocp.args.JsonRestore())
            )
            state, losses = restored["state"], restored["losses"]
        for step, value in enumerate(losses):
            on_step(step + 1, value)
        for step in range(len(losses), stage.steps):
            params, opt_state, value = update(state["params"], state["opt_state"], batch(step))
            state = {"params": params, "opt_state": opt_state}
            losses.append(float(value))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} at step {step}; lower peak_learning_rate")
            on_step(step + 1, losses[-1])
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                manager.save(
                    step + 1,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(losses)
                    ),
                )
                log.write_text(json.dumps(losses))
    return state["params"], losses
