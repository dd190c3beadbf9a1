"""The optimiser loop. A step depends only on its number and the state, so a run resumes to the last bit."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from specjax.quantized import is_quantized
from specjax.training.objectives import Objective
from specjax.training.recipe import Stage
from specjax.types import LanguageModel


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a stage.

    The learning rate rises linearly for ``warmup_steps`` and decays linearly to zero at the last step. Gradients are
    clipped at global norm 1.
    """
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, stage.peak_learning_rate, stage.warmup_steps),
            optax.schedules.linear_schedule(stage.peak_learning_rate, 0.0, stage.steps - stage.warmup_steps),
        ],
        [stage.warmup_steps],
    )
    return adamw(schedule, stage.weight_decay)


def adamw(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW of gradients that are clipped at global norm 1."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate,
            b1=0.9,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        ),
    )


def _decays(path: tuple[Any, ...], x: Array) -> bool:
    """Returns whether a parameter decays: matrices do. Scales of norms do not, since decay would pull them to 0."""
    return x.ndim > 1 and "norm" not in jax.tree_util.keystr(path)


def split_rows(mesh: Mesh, rows: int) -> NamedSharding:
    """Returns the sharding of a batch of ``rows`` rows: split over the mesh axis ``data``, or whole without this axis.

    Raises:
      ValueError: the rows do not divide over the axis.
    """
    count = mesh.shape.get("data", 1)
    if rows % count:
        raise ValueError(
            f"batches of {rows} rows do not divide over the {count} parts of the mesh axis 'data'; give stages a "
            f"multiple of {count}, or make that axis smaller"
        )
    return NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None))


def fit(
    objective: Objective,
    params: Any,
    stage: Stage,
    batch: Callable[[int], np.ndarray],
    folder: Path,
    *,
    teacher: LanguageModel | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_save: Callable[[int, Any], None] = lambda step, params: None,
    save_every: int = 100,
) -> tuple[Any, list[float]]:
    """Runs one stage, from the newest checkpoint in ``folder`` if there is one.

    A run that was stopped and continued computes the same losses, to the last bit, as a run that was not.

    With parameters on a mesh the stage runs over this mesh. Parameters and the optimiser's state stay where they are.
    Rows are split over the axis ``data``, and each process makes only the rows of its devices. Parameters that are
    split over ``data`` (``specjax.sharding.FULLY_SHARDED``) are gathered for each step. With several processes, all
    must call ``fit`` with the same arguments. A stage may continue on another mesh or on none; then its losses agree up
    to rounding.

    Args:
      objective: the function to minimise.
      params: arrays, the parameters of a fresh run. On a mesh: as ``specjax.shard`` places them.
      stage: the stage to run.
      batch: ``batch(step)`` returns int32 ``[rows, sequence]``, a function of the step alone.
      folder: the folder of this stage's checkpoints. All processes must see the same folder.
      teacher: the model to imitate, if the objective needs one; on the same mesh as the parameters.
      on_step: ``on_step(steps_done, loss)`` is called for each step, also for steps of an earlier run.
      on_save: ``on_save(steps_done, params)`` is called after each save. The next step donates the parameters.
      save_every: steps between checkpoints.

    Returns:
      The parameters, and the loss of every step.

    Raises:
      FloatingPointError: the loss is not finite.
      ValueError: the parameters are quantised; rows do not divide over the mesh; or parameters and teacher are not all
        on one mesh or all on none.
    """
    if is_quantized(params):
        raise ValueError("the parameters are quantised; train floating-point ones and quantise the result")
    # Each parameter keeps its place, and so do its moments in the optimiser's state. Scalars are everywhere.
    optimizer, mesh = make_optimizer(stage), _mesh(params, teacher)
    params = jax.tree.map(jnp.array, params)  # a copy: updates donate it
    places = jax.tree.map(lambda x: x.sharding, params)
    everywhere = jax.tree.leaves(places)[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    teacher_places = jax.tree.map(lambda x: getattr(x, "sharding", everywhere), teacher)
    state_places = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, params),
        places,
        transform_non_params=lambda _: everywhere,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(places, state_places, everywhere))
    def update(params, opt_state, tokens_bt, teacher):
        teacher = _gather_data_axis(teacher, teacher_places)
        whole = functools.partial(_gather_data_axis, places=places)
        loss, grads = jax.value_and_grad(lambda x: objective(whole(x), tokens_bt, teacher))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(optimizer.init, out_shardings=state_places)(params)
    # The losses so far are part of a checkpoint, so a resumed run reports the whole stage.
    history: list[float] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager, _mesh_context(mesh):
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
        # The step's number alone decides its batch. The last step is always saved: it is the result of the stage.
        for step in range(len(history), stage.steps):
            params, opt_state, loss = update(params, opt_state, _split(batch(step), mesh), teacher)
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
                on_save(step + 1, params)
    return params, history


def _mesh(params: Any, teacher: LanguageModel | None) -> Mesh | None:
    """Returns the one mesh of all arrays; None if they are on no mesh."""
    arrays = [leaf for leaf in jax.tree.leaves((params, teacher)) if isinstance(leaf, Array)]
    places = [array.sharding for array in arrays]
    meshes = {place.mesh if isinstance(place, NamedSharding) else None for place in places}
    if len(meshes) > 1:
        raise ValueError(
            "parameters and teacher are not on the same devices; place both on one mesh with specjax.shard, or neither"
        )
    mesh = meshes.pop()
    assert not isinstance(mesh, AbstractMesh), "arrays lie on devices"
    return mesh


def _mesh_context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _split(tokens_bt: np.ndarray, mesh: Mesh | None) -> Array | np.ndarray:
    if mesh is None:
        return tokens_bt
    # Each process copies only the rows of its own devices.
    return jax.make_array_from_callback(tokens_bt.shape, split_rows(mesh, len(tokens_bt)), tokens_bt.__getitem__)


def _gather_data_axis(params: Any, places: Any) -> Any:
    """Returns parameters that are whole along ``data``, since every row of a batch needs them.

    Without this constraint the partitioner moves activations between a split by rows and a split by width. A step of a
    model of four layers would take 105 gathers and 46 exchanges, not one gather for each of 30 matrices.
    """

    def gather(x: Array, place: jax.sharding.Sharding) -> Array:
        if not isinstance(place, NamedSharding) or "data" not in place.spec:
            return x
        spec = PartitionSpec(*(None if axis == "data" else axis for axis in place.spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))

    return jax.tree.map(gather, params, places)
