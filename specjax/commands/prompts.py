"""The benchmark ``prompts``: answers to the prompts of files, such as MT-bench, with each drafter and without."""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

import specjax
from specjax.checkpoint.spec import folders_of, short_name
from specjax.commands import figures, measure, models, peers, prompt_files, transformers_peer
from specjax.commands.console import print_table
from specjax.commands.prompt_files import Message, Prompt

PLAIN = "plain"
TRIES = 3  # of a prompt, until nothing compiles; the next one counts, whatever compiles
COUNTS = ("rounds", "drafted", "accepted", "drafted_at", "accepted_at")
FACTS = ("drafter", "num_draft", "fixed")  # of specjax's ways, in each row
COLUMNS = (
    "category",
    "temperature",
    "decoding",
    "prompts",
    "tokens",
    "draft acceptance rate",
    "mean acceptance length",
    "per-position acceptance rate",
    "tokens/s",
    "speed-up",
    "text equal",
)
Found = dict[tuple[float, str], list["Answers"]]
"""By temperature and way to decode: the answers to each prompt."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers to the turns of one prompt.

    Attributes:
      seconds: of all answers, the reading of turns included.
      contexts: for each answer, the tokens that it continues.
      texts: for each answer, its tokens.
      completions: for each answer, its counts; empty for other libraries.
    """

    seconds: float
    contexts: list[list[int]]
    texts: list[list[int]]
    completions: list[specjax.Completion] = dataclasses.field(default_factory=list)


def bench_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers the prompts of files and returns a row for each category, temperature and way to decode."""
    specjax.keep_programs(None)  # ``measure.compilations`` does not see programs that are loaded from there
    with contextlib.ExitStack() as stack:
        try:
            opened = models.named_drafters(args)
            prompts, limit = _fitting(args, [drafter for _, drafter in opened])
            others = _peer_ways(args, opened, stack) if args.peer else []
            ways = _ways(args, opened)
            found = _answer(args, prompts, limit, {name: way.session for name, way in ways.items()}, others)
        except ValueError as error:
            sys.exit(f"{args.prog}: error: {error}")
    rows = table(prompts, found, ways)
    print_table(f"Prompts of files, one at a time, at most {args.new_tokens} new tokens", rows, COLUMNS)
    answered = min(_turns(answers) for answers in found.values())
    if left := sum(len(prompt.turns) for prompt in prompts) - answered:
        print(f"{left} later turns are left out: with {args.new_tokens} new tokens they pass the {limit} positions.\n")
    if args.peer:
        print("\n".join(args.notes) + "\n")
    return rows


def table(prompts: list[Prompt], found: Found, ways: dict[str, "Way"]) -> list[dict[str, Any]]:
    """Returns the rows: counts and seconds are added over prompts before they are divided."""
    rows = []
    for category, places in prompt_files.groups(prompts).items():
        for (temperature, decoding), answers_of_all in found.items():
            answers = [answers_of_all[place] for place in places]
            plain = [found[temperature, PLAIN][place] for place in places]
            equal = [ours.texts == theirs.texts for ours, theirs in zip(answers, plain, strict=True)]
            rows.append(
                {"category": category, "temperature": temperature, "decoding": decoding}
                | (ways[decoding].facts if decoding in ways else dict.fromkeys(FACTS))
                | {"prompts": len(answers), "turns": _turns(answers), "tokens": _tokens(answers)}
                | _acceptance(answers)
                | {
                    "seconds": _seconds(answers),
                    "tokens/s": _tokens(answers) / _seconds(answers),
                    "speed-up": _tokens(answers) / _seconds(answers) / (_tokens(plain) / _seconds(plain)),
                    # Above temperature 0 only the laws of texts are equal.
                    "text equal": None if temperature else f"{sum(equal)} of {len(equal)}",
                }
            )
    return rows


def _turns(answers: list[Answers]) -> int:
    return sum(len(each.texts) for each in answers)


def _tokens(answers: list[Answers]) -> int:
    return sum(len(text) for each in answers for text in each.texts)


def _seconds(answers: list[Answers]) -> float:
    return sum(each.seconds for each in answers)


def _acceptance(answers: list[Answers]) -> dict[str, Any]:
    """Returns ``figures.acceptance`` over all answers; each figure is None for a way without known drafts."""
    completions = [each for answer in answers for each in answer.completions if each.drafted_at]
    if not completions:
        return dict.fromkeys(figures.ACCEPTANCE)
    counts: dict[str, Any] = {name: np.asarray([getattr(each, name) for each in completions]) for name in COUNTS}
    emitted: Any = np.asarray([len(each.tokens) for each in completions])
    return figures.acceptance(specjax.Stats(emitted=emitted, **counts))


@dataclasses.dataclass(frozen=True)
class Way:
    """One of specjax's ways to decode.

    Attributes:
      session: decodes so.
      drafter: its name, or None.
      fixed: whether each round takes all drafts.
    """

    session: specjax.Session
    drafter: str | None = None
    fixed: bool | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the way beside its name."""
        drafter = self.session.drafter
        num_draft = 0 if drafter is None else drafter.num_draft
        return dict(zip(FACTS, (self.drafter, num_draft, self.fixed), strict=True))


def _ways(args: argparse.Namespace, opened: list[tuple[str, Any]]) -> dict[str, Way]:
    """Returns specjax's ways to decode: plain, and each drafter with all drafts and with as many as pay."""
    ways = {PLAIN: Way(specjax.Session(args.opened))}
    for spec, drafter in opened:
        g, name = drafter.num_draft, short_name(spec)
        if any(short_name(other) == name for other, _ in opened if other != spec):
            name = spec
        for fixed, how in ((True, "drafts"), (False, "drafts or fewer")):
            options: dict[str, Any] = {"verify": models.rule(args, drafter), "fixed": fixed}
            ways[f"{name}, {g} {how}"] = Way(specjax.Session(args.opened, drafter, **options), name, fixed)
    return ways


