"""The tokenizer of a GGUF file, as the ``tokenizer.json`` and ``tokenizer_config.json`` of a Hugging Face folder.

Two kinds are read (``tokenizer.ggml.model``): "gpt2", byte-level BPE with its merges, and "llama", SentencePiece's BPE,
whose merges follow from the tokens' scores.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from specjax.hf.gguf.file import Header
from specjax.hf.gguf.splits import SPLITS, Split
from specjax.hf.keys import read_json
from specjax.hf.safetensors import show

_PREFIX = "tokenizer.ggml."
# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_NAMED = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}  # sic
_ENDS = ("eos", "eot", "eom")
# Control tokens that end a turn or a text, whether the metadata name them or not: those of llama.cpp. Models end their
# turns with another token than their texts, and older files name only one.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
)
_HARMONY = {"<|return|>", "<|call|>"}  # with these two, "<|end|>" ends a message and not the turn
_BESIDE = "put the model's tokenizer.json into the folder of the GGUF file"


class Vocabulary:
    """What the metadata of a GGUF file say of tokens and of chats."""

    def __init__(self, header: Header):
        """Checks that tokens, their types and their ids fit together.

        Raises:
          ValueError: they do not.
        """
        self._path, self._metadata = header.path, header.metadata
        self._tokens = self._list("tokens", str)
        types = self._metadata.get(f"{_PREFIX}token_type")
        types = [_NORMAL] * len(self._tokens) if types is None else self._list("token_type", int)
        if len(types) != len(self._tokens):
            raise ValueError(f"there are {len(self._tokens)} tokens and {len(types)} types of tokens; download again")
        self._types = types

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer, or None if the file has no vocabulary.

        A ``tokenizer.json`` next to the file is the model's own, so it is used instead, if its tokens are the file's.

        Raises:
          ValueError: the metadata do not describe a tokenizer, or one of a kind that is not read; or the
            ``tokenizer.json`` is another model's.
        """
        beside = self._path.parent / "tokenizer.json"
        if beside.is_file():
            return self._checked(beside, _made(str(beside), read_json(beside)))
        if not self._tokens:
            return None
        return _made("the tokenizer of the metadata", self._described())

    def named(self) -> dict[str, str]:
        """Returns special tokens by the names that chat templates use."""
        found = {name: self._id(key) for key, name in _NAMED.items()}
        return {f"{name}_token": self._tokens[i] for name, i in found.items() if i is not None}

    def stop_tokens(self) -> tuple[int, ...]:
        """Returns the ids of the tokens that end a text: those that the metadata name, then others by their text."""
        named = [i for i in map(self._id, _ENDS) if i is not None]
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

    def _described(self) -> dict[str, Any]:
        """Returns the content of a ``tokenizer.json``."""
        for token, count in Counter(self._tokens).most_common(1):
            if count > 1:
                raise ValueError(f"token {show(token)} has {count} ids; {_BESIDE}")
        kind = self._metadata.get(f"{_PREFIX}model")
        if kind == "gpt2":
            steps, begins = self._byte_level()
        elif kind == "llama":
            steps, begins = self._sentencepiece(), True
        else:
            raise ValueError(f"{_PREFIX}model is {show(kind)}; supported: 'gpt2', 'llama': {_BESIDE}")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "post_processor": self._ends_of_texts(begins),
            **steps,
        }

    def _byte_level(self) -> tuple[dict[str, Any], bool]:
        """Returns the steps of byte-level BPE, and whether a text begins with a token for it by default."""
        name = self._metadata.get(f"{_PREFIX}pre")
        split: Split | None = SPLITS.get(name) if isinstance(name, str) else None
        if split is None:
            what = "missing: the file was made before 2024-05" if name is None else show(name)
            raise ValueError(
                f"{_PREFIX}pre, which names how words are cut, is {what}; known: {', '.join(sorted(SPLITS))}: {_BESIDE}"
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
            "model": self._bpe(merges, ignore_merges=split.whole_first),
        }, split.begins

    def _sentencepiece(self) -> dict[str, Any]:
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
            "model": self._bpe(self._merges(), byte_fallback=True, fuse_unk=True, unk_token=self._unknown()),
        }

    def _bpe(self, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
        vocabulary = {self._spelled(i): i for i in range(len(self._tokens))}
        for merge in merges:
            if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
                raise ValueError(f"the merge {show(merge)} is not of two tokens into a third; {_BESIDE}")
        usual = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        return {"type": "BPE", **usual, **settings, "vocab": vocabulary, "merges": merges}

    def _merges(self) -> list[list[str]]:
        """Returns all pairs of tokens that are a token together, the best first.

        The order is that of scores. Of Gemma it is that of ids: its scores are not in the order of its merges.
        """
        scores = self._list("scores", float)
        if len(scores) != len(self._tokens):
            raise ValueError(f"there are {len(self._tokens)} tokens and {len(scores)} scores; download the file again")
        by_id = str(self._metadata.get("general.architecture")).startswith("gemma")
        vocabulary = {self._spelled(i): i for i in range(len(self._tokens))}
        found = []
        for token, i in vocabulary.items():
            for cut in range(1, len(token)):
                left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
                if left is not None and right is not None:
                    # Pairs of one token are in the order in which transformers has them: short right parts first.
                    found.append((i if by_id else -scores[i], -cut, left, right))
        tokens = list(vocabulary)
        return [[tokens[left], tokens[right]] for *_, left, right in sorted(found)]

    def _spelled(self, i: int) -> str:
        """Returns a token as the model of the tokenizer spells it: converters write runs of spaces as they read."""
        token = self._tokens[i]
        sentencepiece = self._metadata.get(f"{_PREFIX}model") == "llama"
        spaces = sentencepiece and self._types[i] == _USER_DEFINED and not token.strip(" ")
        return "▁" * len(token) if spaces else token

    def _added(self) -> list[dict[str, Any]]:
        """Returns the tokens that are found in a text before it is cut."""
        # Phi-3's own tokenizer drops white space after these tokens, and its template has a newline after each.
        sentencepiece, phi3 = (
            self._metadata.get(key) == value
            for key, value in ((f"{_PREFIX}model", "llama"), ("general.architecture", "phi3"))
        )
        kept = ("<unk>", "<s>", "<|endoftext|>")
        return [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": sentencepiece and phi3 and kind == _CONTROL and token not in kept,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for i, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token and self._spelled(i) == token
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

    def _checked(self, file: Any, tokenizer: Tokenizer) -> Tokenizer:
        """Returns the tokenizer of a ``tokenizer.json`` if the ordinary tokens of the metadata are in it."""
        for i, token in enumerate(self._tokens):
            if self._types[i] == _NORMAL and tokenizer.id_to_token(i) != token:
                raise ValueError(
                    f"{file} has {tokenizer.id_to_token(i)!r} as token {i}, and the GGUF file {token!r}; it is another "
                    "model's: move one of the two"
                )
        return tokenizer

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
        """Returns the id of a special token, or None if the file names none or, as some do, one past the vocabulary."""
        value = self._metadata.get(f"{_PREFIX}{name}_token_id")
        if value is not None and type(value) is not int:
            raise ValueError(f"{_PREFIX}{name}_token_id is {show(value)}; it must be an id; download again")
        return value if value is not None and 0 <= value < len(self._tokens) else None

    def _unknown(self) -> str | None:
        i = self._id("unknown")
        i = next((i for i, kind in enumerate(self._types) if kind == _UNKNOWN), None) if i is None else i
        return None if i is None else self._tokens[i]


def _made(what: str, described: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of the content of a ``tokenizer.json``, without truncation and padding."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{what} is not one that tokenizers reads ({error}); {_BESIDE}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
