"""The command ``train-draft``: trains a draft for any target, on text that the target writes itself."""

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import specjax
from specjax import training
from specjax.checkpoint.fetched import PUBLISHED, model_path
from specjax.commands import compilation_cache, hosts
from specjax.commands.console import Parser, add_dtype, add_ignored_keys, write_whole
from specjax.commands.draft_card import SPEC_KINDS, card, measure, show
from specjax.commands.run_state import RunState
from specjax.commands.train import digest_of, halved, plot, start_run, train_stage

TOKENS = 250_000  # of text, unless tokens or minutes are given
PASSES, MOST_PASSES = 3, 10  # over the text; with --minutes, at most the second
SAMPLING_SHARE = 0.5  # of --minutes
DOCUMENT, WINDOW, SHORTEST_WINDOW = 511, 512, 16  # tokens; a document of 511 takes 512 slots
ON_CPU, ELSEWHERE = (64, 4), (128, 16)  # documents written at once, and windows in a batch
SHARD = 2  # documents of a shard for each row: a stop loses one shard at most
IDLE_SHARDS = 3  # in a row that add no text end the sampling
PROBED = 4  # steps whose time is measured
FEW_STEPS = 100  # fewer in the time that is given are worth a word
NUM_DRAFT = 4
MEASURED, NEW_TOKENS = 20, 128  # held-out prompts at the end, and the text after each
GLANCE, GLANCE_TOKENS = 4, 32  # the same at each save

SAMPLING, TRAINING = "sampling seconds", "training seconds"  # names of what a run keeps

