"""Maps between two vocabularies. Tokens are compared by the bytes that they stand for."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MAX_PIECES = 4
"""The most draft tokens for one target token. Four spell all but the longest words and runs of foreign letters. More
would cost time: a drafter feeds one more than this in every round."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A target's tokens in terms of a draft's.

    Attributes:
      draft_of_v: int32 ``[v]``, the draft's id of each token that both vocabularies have, -1 for other tokens.
      pieces_vp: int32 ``[v, p]``, the draft tokens that spell each token, then zeros. A shared token is one piece.
      num_pieces_v: int32 ``[v]``, how many of the p pieces count; 0 if no draft tokens spell the token.

    Raises:
      ValueError: the shapes do not fit, an id or a count is out of range, or a shared token is not its one piece.
    """

    draft_of_v: np.ndarray
    pieces_vp: np.ndarray
    num_pieces_v: np.ndarray

    def __post_init__(self):
        # Drafters index arrays with these ids on the device, where a wrong id would raise nothing.
        (vocab,), shape, count_shape = np.shape(self.draft_of_v), np.shape(self.pieces_vp), np.shape(self.num_pieces_v)
        if len(shape) != 2 or shape[0] != vocab or not shape[1] or count_shape != (vocab,):
            raise ValueError(
                f"draft_of_v has shape ({vocab},), pieces_vp {shape} and num_pieces_v {count_shape}; give (v,), (v, p) "
                "with p at least 1, and (v,)"
            )
        if np.min(self.draft_of_v) < -1 or np.min(self.pieces_vp) < 0:
            raise ValueError("draft_of_v or pieces_vp holds a negative id; only draft_of_v may hold -1, for unshared")
        if np.min(self.num_pieces_v) < 0 or np.max(self.num_pieces_v) > shape[1]:
            raise ValueError(f"num_pieces_v holds counts outside of 0 to {shape[1]}, the width of pieces_vp")
        split = (self.draft_of_v >= 0) & ((self.num_pieces_v != 1) | (self.pieces_vp[:, 0] != self.draft_of_v))
        if split.any():
            raise ValueError(f"token {int(np.argmax(split))} is shared; its one piece must be its id in draft_of_v")

    @property
    def num_shared(self) -> int:
        """How many of the target's tokens the draft has as well."""
        return int((self.draft_of_v >= 0).sum())


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Returns the bytes that each id stands for; None for special tokens and for ids without a token.

    Two kinds of tokenizer are known. In byte-level BPE a letter of GPT-2's alphabet is a byte. In the SentencePiece
    style a mark such as "▁" is a space, and ``<0x0A>`` may be a byte. A token at the start of a text keeps its space.

    Raises:
      ValueError: the tokenizer is of another kind.
    """
    read = _reader(json.loads(tokenizer.to_str()))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    tokens = [None if i in special else tokenizer.id_to_token(i) for i in range(size)]
    return [None if token is None else read(token) for token in tokens]


def match_vocabularies(
    target_tokenizer: Tokenizer, draft_tokenizer: Tokenizer, target_size: int, draft_size: int
) -> VocabularyMap:
    """Finds the tokens that two vocabularies share, and spells the target's other tokens in draft tokens.

    Ordinary tokens are shared if they stand for the same bytes, special tokens if they have the same name. An ordinary
    token never matches a special one. If several ids stand for the same bytes, the lowest id counts. Byte-fallback
    tokens come last, because a tokenizer uses them only if nothing else spells the text. A token of more than
    ``MAX_PIECES`` pieces keeps its last pieces. A special token that is not shared has no pieces.

    Args:
      target_tokenizer: the target's.
      draft_tokenizer: the draft model's.
      target_size: v, size of the target's logits. Ids past the tokenizer's last one are unshared.
      draft_size: size of the draft's logits. Tokens of the draft's tokenizer past this size are not used.

    Raises:
      ValueError: a tokenizer is of an unknown kind, a size is below 1, or no ordinary token is shared.
    """
    if target_size < 1 or draft_size < 1:
        raise ValueError(f"target_size is {target_size} and draft_size {draft_size}; give at least 1")
    # Shared tokens first. Without any ordinary one, the two models can say nothing to each other.
    target_tokens = token_bytes(target_tokenizer)[:target_size]
    draft_ids = _text_ids(draft_tokenizer, draft_size)
    draft_of_v = np.full((target_size,), -1, np.int32)
    for data, i in _text_ids(target_tokenizer, target_size).items():
        draft_of_v[i] = draft_ids.get(data, -1)
    if (draft_of_v < 0).all():
        raise ValueError(
            f"no token of the target's vocabulary ({target_size} ids) is in the draft's ({draft_size} ids); "
            "give a draft model whose tokenizer has some of the target's tokens"
        )
    draft_names = _special_ids(draft_tokenizer, draft_size)
    for name, i in _special_ids(target_tokenizer, target_size).items():
        draft_of_v[i] = draft_names.get(name, -1)

    # Unshared tokens are spelled. The last pieces are kept: they are the nearest to the token that follows.
    spell = _speller(draft_tokenizer, draft_ids, draft_size)
    pieces: list[list[int]] = [[int(i)] if i >= 0 else [] for i in draft_of_v]
    for i, data in enumerate(target_tokens):
        if data and draft_of_v[i] < 0:
            pieces[i] = spell(data)[-MAX_PIECES:]
    # Ragged lists to one array: a drafter on the device needs a fixed width.
    num_pieces_v = np.asarray([len(ids) for ids in pieces], np.int32)
    pieces_vp = np.zeros((target_size, num_pieces_v.max()), np.int32)
    pieces_vp[np.arange(pieces_vp.shape[1]) < num_pieces_v[:, None]] = [i for ids in pieces for i in ids]
    return VocabularyMap(draft_of_v, pieces_vp, num_pieces_v)


def _text_ids(tokenizer: Tokenizer, size: int) -> dict[bytes, int]:
    """Returns for each token's bytes the id below ``size`` that a tokenizer would write them with."""
    tokens = [(i, data) for i, data in enumerate(token_bytes(tokenizer)[:size]) if data]
    # Only a byte-fallback token such as <0x41> has a name longer than its bytes. These tokens are sorted last.
    tokens.sort(key=lambda token: len(tokenizer.id_to_token(token[0]) or "") > len(token[1]))
    return {data: i for i, data in reversed(tokens)}  # reversed, so that the first id wins


