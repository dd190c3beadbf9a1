"""Control tokens within messages: marked before a template runs, then encoded as ordinary text."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

# Characters for private use. They surround a control token that a message holds; in messages they are dropped.
_START, _END = "\U000f0000", "\U000f0001"


def control_tokens(tokenizer: Tokenizer, is_control: Callable[[str], bool]) -> list[str]:
    """Returns all special tokens, and the other added tokens for which ``is_control`` is true."""
    added = tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special or is_control(token.content)]


def mark(value: Any, tokens: Sequence[str]) -> Any:
    """Returns plain JSON values with marks around each of ``tokens`` in their texts and in keys of objects.

    A key that is an identifier stays as it is: a template may look it up by its name.
    """
    pattern = _any(tokens)

    def marked_text(text: str) -> str:
        # Marks in the text itself could pass for ours.
        return pattern.sub(f"{_START}\\g<0>{_END}", text.replace(_START, "").replace(_END, ""))

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return marked_text(value)
        if isinstance(value, list):
            return [marked(each) for each in value]
        if isinstance(value, dict):
            return {key if key.isidentifier() else marked_text(key): marked(each) for key, each in value.items()}
        return value

    return marked(value)


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text with marks. Marked control tokens are encoded as ordinary text, the rest as usual.

    A template may cut between a mark and its token. Such a mark is dropped, but nothing joins across it.

    Raises:
      ValueError: the tokenizer makes a control token of ordinary text.
    """
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    # Example, marks written as { and }: "a{<e>}b{c" is cut into "a", "<e>", "b", None for the lone mark, "c".
    pieces = re.split(f"{_START}({_any(added).pattern}){_END}|[{_START}{_END}]", text)
    ids = tokenizer.encode(pieces[0], add_special_tokens=False).ids
    for place, piece in enumerate(pieces[1:], 1):
        is_marked = place % 2 == 1
        new = _continued(tokenizer, piece, is_marked) if piece else []
        if is_marked and piece and tokenizer.token_to_id(piece) in new:
            raise ValueError(
                f"the tokenizer makes the control token {piece!r} of ordinary text; take it out of the text"
            )
        ids += new
    return ids


def _continued(tokenizer: Tokenizer, text: str, ordinary: bool) -> list[int]:
    """Returns the tokens of a text that does not begin the whole text; ``ordinary`` knows no added tokens."""

    def encode(text: str) -> list[int]:
        if not ordinary:
            return tokenizer.encode(text, add_special_tokens=False).ids
        # The steps of ``encode`` without the one that finds added tokens.
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
        steps = tokenizer.pre_tokenizer
        words = [text] if steps is None else [word for word, _ in steps.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]

    # Some tokenizers put a space before a text. After a newline they put none before the text itself.
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    ids = encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)


def _any(tokens: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern of any of the texts, longer ones first; of none, a pattern that matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
