"""A folder's tokenizer: ``tokenizer.json``, and the tokens that other files of the folder add to it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from specjax.text.files import check_characters, read_object, read_text

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens that every tokenizer of transformers knows."""
# Classes of transformers whose tokenizer puts a space before a text as ``tokenizer_config.json`` says, whatever
# ``tokenizer.json`` says. Then the class of each type of model, if the folder names none.
_PREFIXED = ("GPT2Tokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer")
_QWEN = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl")
_QWEN_3_5 = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
_CLASSES = {
    "gpt2": "GPT2Tokenizer",
    **dict.fromkeys(_QWEN, "Qwen2Tokenizer"),
    **dict.fromkeys(_QWEN_3_5, "Qwen3_5Tokenizer"),
}
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens the tokenizer of a checkpoint folder or a Hugging Face folder.

    A text has the ids that ``AutoTokenizer`` of transformers gives it:

    - Tokens that other files of the folder name are added, as ``read_special_tokens`` describes.
    - Truncation and padding, which ``tokenizer.json`` may hold from training, are switched off.
    - ``split_special_tokens`` of ``tokenizer_config.json`` is followed, and ``add_prefix_space`` for the byte-level
      classes of GPT-2 and Qwen. All else that classes of transformers do is left to ``tokenizer.json``.

    BPE dropout is switched off as well. It would give a text other ids at each call.

    Raises:
      ValueError: ``tokenizer.json`` is missing or damaged, or ``read_special_tokens`` raises.
    """
    if Path(path).is_file():
        raise ValueError(
            f"{path} is a file, not a folder; the tokenizer of a GGUF file is specjax.open(path).tokenizer"
        )
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a checkpoint folder must hold one: add the model's")
    tokenizer = tokenizer_of(str(file), read_text(file))
    _follow_prefix_space(tokenizer, file.parent)
    special = read_special_tokens(path)
    tokenizer.add_tokens(special.added(tokenizer))
    tokenizer.encode_special_tokens = special.split
    return tokenizer


def tokenizer_of(name: str, text: str, cure: str = "copy it again") -> Tokenizer:
    """Returns the tokenizer of the text of a ``tokenizer.json``, without truncation, padding and dropout.

    Raises:
      ValueError: the text is none, with ``name`` and ``cure``.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{name} is not a tokenizer ({error}); {cure}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def _follow_prefix_space(tokenizer: Tokenizer, folder: Path) -> None:
    """Follows ``add_prefix_space`` as the byte-level classes of transformers do; its default is false."""
    config, model = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or _CLASSES.get(str(model.get("model_type")))
    if str(name).removesuffix("Fast") not in _PREFIXED:
        return
    step = tokenizer.pre_tokenizer
    for each in step if isinstance(step, pre_tokenizers.Sequence) else [step]:
        if isinstance(each, pre_tokenizers.ByteLevel):
            each.add_prefix_space = config.get("add_prefix_space") is True


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The tokens that files beside ``tokenizer.json`` name.

    Attributes:
      named: special tokens by name. Templates know tokens by these names: ``bos_token``, ``image_token`` and so on.
      extra: special tokens without a name.
      listed: tokens by the ids under which a file lists them.
      older: whether the list is ``added_tokens.json``; then ``tokenizer.json`` decides about ids that both list.
      split: whether special tokens within a text are encoded as ordinary text.
    """

    named: Mapping[str, AddedToken]
    extra: tuple[AddedToken, ...]
    listed: Mapping[int, AddedToken]
    older: bool
    split: bool

    def added(self, tokenizer: Tokenizer) -> list[AddedToken]:
        """Returns the tokens to add to the tokenizer of ``tokenizer.json``, in the order in which new ones get ids.

        Tokens that are there already, perhaps with other flags, may be among them.
        """
        there = tokenizer.get_added_tokens_decoder()
        listed = {**self.listed, **there} if self.older else self.listed
        tokens = [token for _, token in sorted(listed.items())]
        held = {token.content for token in (*there.values(), *tokens)}
        tokens += [token for token in (*self.named.values(), *self.extra) if token.content not in held]
        # A token that has a name is special, whatever a list says.
        names = {token.content for token in self.named.values()}
        return [_flagged(token, token.special or token.content in names) for token in tokens]


def read_special_tokens(path: str | os.PathLike) -> SpecialTokens:
    """Returns the tokens that the files beside ``tokenizer.json`` name, found where transformers 5.24 looks.

    - Named tokens are the keys of ``NAMES`` and all other keys that end in ``_token`` and hold a token, and the keys of
      ``model_specific_special_tokens`` and of an object ``extra_special_tokens``.
    - Extra tokens are a list ``extra_special_tokens``, or else ``additional_special_tokens``.
    - Listed tokens are ``added_tokens_decoder``.

    All of these are keys of ``tokenizer_config.json``. If that file has no ``added_tokens_decoder``, two older files
    are read too: ``special_tokens_map.json``, whose keys go before those of ``tokenizer_config.json``, and
    ``added_tokens.json``, which lists tokens with their ids. ``add_bos_token`` and ``add_eos_token`` have no effect:
    ``tokenizer.json`` says which tokens begin and end a text.

    Raises:
      ValueError: a file is damaged, or a key that names tokens holds something else.
    """
    file = Path(path) / "tokenizer_config.json"
    config = read_object(file)
    own, specific, extra, _ = _names(file, config)
    # 1. New tokens get ids in the order of their names. Names of this model that are mere texts come late.
    late = [name for name in own if name not in NAMES and isinstance(config[name], str)]
    specific = {name: own.pop(name) for name in late} | specific
    listed, older = {}, config.get("added_tokens_decoder") is None
    if not older:
        listed = _listed(file, config["added_tokens_decoder"])
    # 2. The older files count only if the newer list is not there.
    else:
        map_file = file.with_name("special_tokens_map.json")
        more = _names(map_file, read_object(map_file))
        own, specific = own | more.own, specific | more.specific
        # Tokens of the older key are read too late for transformers to know them as special in ``added_tokens.json``.
        known = extra + (more.extra if more.newer else [])
        extra = known or more.extra
        special = {token.content for token in (*(own.get(name) for name in NAMES), *known) if token is not None}
        listed = _added(file.with_name("added_tokens.json"), special)
    named = dict.fromkeys(NAMES) | own | specific
    named = {name: token for name, token in named.items() if token is not None}
    return SpecialTokens(named, tuple(extra), listed, older, config.get("split_special_tokens") is True)


class _Names(NamedTuple):
    """The tokens that the keys of a file name.

    Attributes:
      own: tokens by keys of the file. A key that is null is None: then the name has no token.
      specific: tokens by keys of objects in the file.
      extra: tokens without names.
      newer: whether ``extra`` has the newer of its two keys.
    """

    own: dict[str, AddedToken | None]
    specific: dict[str, AddedToken | None]
    extra: list[AddedToken]
    newer: bool


def _names(file: Path, config: Mapping[str, Any]) -> _Names:
    """Returns the tokens that the keys of a file name; raises ValueError if such a key holds something else."""
    newer = bool(config.get("extra_special_tokens"))
    key = "extra_special_tokens" if newer else "additional_special_tokens"
    values, specific = config.get(key), config.get("model_specific_special_tokens") or {}
    if isinstance(values, Mapping) and isinstance(specific, Mapping):
        specific = {**specific, **values}
        key, values = "additional_special_tokens", config.get("additional_special_tokens")
    for wrong in (not isinstance(specific, Mapping) and specific, not isinstance(values, list | None) and values):
        if wrong:
            raise ValueError(f"{file}: {_short(wrong)} is no list of tokens and no object that names them; repair it")
    # Other keys with this ending are switches, such as ``add_bos_token``.
    own = {
        name: value
        for name, value in config.items()
        if name in NAMES or (name.endswith("_token") and (isinstance(value, str) or _is_object(value)))
    }
    own, specific = (
        {name: None if value is None else _token(file, name, value) for name, value in group.items()}
        for group in (own, specific)
    )
    return _Names(own, specific, [_token(file, key, value) for value in values or []], newer)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _token(file: Path, key: str, value: Any) -> AddedToken:
    """Returns a token that is a text, or an object with the text under ``content`` and with flags."""
    if isinstance(value, str):
        check_characters(f"{file}: {key}", value)
        return AddedToken(value, special=True)
    if not _is_object(value):
        raise ValueError(f"{file}: {key} is {_short(value)}; a token is a text, or an object with the text as content")
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{file}: {key} has {name} {_short(flag)}; it must be true or false")
    check_characters(f"{file}: {key}", value["content"])
    return AddedToken(value["content"], **{"special": True, **flags})


def _listed(file: Path, tokens: Any) -> dict[int, AddedToken]:
    """Returns the tokens of ``added_tokens_decoder``, an object of ids and tokens."""
    if not isinstance(tokens, Mapping) or not all(key.isascii() and key.isdecimal() for key in tokens):
        raise ValueError(f"{file}: added_tokens_decoder is {_short(tokens)}; it must be an object of ids and tokens")
    for key, value in tokens.items():
        if not _is_object(value):
            raise ValueError(
                f"{file}: added_tokens_decoder holds {_short(value)} under {key}; it must be an object with the "
                "token's text as content"
            )
    # Here a token without the flag is no special one.
    return {int(i): _token(file, f"added_tokens_decoder {i}", {"special": False, **tokens[i]}) for i in tokens}


def _added(file: Path, special: Iterable[str]) -> dict[int, AddedToken]:
    """Returns the tokens of ``added_tokens.json``, an object of tokens and ids."""
    tokens = read_object(file)
    for token, i in tokens.items():
        check_characters(f"{file}: a token", token)
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{file}: the id of {token!r} is {_short(i)}; it must be an integer of at least 0")
    return {i: AddedToken(token, special=token in special) for token, i in tokens.items()}


def _flagged(token: AddedToken, special: bool) -> AddedToken:
    return token if token.special == special else AddedToken(**{**token.__getstate__(), "special": special})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
