"""The tokens emitted after each prompt, round by round, and their printing while they are made."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import specjax
from specjax.commands.streams import has_colours
from specjax.commands.trace_page import Round, Token

COUNTS = ("rounds", "drafted", "accepted", "emitted")
DIM, RESET = "\x1b[2m", "\x1b[0m"
COLOURS = {"accepted": "\x1b[32m", "corrected": "\x1b[33m", "bonus": "\x1b[36m", "target": ""}


class Transcript:
    """A prompt, and the tokens emitted after it, round by round.

    Attributes:
      prompt: the text to continue; ``prompt_ids`` are its tokens.
      shown: the text printed before the continuation.
      messages: the messages of which a chat template made the prompt, or None.
      ids: the emitted tokens. Tokens after a stop string, in the same round, are among them; ``text`` leaves them out.
      tokens: the same as ``trace_page.Token``.
      rounds: the rounds until the row was done.
      counts: figures of the row, until the round in which it was done.
      done: whether the row met its limit, a stop token or a stop string.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        template: specjax.text.ChatTemplate | None = None,
        system: str | None = None,
        sanitize_control_tokens: bool = False,
        **variables: Any,
    ):
        """Starts after a prompt.

        Args:
          tokenizer: the target's.
          prompt: the text to continue, or with a template, the message to answer.
          max_new_tokens: the most tokens that are emitted.
          stop_tokens, stop: tokens and texts that end the row.
          template: lays the message out; None continues the prompt itself.
          system: a system message before it.
          sanitize_control_tokens, variables: as for ``ChatTemplate.encode``.
        """
        self.prompt, self.shown, self.messages, self.done = prompt, prompt, None, False
        if template is not None:
            roles = {"system": system, "user": prompt}
            self.messages = [{"role": role, "content": text} for role, text in roles.items() if text is not None]
            self.prompt, self.shown = template.render(self.messages, **variables), prompt + "\n"
            self.prompt_ids = template.encode(
                tokenizer, self.messages, sanitize_control_tokens=sanitize_control_tokens, **variables
            )
        else:
            self.prompt_ids = tokenizer.encode(prompt).ids
        self.ids, self.tokens, self.rounds = [], [], []
        self.counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self._tokenizer, self._limit, self._stop_tokens = tokenizer, max_new_tokens, stop_tokens
        self._stream = specjax.text.TextStream(tokenizer, self.prompt_ids, stop)

    @property
    def text(self) -> str:
        """The continuation, without a stop string and the text after it."""
        return "".join(token.text for token in self.tokens)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stream.stopped

    def add(self, generation: specjax.Generation, row: int) -> None:
        """Adds a round, if the row was still running."""
        if self.done:
            return
        # Statistics are sums over all rounds, so the round's figures are differences.
        before, self.counts = self.counts, counts_of(generation.stats, row)
        accepted = self.counts["accepted"] - before["accepted"]
        # Of a tree, its depth: as many drafts as could have been accepted.
        drafted = sum(self.counts["drafted_at"]) - sum(before.get("drafted_at", []))
        length = len(self.prompt_ids) + len(self.ids)
        new = generation.tokens[row, length : generation.lengths[row]].tolist()
        own = "target" if not drafted else "bonus" if accepted == drafted else "corrected"
        # A round's first tokens are the accepted drafts, and its last one is the target's own.
        tokens = []
        for place, token in enumerate(new):
            ends = token in self._stop_tokens
            text = "" if ends else self._stream.push([token])
            name = self._tokenizer.id_to_token(token) or str(token)
            tokens.append(Token(text, "accepted" if place < accepted else own, name if ends else ""))
        self.ids += new
        self.done = new[-1] in self._stop_tokens or self.stopped is not None or len(self.ids) == self._limit
        # Text that was held back, since a stop string might have begun there, belongs to the last token.
        if self.done:
            tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + self._stream.finish())
        self.tokens += tokens
        self.rounds.append(Round(drafted, accepted, tokens))


def counts_of(stats: specjax.Stats, row: int) -> dict[str, Any]:
    """Returns the figures of a row by name."""
    counts = {name: int(getattr(stats, name)[row]) for name in COUNTS}
    return counts | {name: getattr(stats, name)[row].tolist() for name in ("drafted_at", "accepted_at")}


class Printer:
    """Prints text while it is made: the first unfinished prompt live, the others when their turn comes."""

    def __init__(self, transcripts: list[Transcript]):
        self._transcripts, self._row, self._printed = transcripts, 0, 0
        self._colour = has_colours(sys.stdout)
        self._begin()

    def _begin(self) -> None:
        if len(self._transcripts) > 1:
            print(self._paint(f"--- prompt {self._row + 1} of {len(self._transcripts)} ---", DIM))
        print(self._paint(self._transcripts[self._row].shown, DIM), end="", flush=True)

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{RESET}" if self._colour and colour and text else text

    def update(self) -> None:
        """Prints the text since the last call."""
        while self._row < len(self._transcripts):
            transcript = self._transcripts[self._row]
            for token in transcript.tokens[self._printed :]:
                print(self._paint(token.text, COLOURS[token.origin]), end="")
            self._printed = len(transcript.tokens)
            if not transcript.done:
                break
            if not (transcript.shown + transcript.text).endswith("\n"):
                print()
            self._row, self._printed = self._row + 1, 0
            if self._row < len(self._transcripts):
                self._begin()
        sys.stdout.flush()


def follow(rounds: Iterator[specjax.Generation], transcripts: list[Transcript]) -> float:
    """Prints the text of all rounds until all rows are done; returns the seconds of the rounds, without printing."""
    printer = Printer(transcripts)
    seconds = 0.0
    while not all(transcript.done for transcript in transcripts):
        start = time.perf_counter()
        generation = next(rounds)
        seconds += time.perf_counter() - start  # without decoding and printing
        for row, transcript in enumerate(transcripts):
            transcript.add(generation, row)
        printer.update()
    return seconds
