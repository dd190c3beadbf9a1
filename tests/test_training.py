"""Training: what text is used, batches and losses by their definitions, runs that stop and go on, clear recipes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.commands import stdlib
from specjax.hf.config import decoder_config
from specjax.training import data, losses
from specjax.training.loop import fit, make_optimizer
from specjax.training.objectives import make_objective
from specjax.training.recipe import Stage, read_recipe
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

REPOSITORY = Path(__file__).parent.parent

# Text.


@pytest.fixture(scope="module")
def modules():
    return stdlib.modules()


def test_the_corpus_is_the_standard_library_without_its_tests(modules):
    assert len(modules) > 300
    assert list(modules) == sorted(modules)
    assert "def dataclass(" in modules["dataclasses"]
    assert "class JSONDecoder" in modules["json.decoder"]
    parts = {part for name in modules for part in name.split(".")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"})
    assert all(isinstance(text, str) for text in modules.values())


@pytest.mark.parametrize("name", ["bz2", "ipaddress", "netrc", "pprint", "socket"])
def test_modules_held_out_on_every_machine(name, modules):
    assert name in modules
    assert stdlib.is_held_out(name)


@pytest.mark.parametrize("name", ["argparse", "dataclasses", "heapq", "json.decoder", "textwrap"])
def test_modules_trained_on_on_every_machine(name, modules):
    assert name in modules
    assert not stdlib.is_held_out(name)


def test_about_one_module_in_twenty_is_held_out(modules):
    held = [name for name in modules if stdlib.is_held_out(name)]
    assert 0.03 < len(held) / len(modules) < 0.08
    assert not any(stdlib.is_held_out(name, percent=0) for name in modules)
    assert all(stdlib.is_held_out(name, percent=100) for name in modules)
    more = {name for name in modules if stdlib.is_held_out(name, percent=10)}
    assert set(held) < more, "a larger share should hold out the same modules and more"


def test_the_tokenizer_loses_nothing():
    tokenizer = data.train_tokenizer(["def f(x):\n    return x\n"] * 20, 280)
    assert 256 < tokenizer.get_vocab_size() <= 280
    assert tokenizer.token_to_id(data.END_OF_TEXT) == 0
    for text in ("def f(x):\n    return x\n", "  two  spaces\t\n\n", "naïve → λ 🐍", "\x00\x7f", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("def f(x):\n").ids) < len("def f(x):\n")


def test_each_text_stands_behind_an_end_of_text():
    tokenizer = data.train_tokenizer(["def f(x):\n    return x\n"] * 20, 280)
    texts = ["def f", "", "return x"]
    tokens = data.encode_texts(tokenizer, texts)
    assert tokens.dtype == np.int32
    wanted = [token for text in texts for token in (0, *tokenizer.encode(text).ids)]
    assert tokens.tolist() == wanted


# Windows.


def epoch_of(windows, number):
    count = windows.batches_per_epoch
    return np.concatenate([windows.batch(step) for step in range(number * count, (number + 1) * count)])


@pytest.mark.parametrize(("total", "length", "rows"), [(1000, 7, 3), (1000, 10, 4), (50, 5, 9), (13, 6, 1)])
def test_an_epoch_visits_every_window_once(total, length, rows):
    windows = data.Windows(np.arange(total, dtype=np.int32), length, rows, seed=0)
    assert windows.batches_per_epoch == (total - length) // length // rows
    offsets = set()
    for number in range(6):
        epoch = epoch_of(windows, number)
        assert (epoch.shape, epoch.dtype) == ((windows.batches_per_epoch * rows, length), np.int32)
        starts = epoch[:, 0]
        np.testing.assert_array_equal(epoch, starts[:, None] + np.arange(length))
        offset = starts.min()
        assert 0 <= offset < length
        np.testing.assert_array_equal(np.sort(starts), offset + length * np.arange(len(epoch)))
        offsets.add(int(offset))
    assert len(offsets) > 1, "each epoch has an offset of its own"


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 50, 3000).astype(np.int32)
    steps = [40, 0, 17, 3, 17, 39, 80]
    forth = {step: data.Windows(tokens, 16, 4, seed=5).batch(step) for step in steps}
    windows = data.Windows(tokens, 16, 4, seed=5)
    for step in reversed(steps):
        np.testing.assert_array_equal(windows.batch(step), forth[step])
    assert not np.array_equal(data.Windows(tokens, 16, 4, seed=6).batch(0), forth[0])
    count = windows.batches_per_epoch
    assert not np.array_equal(windows.batch(count), windows.batch(0)), "each epoch has an order of its own"


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"19 tokens .* 2 windows of 8.*more text or smaller"):
        data.Windows(np.zeros(19, np.int32), 8, 2, seed=0)


# Losses.


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits():
    draft, target = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32) * 4
    return draft, target


def test_next_token_is_the_mean_surprise_at_the_following_token(logits):
    tokens = np.random.default_rng(1).integers(0, 7, (3, 5)).astype(np.int32)
    wanted = -np.mean([log_softmax(logits[0])[b, t, tokens[b, t + 1]] for b in range(3) for t in range(4)])
    np.testing.assert_allclose(losses.next_token(logits[0], tokens), wanted, rtol=1e-5)


def test_kl_is_of_the_draft_against_the_target(logits):
    draft, target = map(log_softmax, logits)
    wanted = (np.exp(target) * (target - draft)).sum(-1).mean()
    np.testing.assert_allclose(losses.kl(*logits), wanted, rtol=1e-5)
    assert abs(wanted - (np.exp(draft) * (draft - target)).sum(-1).mean()) > 0.1, "the other direction differs"
    np.testing.assert_allclose(losses.kl(logits[1], logits[1]), 0, atol=1e-6)


def test_total_variation_is_one_minus_acceptance(logits):
    q, p = (np.exp(log_softmax(x)) for x in logits)
    wanted = 1 - np.minimum(p, q).sum(-1).mean()
    np.testing.assert_allclose(losses.total_variation(*logits), wanted, rtol=1e-5)
    np.testing.assert_allclose(wanted, 0.5 * np.abs(p - q).sum(-1).mean(), rtol=1e-12)
    np.testing.assert_allclose(losses.total_variation(logits[0], logits[0]), 0, atol=1e-6)
    apart = np.array([[[40.0, 0.0]]], np.float32)
    np.testing.assert_allclose(losses.total_variation(apart, apart[..., ::-1]), 1, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.kl, losses.total_variation])
def test_gradients_stay_finite_far_apart_and_at_equality(loss):
    far = jnp.asarray([[[80.0, 0.0, -80.0]]])
    for draft in (far, far[..., ::-1], jnp.zeros_like(far)):
        assert np.isfinite(jax.grad(loss)(draft, far)).all()


# Objectives.

CONFIG = DecoderConfig(23, 16, 24, 1, 2, 1, max_position_embeddings=32, tie_word_embeddings=True)
TOKENS = np.random.default_rng(3).integers(0, 23, (2, 6)).astype(np.int32)


def model(seed):
    params = init_params(CONFIG, jax.random.key(seed))
    return decoder_model(CONFIG, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


@pytest.fixture(scope="module")
def student():
    return model(0)


@pytest.fixture(scope="module")
def teacher():
    return model(1)


@jax.jit
def logits_of(model):
    return model.forward(model.params, whole_feed(jnp.asarray(TOKENS)), model.init_cache(2, 6)).logits_btv


@pytest.mark.parametrize("name", ["next_token", "kl", "total_variation"])
def test_objectives_apply_their_loss_to_the_models_logits(name, student, teacher):
    wanted = {
        "next_token": lambda: losses.next_token(logits_of(student), TOKENS),
        "kl": lambda: losses.kl(logits_of(student), logits_of(teacher)),
        "total_variation": lambda: losses.total_variation(logits_of(student), logits_of(teacher)),
    }[name]()
    objective = jax.jit(make_objective(name, CONFIG))
    np.testing.assert_allclose(objective(student.params, jnp.asarray(TOKENS), teacher), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["kl", "total_variation"])
def test_imitation_without_a_teacher_is_refused(name, student):
    with pytest.raises(ValueError, match=rf"{name}.*teacher.*drafts_for"):
        make_objective(name, CONFIG)(student.params, jnp.asarray(TOKENS), None)


# The loop. The model is a table of bigrams, which compiles in no time; one test trains a decoder.

STEPS = 12
STAGE = Stage("next_token", steps=STEPS, rows=4, sequence=8, peak_learning_rate=0.3, warmup_steps=2)
TEXT = (np.random.default_rng(0).integers(1, 3, 200).cumsum() % 6).astype(np.int32)  # one or two up from the last
PARAMS = {"table": jnp.zeros((6, 6)), "bias": jnp.asarray([0.3, -0.1, 0.2, 0.0, 0.1, -0.4])}


def bigrams(params, tokens_bt, teacher):
    del teacher
    logits_btv = params["table"][tokens_bt] + jnp.broadcast_to(params["bias"], (*tokens_bt.shape, 6))
    return losses.next_token(logits_btv, tokens_bt)


def not_strict():
    """optax raises a decay rate to the power of a step count, which strict promotion forbids."""
    return jax.numpy_dtype_promotion("standard")


def train(folder, **changed):
    windows = data.Windows(TEXT, STAGE.sequence, STAGE.rows, seed=0)
    arguments = {"objective": bigrams, "params": PARAMS, "stage": STAGE, "batch": windows.batch, "save_every": 3}
    with not_strict():
        return fit(**{**arguments, "folder": folder, **changed})


def bits(params):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), params)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    params, history = train(tmp_path_factory.mktemp("run") / "stage-0")
    return bits(params), history


def test_the_loss_falls(uninterrupted):
    _, history = uninterrupted
    assert len(history) == STEPS
    assert np.mean(history[-3:]) < np.mean(history[:3]) - 0.1


def stop_at(step):
    def on_step(done, loss):
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize(
    "stops",
    [(1,), (2,), (3,), (4,), (6, 8, 11), (12,)],
    ids=["at once", "before a save", "at a save", "behind a save", "three times", "at the last step"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(stops, uninterrupted, tmp_path):
    """Steps behind the last save are computed again; losses and parameters are those of a run never stopped."""
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", on_step=stop_at(stop))
    reported = []
    params, history = train(tmp_path / "run", on_step=lambda done, loss: reported.append((done, loss)))
    assert (bits(params), history) == uninterrupted
    assert reported == [(i + 1, loss) for i, loss in enumerate(history)], "earlier steps are reported again"


def test_a_run_does_not_compute_what_is_saved(uninterrupted, tmp_path):
    """A run stopped at step 8 with saves at 3 and 6 asks for the batches from step 6 on; a finished one for none."""
    windows = data.Windows(TEXT, STAGE.sequence, STAGE.rows, seed=0)
    asked = []

    def batch(step):
        asked.append(step)
        return windows.batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", batch=batch, on_step=stop_at(8))
    assert asked == list(range(8))
    asked.clear()
    train(tmp_path / "run", batch=batch)
    assert asked == list(range(6, STEPS))
    asked.clear()
    params, history = train(tmp_path / "run", batch=batch)
    assert asked == []
    assert (bits(params), history) == uninterrupted


def test_the_callers_parameters_survive(tmp_path):
    params = jax.tree.map(jnp.copy, PARAMS)
    before = bits(params)
    train(tmp_path / "run", params=params)
    assert bits(params) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def objective(params, tokens_bt, teacher):
        return bigrams(params, tokens_bt, teacher) + jnp.where(tokens_bt[0, 0] >= 0, jnp.nan, 0.0)

    with pytest.raises(FloatingPointError, match=r"nan at step 0.*peak_learning_rate"):
        train(tmp_path / "run", objective=objective)


def test_a_decoder_learns_and_goes_on_to_the_same_bits(tmp_path):
    config = DecoderConfig(6, 8, 16, 1, 2, 1, max_position_embeddings=8, tie_word_embeddings=True)
    stage = dataclasses.replace(STAGE, loss="kl", peak_learning_rate=0.03)
    teacher = specjax.testing.table_model(np.random.default_rng(0).normal(size=(6, 6)) * 2)
    arguments = {
        "objective": make_objective("kl", config),
        "params": init_params(config, jax.random.key(0)),
        "stage": stage,
        "teacher": teacher,
    }
    params, history = train(tmp_path / "whole", **arguments)
    assert history[-1] < 0.9 * history[0]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", **arguments, on_step=stop_at(5))
    again, history_again = train(tmp_path / "stopped", **arguments)
    assert history_again == history
    assert bits(again) == bits(params)


def test_the_learning_rate_rises_and_falls_and_only_matrices_decay():
    """Without gradients a step is weight decay alone, lr * decay * w, on what has two axes or more."""
    stage = Stage("next_token", steps=10, rows=1, sequence=2, peak_learning_rate=0.5, warmup_steps=4, weight_decay=0.1)
    optimizer = make_optimizer(stage)
    update = jax.jit(optimizer.update)
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones((2,))}
    state, rates = optimizer.init(params), []
    for _ in range(11):
        with not_strict():
            updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_array_equal(updates["norm"], 0)
        rates.append(-float(updates["matrix"][0, 0]) / 0.1)
    wanted = [0, 0.125, 0.25, 0.375, *(0.5 * (10 - step) / 6 for step in range(4, 11))]
    np.testing.assert_allclose(rates, wanted, atol=1e-6)


# Recipes.

RECIPE = """
seed = 3
drafts_for = "big"
sample_tokens = 1000

