"""Tokens as text while they are made."""

import operator
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer

# Tokens behind which a decoder forgets: a UTF-8 character has 4 bytes, and a token at least one of them.
CONTEXT = 8


class TextStream:
    """Turns a row's tokens into text piece by piece, in time linear in the tokens.

    The pieces together are what ``tokenizer.decode(prompt + tokens)`` has behind ``tokenizer.decode(prompt)``, however
    the tokens were divided: a character is never split, bytes that form none come out as U+FFFD, and special tokens
    are left out. (A prompt that ends inside a character is itself decoded otherwise once that is complete; then the
    pieces are what follows the two decoded texts' common beginning.)

    Text ends before the first place where a stop string begins; of several that begin there, the shortest is the one
    that ``stopped`` names. What may yet turn out to be held back is held back: bytes of an unfinished character, and
    the beginning of a stop string.

    Attributes:
      stopped: the stop string that was met, or None.
    """

    # ``tokenizers.decoders.DecodeStream`` does not serve: it raises where byte tokens turn out not to be UTF-8, holds
    # text back for ever where it ends with U+FFFD, and cannot be asked for what it still holds.

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: ArrayLike = (), stop: Sequence[str] = ()):
        """Starts behind a prompt.

        Args:
          tokenizer: what the tokens belong to. Ids that it does not know have no text.
          prompt_tokens: ``[t]`` integers, what lies before: it decides, for one, whether a first space is text.
          stop: texts to end before; they count where they begin in pushed tokens, not in the prompt.

        Raises:
          ValueError: a stop string is empty or no string, or a token is not an integer from 0 to 2**31 - 1.
        """
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}; give a sequence of strings, none of them empty")
        self.stopped: str | None = None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {token for token, about in tokenizer.get_added_tokens_decoder().items() if about.special}
        # A run of byte tokens, such as <0xE6>, becomes characters or one U+FFFD each only as a whole, at its end.
        names = [f"<0x{byte:{form}}>" for byte in range(256) for form in ("02X", "02x")]
        self._bytes = {tokenizer.token_to_id(name) for name in names} - {None}
        self._window = self._visible(prompt_tokens)  # the last tokens, and of their text, what has been dealt with
        self._shorten()
        self._shown = tokenizer.decode(self._window)
        self._held = ""  # text that may be the beginning of a stop string
        self._finished = False

    def push(self, tokens: ArrayLike) -> str:
        """Returns the text that became certain with these tokens; nothing once a stop string was met.

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
        """Returns the text that was held back, the text being at its end."""
        if self._finished or self.stopped is not None:
            return ""
        self._finished = True
        return self._release(_behind(self._shown, self._tokenizer.decode(self._window)), last=True)

    def _visible(self, tokens: ArrayLike) -> list[int]:
        """Returns the tokens that have text: those that ``decode`` does not skip."""
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
            return ""
        new = _behind(self._shown, _certain(self._tokenizer.decode(self._window)))
        if new:
            self._shorten()
            self._shown = _certain(self._tokenizer.decode(self._window))
        return new

    def _shorten(self) -> None:
        """Drops old tokens from the window, but none of a run of byte tokens that reaches into it."""
        start = max(0, len(self._window) - CONTEXT)
        while start and self._window[start - 1] in self._bytes:
            start -= 1
        del self._window[:start]

    def _release(self, new: str, last: bool = False) -> str:
        """Returns text up to a stop string, or up to where one may have begun."""
        text = self._held + new
        matches = ((text.find(stop), len(stop), stop) for stop in self._stop if stop in text)
        start, _, match = min(matches, default=(len(text), 0, None))
        end = len(text) if last else self._doubtful(text)
        if match is not None and start <= end:
            self.stopped, self._held = match, ""
            return text[:start]
        self._held = text[end:]
        return text[:end]

    def _doubtful(self, text: str) -> int:
        """Returns where the longest end of the text starts that begins a stop string."""
        longest = max(map(len, self._stop), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        return next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))


def _certain(text: str) -> str:
    """Returns a text without the U+FFFD at its end, which stands for bytes that the next may complete."""
    return text.removesuffix("\ufffd")


def _behind(shown: str, text: str) -> str:
    """Returns the text behind the beginning that the two have in common."""
    return text[sum(takewhile(bool, map(operator.eq, shown, text))) :]