def _fitting(args: argparse.Namespace, drafters: list[Any]) -> tuple[list[Prompt], int | None]:
    """Returns the prompts that can be answered, and the positions of target and drafters; None is no limit.

    Raises:
      ValueError: no prompt can be answered, or one does not suit the target.
    """
    limits = [part.max_positions for part in (args.model, *drafters) if part.max_positions is not None]
    limit, prompts = min(limits, default=None), args.file_prompts
    if args.opened.chat_template is None:
        for prompt in prompts:
            if prompt.text is None:
                raise ValueError(f"{prompt.source} has messages, and the target no chat template; leave them out")
        print("The target has no chat template: it continues the text of each first turn.\n")
        prompts = [dataclasses.replace(prompt, turns=prompt.turns[:1]) for prompt in prompts]
    fit = [prompt for prompt in prompts if _fits(_laid_out(args.opened, prompt.turns[0]), args.new_tokens, limit)]
    if left := len(prompts) - len(fit):
        message = f"{left} of {len(prompts)} prompts and {args.new_tokens} new tokens pass the {limit} positions"
        if not fit:
            raise ValueError(f"{message}; give a smaller --new-tokens, or shorter prompts")
        print(f"{message}: they are left out.\n")
    return fit, limit


def _laid_out(opened: specjax.Opened, messages: Sequence[Message]) -> list[int]:
    """Returns the tokens that an answer to the messages continues."""
    tokenizer = opened.need_tokenizer()
    if opened.chat_template is None:
        return tokenizer.encode(messages[0]["content"]).ids
    return opened.chat_template.encode(tokenizer, messages)


def _fits(tokens: list[int], new_tokens: int, limit: int | None) -> bool:
    return limit is None or len(tokens) + new_tokens <= limit


def _answer(
    args: argparse.Namespace,
    prompts: list[Prompt],
    limit: int | None,
    sessions: dict[str, specjax.Session],
    others: list[tuple[str, Callable[[np.ndarray], Any]]],
) -> Found:
    """Answers each prompt by all ways in turn, so that a change of the machine's load touches all."""
    found: Found = {}
    work = [(temperature, number) for temperature in args.temperature for number in range(len(prompts))]
    for temperature, number in tqdm(work, unit="prompt"):
        # A prompt has the same seed in all ways. Its later turns follow the way's own answers.
        sampling = {"temperature": temperature, "seed": number}
        for name, session in sessions.items():
            answers = _timed(session, prompts[number], limit, args.new_tokens, sampling)
            found.setdefault((temperature, name), []).append(answers)
        for name, decode in [] if temperature else others:
            contexts = found[temperature, PLAIN][number].contexts
            found.setdefault((temperature, name), []).append(_decoded(decode, contexts))
    return found


def _timed(*arguments: Any) -> Answers:
    """Returns ``_answered`` of a run in which nothing compiled: the run is repeated until then."""
    for _ in range(TRIES):
        with measure.compilations() as compiled:
            answers = _answered(*arguments)
        if not compiled:
            return answers
    return _answered(*arguments)


def _answered(
    session: specjax.Session, prompt: Prompt, limit: int | None, new_tokens: int, sampling: dict[str, Any]
) -> Answers:
    """Answers the turns of a prompt, up to one that does not fit. The caches of a turn serve the next."""
    messages: list[Message] = []
    seconds, contexts, completions = 0.0, [], []
    for turn in prompt.turns:
        messages += turn
        contexts.append(_laid_out(session.opened, messages))
        if not _fits(contexts[-1], new_tokens, limit):
            contexts.pop()
            break
        begin = time.perf_counter()
        if session.opened.chat_template is None:
            completions.append(session.complete(messages[0]["content"], new_tokens, **sampling))
        else:
            completions.append(session.chat(messages, new_tokens, **sampling))
        seconds += time.perf_counter() - begin
        messages.append(completions[-1].message)
    return Answers(seconds, contexts, [each.tokens for each in completions], completions)


def _peer_ways(
    args: argparse.Namespace, opened: list[tuple[str, Any]], stack: contextlib.ExitStack
) -> list[tuple[str, Callable[[np.ndarray], Any]]]:
    """Returns the ways of transformers to decode, with the first draft model of the drafters if there is one.

    The folders that it opens are there until ``stack`` closes.
    """
    drafts = [folders_of(spec)[0] for spec, drafter in opened if isinstance(drafter, specjax.ModelDrafter)][:1]
    folders = stack.enter_context(peers.exported(args.target, *drafts))
    ways, note = transformers_peer.ways(
        *folders,
        num_draft=args.num_draft[0],
        new_tokens=args.new_tokens,
        threads=args.torch_threads,
        stop_tokens=args.opened.stop_tokens,
    )
    for way in ways:
        way.decode(np.ones(8, np.int32))  # the first call takes longer
    args.notes.append(f"{note} It reads all turns anew for each answer.")
    return [(f"{way.library}: {way.decoding}", way.decode) for way in ways]


def _decoded(decode: Callable[[np.ndarray], Any], contexts: list[list[int]]) -> Answers:
    """Returns another library's greedy answers after the same tokens as plain decoding's."""
    begin = time.perf_counter()
    texts = [np.asarray(decode(np.asarray(context, np.int32))).tolist() for context in contexts]
    return Answers(time.perf_counter() - begin, contexts, texts)
