"""The tokenizer of a GGUF file, as the ``tokenizer.json`` and ``tokenizer_config.json`` of a Hugging Face folder.

Two kinds are read (``tokenizer.ggml.model``): "gpt2", byte-level BPE with its merges, and "llama", SentencePiece's BPE,
whose merges follow from the tokens' scores.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from specjax.hf.gguf.file import Header
from specjax.hf.gguf.splits import SPLITS, Split
from specjax.hf.safetensors import show

_PREFIX = "tokenizer.ggml."
# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}  # sic
_STOP_KEYS = ("eos", "eot", "eom")
# Ids of special tokens of SentencePiece, if the metadata name none or one past the vocabulary. llama.cpp has the same.
_USUAL = {"unknown": 0, "bos": 1, "eos": 2}
# Tokens that end a turn or a text, whether the metadata name them or not. Models end their turns with another token
# than their texts, and older files name only one. llama.cpp has these, too, and knows them by their text alone.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)
_HARMONY = {"<|return|>", "<|call|>"}  # with these two, "<|end|>" ends a message and not the turn
BESIDE = "put the model's tokenizer.json into the folder of the GGUF file"


class Vocabulary:
    """What the metadata of a GGUF file say of tokens and of chats."""

    def __init__(self, header: Header):
        """Checks that tokens, their types and their ids fit together.

        Raises:
          ValueError: they do not.
        """
        self._metadata = header.metadata
        self._sentencepiece = self._metadata.get(f"{_PREFIX}model") == "llama"
        self._tokens = self._list("tokens", str)
        types = self._metadata.get(f"{_PREFIX}token_type")
        types = [_NORMAL] * len(self._tokens) if types is None else self._list("token_type", int)
        if len(types) != len(self._tokens):
            raise ValueError(f"there are {len(self._tokens)} tokens and {len(types)} types of tokens; download again")
        # Converters left the types of some of these tokens as they were in the model's own vocabulary.
        self._types = [
            _CONTROL if token in _END_TEXTS and kind in (_NORMAL, _USER_DEFINED) else kind
            for token, kind in zip(self._tokens, types, strict=True)
        ]

    def check(self, file: Path, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless the tokenizer of a ``tokenizer.json`` has the ordinary tokens of the metadata."""
        for i, token in enumerate(self._tokens):
            if self._types[i] == _NORMAL and token and tokenizer.id_to_token(i) != token:
                raise ValueError(
                    f"{file} has {tokenizer.id_to_token(i)!r} as token {i}, and the GGUF file {token!r}; it is another "
                    "model's: move one of the two"
                )

    def named(self) -> dict[str, str]:
        """Returns special tokens by the names that chat templates use."""
        found = {name: self._id(key) for key, name in _NAMED.items()}
        return {f"{name}_token": self._tokens[i] for name, i in found.items() if i is not None}

    def stop_tokens(self) -> tuple[int, ...]:
        """Returns the ids of the tokens that end a text: those that the metadata name, then others by their text."""
        named = [i for i in map(self._id, _STOP_KEYS) if i is not None]
        control = {token: i for i, token in enumerate(self._tokens) if self._types[i] == _CONTROL}
        ends = [token for token in _END_TEXTS if not (token == "<|end|>" and control.keys() >= _HARMONY)]
        return tuple(dict.fromkeys([*named, *(control[token] for token in ends if token in control)]))

    def chat_templates(self) -> dict[str, str]:
        """Returns the chat templates by their names; the one without a name is "default"."""
        key = "tokenizer.chat_template"
        named = {"default": self._metadata[key]} if key in self._metadata else {}
        others = [name for name in self._metadata if name.startswith(f"{key}.")]
        named |= {name.removeprefix(f"{key}."): self._metadata[name] for name in others}
        for name, template in named.items():
            if not isinstance(template, str):
                raise ValueError(f"the chat template {name!r} is {show(template)}; it must be a text")
        return named

    def config(self) -> dict[str, Any]:
        """Returns the content of the ``tokenizer_config.json`` that a Hugging Face folder has."""
        templates = self.chat_templates()
        listed: Any = [{"name": name, "template": template} for name, template in templates.items()]
        if list(templates) == ["default"]:
            listed = templates["default"]
        usual = {"tokenizer_class": "PreTrainedTokenizerFast", **self.named()}
        return usual | ({"chat_template": listed} if templates else {})

    # The tokenizer.

    def described(self) -> dict[str, Any] | None:
        """Returns the content of a ``tokenizer.json``, or None if the file has no vocabulary.

        Raises:
          ValueError: the metadata do not describe a tokenizer, or one of a kind that is not read.
        """
        if not self._tokens:
            return None
        spelled = [self._spelled(i) for i in range(len(self._tokens))]
        for token, count in Counter(spelled).most_common(1):
            if count > 1:
                raise ValueError(f"token {show(token)} has {count} ids; {BESIDE}")
        ids = {token: i for i, token in enumerate(spelled)}
        kind = self._metadata.get(f"{_PREFIX}model")
        if self._sentencepiece:
            steps, begins = self._of_sentencepiece(ids), True
        elif kind == "gpt2":
            steps, begins = self._of_byte_level(ids)
        else:
            raise ValueError(f"{_PREFIX}model is {show(kind)}; supported: 'gpt2', 'llama': {BESIDE}")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "post_processor": self._ends_of_texts(begins),
            **steps,
        }

    def _of_byte_level(self, ids: dict[str, int]) -> tuple[dict[str, Any], bool]:
        """Returns the steps of byte-level BPE, and whether a text begins with a token for it by default."""
        name = self._metadata.get(f"{_PREFIX}pre")
        split: Split | None = SPLITS.get(name) if isinstance(name, str) else None
        if split is None:
            what = "missing: the file was made before 2024-05" if name is None else show(name)
            raise ValueError(
                f"{_PREFIX}pre, which names how words are cut, is {what}; known: {', '.join(sorted(SPLITS))}: {BESIDE}"
            )
        merges = [merge.split(" ", 1) for merge in self._list("merges", str)]
        byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        cuts = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            for expression in split.expressions
        ]
        return {
            "normalizer": {"type": "NFC"} if split.composed else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, {"type": "ByteLevel", **byte_level}]},
            "decoder": {"type": "ByteLevel", **byte_level},
            "model": _bpe(ids, merges, ignore_merges=split.whole_first),
        }, split.begins

    def _of_sentencepiece(self, ids: dict[str, int]) -> dict[str, Any]:
        """Returns the steps of SentencePiece's BPE.

        A space is put before each piece of text, whether the text begins with one or not: so do SentencePiece, the
        ``tokenizer.json`` of Llama 2, and llama.cpp. transformers' LlamaTokenizer does so only at the start of a text
        that begins with no space.
        """
        prefix = self._flag("add_space_prefix", True)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        marks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        return {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces] if prefix else [spaces],
            },
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [marks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
            },
            "model": _bpe(ids, self._merges(ids), byte_fallback=True, fuse_unk=True, unk_token=self._unknown()),
        }

    def _merges(self, ids: dict[str, int]) -> list[list[str]]:
        """Returns all pairs of tokens that are a token together, the best first.

        Merges are ordered by score. Gemma's merges are ordered by id: its scores are in another order. As in
        SentencePiece, no merge makes a control token, an unknown token or a byte.
        """
        scores = self._list("scores", float)
        if len(scores) != len(self._tokens):
            raise ValueError(f"there are {len(self._tokens)} tokens and {len(scores)} scores; download the file again")
        by_id = str(self._metadata.get("general.architecture")).startswith("gemma")
        found = []
        for token, i in ids.items():
            if self._types[i] not in (_NORMAL, _USER_DEFINED, _UNUSED):
                continue
            for cut in range(1, len(token)):
                left, right = ids.get(token[:cut]), ids.get(token[cut:])
                if left is not None and right is not None:
                    # Pairs of one token are in the order in which transformers has them: short right parts first.
                    found.append((i if by_id else -scores[i], -cut, left, right))
        tokens = list(ids)
        return [[tokens[left], tokens[right]] for *_, left, right in sorted(found)]

    def _spelled(self, i: int) -> str:
        """Returns a token as the model of the tokenizer spells it.

        Converters write runs of spaces as they read. Empty tokens have the name that llama.cpp gives them.
        """
        token = self._tokens[i]
        if not token:
            return f"[EMPTY_{i}]"
        spaces = self._sentencepiece and self._types[i] == _USER_DEFINED and not token.strip(" ")
        return "▁" * len(token) if spaces else token

    def _added(self) -> list[dict[str, Any]]:
        """Returns the tokens that are found in a text before it is cut."""
        # Phi-3's own tokenizer drops white space after all but three of these tokens, and its template has a newline
        # after each.
        phi3 = self._sentencepiece and self._metadata.get("general.architecture") == "phi3"
        kept = ("<unk>", "<s>", "<|endoftext|>")
        return [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": phi3 and token not in kept,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for i, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and self._spelled(i) == token
        ]

    def _ends_of_texts(self, begins: bool) -> dict[str, Any] | None:
        """Returns the step that puts tokens before and after a text, or None. ``begins``: whether one by default."""
        ids = {"bos": self._id("bos"), "eos": self._id("eos")}
        flags = {"bos": self._flag("add_bos_token", begins), "eos": self._flag("add_eos_token", False)}
        used = {name: i for name, i in ids.items() if flags[name] and i is not None}
        if not used:
            return None

        def template(*texts: tuple[str, int]) -> list[dict[str, Any]]:
            pieces: list[dict[str, Any]] = []
            for text, kind in texts:
                ends = {name: [{"SpecialToken": {"id": self._tokens[i], "type_id": kind}}] for name, i in used.items()}
                pieces += [*ends.get("bos", []), {"Sequence": {"id": text, "type_id": kind}}, *ends.get("eos", [])]
            return pieces

        special = {
            self._tokens[i]: {"id": self._tokens[i], "ids": [i], "tokens": [self._tokens[i]]} for i in used.values()
        }
        return {
            "type": "TemplateProcessing",
            "single": template(("A", 0)),
            "pair": template(("A", 0), ("B", 1)),
            "special_tokens": special,
        }

    # Values of the metadata.

    def _list(self, key: str, kind: type) -> list[Any]:
        """Returns a list of the metadata; raises ValueError if it is there and holds something else."""
        value = self._metadata.get(f"{_PREFIX}{key}", [])
        if isinstance(value, np.ndarray) and kind is not str and np.issubdtype(value.dtype, np.number):
            value = value.astype(np.float64 if kind is float else np.int64).tolist()
        if not isinstance(value, list) or not all(isinstance(each, kind) for each in value[:1]):
            raise ValueError(f"{_PREFIX}{key} is {show(value)}; it must be a list of {kind.__name__}; download again")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"{_PREFIX}{key}", default)
        if not isinstance(value, bool):
            raise ValueError(f"{_PREFIX}{key} is {show(value)}; it must be true or false; download again")
        return value

    def _id(self, name: str) -> int | None:
        """Returns the id of a special token, or None if there is none. Some files name one past the vocabulary."""
        value = self._metadata.get(f"{_PREFIX}{name}_token_id")
        if value is not None and type(value) is not int:
            raise ValueError(f"{_PREFIX}{name}_token_id is {show(value)}; it must be an id; download again")
        usual = _USUAL.get(name) if self._sentencepiece else None
        return next((i for i in (value, usual) if i is not None and 0 <= i < len(self._tokens)), None)

    def _unknown(self) -> str | None:
        i = self._id("unknown")
        return None if i is None else self._spelled(i)


def _bpe(ids: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """Returns the model of a tokenizer."""
    for merge in merges:
        if len(merge) != 2 or not ids.keys() >= {*merge, "".join(merge)}:
            raise ValueError(f"the merge {show(merge)} is not of two tokens into a third; {BESIDE}")
    usual = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **usual, **settings, "vocab": ids, "merges": merges}