def _special_ids(tokenizer: Tokenizer, size: int) -> dict[str, int]:
    tokens = tokenizer.get_added_tokens_decoder().items()
    return {token.content: i for i, token in tokens if token.special and i < size}


def _speller(tokenizer: Tokenizer, ids: dict[bytes, int], size: int) -> Callable[[bytes], list[int]]:
    """Returns a function from a token's bytes to the draft tokens that spell them in the middle of a text."""
    # In the middle of a text no tokenizer may add a space, cut the text or pad it.
    spec = json.loads(tokenizer.to_str())
    spec.update(truncation=None, padding=None)
    for part in ("normalizer", "pre_tokenizer"):
        spec[part] = _without_first_space(spec[part])
    inner = Tokenizer.from_str(json.dumps(spec))
    inner.encode_special_tokens = True  # the name of a special token within text is text

    def spell(data: bytes) -> list[int]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return _longest_first(data, ids)  # the bytes are part of a character
        return [ids[data]] if data in ids else [i for i in inner.encode(text, add_special_tokens=False).ids if i < size]

    return spell


def _longest_first(data: bytes, ids: dict[bytes, int]) -> list[int]:
    """Spells bytes by the longest token at each place. A byte at which no token starts is left out."""
    pieces, at = [], 0
    while at < len(data):
        end = next((end for end in range(len(data), at, -1) if data[at:end] in ids), None)
        if end is not None:
            pieces.append(ids[data[at:end]])
        at = end or at + 1
    return pieces


def _without_first_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the normalizer or pre-tokenizer ``step`` changed so that it puts no space before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        (name,) = step.keys() - {"type"}
        return step | {name: [kept for part in step[name] if (kept := _without_first_space(part))]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else step


def _reader(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """Returns a function from a token's name to its bytes, as the tokenizer's decoder reads it."""
    # Each kind of tokenizer is known by a step of its decoder or pre-tokenizer.
    steps = [*_steps(spec["decoder"]), *_steps(spec["pre_tokenizer"])]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level
    # The mark of a space is named by a Metaspace step or, in older files, by a step that replaces the mark by a space.
    marks = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    replacements = [step for step in _steps(spec["decoder"]) if step["type"] == "Replace" and step["content"] == " "]
    marks += [step["pattern"]["String"] for step in replacements if "String" in step["pattern"]]
    if not marks:
        raise ValueError(
            f"a tokenizer with the decoder {[step['type'] for step in _steps(spec['decoder'])]} is of an unknown kind; "
            "give a byte-level one (ByteLevel) or one of the SentencePiece style (Metaspace, or Replace of a mark by "
            "a space)"
        )
    fallback = "ByteFallback" in kinds or spec["model"].get("byte_fallback", False)

    def marked(token: str) -> bytes:
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token) if fallback else None
        return bytes.fromhex(byte[1]) if byte else token.replace(marks[0], " ").encode("utf-8")

    return marked


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the parts of a decoder or pre-tokenizer; sequences within sequences are flattened."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        (name,) = step.keys() - {"type"}
        return [part for inner in step[name] for part in _steps(inner)]
    return [step]


def _alphabet() -> dict[str, int]:
    """Returns the byte of each letter of GPT-2's alphabet.

    A printable Latin-1 letter stands for its own byte. Letters 256, 257, ... stand for the other bytes in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    if all(letter in _ALPHABET for letter in token):
        return bytes(_ALPHABET[letter] for letter in token)
    return token.encode("utf-8")  # an added token, which is stored as it reads
