"""The command ``train``: trains the target, draft model or draft head of a recipe."""

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import specjax
from specjax import training
from specjax.commands import compilation_cache, hosts, stdlib
from specjax.commands.places import recipe_folder

HELD_OUT_PROMPTS = 20  # excerpts over which acceptance is measured
PROMPT_TOKENS, NEW_TOKENS, NUM_DRAFT = 64, 192, 5  # of each excerpt, if the models are long enough


ABOUT = """Trains the model or draft head of a recipe: `%(prog)s models/NAME` writes checkpoints/NAME.

A draft model or draft head (a recipe with drafts_for) needs its target in checkpoints/ first. After a stop at any time,
the same command goes on from the last save in runs/NAME and ends with the same bits. --mesh trains over several
devices; a run may go on over other devices. With several processes, all must see both folders.
"""


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a folder with a recipe.toml, such as models/py-14m")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="default: %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="resumable state; default: %(default)s")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves; default: %(default)s")
    parser.add_argument(
        "--fully-sharded", action="store_true", help="split parameters and optimiser state over data as well"
    )
    compilation_cache.add_options(parser)
    hosts.add_mesh_options(parser)
    args = parser.parse_args(argv)
    compilation_cache.set_up(args)
    # Errors that a user can cause are one line. Others keep their traceback.
    if args.save_every < 1:
        parser.error(f"--save-every is {args.save_every}; give at least 1")
    try:
        with hosts.run(args) as mesh:
            if args.fully_sharded and (mesh is None or mesh.shape["data"] == 1):
                raise ValueError("--fully-sharded splits over data, which has one part; give --mesh data=N")
            rules = specjax.sharding.FULLY_SHARDED if args.fully_sharded else specjax.sharding.RULES
            train(recipe_folder(args.recipe), args.checkpoints, args.runs, args.save_every, mesh, rules)
    except (ValueError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last save", file=sys.stderr)
        return 130
    return 0


def train(
    folder: Path,
    checkpoints: Path,
    runs: Path,
    save_every: int,
    mesh: Mesh | None,
    rules: specjax.sharding.Rules,
) -> None:
    """Runs all stages of a recipe and writes the checkpoint folder.

    Args:
      folder: the recipe's folder.
      checkpoints: where targets are, and where the new checkpoint goes.
      runs: where resumable state goes.
      save_every: steps between saves.
      mesh: the devices to train over; None is the default device.
      rules: how parameters are split over the mesh.

    Raises:
      ValueError: the recipe is damaged or does not fit the mesh, the target is missing, or the run's folder belongs to
        another recipe, text or target.
      FloatingPointError: a loss is not finite.
    """
    # The recipe is checked before anything is loaded, since sizes and steps follow from it.
    recipe = training.read_recipe(folder)
    hosts.check_same({f"the digest of {folder}": recipe.digest})
    if mesh is not None:
        for stage in recipe.stages:
            training.split_rows(mesh, stage.rows)
    # The text and the tokenizer. A target trains its own tokenizer. A drafter shares its target's.
    run = runs / recipe.name
    modules = stdlib.modules()
    kept = [text for name, text in modules.items() if not stdlib.is_held_out(name)]
    held = [text for name, text in modules.items() if stdlib.is_held_out(name)]
    if recipe.drafts_for is None:
        teacher, tokenizer = None, training.train_tokenizer(kept, recipe.architecture["vocab_size"])
    else:
        hosts.check_same_folders(checkpoints / recipe.drafts_for)
        opened = specjax.open(checkpoints / recipe.drafts_for, mesh=mesh, rules=rules)
        teacher, tokenizer = opened.model, opened.need_tokenizer()
    corpus, held_out = training.encode_texts(tokenizer, kept), training.encode_texts(tokenizer, held)
    # A run may only go on with the recipe, text and target that it began with.
    digest = digest_of(corpus, None if teacher is None else teacher.params)
    start_run(run, {"recipe": recipe.digest, "text and target": digest})
    hosts.exchange("the first process has written what the run is of")
    hosts.check_same_folders(run)
    print(f"{len(kept)} modules, {len(corpus):,} tokens; held out: {len(held)} modules, {len(held_out):,} tokens")

    # A drafter also learns from text that its target writes, since it will draft such text.
    texts = {"corpus": corpus}
    if teacher is not None and any(stage.text in ("samples", "both") for stage in recipe.stages):
        texts["samples"] = draw_samples(teacher, corpus, recipe, run / "samples.npy")

    # The parameters, and a trial of the checkpoint: an error of writing must not come after hours of training.
    trainee = training.make_trainee(
        recipe, teacher, np.concatenate(list(texts.values())), tokenizer.token_to_id(training.END_OF_TEXT)
    )
    params = trainee.init(jax.random.key(recipe.seed), None if mesh is None else trainee.places(mesh, rules))
    trial = run / ".trial"
    trainee.write(trial, halved(params), tokenizer, {})
    if hosts.is_first():
        shutil.rmtree(trial)
    # The stages. On-policy text is drawn when its stage begins, by the draft in its state of training at that time.
    history = []
    for number, stage in enumerate(recipe.stages):
        if stage.text == "on_policy":
            draft: Any = trainee.drafter(params, 1)  # a ModelDrafter: recipes allow this text only for draft models
            texts["on_policy"] = draw_samples(draft.model, corpus, recipe, run / f"on-policy-{number}.npy")
        batch, place = batches(stage, texts, recipe.seed + number), run / f"stage-{number}"
        params, losses = train_stage(number, stage, trainee, params, batch, place, teacher, save_every)
        history.append({**dataclasses.asdict(stage), "losses": losses})

    # Parameters are stored in bfloat16, half the size. The figures are those of the stored parameters.
    stored = halved(params)
    measured = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    metrics = {
        "recipe": recipe.digest,
        "seed": recipe.seed,
        "python": platform.python_version(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "train_tokens": len(corpus),
        "held_out_tokens": len(held_out),
        "held_out_loss": held_out_loss(trainee, measured, teacher, recipe, held_out),
    }
    if teacher is not None:
        drafter = trainee.drafter(measured, min(NUM_DRAFT, trainee.max_draft or NUM_DRAFT))
        drafter = drafter if mesh is None else specjax.shard(drafter, mesh, rules)
        metrics["held_out_acceptance"] = held_out_acceptance(teacher, drafter, held_out, mesh)
    for name, value in metrics.items():
        print(f"{name}: {value}")
    trainee.write(checkpoints / recipe.name, stored, tokenizer, {**metrics, "stages": history})
    if hosts.is_first():
        plot(history, checkpoints / recipe.name / "loss.png")


def halved(params: Any) -> Any:
    """Returns the parameters in bfloat16, as they are stored."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def train_stage(
    number: int,
    stage: training.Stage,
    trainee: training.Trainee,
    params: Any,
    batch: Callable[[int], np.ndarray],
    folder: Path,
    teacher: specjax.LanguageModel | None,
    save_every: int,
    measure: Callable[[Any], dict[str, str]] = lambda params: {},
) -> tuple[Any, list[float]]:
    """Runs a stage with a progress bar; returns the parameters and the losses, rounded.

    Args:
      number: the stage's, for the bar.
      stage, params, batch, folder, teacher, save_every: as for ``training.fit``.
      trainee: what is trained.
      measure: ``measure(params)`` returns figures for the bar, and is called at each save.
    """
    shown: dict[str, str] = {}
    with tqdm(
        total=stage.steps,
        desc=f"stage {number}: {stage.loss} on {stage.text}",
        unit="step",
        disable=not hosts.is_first(),
    ) as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix({"loss": f"{loss:.3f}", **shown}, refresh=False)

        params, losses = training.fit(
            trainee.objective(stage.loss),
            params,
            stage,
            batch,
            folder,
            teacher=teacher,
            on_step=on_step,
            on_save=lambda done, params: shown.update(measure(params)),
            save_every=save_every,
        )
    return params, [round(loss, 4) for loss in losses]


def digest_of(*trees: Any) -> str:
    """Returns a short digest of all arrays of some trees."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        digest.update(specjax.sharding.gathered(leaf).tobytes())
    return digest.hexdigest()[:16]


def start_run(run: Path, origin: dict[str, str]) -> None:
    """Writes the origin of a run into its folder, or compares it with the origin that is there.

    Args:
      run: the run's folder.
      origin: what the run is of, by names for messages. All processes must have the same.

    Raises:
      ValueError: the folder is a run of another origin, or no run.
    """
    hosts.check_same({f"the digest of {name}": value for name, value in origin.items()})
    if not hosts.is_first():
        return
    file = run / "origin.json"
    if not file.is_file():
        if run.is_dir() and any(run.iterdir()):
            raise ValueError(f"{run} holds something else than a run; move it away or give another --runs")
        run.mkdir(parents=True, exist_ok=True)
        partial = run.with_name(f".{run.name}.partial")  # outside the folder, which must hold no other file
        partial.write_text(json.dumps(origin), encoding="utf-8")
        partial.replace(file)
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name, value in origin.items() if there.get(name) != value]
    if changed:
        raise ValueError(
            f"{run} is a run of another {' and '.join(changed)}; remove it to start anew, or restore what has changed"
        )


def batches(stage: training.Stage, texts: dict[str, np.ndarray], seed: int) -> Callable[[int], np.ndarray]:
    """Returns ``batch(step) -> int32 [rows, sequence]`` over the stage's text. Two texts take turns."""
    names = ("corpus", "samples") if stage.text == "both" else (stage.text,)
    windows = [training.Windows(texts[name], stage.sequence, stage.rows, seed) for name in names]
    return lambda step: windows[step % len(windows)].batch(step // len(windows))


def draw_samples(
    model: specjax.LanguageModel, corpus: np.ndarray, recipe: training.Recipe, file: Path, rows: int = 64
) -> np.ndarray:
    """Returns tokens ``[n]`` of texts that a model wrote, with their openings from the corpus.

    Half of the rows are drawn at temperature 1 and half greedily, since the draft will serve both. The text is drawn
    once, and read from ``file`` after that.
    """
    if file.is_file():
        return np.load(file)
    # Rows are as long as the draft and the model allow. Batches are drawn until there are enough tokens.
    limit = min(recipe.architecture.get("max_position_embeddings", 2048), model.max_positions or sys.maxsize)
    openings = training.Windows(corpus, PROMPT_TOKENS, rows, recipe.seed)
    temperature = np.where(np.arange(rows) % 2, 0.0, 1.0).astype(np.float32)
    pieces: list[np.ndarray] = []
    drawn = 0
    with tqdm(total=recipe.sample_tokens, desc="samples", unit="token", disable=not hosts.is_first()) as bar:
        while drawn < recipe.sample_tokens:
            generation = specjax.generate(
                model,
                openings.batch(len(pieces)),
                drafter=specjax.NGramDrafter(num_draft=4),
                sampling=specjax.Sampling(temperature=temperature, seed=recipe.seed + rows * len(pieces)),
                max_new_tokens=limit - PROMPT_TOKENS,
                fixed=True,  # the same corpus on every machine
            )
            generation = specjax.sharding.gathered(generation)
            pieces.append(np.asarray(generation.tokens[:, :limit]).reshape(-1))
            emitted = int(generation.stats.emitted.sum())
            drawn += emitted
            bar.update(emitted)
    samples = np.concatenate(pieces)
    if not hosts.is_first():
        return samples
    # The file is written whole or not at all, since a run that is stopped here goes on from it.
    partial = file.with_suffix(".partial.npy")
    np.save(partial, samples)
    partial.replace(file)
    return samples


def held_out_loss(
    trainee: training.Trainee,
    params: Any,
    teacher: specjax.LanguageModel | None,
    recipe: training.Recipe,
    tokens: np.ndarray,
) -> float:
    """Returns the mean next-token loss in nats over the held-out modules; for a draft head, the loss of its chains."""
    sequence = max(stage.sequence for stage in recipe.stages)
    windows = training.Windows(tokens, sequence, 4, seed=0)
    teacher = None if recipe.head is None else teacher
    loss = jax.jit(trainee.objective("next_token"))
    values = [float(loss(params, windows.batch(i), teacher)) for i in range(windows.batches_per_epoch)]
    return float(np.mean(values))


def held_out_acceptance(
    target: specjax.LanguageModel, drafter: specjax.Drafter, tokens: np.ndarray, mesh: Mesh | None
) -> dict[str, dict]:
    """Returns acceptance rates by position and tokens per round after held-out excerpts, greedy and at temperature 1.

    The keys are "temperature 0" and "temperature 1".
    """
    # Prompt and text must fit both models. A short model has shorter prompts.
    limits = (target.max_positions, drafter.max_positions, PROMPT_TOKENS + NEW_TOKENS)
    limit = min(limit for limit in limits if limit is not None)
    length = min(PROMPT_TOKENS, limit // 2)
    prompts = training.Windows(tokens, length, HELD_OUT_PROMPTS, seed=0).batch(0)
    parts = 1 if mesh is None else mesh.shape["data"]
    # Over a mesh, the first prompts come again to fill the last part. They are not counted.
    prompts = np.resize(prompts, (math.ceil(HELD_OUT_PROMPTS / parts) * parts, length))
    figures = {}
    for temperature in (0.0, 1.0):
        sampling = specjax.Sampling(temperature=temperature)
        room = min(NEW_TOKENS, limit - length)
        options = {"sampling": sampling, "max_new_tokens": room, "fixed": True}
        generation = specjax.generate(target, prompts, drafter=drafter, **options)
        stats = jax.tree.map(lambda x: x[:HELD_OUT_PROMPTS], specjax.sharding.gathered(generation.stats))
        figures[f"temperature {temperature:g}"] = acceptance(stats)
    return figures


def acceptance(stats: specjax.Stats) -> dict[str, Any]:
    """Returns acceptance rates by position and tokens per round, over all rows."""
    by_position = np.asarray(stats.accepted_at).sum(0) / np.maximum(np.asarray(stats.drafted_at).sum(0), 1)
    return {
        "num_draft": len(by_position),
        "by_position": [round(float(x), 4) for x in by_position],
        "emitted_per_round": round(float(stats.tokens_per_round), 4),
    }


def plot(stages: list[dict], file: Path) -> None:
    """Draws the losses of all stages with a running mean, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no loss plot (pip install 'specjax[plot]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 3.5), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages, strict=True):
        losses = np.asarray(stage["losses"])
        width = max(1, len(losses) // 50)
        axis.plot(losses, alpha=0.3, linewidth=0.8)
        axis.plot(np.arange(width - 1, len(losses)), np.convolve(losses, np.ones(width) / width, "valid"))
        axis.set(title=f"{stage['loss']} on {stage['text']}", xlabel="step", ylabel="loss")
    figure.savefig(file, dpi=100)