[architecture]
vocab_size = 64
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 32

[[stages]]
loss = "next_token"
steps = 100
rows = 4
sequence = 32
peak_learning_rate = 2e-3

[[stages]]
loss = "total_variation"
text = "both"
steps = 100
rows = 4
sequence = 16
peak_learning_rate = 1e-3
warmup_steps = 5
weight_decay = 0.0
"""


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_a_recipe_is_read(tmp_path):
    recipe = read_recipe(write(tmp_path / "small", RECIPE))
    assert (recipe.name, recipe.seed, recipe.drafts_for, recipe.sample_tokens) == ("small", 3, "big", 1000)
    assert recipe.architecture == {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    expected = DecoderConfig(64, 16, 32, 2, 4, max_position_embeddings=32)
    assert decoder_config(recipe.architecture) == expected
    assert (recipe.head, recipe.chain_steps) == (None, 1)
    assert recipe.stages == (
        Stage("next_token", 100, 4, 32, 2e-3),
        Stage("total_variation", 100, 4, 16, 1e-3, "both", 5, 0.0),
    )


def test_the_digest_is_of_the_file(tmp_path):
    first = read_recipe(write(tmp_path / "a", RECIPE)).digest
    assert read_recipe(write(tmp_path / "b", RECIPE)).digest == first
    assert read_recipe(write(tmp_path / "b", RECIPE.replace("seed = 3", "seed = 4"))).digest != first


@pytest.mark.parametrize("folder", sorted(REPOSITORY.glob("models/*/")), ids=lambda folder: folder.name)
def test_the_shipped_recipes_are_sound(folder):
    recipe = read_recipe(folder)
    assert recipe.name == folder.name
    assert recipe.stages
    if recipe.drafts_for is not None:
        target = read_recipe(folder.parent / recipe.drafts_for)
        layer = recipe.architecture.get("transformer_layer_config", recipe.architecture)
        assert layer.get("vocab_size", 4096) == target.architecture["vocab_size"] == 4096


# what is replaced in the recipe, by what -> what the message must contain
BAD_RECIPES = {
    "an unknown key": ("seed = 3", "sead = 3", ["sead"]),
    "no architecture": ("[architecture]", "[other]", ["architecture", "missing"]),
    "an unknown size": ("intermediate_size = 32", "intermediate_size = 32\nqk_norm = true", ["qk_norm"]),
    "a missing size": ("vocab_size = 64", "", ["lacks", "vocab_size"]),
    "a size of zero": ("num_hidden_layers = 2", "num_hidden_layers = 0", ["num_hidden_layers", "0"]),
    "an unknown stage key": ("rows = 4", "rows = 4\nbatch = 8", ["batch"]),
    "a missing stage key": ("rows = 4\nsequence = 32", "sequence = 32", ["rows", "missing"]),
    "an unknown loss": ('"next_token"', '"mse"', ["'mse'", "next_token", "kl", "total_variation"]),
    "an unknown text": ('"both"', '"web"', ["'web'", "corpus", "samples", "both", "on_policy"]),
    "no steps": ("steps = 100", "steps = 0", ["steps", "0", "at least 1"]),
    "no rows": ("rows = 4", "rows = 0", ["rows", "0", "at least 1"]),
    "steps in words": ("steps = 100", 'steps = "100"', ["steps", "'100'"]),
    "half a step": ("steps = 100", "steps = 100.5", ["steps", "100.5"]),
    "one token": ("sequence = 32", "sequence = 1", ["sequence", "at least 2"]),
    "windows too long": ("sequence = 32", "sequence = 33", ["sequence", "33", "max_position_embeddings", "32"]),
    "a rate in words": ("= 2e-3", '= "2e-3"', ["peak_learning_rate", "'2e-3'"]),
    "a rate that is no number": ("= 2e-3", "= nan", ["peak_learning_rate", "nan"]),
    "a negative rate": ("= 2e-3", "= -2e-3", ["peak_learning_rate", "-0.002"]),
    "a warm-up without end": ("warmup_steps = 5", "warmup_steps = 100", ["warmup_steps", "100"]),
    "a negative warm-up": ("warmup_steps = 5", "warmup_steps = -1", ["warmup_steps", "-1"]),
    "a negative decay": ("weight_decay = 0.0", "weight_decay = -0.1", ["weight_decay", "-0.1"]),
    "a negative seed": ("seed = 3", "seed = -3", ["seed", "-3"]),
    "a seed in words": ("seed = 3", 'seed = "3"', ["seed", "'3'"]),
    "imitation of nothing": ('drafts_for = "big"\n', "", ["total_variation", "drafts_for"]),
    "no samples": ("sample_tokens = 1000\n", "", ["both", "sample_tokens"]),
    "samples in words": ("sample_tokens = 1000", 'sample_tokens = "1000"', ["sample_tokens", "'1000'"]),
    "not TOML": ("seed = 3", "seed 3", ["TOML"]),
}


@pytest.mark.parametrize(("old", "new", "words"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_bad_recipes_name_file_and_key(old, new, words, tmp_path):
    assert old in RECIPE
    folder = write(tmp_path / "bad", RECIPE.replace(old, new, 1))
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", ["TOML"]),
        (b"", ["architecture", "missing"]),
        (RECIPE[: RECIPE.index("[[stages]]")].encode(), ["stages", "missing"]),
        (b"stages = []\n" + RECIPE[: RECIPE.index("[[stages]]")].encode(), ["stages"]),
        (b"stages = 3\n" + RECIPE[: RECIPE.index("[[stages]]")].encode(), ["stages"]),
        (b"architecture = 3\nstages = []", ["architecture"]),
    ],
    ids=["not text", "empty", "no stages", "an empty list of stages", "a number of stages", "a number of sizes"],
)
def test_recipes_that_are_not_whole(text, words, tmp_path):
    assert_refused(write(tmp_path / "bad", text), words)


BAD_HEADS = {
    "of no kind": ('head = "hydra"\n' + RECIPE, ["'hydra'", "mtp", "eagle", "medusa"]),
    "of no target": ('head = "mtp"\n' + RECIPE.replace('drafts_for = "big"\n', ""), ["'mtp'", "drafts_for"]),
    "with text of its own": (
        'head = "mtp"\n' + RECIPE.replace('"both"', '"on_policy"'),
        ["'mtp'", "draws no text", "both"],
    ),
    "a model in chains": ("chain_steps = 2\n" + RECIPE, ["chain_steps is 2", "heads"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_recipes_of_heads_that_cannot_be(text, words, tmp_path):
    assert_refused(write(tmp_path / "bad", text), words)


def test_a_recipe_that_is_not_there(tmp_path):
    assert_refused(tmp_path, ["does not exist", "models/"])


def assert_refused(folder, words):
    file = str(folder / "recipe.toml")
    with pytest.raises(ValueError) as caught:
        read_recipe(folder)
    assert file in str(caught.value)
    message = str(caught.value).replace(file, "")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
