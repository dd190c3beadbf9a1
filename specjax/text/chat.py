"""Chat templates: a conversation as the text that a model was trained to continue."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_chat_template(path: str | os.PathLike) -> "ChatTemplate":
    """Opens the chat template of a checkpoint folder or a Hugging Face folder.

    Raises:
      ValueError: the folder has no chat template, or ``find_chat_template`` raises.
    """
    template = find_chat_template(path)
    if template is None:
        raise ValueError(
            f"{Path(path)} has neither chat_template.jinja nor a chat_template in tokenizer_config.json; add the "
            "model's"
        )
    return template


def find_chat_template(path: str | os.PathLike) -> "ChatTemplate | None":
    """Opens the chat template of a checkpoint folder or a Hugging Face folder; returns None if there is none.

    The template is ``chat_template.jinja``. Without this file it is ``chat_template`` of ``tokenizer_config.json``: a
    string, or a list of named templates with one called "default". Special tokens come from ``tokenizer_config.json``.
    If it has no ``added_tokens_decoder``, ``special_tokens_map.json`` is read as well and goes before it.

    Raises:
      ValueError: the path is no folder, a file is damaged, or the template does not compile.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with chat_template.jinja or tokenizer_config.json")
    config_file, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    # Older folders keep special tokens in a file of their own.
    config = _read_json(config_file)
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    tokens = {name: _content(config.get(name)) for name in SPECIAL_TOKENS}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    # A file beside the config is the newer way to store a template, and transformers prefers it as well.
    if file.is_file():
        return ChatTemplate(_read(file), tokens, str(file))
    source, name = config.get("chat_template"), f"{config_file}: chat_template"
    if source is None:
        return None
    if isinstance(source, list):
        source = next((each.get("template") for each in source if _content(each, "name") == "default"), None)
    if not isinstance(source, str):
        raise ValueError(f'{name} is neither a text nor a list with a template named "default"; give one of the two')
    return ChatTemplate(source, tokens, name)


class ChatTemplate:
    """A Jinja template that lays out a conversation, as ``apply_chat_template`` of ``transformers`` renders it.

    Templates come with a model and are not trusted. They run in Jinja's sandbox, where they read their variables and
    change nothing. The text already holds all special tokens, so encode it with ``add_special_tokens=False``.

    Reference: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "the chat template"):
        """Compiles a template.

        Args:
          source: the template's text.
          tokens: special tokens by the names that templates use, such as ``bos_token``.
          name: what errors call the template.

        Raises:
          ValueError: the template does not compile.
        """
        self._tokens, self._name = dict(tokens or {}), name
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # Jinja raises whatever Python's own compiler raises
            place = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"{name} does not compile{place} ({_reason(error)}); copy it again or repair it") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Returns a conversation as text.

        Args:
          messages: the conversation, in order; a message is ``{"role": ..., "content": ...}``.
          add_generation_prompt: whether the text ends with the beginning of an answer of the model.
          **variables: other variables of the template, such as ``tools`` or ``enable_thinking``. They go before special
            tokens of the same name.

        Raises:
          ValueError: the messages or variables are not plain JSON values; or the template refuses them, fails on them,
            or tries something that the sandbox forbids.
        """
        # A string is a sequence, too, and would be read as one message per letter.
        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        if not listed or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(f'messages is {messages!r}; give a list such as [{{"role": "user", "content": "Hello"}}]')
        values = {"tools": None, "documents": None, **self._tokens, **variables}
        values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        # Plain JSON values only: the sandbox cannot watch the methods of other objects.
        try:
            values = json.loads(json.dumps(values))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and variables must be plain JSON values ({error}); convert them") from None
        # A template is a program and can fail in any way. Each kind of failure has its own remedy in the message.
        try:
            return self._template.render(values)
        except _RefusalError as error:
            raise ValueError(f"{self._name} refuses the messages: {_reason(error)}; change them to suit it") from None
        except SecurityError as error:
            raise ValueError(
                f"{self._name} tries what a template may not ({_reason(error)}); take one from a trusted source"
            ) from None
        except Exception as error:
            raise ValueError(
                f"{self._name} fails on the messages ({type(error).__name__}: {_reason(error)}); "
                "give messages that it supports, or repair it"
            ) from None


class _RefusalError(jinja2.TemplateError):
    """A template called ``raise_exception``."""


class _Generation(Extension):
    """The tag ``{% generation %}``. It marks the model's own words for training; here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _PublicNamespace(Namespace):
    """A namespace that refuses names such as ``__call__``, which would let a template leave the sandbox."""

    def __init__(*args: Any, **kwargs: Any):  # `self` is a name that templates may use
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        Namespace.__setitem__(self, name, value)


def _check_public(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore, like {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "namespace": _PublicNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON like Jinja's own filter, but without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusalError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _reason(error: Exception) -> str:
    # One short line: errors of templates may quote whole conversations.
    return " ".join(str(error).split())[:300]


def _content(token: Any, key: str = "content") -> str | None:
    """Returns a token that is a string or an object with the string under ``key``; None for anything else."""
    token = token.get(key) if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({error}); copy it again") from None


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds, or an empty dict if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; it must hold one JSON object")
    return value
