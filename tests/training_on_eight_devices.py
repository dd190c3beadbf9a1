"""Checks of training over eight devices, run as ``on_eight_devices.py`` is, by ``test_sharded_training.py``."""

import functools
import json
import sys
import tempfile
import traceback
from pathlib import Path

import conftest  # noqa: F401  (the suite's strictness, and its compilations)
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from specjax.checkpoint.models import load_params, save_params
from specjax.hf.config import decoder_config
from specjax.sharding import FULLY_SHARDED, RULES, make_mesh, shard
from specjax.training.loop import fit, split_rows
from specjax.training.recipe import Recipe, Stage
from specjax.training.trainees import make_trainee
from specjax.transformer.decoder import decoder_model, init_params

VOCAB, ROWS, STEPS = 64, 8, 4
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EAGLE = {
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 32,
    "norm_before_residual": False,
    "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    "transformer_layer_config": MODEL,
}
DSPARK = {
    "speculators_model_type": "dspark",
    "draft_vocab_size": VOCAB,
    "block_size": 3,
    "mask_token_id": VOCAB - 1,
    "markov_rank": 4,
    "aux_hidden_state_layer_ids": [0, 1],
    "transformer_layer_config": MODEL | {"model_type": "qwen3"},
}
TEXT = np.random.default_rng(0).integers(0, VOCAB, 400, np.int32)


def batch(step):
    starts = np.random.default_rng(step).integers(0, len(TEXT) - 12, ROWS)
    return np.stack([TEXT[start : start + 12] for start in starts])


@functools.cache
def teacher():
    config = decoder_config(MODEL | {"num_hidden_layers": 2})
    return decoder_model(config, jax.tree.map(lambda x: 8 * x, init_params(config, jax.random.key(9))))


@functools.cache
def trainee(kind, loss):
    architecture = {"eagle": EAGLE, "dspark": DSPARK, "medusa": {"medusa_num_heads": 2}}.get(kind, MODEL)
    head = None if kind == "model" else kind
    steps = 1 if kind in ("model", "dspark") else 2
    recipe = Recipe("student", 0, architecture, (stage(loss),), "teacher", 0, "", head, steps)
    return make_trainee(recipe, teacher(), TEXT)


def stage(loss):
    return Stage(loss, STEPS, ROWS, 12, peak_learning_rate=0.05, warmup_steps=1)


def train(kind, loss, folder, mesh=None, rules=RULES, on_step=lambda done, loss: None, save_every=2):
    one = trainee(kind, loss)
    places = None if mesh is None else one.places(mesh, rules)
    taught = teacher() if mesh is None else shard(teacher(), mesh, rules)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a decay rate to the power of a step count
        params = one.init(jax.random.key(1), places)
        return fit(
            one.objective(loss),
            params,
            stage(loss),
            batch,
            Path(folder),
            teacher=taught,
            on_step=on_step,
            save_every=save_every,
        )


@functools.cache
def on_one_device(kind, loss):
    with tempfile.TemporaryDirectory() as folder:
        params, losses = train(kind, loss, folder)
    return jax.device_get(params), losses


def same_losses(kind, loss, sizes, rules):
    """Adam divides by the gradient's size, so parameters agree less closely than losses."""
    wanted, wanted_losses = on_one_device(kind, loss)
    with tempfile.TemporaryDirectory() as folder:
        params, losses = train(kind, loss, folder, make_mesh(*sizes), rules)
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3), params, wanted)
    places = trainee(kind, loss).places(make_mesh(*sizes), rules)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), params, places))


CASES = [  # kind, loss, mesh, rules
    ("model", "total_variation", (4, 2), FULLY_SHARDED),
    ("mtp", "next_token", (2, 2), RULES),
    ("eagle", "kl", (4, 2), FULLY_SHARDED),
    ("medusa", "kl", (8,), FULLY_SHARDED),
    ("dspark", "dspark", (4, 2), FULLY_SHARDED),
]


