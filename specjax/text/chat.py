"""Chat templates: a conversation as the text that a model was trained to continue."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
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
from tokenizers import Tokenizer

from specjax.text.control import control_tokens, encode_marked, mark
from specjax.text.files import check_characters, read_object, read_text
from specjax.text.tokenizer import read_special_tokens

DEFAULT, TOOLS = "default", "tool_use"
"""Names of the template that is used if none is named: without tools, and with tools."""
# Names of a message's reasoning. Templates read the first, or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


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

    Templates are found in these places. The first place that has any counts alone, as in transformers 5.24.

    1. ``chat_template.jinja``, which is the template named "default", and ``additional_chat_templates/NAME.jinja``.
    2. ``chat_template`` of ``tokenizer_config.json``: one template, a list of objects with ``name`` and ``template``,
       or an object of names and templates.
    3. ``chat_template`` of ``chat_template.json``, then of ``processor_config.json``: the older files of multimodal
       models.

    The names of special tokens, such as ``bos_token``, are variables of templates. ``read_special_tokens`` finds them.

    Raises:
      ValueError: the path is no folder, a file is damaged, or a template does not compile.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with chat_template.jinja or tokenizer_config.json")
    tokens = {name: token.content for name, token in read_special_tokens(folder).named.items()}
    control = read_object(folder / "tokenizer_config.json").get("chat_control_tokens")
    if control is not None and not isinstance(control, list):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_control_tokens is {control!r}; it must be a list of tokens"
        )
    # 1. Files of their own.
    file, files = folder / "chat_template.jinja", sorted(folder.glob("additional_chat_templates/*.jinja"))
    sources = {each.stem: read_text(each) for each in files}
    if file.is_file():
        sources[DEFAULT] = read_text(file)
    if sources:
        name = str(file if list(sources) == [DEFAULT] else folder / "additional_chat_templates")
        return ChatTemplate(sources, tokens, name, control)
    # 2. A key of a JSON file.
    for file in (folder / f"{name}.json" for name in ("tokenizer_config", "chat_template", "processor_config")):
        source = read_object(file).get("chat_template")
        if source is not None:
            return ChatTemplate(_named(source, file), tokens, f"{file}: chat_template", control)
    return None


def _named(source: Any, file: Path) -> dict[str, str]:
    """Returns templates by name."""
    if isinstance(source, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in source
    ):
        source = {each["name"]: each.get("template") for each in source}
    named = source if isinstance(source, dict) else {DEFAULT: source}
    texts = {str(name): text for name, text in named.items() if isinstance(text, str)}
    if not named or len(texts) < len(named):
        raise ValueError(
            f"{file}: chat_template is neither a text nor a list of named templates; give one of the two, such as "
            '[{"name": "default", "template": "..."}]'
        )
    return texts


class ChatTemplate:
    """A Jinja template that lays out a conversation, as ``apply_chat_template`` of ``transformers`` renders it.

    A model may have several templates, by name. With ``tools``, the one named "tool_use" is used, and else the one
    named "default".

    Templates come with a model and are not trusted. They run in Jinja's sandbox, where they read their variables and
    change nothing. The text already holds all special tokens, so encode it with ``add_special_tokens=False``, or with
    the method ``encode``.

    Reference: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        tokens: Mapping[str, str] | None = None,
        name: str = "the chat template",
        control: Sequence[str] | None = None,
    ):
        """Compiles a template, or several.

        Args:
          source: the template's text, or texts of templates by name.
          tokens: special tokens by the names that templates use, such as ``bos_token``.
          name: what errors call the template.
          control: added tokens that ``encode`` can keep out of messages, besides all special tokens. None takes those
            that the template contains.

        Raises:
          ValueError: a template does not compile.
        """
        self._tokens, self._name = dict(tokens or {}), name
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._control = None if control is None else tuple(control)
        self._templates = {each: self._compile(each, text) for each, text in self._sources.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the templates."""
        return tuple(self._sources)

    def _compile(self, template: str, source: str) -> jinja2.Template:
        try:
            return _environment().from_string(source)
        except Exception as error:  # Jinja raises whatever Python's own compiler raises
            place = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(
                f"{self._called(template)} does not compile{place} ({_reason(error)}); copy it again or repair it"
            ) from None

    def _called(self, template: str) -> str:
        """Returns what errors call one of the templates."""
        return self._name if len(self._sources) == 1 else f"{self._name} {template!r}"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as text.

        Keys of a message whose value is None are left out. A message's reasoning may be called ``reasoning_content``,
        ``thinking`` or ``reasoning``; the template finds it under the first two names.

        Args:
          messages: the conversation, in order; a message is ``{"role": ..., "content": ...}``.
          add_generation_prompt: whether the text ends with the beginning of an answer of the model.
          chat_template: the name of one of the templates. None takes "tool_use" if there are ``tools`` and such a
            template, and else "default".
          **variables: other variables of the template, such as ``tools`` or ``enable_thinking``. They go before special
            tokens of the same name.

        Raises:
          ValueError: there are no messages; the messages or variables are not plain JSON values; there is no such
            template; or the template refuses them, fails on them, or tries something that the sandbox forbids.
        """
        which = self._which(chat_template, variables.get("tools"))
        return self._render(which, _plain(messages, variables), add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        sanitize_control_tokens: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Returns a conversation as tokens.

        Args:
          tokenizer: the model's tokenizer.
          messages, add_generation_prompt, chat_template, variables: as for ``render``.
          sanitize_control_tokens: whether control tokens within messages and variables are encoded as ordinary text.
            Then only the template writes control tokens, and a user cannot end a message by typing "<|im_end|>".
            Control tokens are the special tokens, and the added tokens that the template contains. They are found as
            a whole only: a template that joins them from parts, such as a message's role, can still write them.

        Raises:
          ValueError: as for ``render``; or the text holds half of a character, or the tokenizer makes a control token
            of ordinary text.
        """
        which = self._which(chat_template, variables.get("tools"))
        values = _plain(messages, variables)
        if sanitize_control_tokens:
            values = mark(values, control_tokens(tokenizer, self._is_control(which)))
        text = self._render(which, values, add_generation_prompt)
        check_characters("the conversation", text)
        if sanitize_control_tokens:
            return encode_marked(tokenizer, text)
        return tokenizer.encode(text, add_special_tokens=False).ids

    def _is_control(self, template: str) -> Callable[[str], bool]:
        """Returns whether an added token that is not special is a control token."""
        if self._control is not None:
            return set(self._control).__contains__
        # White space, such as Gemma's tokens of newlines, is ordinary text of templates.
        texts = _literals(self._sources[template])
        return lambda token: not token.isspace() and any(token in text for text in texts)

    def _which(self, name: str | None, tools: Any) -> str:
        """Returns the name of the template to use."""
        if name is None:
            name = TOOLS if tools is not None and TOOLS in self._sources else DEFAULT
            if name not in self._sources:
                raise ValueError(
                    f'{self._name} has no template named "default"; name one of them as chat_template: '
                    f"{', '.join(map(repr, self._sources))}"
                )
        if name not in self._sources:
            raise ValueError(f"chat_template is {name!r}; {self._name} has {', '.join(map(repr, self._sources))}")
        return name

    def _render(self, template: str, values: dict[str, Any], add_generation_prompt: bool) -> str:
        """Returns the text; ``values`` are plain JSON values."""
        values = {"tools": None, "documents": None, **self._tokens, **values}
        values["add_generation_prompt"] = add_generation_prompt
        name = self._called(template)
        # A template is a program and can fail in any way. Each kind of failure has its own remedy in the message.
        try:
            return self._templates[template].render(values)
        except _RefusalError as error:
            raise ValueError(f"{name} refuses the messages: {_reason(error)}; change them to suit it") from None
        except SecurityError as error:
            raise ValueError(
                f"{name} tries what a template may not ({_reason(error)}); take one from a trusted source"
            ) from None
        except Exception as error:
            raise ValueError(
                f"{name} fails on the messages ({type(error).__name__}: {_reason(error)}); "
                "give messages that it supports, or repair it"
            ) from None


_ARGUMENTS = ("continue_final_message", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask")


def _plain(messages: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns messages and variables as a template reads them."""
    # A string is a sequence, too, and would be read as one message per letter.
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f'messages is {messages!r}; give a list such as [{{"role": "user", "content": "Hello"}}]')
    asked = [name for name in _ARGUMENTS if variables.get(name)]
    if asked:
        raise ValueError(
            f"{asked[0]} is {variables[asked[0]]!r}: an argument of apply_chat_template, not a variable "
            "of templates, and not supported here; leave it out"
        )
    plain = [_message(message) for message in messages]
    # Plain JSON values only: the sandbox cannot watch the methods of other objects.
    try:
        return json.loads(json.dumps({**variables, "messages": plain}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages and variables must be plain JSON values ({error}); convert them") from None


def _message(message: Any) -> dict[str, Any]:
    """Returns a message without keys that are None, and with its reasoning under the names that templates read."""
    # Many templates write the word None for a content that is None, as beside tool calls.
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _literals(source: str) -> tuple[str, ...]:
    """Returns the texts that a template contains outside of its statements, and as constants within them."""
    tree = _environment().parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    return (*texts, *(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)))


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
