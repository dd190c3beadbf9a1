"""Text of tokens, piece by piece while the tokens are generated."""

import operator
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer

# A decoder has forgotten a token after so many others: a UTF-8 character has at most 4 bytes, and each token at least
# one of them.
CONTEXT = 8


class TextStream:
    """Turns a row's tokens into text piece by piece, in time linear in the tokens.

    The joined pieces do not depend on how the tokens were divided into pushes. They are the text of
    ``tokenizer.decode(prompt + tokens)`` after its common beginning with ``tokenizer.decode(prompt)``. The whole
    decoded prompt is that common beginning, except for a prompt that ends inside a character. A character is never
    split. Bytes that form no character become U+FFFD. Special tokens are left out.

    The text ends before the first place where a stop string begins. If several stop strings begin at this place,
    ``stopped`` names the shortest. Text that is not certain yet is held back: bytes of an unfinished character, and the
    beginning of a stop string. Example, stop string "END": after "the E" the stream has returned "the ".

    Attributes:
      stopped: the stop string that was met, or None.
    """

    # ``tokenizers.decoders.DecodeStream`` is no substitute. It raises if byte tokens are not UTF-8, holds text that
    # ends with U+FFFD back for ever, and has no way to return the text that it still holds.

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: ArrayLike = (), stop: Sequence[str] = ()):
        """Starts after a prompt.

        Args:
          tokenizer: the tokenizer of the tokens. Ids that it does not know have no text.
          prompt_tokens: ``[t]`` integers, the tokens before the first pushed one. They decide, for one, whether a first
            space is text.
          stop: stop strings. Only those that begin in the text of pushed tokens count, not those of the prompt.

        Raises:
          ValueError: a stop string is empty or no string, or a token is not an integer from 0 to 2**31 - 1.
        """
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}; give a sequence of strings, none of them empty")
        self.stopped: str | None = None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {token for token, about in tokenizer.get_added_tokens_decoder().items() if about.special}
        # A run of byte tokens, such as <0xE6>, is decoded as a whole at its end: to characters, or to one U+FFFD each.
        names = [f"<0x{byte:{form}}>" for byte in range(256) for form in ("02X", "02x")]
        self._bytes = {tokenizer.token_to_id(name) for name in names} - {None}
        # A decoder needs a few tokens of context. `_window` holds the last tokens, `_shown` the part of their text that
        # has been released.
        self._window = self._visible(prompt_tokens)
        self._shorten()
        self._shown = tokenizer.decode(self._window)
        self._held = ""  # text that may be the beginning of a stop string
        self._finished = False

    def push(self, tokens: ArrayLike) -> str:
        """Returns the text that became certain with these tokens; "" after a stop string was met.

        Args:
          tokens: ``[t]`` integers, the next tokens of the row.

        Raises:
          ValueError: a token is not an integer from 0 to 2**31 - 1, or the stream is finished.
        """
        if self._finished:
            raise ValueError("the stream is finished and takes no more tokens; make a new one")
        if self.stopped is not None:
            return ""
        return self._release("".join(map(self._decode, self._visible(tokens))))

    def finish(self) -> str:
        """Ends the stream and returns the text that was held back."""
        if self._finished or self.stopped is not None:
            return ""
        self._finished = True
        return self._release(_after(self._shown, self._tokenizer.decode(self._window)), last=True)

    def _visible(self, tokens: ArrayLike) -> list[int]:
        """Returns the tokens that have text: no special tokens and no unknown ids, which ``decode`` skips."""
        array = np.asarray(tokens)
        whole = array.ndim == 1 and (not array.size or np.issubdtype(array.dtype, np.integer))
        if not whole or any((array < 0) | (array >= 2**31)):
            raise ValueError(f"tokens are {tokens!r}; give one row of integers from 0 to 2**31 - 1")
        known = self._tokenizer.id_to_token
        return [token for token in array.tolist() if token not in self._special and known(token) is not None]

    def _decode(self, token: int) -> str:
        """Returns the text that one more token makes certain."""
        self._window.append(token)
        if token in self._bytes:
            return ""  # the run of byte tokens may go on
        new = _after(self._shown, _certain(self._tokenizer.decode(self._window)))
        if new:
            self._shorten()
            self._shown = _certain(self._tokenizer.decode(self._window))
        return new

    def _shorten(self) -> None:
        """Drops old tokens from the window. A run of byte tokens that reaches into the window is kept whole."""
        start = max(0, len(self._window) - CONTEXT)
        while start and self._window[start - 1] in self._bytes:
            start -= 1
        del self._window[:start]

    def _release(self, new: str, last: bool = False) -> str:
        """Returns the text up to a stop string, or up to the place where a stop string may have begun."""
        text = self._held + new
        # The first place wins, then the shortest string.
        matches = ((text.find(stop), len(stop), stop) for stop in self._stop if stop in text)
        start, _, match = min(matches, default=(len(text), 0, None))
        end = len(text) if last else self._doubtful(text)
        # A longer stop string may have begun before the match; then the match has to wait.
        if match is not None and start <= end:
            self.stopped, self._held = match, ""
            return text[:start]
        self._held = text[end:]
        return text[:end]

    def _doubtful(self, text: str) -> int:
        """Returns the start of the longest end of ``text`` that begins a stop string, or ``len(text)`` if none does."""
        longest = max(map(len, self._stop), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        return next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))


def _certain(text: str) -> str:
    """Returns ``text`` without a U+FFFD at its end, which stands for bytes that the next token may complete."""
    return text.removesuffix("\ufffd")


def _after(shown: str, text: str) -> str:
    """Returns the part of ``text`` after its common beginning with ``shown``."""
    return text[sum(takewhile(bool, map(operator.eq, shown, text))) :]
