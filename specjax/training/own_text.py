"""Text that a target writes by itself, in batches whose rows are replaced by new ones as they end.

A document has two parts. The opening is sampled at temperature 1, so that no two documents are alike: the user's turn
of a chat, or the first tokens of a text. The rest follows at one of ``TEMPERATURES``: the answer, or the text.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from specjax.checkpoint.opened import Opened
from specjax.engine.loop import prefill, run
from specjax.engine.state import State, insert, stop
from specjax.sampling import Sampling
from specjax.text.chat import ChatTemplate
from specjax.training.data import END_OF_TEXT
from specjax.types import LanguageModel

TEMPERATURES = (0.0, 0.5, 0.8, 1.0)
"""Document n has temperature n modulo 4 of these after its opening, since a draft serves greedy users and others."""
USER_TOKENS = 128  # the most of a user's turn, which is cut there
OPENING_TOKENS = 16  # the opening of a text
ROUNDS = 16  # between two looks at which rows are done
GROUPS = 4  # a quarter of the rows is replaced at a time, so that all prompts have one number of rows
MARKS = ("Zephyr7Quill", "Onyx4Marble")  # stand for a user's message


@dataclasses.dataclass(frozen=True)
class Openings:
    """How the documents of a target begin.

    Attributes:
      before: tokens before the opening. If there are none, a random one of ``starts`` begins a document.
      between: tokens after the opening. Of a chat, they end the user's turn and begin the answer; else there are none.
      ends: tokens that end a turn or a text.
      starts: see ``before``.
      chat: whether the opening is a user's turn.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    ends: tuple[int, ...]
    starts: tuple[int, ...]
    chat: bool

    def tokens(self, length: int) -> int:
        """Returns the most tokens of an opening in documents of at most ``length`` tokens."""
        return min(USER_TOKENS if self.chat else OPENING_TOKENS, max(1, length // 4))

    def check_length(self, length: int) -> None:
        """Raises ValueError unless documents of at most ``length`` tokens have a place for what follows an opening."""
        least = len(self.before) + self.tokens(length) + len(self.between) + 1
        if least >= length:
            raise ValueError(
                f"documents have at most {length} tokens, as the target has few positions, and its chat template with "
                f"a user's turn takes {least}; give a target with more positions"
            )


def openings_of(opened: Opened) -> Openings:
    """Returns how the documents of a target begin: as a chat if it has a template with a user's turn, else as a text.

    A text begins with the token that the tokenizer puts first, or ``bos_token_id`` of the config, or ``END_OF_TEXT``;
    without any of them, with a random token of the vocabulary that is not a special one.
    """
    tokenizer = opened.need_tokenizer()
    turns = None if opened.chat_template is None else user_turn(opened.chat_template, tokenizer)
    special = set(tokenizer.get_added_tokens_decoder())
    if turns is not None:
        before, between = turns
        ends = dict.fromkeys([*opened.stop_tokens, *between[:1]] if between[0] in special else opened.stop_tokens)
        return Openings(before, between, tuple(ends), (), chat=True)
    first = next(iter(tokenizer.encode("").ids), None)
    first = opened.config.get("bos_token_id") if first is None else first
    first = tokenizer.token_to_id(END_OF_TEXT) if first is None else first
    vocab = min(tokenizer.get_vocab_size(), opened.model.vocab_size)
    starts = tuple(i for i in range(vocab) if i not in special and i not in opened.stop_tokens)
    if isinstance(first, int) and 0 <= first < opened.model.vocab_size:
        return Openings((first,), (), opened.stop_tokens, (), chat=False)
    return Openings((), (), opened.stop_tokens, starts, chat=False)


def user_turn(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the tokens before a user's first message, and those from its end to the beginning of the answer.

    Two marks stand for the message. None is returned unless the template leaves each mark as it is, once, and puts the
    same texts around both; or if nothing comes before or after a message.
    """
    around = set()
    for mark in MARKS:
        try:
            text = template.render([{"role": "user", "content": mark}])
        except ValueError:
            return None
        around.add(tuple(text.split(mark)))
    if len(around) > 1 or len(next(iter(around))) != 2:
        return None
    before, between = around.pop()
    # A space before the message belongs to the message's first token.
    pieces = (tokenizer.encode(text, add_special_tokens=False).ids for text in (before.rstrip(" "), between))
    before, between = map(tuple, pieces)
    return (before, between) if before and between else None


class Document(NamedTuple):
    """A text of a target: int32 tokens ``[n]``, of which the first ``start`` are the prompt of the rest."""

    tokens: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """A prompt to go on with. ``number``: the document's; None fills a row up."""

    number: int | None
    prompt: tuple[int, ...]
    temperature: float
    limit: int
    seed: int
    opening: bool


def write_documents(
    model: LanguageModel,
    openings: Openings,
    numbers: Iterable[int],
    *,
    seed: int,
    rows: int,
    length: int,
    on_tokens: Callable[[int], Any] = lambda count: None,
) -> list[Document]:
    """Returns documents of a target, in the order of their numbers.

    The result is a function of the arguments alone. Rows that end, or fall into a loop (``cut_loop``), are replaced by
    the next prompts.

    Args:
      model: the target.
      openings: how documents begin.
      numbers: the documents' numbers, which decide their seeds and temperatures.
      seed: at least 0.
      rows: how many are written at once, a multiple of 4.
      length: the most tokens of a document.
      on_tokens: ``on_tokens(count)`` is called every few rounds with how many tokens were sampled since.

    Returns:
      The documents, without those whose opening is empty.

    Raises:
      ValueError: a document has no place for an answer.
    """
    openings.check_length(length)
    queue = deque(_first_part(openings, number, seed, length) for number in numbers)
    group, written = rows // GROUPS, {}
    start = functools.partial(_read, model, openings.ends, length)
    # 1. All rows begin with a prompt. Fillers end at once.
    parts = [_take(queue, group) for _ in range(GROUPS)]
    state: State = jax.tree.map(lambda *each: jnp.concatenate(each), *map(start, parts))
    running: list[_Part | None] = [part for each in parts for part in each]
    while True:
        state = run(model, state, rounds=ROUNDS)
        done_b, length_b = np.asarray(state.done_b), np.asarray(state.length_b)
        tokens_bs = np.asarray(state.tokens_bs)
        looped_b = np.asarray([len(cut_loop(row[:end])) < end for row, end in zip(tokens_bs, length_b, strict=True)])
        state = stop(state, looped_b)
        # 2. What ended, or fell into a loop: an opening goes to the end of the queue as the prompt of the rest.
        for row in np.flatnonzero(done_b | looped_b):
            part, running[row] = running[row], None
            if part is None or part.number is None:
                continue
            tokens = tokens_bs[row, : length_b[row]]
            on_tokens(len(tokens) - len(part.prompt))
            rest = _rest(openings, part, tokens, seed, length) if part.opening else None
            if rest is not None:
                queue.append(rest)
            elif not part.opening or not openings.chat:
                written[part.number] = Document(tokens, len(part.prompt))
        # 3. Rows without work take the next prompts.
        free = [row for row in range(rows) if running[row] is None]
        while queue and len(free) >= group:
            part_k, row_k, free = _take(queue, group), free[:group], free[group:]
            state = _replace(state, np.asarray(row_k, np.int32), start(part_k))
            for row, part in zip(row_k, part_k, strict=True):
                running[row] = part
        if not queue and len(free) == rows:
            return [written[number] for number in sorted(written)]


_replace = jax.jit(insert, donate_argnums=0)


def _take(queue: deque[_Part], count: int) -> list[_Part]:
    """Takes parts from a queue. Fillers make up the count."""
    parts = [queue.popleft() for _ in range(min(count, len(queue)))]
    return parts + [_Part(None, (0,), 0.0, 1, 0, opening=False)] * (count - len(parts))


def _read(model: LanguageModel, ends: Sequence[int], length: int, parts: Sequence[_Part]) -> State:
    sampling = Sampling(
        temperature=np.asarray([part.temperature for part in parts], np.float32),
        seed=np.asarray([part.seed for part in parts], np.uint32),
    )
    return prefill(
        model,
        [part.prompt for part in parts],
        sampling=sampling,
        max_new_tokens=np.asarray([part.limit for part in parts], np.int32),
        stop_tokens=tuple(ends),
        slots=length + 1,
        fixed=True,
    )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _first_part(openings: Openings, number: int, seed: int, length: int) -> _Part:
    before = openings.before
    if not before:
        before = (int(np.random.default_rng((seed, number, 2)).choice(openings.starts)),)
    return _Part(number, before, 1.0, openings.tokens(length), _seed(seed, number, 0), opening=True)


def _rest(openings: Openings, part: _Part, tokens: np.ndarray, seed: int, length: int) -> _Part | None:
    """Returns what follows an opening; None if the document ends with it."""
    assert part.number is not None
    ended, opening = int(tokens[-1]) in openings.ends, tokens[len(part.prompt) :].tolist()
    if openings.chat:
        opening = opening[:-1] if ended else opening
        if not opening:
            return None
    elif ended:
        return None
    prompt = (*part.prompt, *opening, *openings.between)
    temperature = TEMPERATURES[part.number % len(TEMPERATURES)]
    return _Part(part.number, prompt, temperature, length - len(prompt), _seed(seed, part.number, 1), opening=False)


LONGEST_PERIOD, LEAST_LOOP = 64, 32


def cut_loop(tokens: np.ndarray) -> np.ndarray:
    """Returns a text whose end repeats itself without its repetitions after the second.

    A greedy text of a small model often ends in a loop of a few tokens until its limit. Such loops are easy to draft
    and would be most of the text. Two rounds stay, from which a draft learns that loops go on. A loop has a period of
    at most 64 tokens and goes on for at least three periods, and at least 32 tokens. Example: a text of 5 tokens, then
    a period of 4 tokens for 100 tokens: 5 + 2 * 4 tokens stay.
    """
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        start = int(differs[-1]) + 1 if differs.size else 0  # where the loop begins
        looped = len(tokens) - start
        if looped >= max(3 * period, LEAST_LOOP):
            return tokens[: start + 2 * period]
    return tokens