ABOUT = """Trains a draft for any target, without data: `%(prog)s --target X --kind eagle`.

First the target writes the text: a chat model a user's turn and the answer, any other model a text from its beginning.
Then the draft is trained on the text, and measured on documents that were held out. It is written to
checkpoints/X-eagle in its published layout, with a card, README.md. `specjax generate --target X --drafter
eagle:checkpoints/X-eagle` uses it. Kinds: eagle (an EAGLE-3 head), dflash and dspark (a block in one pass),
mtp, medusa, and model (a small draft model).

After a stop at any time, also by kill -9, the same command goes on and ends with the same bits. The text is in
runs/X-text, one for all kinds, and goes on with the first missing shard. The training is in runs/X-eagle, and goes on
from the last save. With --minutes, the amounts of text and of steps are measured once and kept there.
"""


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """Returns the arguments; ends with a message of one line if one is wrong."""
    parser = Parser(prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="folder, GGUF file or fetched name")
    parser.add_argument("--kind", choices=training.KINDS, required=True, help="what to train")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="train on these, too: texts, and JSONL with {'messages': [...]} or {'text': ...} in each line",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--tokens", type=int, metavar="N", help=f"tokens that the target writes (default: {TOKENS:,})")
    amount.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="write text for half of M minutes, one shard at least, and train for the rest; opening and measuring "
        "come on top",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: checkpoints/TARGET-KIND")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="resumable state; default: %(default)s")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of text, parameters and batches")
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    add_dtype(parser, "the target")
    add_ignored_keys(parser)
    compilation_cache.add_options(parser)
    parser.set_defaults(distributed=False, coordinator=None)  # one process, for the compilation cache
    args = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("save_every", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        parser.error(f"--minutes is {args.minutes:g}; give a number above 0")
    if args.mesh is not None:
        parser.error("--mesh is given, and train-draft runs on one device; `specjax train` takes a recipe over several")
    if args.tokens is None and args.minutes is None:
        args.tokens = TOKENS
    return args


def main(argv: list[str] | None = None, prog: str = "train_draft.py") -> int:
    """Runs the command and returns the exit status."""
    args = parse(argv, prog)
    compilation_cache.set_up(args)
    command = shlex.join(["specjax", "train-draft", *(sys.argv[1:] if argv is None else argv)])
    try:
        train_draft(args, command)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {hosts.describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last save", file=sys.stderr)
        return 130
    return 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for, and where it goes.

    Attributes:
      args: from ``parse``.
      opened: the target.
      target_name: its name, for folders and other engines.
      output: the draft's folder.
      run: what this draft's run decided, in its folder.
      text: likewise of the target's own text, which all kinds share.
    """

    args: argparse.Namespace
    opened: specjax.Opened
    target_name: str
    output: Path
    run: RunState
    text: RunState

    @property
    def start_token(self) -> int | None:
        """The token with which each text begins, if the tokenizer has it."""
        return self.opened.need_tokenizer().token_to_id(training.END_OF_TEXT)

    def recipe(self, tokens: np.ndarray, steps: int, rows: int, sequence: int) -> training.Recipe:
        """Returns the recipe that follows from the target, the text and the amounts."""
        amounts: dict[str, Any] = {"steps": steps, "rows": rows, "sequence": sequence, "seed": self.args.seed}
        return training.draft_recipe(
            self.args.kind, self.opened, tokens, name=self.output.name, target_name=self.target_name, **amounts
        )


def train_draft(args: argparse.Namespace, command: str) -> None:
    """Samples, trains, measures and writes.

    Args:
      args: from ``parse``.
      command: for the card.

    Raises:
      ValueError: the target cannot be opened, or lacks what the kind needs; a file of the data is no text; the run or
        the output is of another run; or the target writes no text.
      OSError: a folder cannot be written.
      FloatingPointError: a loss is not finite.
    """
    # 1. Everything that a user can have wrong comes before the sampling, which takes long.
    opened = specjax.open(args.target, dtype=args.dtype, ignore_config_keys=args.ignore_config_keys)
    named = str(args.target) in PUBLISHED
    target_name = str(args.target) if named else model_path(args.target).resolve().name.removesuffix(".gguf")
    output = args.output or Path("checkpoints") / f"{target_name}-{args.kind}"
    folders = RunState(args.runs / output.resolve().name), RunState(args.runs / f"{target_name}-text")
    job = Job(args, opened, target_name, output, *folders)
    data = training.encode_files(args.data, opened)
    origin = check(job, data)
    # 2. The text and the draft.
    openings, own = sample(job)
    text = np.concatenate([data, own.trained])
    prompts = [document.tokens[: document.start] for document in own.held_out]
    measured = functools.partial(measure, opened.model, prompts, openings.ends)
    trainee, params, history = train(job, text, measured)
    # 3. The stored parameters are measured, next to the drafter that needs no training.
    stored = halved(params)
    drafter = drafter_of(trainee, jax.tree.map(lambda x: x.astype(jnp.float32), stored))
    figures = {
        name: {f"temperature {t:g}": measured(each, t, MEASURED, NEW_TOKENS) for t in (0.0, 1.0)}
        for name, each in ((args.kind, drafter), ("ngram", specjax.NGramDrafter(num_draft=drafter.num_draft)))
    }
    show(figures)
    metrics = {
        "run": json.dumps(origin),
        "target": target_name,
        "kind": args.kind,
        "seed": args.seed,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "sampled_tokens": own.tokens,
        "data_tokens": len(data),
        "train_tokens": len(text),
        "tokens_seen": sum(stage["steps"] * stage["rows"] * stage["sequence"] for stage in history),
        "sampling_hours": round(job.text.get(SAMPLING, 0.0) / 3600, 3),
        "training_hours": round(job.run.get(TRAINING, 0.0) / 3600, 3),
        "held_out_documents": len(prompts),
        "measured_documents": min(len(prompts), MEASURED),
        "held_out_acceptance": figures,
        "stages": history,
    }
    trainee.write(output, stored, opened.need_tokenizer(), metrics)
    write_whole(output / "README.md", card(metrics, str(args.target), output, command, chat=openings.chat))
    plot(history, output / "loss.png")
    chat, spec = " --chat" if openings.chat else "", f"{SPEC_KINDS.get(args.kind, args.kind)}:{output}"
    print(f"wrote {output}\nTry: specjax generate --target {args.target} --drafter {spec}{chat} --compare")


def check(job: Job, data: np.ndarray) -> dict[str, str]:
    """Starts the runs and returns what this one is of. A draft of this kind is made and written on trial.

    Raises:
      ValueError: as for ``train_draft``.
    """
    args, target = job.args, job.opened.model
    if data.size and data.max() >= target.vocab_size:
        raise ValueError(
            f"the tokenizer makes token {data.max()} of --data, and the target has {target.vocab_size}; give the "
            "target its own tokenizer.json"
        )
    digest = digest_of(target.params)
    origin = {
        "--target": digest,
        "--kind": args.kind,
        "--data": digest_of(data),
        "--tokens or --minutes": f"{args.tokens} tokens, {args.minutes} minutes",
        "--seed": str(args.seed),
    }
    check_output(job.output, origin, job.run.folder)
    if job.output.resolve() == job.run.folder.resolve():
        raise ValueError(f"{job.output} is the folder of the run as well; give another --output or --runs")
    nothing = np.zeros(1, np.int32)
    recipe = job.recipe(nothing, 1, 1, SHORTEST_WINDOW)
    trainee = training.make_trainee(recipe, target, nothing, job.start_token)
    params = halved(trainee.init(jax.random.key(args.seed)))
    start_run(job.text.folder, {"--target": digest, "--seed": str(args.seed)})
    start_run(job.run.folder, origin)
    with tempfile.TemporaryDirectory(dir=job.run.folder, prefix=".trial-") as folder:
        trainee.write(Path(folder) / "draft", params, job.opened.need_tokenizer(), {})
    return origin


def check_output(output: Path, origin: dict[str, str], run: Path) -> None:
    """Raises ValueError if something else than the draft of this run is where the draft goes.

    A draft that was trained elsewhere by the same command, such as one that is shipped, is something else.
    """
    if not os.path.lexists(output):
        return
    try:
        there = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there != json.dumps(origin) or not run.is_dir():
        raise ValueError(f"{output} exists and is not of the run in {run}; give another --output, or remove it")


def sample(job: Job) -> tuple[training.Openings, training.OwnText]:
    """Returns how the target's documents begin, and its text: as many tokens as asked for, or what the time allows.

    Raises:
      ValueError: a shard is damaged, the target has too few positions, or it writes nothing new.
    """
    args, target = job.args, job.opened.model
    # What the platform, the day or a later version may change is kept with the text.
    rows = job.text.once("rows", lambda: ON_CPU[0] if jax.default_backend() == "cpu" else ELSEWHERE[0])
    count = job.text.once("documents of a shard", lambda: SHARD * rows)
    length = job.text.once("length", lambda: min(DOCUMENT, target.max_positions or DOCUMENT))
    found = job.text.once("openings", lambda: dataclasses.asdict(training.openings_of(job.opened)))
    tokens = (tuple(found[name]) for name in ("before", "between", "ends", "starts"))
    openings = training.Openings(*tokens, chat=found["chat"])
    openings.check_length(length)
    begins = "a user's turn in the chat template" if openings.chat else "the beginning of a text"
    print(f"{job.target_name} writes documents of at most {length} tokens from {begins}", flush=True)
    limit = math.inf if args.minutes is None else 60 * SAMPLING_SHARE * args.minutes
    with tqdm(total=args.tokens, desc="text", unit="token") as bar:

        def write(number: int) -> list[training.Document]:
            begun, numbers = time.monotonic(), range(number * count, (number + 1) * count)
            shape: dict[str, Any] = {"seed": args.seed, "rows": rows, "length": length}
            documents = training.write_documents(target, openings, numbers, **shape, on_tokens=bar.update)
            for kept in (job.text, job.run):
                kept.add(SAMPLING, time.monotonic() - begun)
            return documents

        own, idle = training.OwnText(job.text.folder / "shards", write, target.vocab_size), 0

        def goes_on() -> bool:
            if "shards" in job.run:  # decided before a stop
                return own.shards < job.run.get("shards", 0)
            spent = job.run.get(SAMPLING, 0.0)
            half = spent / own.shards / 2 if own.shards else 0.0  # a shard is begun if half of it fits
            return own.tokens < (args.tokens or math.inf) and (not own.shards or own.is_there or spent + half < limit)

        while goes_on():
            idle = 0 if own.take() else idle + 1
            bar.n = own.tokens
            if args.minutes is not None:
                bar.set_postfix({"seconds left": f"{max(0.0, limit - job.run.get(SAMPLING, 0.0)):.0f}"}, refresh=False)
            bar.refresh()
            if idle == IDLE_SHARDS:
                raise ValueError(
                    f"the last {IDLE_SHARDS * count} documents of the target are empty or repeat earlier ones, "
                    f"after {own.tokens} tokens; give a lower --tokens"
                )
    job.run.once("shards", lambda: own.shards)
    print(f"{len(own.documents)} documents of {own.tokens:,} tokens; {len(own.held_out)} are held out", flush=True)
    return openings, own


def train(job: Job, text: np.ndarray, measured: Callable[..., dict[str, Any]]) -> tuple[training.Trainee, Any, list]:
    """Returns the trainee, its parameters after all stages, and the stages with their losses.

    Args:
      job: what is asked for.
      text: integers ``[n]``, tokens.
      measured: ``measure`` without its first arguments.
    """
    args, target = job.args, job.opened.model
    rows = job.run.once("rows", lambda: ON_CPU[1] if jax.default_backend() == "cpu" else ELSEWHERE[1])
    sequence = window(len(text), rows, target.max_positions)
    recipe = functools.partial(job.recipe, text, rows=rows, sequence=sequence)
    trainee = training.make_trainee(recipe(steps=1), target, text, job.start_token)
    params = trainee.init(jax.random.key(args.seed))
    if args.kind == "eagle":
        params = training.with_targets_head(params, target, text)
    batch, passes = training.Windows(text, sequence, rows, args.seed).batch, len(text) / (rows * sequence)

    def steps() -> int:
        if args.minutes is None:
            return max(1, round(PASSES * passes))
        seconds, first = step_seconds(trainee, params, recipe(steps=PROBED).stages[0], batch, target, job.run.folder)
        # A shard may have taken longer than the time for text, but the training has its own. Probe and stage compile.
        sampled = min(job.run.get(SAMPLING, 0.0), 60 * SAMPLING_SHARE * args.minutes)
        left = 60 * args.minutes - sampled - 2 * first
        return max(1, min(int(left / seconds), round(MOST_PASSES * passes)))

    number_of_steps = job.run.once("steps", steps)
    if number_of_steps < FEW_STEPS and args.minutes is not None:
        print(
            f"{args.minutes:g} minutes leave time for {number_of_steps} steps on this machine, which teach a draft "
            "little; give more --minutes"
        )
    mark, history = [time.monotonic()], []

    def glance(params: Any) -> dict[str, str]:
        job.run.add(TRAINING, time.monotonic() - mark[0])
        mark[0] = time.monotonic()
        figures = measured(drafter_of(trainee, params), 0.0, GLANCE, GLANCE_TOKENS)
        return {"tokens per round": f"{figures['emitted_per_round']:.2f}"}

    for number, stage in enumerate(recipe(steps=number_of_steps).stages):
        place = job.run.folder / f"stage-{number}"
        params, losses = train_stage(number, stage, trainee, params, batch, place, target, args.save_every, glance)
        history.append({**dataclasses.asdict(stage), "losses": losses})
    return trainee, params, history


def window(tokens: int, rows: int, max_positions: int | None) -> int:
    """Returns how long the windows of a batch are: 512 tokens, or less for a short text or few positions."""
    length = min(WINDOW, max_positions or WINDOW)
    while length > SHORTEST_WINDOW and 2 * (rows + 1) * length > tokens:
        length = max(SHORTEST_WINDOW, length // 2)
    return length


def step_seconds(
    trainee: training.Trainee,
    params: Any,
    stage: training.Stage,
    batch: Callable[[int], np.ndarray],
    target: specjax.LanguageModel,
    run: Path,
) -> tuple[float, float]:
    """Returns the seconds of a step, and of the first step with compilation, by a few steps whose result is dropped."""
    times = [time.monotonic()]
    with tempfile.TemporaryDirectory(dir=run, prefix=".probe-") as folder:
        training.fit(
            trainee.objective(stage.loss),
            params,
            stage,
            batch,
            Path(folder),
            teacher=target,
            on_step=lambda done, loss: times.append(time.monotonic()),
            save_every=stage.steps,
        )
    return (times[-1] - times[1]) / (stage.steps - 1), times[1] - times[0]


def drafter_of(trainee: training.Trainee, params: Any) -> Any:
    """Returns the drafter that is measured: of four tokens a round, or of fewer if the kind drafts fewer."""
    return trainee.drafter(params, min(NUM_DRAFT, trainee.max_draft or NUM_DRAFT))
