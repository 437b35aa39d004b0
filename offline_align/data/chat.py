"""Chat templates in Jinja, rendered in a sandbox with the names that `transformers` provides.

A template may name special tokens, a message may not. If a message contains the text of a special
token, a private-use character replaces that text while the template runs, and the text becomes
plain text in the rendering. Every other dialogue gets exactly the rendering of `transformers`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time
from functools import lru_cache, partial
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from offline_align.data.records import Message
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError, DataError

PRIVATE_USE = range(0x100000, 0x10FFFE)
"""Code points of Unicode's last plane, which no standard assigns."""

_CLOCK = "strftime_now"
_MARKER = chr(PRIVATE_USE[-1])
"""Placeholder answer, used to find the text that a template writes around an answer."""
_QUESTION = (Message("user", "a"),)

_REWRITES = "it renders a prompt differently once it has an answer, so prompt and answer cannot be separated"

Piece = tuple[str, bool]
"""A text, and whether special-token strings in it are special tokens."""


class ChatTemplate:
    """The chat template of a tokenizer; `day` is the date it sees as today (None: the actual date)."""

    def __init__(
        self, source: str, named_tokens: Mapping[str, str], special_texts: Sequence[str], day: date | None = None
    ) -> None:
        self._template = _compile(source, day)
        self._named_tokens = dict(named_tokens)
        longest_first = sorted(set(special_texts), key=len, reverse=True)
        self._special_texts = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        # The rendering of a prompt is needed for the prompt itself and for each of its answers.
        self._prompt_text = lru_cache(maxsize=1)(partial(self._run, generation_prompt=True))

    def prompt(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[Piece]:
        """Return the pieces of a dialogue, with the generation prompt at its end.

        Raises DataError if the template refuses the dialogue.
        """
        shielded, shields = self._shield(messages)
        text = self._prompt_text(tuple(shielded)) if generation_prompt else self._run(shielded, generation_prompt)
        return _pieces(text, shields)

    def whole(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the pieces of a dialogue that ends with its answer; raises as `prompt`."""
        return self.prompt(messages, generation_prompt=False)

    def around(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the text that the template writes before and after an answer to `messages`.

        Both are empty if they cannot be determined. A template may treat some answers differently;
        the result holds for an answer of one plain word.
        """
        try:
            pieces = self.answer(messages, _MARKER)
        except (DataError, ConfigError):  # a template that renders only prompts is enough for generation
            return "", ""
        before, marker, behind = "".join(text for text, _ in pieces).partition(_MARKER)
        return (before, behind) if marker and _MARKER not in behind else ("", "")

    def without_special(self, text: str) -> str:
        """Return `text` as decoding shows it."""
        return self._special_texts.sub("", text) if self._special_texts else text

    def first_special(self, text: str) -> tuple[str, str | None]:
        """Return the part of `text` before its first special token, and this token if there is one."""
        found = self._special_texts.search(text) if self._special_texts else None
        return (text[: found.start()], found[0]) if found else (text, None)

    def answer(self, messages: Sequence[Message], response: str) -> list[Piece]:
        """Return the pieces that the template writes after `prompt(messages)` for this response.

        Raises DataError if the template refuses the dialogue, and ConfigError if the rendering of
        the whole dialogue does not begin with the rendering of the prompt.
        """
        shielded, shields = self._shield([*messages, Message("assistant", response)])
        context = self._prompt_text(tuple(shielded[:-1]))
        whole = self._run(shielded, generation_prompt=False)
        if not whole.startswith(context):
            raise ConfigError(
                f"data.template=chat: the tokenizer's chat template cannot be used for training: {_REWRITES}; "
                "use data.template=paper"
            )
        return _pieces(whole[len(context) :], shields)

    def _shield(self, messages: Sequence[Message]) -> tuple[Sequence[Message], dict[str, str]]:
        """Return the messages with special texts replaced by private-use characters, and the inverse map."""
        pattern = self._special_texts
        text = "".join(message.content for message in messages)
        if pattern is None or not pattern.search(text):
            return messages, {}
        used = set(text)
        unused = (chr(point) for point in PRIVATE_USE if chr(point) not in used)
        shields = dict(zip(sorted(set(pattern.findall(text))), unused, strict=False))
        hidden = [replace(m, content=pattern.sub(lambda hit: shields[hit[0]], m.content)) for m in messages]
        return hidden, {private: special for special, private in shields.items()}

    def _run(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._named_tokens,
            )
        except Exception as error:  # a template is third-party code, which can fail in any way
            raise DataError(f"chat template: {error}{_system_fix(messages)}") from error


def _system_fix(messages: Sequence[Message]) -> str:
    if not messages or messages[0].role != "system":
        return ""
    return " (if the template takes no system message: move its text into the user's, or use data.template=paper)"


def _pieces(text: str, shields: Mapping[str, str]) -> list[Piece]:
    """Split a rendering at the private-use characters and turn each of them back into plain text."""
    if not shields:
        return [(text, True)] if text else []
    parts = re.split("([" + "".join(shields) + "])", text)
    return [(shields.get(part, part), part not in shields) for part in parts if part]


def of_tokenizer(tokenizer: Tokenizer, day: date | None = None) -> ChatTemplate:
    """Return the chat template of a tokenizer that has one; raises ConfigError if it is not valid Jinja."""
    assert tokenizer.chat_template is not None
    return ChatTemplate(tokenizer.chat_template, tokenizer.named_tokens, tokenizer.special_texts, day)


def training_problem(tokenizer: Tokenizer, trains: bool) -> str | None:
    """Return why a chat template cannot render questions or, if `trains`, targets of training; None if it can.

    Raises ConfigError if it is not valid Jinja, DataError if it refuses a question.
    """
    template = of_tokenizer(tokenizer)
    template.prompt(_QUESTION)
    if not trains:
        return None
    template.whole([*_QUESTION, Message("assistant", "b")])
    for dialogue in (_QUESTION, (*_QUESTION, Message("assistant", "b"), *_QUESTION)):
        try:
            template.answer(dialogue, "b")
        except ConfigError:
            return _REWRITES
        except DataError:  # a template that takes one turn only refuses the other rows one by one
            continue
    return None


def limits(tokenizer: Tokenizer) -> str:
    """Return what a usable template does to system messages if it does not render them, else an empty text."""
    try:
        pieces = of_tokenizer(tokenizer).prompt([Message("system", _MARKER), *_QUESTION])
    except DataError:
        return "; it refuses system messages, so rows that have one are bad"
    return "" if any(_MARKER in text for text, _ in pieces) else "; it leaves out system messages"


class Generation(Extension):
    """`{% generation %}` marks the assistant's text; it does not change the rendering."""

    tags = {"generation"}  # noqa: RUF012  (Jinja asks for this form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def uses_date(source: str) -> bool:
    """Return whether a template uses the current date; raises ConfigError if it is not valid Jinja."""
    return _CLOCK in meta.find_undeclared_variables(_parsed(_environment(), source))


def with_day(source: str, day: date) -> str | None:
    """Return a template that always writes `day`, or None if it computes the format of the date."""
    calls = [
        call.args
        for call in _parsed(_environment(), source).find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == _CLOCK
    ]
    if not all(len(args) == 1 and isinstance(args[0], nodes.Const) for args in calls):
        return None
    forms = {args[0].value: _strftime_on(day)(args[0].value) for args in calls if isinstance(args[0], nodes.Const)}
    written = json.dumps(forms, ensure_ascii=False)
    return f"{{%- macro {_CLOCK}(form) -%}}{{{{ {written}[form] }}}}{{%- endmacro -%}}\n{source}"


def _compile(source: str, day: date | None) -> Template:
    environment = _environment()
    environment.globals[_CLOCK] = _strftime_now if day is None else _strftime_on(day)
    _parsed(environment, source)
    return environment.from_string(source)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _parsed(environment: Environment, source: str) -> nodes.Template:
    try:
        return environment.parse(source)
    except TemplateError as error:
        raise ConfigError(f"model.tokenizer: its chat template is not valid Jinja: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _strftime_on(day: date) -> Callable[[str], str]:
    """Return `strftime` for midnight at the beginning of `day`."""
    return datetime.combine(day, time()).strftime


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
