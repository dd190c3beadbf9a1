"""Sessions: text completion, chat and streaming with a model that ``specjax.open`` opened. Strings in, strings out."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import NamedSharding
from tokenizers import Tokenizer

from specjax import verify as verify_lib
from specjax.checkpoint.drafters import load_drafter
from specjax.checkpoint.generation import load_generation_defaults
from specjax.checkpoint.opened import Opened
from specjax.checkpoint.opened import open as open_folder
from specjax.engine.adapt import places_past
from specjax.engine.arguments import check_rule
from specjax.engine.loop import extend, prefill, run
from specjax.engine.memory import remember as remember_texts
from specjax.engine.state import State, stop
from specjax.sampling import Sampling
from specjax.sharding import gathered
from specjax.text.files import check_characters
from specjax.text.stream import TextStream
from specjax.types import Drafter, Generation, Stats, VerifyRule

# Rounds between two searches of the text for stop strings. Each search returns to the host. Until the next search, a
# row that met a stop string runs on.
_ROUNDS_PER_LOOK = 4
_COUNTS = ("rounds", "drafted", "accepted", "drafted_at", "accepted_at")
_CONVERSATION_SLOTS = 2048  # of the caches of a conversation, unless the first turn needs more than half of them
_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation: messages such as ``{"role": "user", "content": "Hello"}``, or the text of one user message."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """The generated continuation of one prompt. ``str(completion)`` is its text.

    Attributes:
      text: the generated text, without a stop token. It ends before a stop string.
      tokens: the generated tokens. A stop token is included, and so are the tokens of a stop string and the tokens
        after it in the same rounds. So after a stop string, the tokens say more than ``text``.
      finish_reason: "stop token", "stop string", or "length" for a row that reached ``max_new_tokens``.
      prompt_tokens: how many tokens the prompt has.
      rounds: how many rounds ran; each has one pass of the target.
      drafted: how many tokens were drafted.
      accepted: how many drafted tokens were accepted.
      drafted_at: for each place in a round's draft, how many rounds drafted a token there.
      accepted_at: for each place, in how many rounds that token was accepted.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    rounds: int
    drafted: int
    accepted: int
    drafted_at: list[int]
    accepted_at: list[int]

    def __str__(self) -> str:
        return self.text

    @property
    def message(self) -> dict[str, str]:
        """The text as a message of the assistant, to append to a conversation."""
        return {"role": "assistant", "content": self.text}