def a_run_goes_on_over_other_meshes():
    """A step on one mesh, two on another and the last on none, each from what the one before has saved."""
    _, wanted = on_one_device("model", "total_variation")

    def stop(at, done, loss):
        if done == at:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        for at, mesh, rules in ((2, make_mesh(4, 2), FULLY_SHARDED), (4, make_mesh(2, 2), RULES)):
            with pytest.raises(KeyboardInterrupt):
                train("model", "total_variation", folder, mesh, rules, functools.partial(stop, at), save_every=1)
            assert (Path(folder) / str(at - 1)).is_dir()
        _, losses = train("model", "total_variation", folder, save_every=1)
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)


def parameters_and_optimiser_state_are_divided():
    """What lies on each device between two steps, and in what is saved."""
    held = []

    def measure(done, loss):
        arrays = [x for x in jax.live_arrays() if x.ndim and x.dtype == jnp.float32 and len(x.devices()) == 8]
        held.append([sum(x.addressable_shards[i].data.nbytes for x in arrays) for i in range(8)])

    mesh = make_mesh(4, 2)
    with tempfile.TemporaryDirectory() as folder:
        params, _ = train("model", "next_token", folder, mesh, FULLY_SHARDED, measure)
        saved = ocp.StandardCheckpointer().metadata(Path(folder) / str(STEPS) / "state").item_metadata.tree
    # Parameters, two moments, the start that the caller holds, and the teacher; norms are whole on each device.
    leaves = [*4 * jax.tree.leaves(params), *jax.tree.leaves(teacher().params)]
    assert held == [[sum(x.nbytes if x.ndim == 1 else x.nbytes // 8 for x in leaves)] * 8] * STEPS
    moments = saved["opt_state"][1][0]["mu"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert tuple(moments.sharding.partition_spec) == ("data", "tensor")


def folders_saved_from_a_mesh_load_anywhere():
    mesh = make_mesh(2, 4)
    params = init_params(decoder_config(MODEL | {"vocab_size": 8000, "hidden_size": 256}), jax.random.key(0))
    model = decoder_model(decoder_config(MODEL | {"vocab_size": 8000, "hidden_size": 256}), params)
    spread = shard(model, mesh, FULLY_SHARDED).params
    for given in (params, spread):
        with tempfile.TemporaryDirectory() as folder:
            save_params(Path(folder), given)
            stored = ocp.StandardCheckpointer().metadata(Path(folder) / "params").item_metadata.tree
            weight = stored["embed_tokens"]["weight"]
            assert weight.storage.chunk_shape != weight.shape, "8 MB in one chunk"
            for like in (params, spread):
                abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
                jax.tree.map(np.testing.assert_array_equal, load_params(Path(folder), abstract), params)


def what_does_not_fit_is_refused():
    one, mesh = trainee("model", "kl"), make_mesh(3)
    with pytest.raises(ValueError, match=r"8 rows do not divide over the 3 parts.*'data'.*a multiple of 3"):
        split_rows(mesh, ROWS)
    assert split_rows(jax.make_mesh((8,), ("model",)), 3).spec == PartitionSpec(None)
    params = one.init(jax.random.key(0), one.places(make_mesh(8), RULES))
    with pytest.raises(ValueError, match=r"not on the same devices; place both on one mesh"):
        fit(one.objective("kl"), params, stage("kl"), batch, Path("absent"), teacher=teacher())
    with pytest.raises(ValueError, match=r"32 embed, which do not divide over the 3 devices.*'data'"):
        one.places(mesh, FULLY_SHARDED)


CHECKS = {
    f"{kind} {'x'.join(map(str, sizes))}{' fully' * (rules is FULLY_SHARDED)}": functools.partial(
        same_losses, kind, loss, sizes, rules
    )
    for kind, loss, sizes, rules in CASES
} | {
    check.__name__: check
    for check in (
        a_run_goes_on_over_other_meshes,
        parameters_and_optimiser_state_are_divided,
        folders_saved_from_a_mesh_load_anywhere,
        what_does_not_fit_is_refused,
    )
}


def outcome(name):
    try:
        CHECKS[name]()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    assert jax.device_count() == 8
    wanted = sys.argv[1:] or CHECKS
    print(json.dumps({name: outcome(name) for name in wanted}))
