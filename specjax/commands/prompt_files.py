"""Prompts from JSONL files in the formats of public benchmarks: MT-bench, Spec-Bench, HumanEval, GSM8K."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.text.files import check_characters, read_lines

# The first that a line has counts.
KEYS = ("turns", "messages", "prompt", "question")
OVERALL = "overall"
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of a file.

    Attributes:
      source: the file's name without its ending.
      category: of the line; ``source`` if the line has none.
      turns: what is said before each answer: messages such as ``{"role": "user", "content": "Hello"}``.
    """

    source: str
    category: str
    turns: tuple[tuple[Message, ...], ...]

    @property
    def text(self) -> str | None:
        """The first turn as text to continue; None if it is not one message of the user."""
        first, *others = self.turns[0]
        return None if others or first["role"] != "user" else first["content"]


def read(files: Sequence[Path], limit: int | None = None) -> list[Prompt]:
    """Reads the prompts of files.

    Args:
      files: JSONL files; each line is an object with one of ``KEYS``, and perhaps a ``category``. Blank lines are
        skipped.
      limit: the most prompts of each category of each file, evenly spread over it. Example, 2 of 5: the first and the
        third. None: all.

    Raises:
      ValueError: a file cannot be read or has no prompt, or a line is wrong.
    """
    prompts = []
    for file in files:
        lines = read_lines(file)
        if not lines:
            raise ValueError(f"{file} has no prompts; give a file with one JSON object in each line")
        prompts += [_prompt(file.stem, place, line) for place, line in lines]
    categories: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault((prompt.source, prompt.category), []).append(prompt)
    return [prompt for among in categories.values() for prompt in _spread(among, limit)]


def groups(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Returns the places of the prompts of each category, of each of several files, and of all, by name."""
    sources = list(dict.fromkeys(prompt.source for prompt in prompts))
    found: dict[str, list[int]] = {}
    for source in sources:
        own = [place for place, prompt in enumerate(prompts) if prompt.source == source]
        categories = list(dict.fromkeys(prompts[place].category for place in own))
        for category in categories:
            # Categories of different files may share a name.
            name = category if len(sources) == 1 or category == source else f"{source}: {category}"
            found[name] = [place for place in own if prompts[place].category == category]
        if len(sources) > 1 and len(categories) > 1:
            found[source] = own
    return found if len(found) == 1 else found | {OVERALL: list(range(len(prompts)))}


def _spread(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    count = len(prompts)
    return prompts if limit is None or limit >= count else [prompts[i * count // limit] for i in range(limit)]


def _prompt(source: str, place: str, line: str) -> Prompt:
    """Reads a line; ``place`` is what errors call it."""
    # 1. The object, its category and the key that counts.
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); give one JSON object in each line") from None
    if not isinstance(value, dict):
        raise ValueError(f'{place} is a {type(value).__name__}; give an object such as {{"prompt": "Hello"}}')
    category = value.get("category")
    if category is not None and (not isinstance(category, str) or not category):
        raise ValueError(f"{place}: category is {category!r}; give a text, or leave it out")
    key = next((key for key in KEYS if value.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{place} has none of the keys {', '.join(KEYS)}, but {_short(list(value))}; give one of them")
    # 2. Its turns.
    given = value[key]
    if key == "messages" or (key == "prompt" and isinstance(given, list)):
        turns: tuple[tuple[Message, ...], ...] = (_messages(f"{place}: {key}", given),)
    else:
        texts = given if key == "turns" else [given]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            wanted = "a list of texts that are not empty" if key == "turns" else "a text that is not empty"
            raise ValueError(f"{place}: {key} is {_short(given)}; give {wanted}")
        turns = tuple(({"role": "user", "content": text},) for text in texts)
    check_characters(place, json.dumps([category, turns], ensure_ascii=False))
    return Prompt(source, category or source, turns)


def _messages(place: str, given: Any) -> tuple[Message, ...]:
    """Checks a conversation that the model is to answer."""
    fine = isinstance(given, list) and given and all(isinstance(each, dict) for each in given)
    if not fine or not all(isinstance(each.get("role"), str) and "content" in each for each in given):
        raise ValueError(f'{place} is {_short(given)}; give a list such as [{{"role": "user", "content": "Hello"}}]')
    if given[-1]["role"] == "assistant":
        raise ValueError(f"{place} ends with a message of the assistant; end with the message to answer")
    return tuple(given)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