class Session:
    """Completes texts and chats with one model, and drafts with one drafter.

    Under a mesh (``jax.set_mesh``), the number of prompts must be a multiple of the size of the mesh's ``data`` axis.

    Attributes:
      opened: the model, its tokenizer, stop tokens and chat template.
      drafter: the drafter, or None.
    """

    def __init__(
        self,
        opened: Opened | str | os.PathLike,
        drafter: str | Drafter | None = None,
        num_draft: int = 4,
        *,
        tree: int | None = None,
        siblings: str | None = None,
        verify: VerifyRule | None = None,
        slots: int | None = None,
        seed: int = 0,
        fixed: bool = False,
        generation_defaults: bool = False,
        remember: bool = False,
    ):
        """Opens the folder and the drafter if they are given by name.

        Args:
          opened: the result of ``specjax.open``, or a folder, which is then opened.
          drafter: a drafter, or a text for ``specjax.load_drafter`` such as "model:DIR"; None is plain decoding.
          num_draft: g, tokens proposed per round; with ``tree``, the most on one path. Only for a drafter that is given
            as a text.
          tree, siblings: drafts of a tree, and how siblings come about, as for ``specjax.load_drafter``. Only for a
            drafter that is given as a text.
          verify: a rule of ``specjax.verify``. None takes ``verify.default_rule(drafter)``.
          slots: tokens to allocate per row, for prompt, text and drafts. None allocates as many as each call needs, and
            at least 2048 for most conversations, so that later turns find room.
          seed: the seed of the first prompt that comes without a seed. Each further such prompt has the next seed.
          fixed: every round takes all drafts, as for ``specjax.generate``. By default rounds take as many as pay.
          generation_defaults: whether the folder's ``generation_config.json`` gives the sampling parameters that a call
            does not give: temperature, top_k, top_p, min_p and repetition_penalty, and temperature 0 for
            ``do_sample: false``.
          remember: whether the drafter remembers each call's prompts and answers (``specjax.remember``), for later
            calls to copy from. For drafters with a memory: "suffix", and cascades with it.

        Raises:
          TypeError: ``remember`` is true and the drafter has no memory.
          ValueError: the folder has no tokenizer, or its ``generation_config.json`` is damaged; ``tree`` is given, and
            the drafter not as a text; the rule does not verify what the drafter proposes; or as for ``specjax.open``
            and ``specjax.load_drafter``.
        """
        self.opened = opened if isinstance(opened, Opened) else open_folder(opened)
        self._tokenizer = self.opened.need_tokenizer()
        if isinstance(drafter, str):
            mesh = _mesh_of(self.opened)
            drafter = load_drafter(drafter, self.opened, num_draft, mesh=mesh, tree=tree, siblings=siblings)
        elif (tree, siblings) != (None, None):
            raise ValueError(
                f"tree is {tree!r}, siblings {siblings!r} and drafter no text; give a text, or a drafter of trees alone"
            )
        verify = verify_lib.default_rule(drafter) if verify is None else verify
        check_rule(verify, drafter)  # before a prompt is read
        # Remembering nothing tells now whether the drafter can remember.
        self.drafter = remember_texts(drafter, [[]]) if remember else drafter
        self._remember = remember
        self._verify, self._slots, self._seed, self._fixed = verify, slots, seed, fixed
        self._defaults = load_generation_defaults(self.opened.path) if generation_defaults else {}
        self._kept: _Kept | None = None

    @overload
    def complete(self, prompts: str, max_new_tokens: Any = 200, **options: Any) -> Completion: ...

    @overload
    def complete(self, prompts: list[str], max_new_tokens: Any = 200, **options: Any) -> list[Completion]: ...

    def complete(self, prompts, max_new_tokens=200, *, stop=(), **sampling):
        """Continues texts.

        Args:
          prompts: a text, or a list of texts, which is one batch.
          max_new_tokens: the most tokens to generate, an integer or one per prompt.
          stop: stop strings. A text ends before the first stop string, and its row stops.
          **sampling: parameters of ``specjax.Sampling``: temperature (default 1), top_k, top_p, seed and so on. Each
            is one value, or one per prompt.

        Returns:
          A ``Completion`` if ``prompts`` is a text, else a list with a ``Completion`` for each text.

        Raises:
          TypeError: ``prompts`` is neither a text nor a list of texts; or as for ``specjax.generate``.
          ValueError: a prompt has no tokens or holds half of a character; or as for ``specjax.generate``.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompts is {prompts!r}; give a text, or a list of texts (messages: Session.chat)")
        state, rows = self._begin([self._encode(text) for text in texts], max_new_tokens, stop, sampling)
        # Without stop strings the host has nothing to look at, so one call of the device runs all rounds.
        _exhaust(self._run(state, rows, _ROUNDS_PER_LOOK if stop else None))
        results = [row.result() for row in rows]
        return results[0] if isinstance(prompts, str) else results

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int = 200,
        *,
        stop: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Answers a conversation, laid out by the model's chat template.

        To go on, append ``result.message`` and the next message to the list, and call again. The session keeps the
        caches of its last conversation: the earlier prompt and answer. If the new conversation's tokens begin with all
        tokens in the caches, only the new tokens are read. Otherwise the whole conversation is read again. The text has
        the same law in both cases. The whole conversation is read again for:

        - another conversation;
        - a template that lays out an earlier answer in other tokens, such as without its reasoning;
        - an answer that ended at a stop string;
        - other sampling parameters;
        - too few slots in the caches.

        Args:
          messages: the conversation, as a list of ``{"role": ..., "content": ...}``; or a text, which is one message
            of the user.
          max_new_tokens: the most tokens to generate.
          stop: stop strings. The answer ends before the first.
          variables: further arguments of ``ChatTemplate.render``: variables of the template such as ``tools`` or
            ``{"enable_thinking": False}``, and ``chat_template``, the name of one of several templates.
          sanitize_control_tokens: whether special tokens that someone typed into a message are ordinary text, as for
            ``ChatTemplate.encode``. By default, as in transformers, they are control tokens: a message that holds
            "<|im_end|>" ends there.
          **sampling: as for ``complete``. A conversation that goes on keeps its seed unless another is given.

        Returns:
          The answer.

        Raises:
          ValueError: the folder has no chat template, or the template refuses the messages; or as for ``complete``.
          TypeError: as for ``complete``.
        """
        tokens = self._lay_out(messages, variables, sanitize_control_tokens)
        state, row = self._go_on(tokens, max_new_tokens, stop, sampling)
        state = _exhaust(self._run(state, [row], _ROUNDS_PER_LOOK if stop else None))
        self._keep(state, sampling)
        return row.result()

    def stream(
        self,
        prompt: Messages,
        max_new_tokens: int = 200,
        *,
        stop: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Like ``complete`` for one text, or ``chat`` for a list of messages, but yields the text piece by piece.

        The call itself checks the arguments and reads the prompt, before the first piece is asked for.

        Args:
          prompt: a text to continue, or a list of messages to answer.
          max_new_tokens, stop, variables, sanitize_control_tokens, sampling: as for ``chat``.

        Yields:
          Pieces of text, none of them empty. A piece never splits a character. The generator's return value, which
          ``yield from`` gives, is the ``Completion``.

        Raises:
          ValueError, TypeError: as for ``complete`` or ``chat``.
        """
        if isinstance(prompt, str):
            state, (row,) = self._begin([self._encode(prompt)], max_new_tokens, stop, sampling)
        else:
            tokens = self._lay_out(prompt, variables, sanitize_control_tokens)
            state, row = self._go_on(tokens, max_new_tokens, stop, sampling)
        return self._pieces(state, row, None if isinstance(prompt, str) else sampling)

    def _pieces(self, state: State, row: "_Row", kept_sampling: dict[str, Any] | None) -> Iterator[str]:
        """Yields the text of a row.

        ``kept_sampling`` holds a conversation's sampling parameters: its caches are kept at the end. None keeps none.
        """
        rounds = self._run(state, [row], 1)
        while True:
            try:
                (piece,) = next(rounds)
            except StopIteration as end:
                if kept_sampling is not None:
                    self._keep(end.value, kept_sampling)
                return row.result()
            if piece:
                yield piece

    def _encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, at least one."""
        check_characters("the prompt", text)
        tokens = self._tokenizer.encode(text).ids
        if not tokens:
            raise ValueError(f"the prompt {text!r} has no tokens; give at least one character")
        return tokens

    def _lay_out(self, messages: Messages, variables: Mapping[str, Any] | None, sanitize: bool) -> list[int]:
        """Returns a conversation as tokens, at least one."""
        template = self.opened.need_chat_template()
        if not messages:
            raise ValueError(f"messages is {messages!r}; give at least one message, or the text of one")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        tokens = template.encode(self._tokenizer, messages, sanitize_control_tokens=sanitize, **(variables or {}))
        if not tokens:
            raise ValueError(f"the chat template lays {messages!r} out as no tokens; repair it, or use complete")
        return tokens

    def _begin(
        self,
        prompts: list[list[int]],
        max_new_tokens: Any,
        stop: Sequence[str],
        sampling: dict[str, Any],
        slots: int | None = None,
    ) -> "tuple[State, list[_Row]]":
        """Reads prompts into new caches; returns the state, and the text of each row so far."""
        # A misspelt keyword would otherwise reach Sampling, whose own message does not list the parameters.
        unknown = sorted(sampling.keys() - set(_SAMPLING))
        if unknown:
            raise TypeError(
                f"there is no argument {unknown[0]!r}; sampling parameters are {', '.join(_SAMPLING)} (and there are "
                "max_new_tokens and stop)"
            )
        sampling = self._defaults | sampling
        rows = [_Row(self._tokenizer, tokens, self.opened.stop_tokens, stop) for tokens in prompts]
        # Each prompt has its own seed, so that the same prompt twice has two texts.
        if "seed" not in sampling:
            sampling = sampling | {"seed": self._seed}
            self._seed = (self._seed + len(prompts)) % 2**32
        state = prefill(
            self.opened.model,
            prompts,
            drafter=self.drafter,
            sampling=Sampling(**sampling),
            max_new_tokens=max_new_tokens,
            stop_tokens=self.opened.stop_tokens,
            slots=slots if self._slots is None else self._slots,
            fixed=self._fixed,
        )
        return state, rows

    def _go_on(
        self, tokens: list[int], max_new_tokens: int, stop: Sequence[str], sampling: dict[str, Any]
    ) -> "tuple[State, _Row]":
        """Reads a conversation: only its new tokens if the kept caches hold its beginning, else all tokens."""
        kept, self._kept = self._kept, None  # ``extend`` and ``run`` donate the state, so it serves one turn
        if kept is None or not kept.begins(tokens, max_new_tokens, sampling):
            # Later turns should find room. Slots that are not used cost memory, but no time.
            roomy = len(tokens) + max_new_tokens <= _CONVERSATION_SLOTS // 2
            slots = _CONVERSATION_SLOTS if roomy else None
            state, (row,) = self._begin([tokens], max_new_tokens, stop, sampling, slots)
            return state, row
        row = _Row(self._tokenizer, tokens, self.opened.stop_tokens, stop, kept.stats)
        new = [tokens[len(kept.tokens) :]]
        return extend(self.opened.model, kept.state, new, drafter=self.drafter, max_new_tokens=max_new_tokens), row

    def _keep(self, state: State, sampling: dict[str, Any]) -> None:
        """Keeps the caches of a conversation for its next turn."""
        generation = gathered(state.generation)
        tokens = generation.tokens[0, : generation.lengths[0]].tolist()
        self._kept = _Kept(state, tokens, generation.stats, sampling)

    def _run(self, state: State, rows: "list[_Row]", rounds: int | None) -> Iterator[list[str]]:
        """Runs rounds until all rows have ended. After every ``rounds`` of them, yields the new text of each row.

        Returns:
          The last state.
        """
        while not all(row.ended for row in rows):
            # 1. The device runs as few rounds as the caller wants to wait for new text, or all.
            state = run(self.opened.model, state, drafter=self.drafter, verify=self._verify, rounds=rounds)
            generation, done_b = gathered((state.generation, state.done_b))
            # 2. New tokens become text, since stop strings can only be found in text.
            pieces = [row.add(generation, i, done_b[i]) for i, row in enumerate(rows)]
            # 3. The device knows nothing of stop strings. Without this, such a row would run to its limit.
            met_b = np.asarray([row.ended for row in rows])
            if (met_b & ~done_b).any():
                state = stop(state, met_b)
            yield pieces
        if self._remember:
            self.drafter = remember_texts(self.drafter, state.generation)
        return state


@dataclasses.dataclass(frozen=True)
class _Kept:
    """The caches of a conversation, for its next turn.

    Attributes:
      state: the engine's state, of one row.
      tokens: all tokens of the row, prompt and answer.
      stats: counts over all turns so far, NumPy arrays ``[1]``.
      sampling: the sampling parameters that the caller gave.
    """

    state: State
    tokens: list[int]
    stats: Stats
    sampling: dict[str, Any]

    def begins(self, tokens: list[int], max_new_tokens: int, sampling: dict[str, Any]) -> bool:
        """Returns whether a conversation goes on from here: it begins with these tokens, and the slots hold its end."""
        held, slots = len(self.tokens), self.state.tokens_bs.shape[1]
        same = sampling.keys() == self.sampling.keys() and all(
            np.array_equal(sampling[name], self.sampling[name]) for name in sampling
        )
        past = places_past(self.state.num_draft, self.state.adapt is not None)
        fits = len(tokens) + max_new_tokens + past + 1 <= slots
        return same and fits and len(tokens) > held and tokens[:held] == self.tokens


class _Row:
    """A prompt and its text so far.

    Attributes:
      ended: whether the text has ended.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        stop_tokens: Sequence[int],
        stop: Sequence[str],
        before: Stats | None = None,
    ):
        """Starts a text after a prompt. ``before`` holds the row's counts of earlier turns, to be taken off."""
        self._prompt, self._stop_tokens, self._before = prompt, stop_tokens, before
        self._stream = TextStream(tokenizer, prompt, stop)
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._reason: str | None = None
        self._counts: dict[str, Any] = {}

    @property
    def ended(self) -> bool:
        return self._reason is not None

    def add(self, generation: Generation, row: int, done: Any) -> str:
        """Takes the row's new tokens; returns the new text, less what a stop string or a character may still change."""
        if self.ended:
            return ""
        piece = ""
        start = len(self._prompt) + len(self._tokens)
        # 1. Text. Tokens go in one by one, since the row ends at the first one that is a stop token or completes a
        # stop string: later tokens of the same round do not count.
        for token in generation.tokens[row, start : generation.lengths[row]].tolist():
            self._tokens.append(token)
            if token in self._stop_tokens:
                self._reason = "stop token"
                break
            piece += self._stream.push([token])
            if self._stream.stopped is not None:
                break
        # 2. Why the row ended. At the end, text that was held back may still complete a stop string.
        if self._reason is None and done:
            self._reason = "length"
        if self._reason is not None:
            piece += self._stream.finish()
        if self._stream.stopped is not None:
            self._reason = "stop string"
        self._texts.append(piece)
        # 3. Counts of this turn alone: those of a row that goes on include the earlier turns.
        for name in _COUNTS:
            earlier = 0 if self._before is None else getattr(self._before, name)[row]
            self._counts[name] = (getattr(generation.stats, name)[row] - earlier).tolist()
        return piece

    def result(self) -> Completion:
        """Returns the completion of a text that has ended."""
        assert self._reason is not None
        return Completion("".join(self._texts), self._tokens, self._reason, len(self._prompt), **self._counts)


def _exhaust(rounds: Iterator[Any]) -> Any:
    """Runs a generator to its end; returns its return value."""
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value


def _mesh_of(opened: Opened) -> Any:
    """Returns the mesh that the model's parameters are split over, or None."""
    places = [leaf.sharding for leaf in jax.tree.leaves(opened.model.params) if isinstance(leaf, jax.Array)]
    return next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
