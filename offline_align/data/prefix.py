"""The space that some tokenizers add to the start of a text, and when to leave it out.

SentencePiece calls this space the dummy prefix: it encodes `Two` at the start of a text as `▁Two`.
A text that is encoded separately but follows other text must not get it, because the whole text has
no space there.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any


class After(StrEnum):
    """What precedes a text; it decides whether the tokenizer adds a space to the start of the text."""

    nothing = "nothing"
    """The text starts its sequence."""
    special = "special"
    """The text follows a special token."""
    text = "text"
    """The text follows other text."""


class PrefixRule(StrEnum):
    """Where a `tokenizer.json` adds a space to the start of a text."""

    never = "never"
    first = "first"
    """At the start of a sequence."""
    always = "always"
    """At the start of a sequence and after every added token."""


def rule_of(definition: dict[str, Any]) -> PrefixRule:
    """Return the prefix rule of a `tokenizer.json`."""
    steps = [*_steps(definition.get("normalizer")), *_steps(definition.get("pre_tokenizer"))]
    rules = {_rule_of(step) for step in steps}
    return next((rule for rule in (PrefixRule.always, PrefixRule.first) if rule in rules), PrefixRule.never)


def _rule_of(step: dict[str, Any]) -> PrefixRule:
    kind = step.get("type")
    if kind == "Metaspace":
        usual = "always" if step.get("add_prefix_space", True) else "never"
        return PrefixRule(step.get("prepend_scheme") or usual)
    adds = kind == "Prepend" or (kind == "ByteLevel" and step.get("add_prefix_space", True))
    return PrefixRule.always if adds else PrefixRule.never


def without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a `tokenizer.json` that neither adds a space in encoding nor strips one in decoding."""
    changed = copy.deepcopy(definition)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(changed.get(name)):
            if "normalizers" in step:
                step["normalizers"] = [s for s in step["normalizers"] if s.get("type") != "Prepend"]
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            if "add_prefix_space" in step:
                step["add_prefix_space"] = False
            if name == "decoder" and step.get("type") == "Strip":
                step["start"] = 0
    if (changed.get("normalizer") or {}).get("type") == "Prepend":
        changed["normalizer"] = None
    return changed


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """Yield a normalizer, pre-tokenizer or decoder and, if it is a sequence, its members."""
    if isinstance(node, dict):
        yield node
        for name in ("normalizers", "pretokenizers", "decoders"):
            for child in node.get(name) or []:
                yield from _steps(child)


class Breaks:
    """The added tokens after which a tokenizer treats the text as a new start.

    If the normalizer adds the prefix, only tokens that are matched before it runs (those with
    `normalized=False`) split the text.
    """

    def __init__(self, definition: dict[str, Any], special: bool) -> None:
        prepends = any(_rule_of(step) is PrefixRule.always for step in _steps(definition.get("normalizer")))
        tokens = [
            token
            for token in definition.get("added_tokens") or []
            if (special or not token["special"]) and not (prepends and token.get("normalized"))
        ]
        self._end, self._any = _pattern(tokens, "(?:%s)$"), _pattern(tokens, "%s")

    def ends(self, text: str) -> bool:
        """Return whether `text` ends with one of these tokens."""
        return self._end is not None and self._end.search(text) is not None

    def cut(self, text: str) -> tuple[str, str]:
        """Split `text` at the start of the first of these tokens."""
        found = self._any.search(text) if self._any is not None else None
        place = found.start() if found else len(text)
        return text[:place], text[place:]


def _pattern(tokens: Iterable[dict[str, Any]], form: str) -> re.Pattern[str] | None:
    """Return a pattern of added tokens, longest first; `lstrip` and `rstrip` tokens include white space."""
    longest_first = sorted(tokens, key=lambda token: len(token["content"]), reverse=True)
    texts = [
        (r"\s*" if token.get("lstrip") else "") + re.escape(token["content"]) + (r"\s*" if token.get("rstrip") else "")
        for token in longest_first
    ]
    return re.compile(form % "|".join(texts)) if texts else None


class Prefixed(ABC):
    """Base of tokenizers that encode and decode a text according to what precedes it.

    A subclass sets its prefix rule and implements encoding and decoding with and without the prefix
    (`apart`).
    """

    prefix_rule: PrefixRule
    """Where a space is added to the start of a text."""
    _strips: bool
    """Whether encoding strips white space; the prefix then represents the space between two texts."""
    _breaks: dict[bool, Breaks]
    """The tokens after which text starts anew, by whether special tokens are matched."""

    @abstractmethod
    def _encoded(self, texts: Sequence[str], special: bool, apart: bool) -> list[list[int]]: ...

    @abstractmethod
    def _decoded(self, ids: Sequence[int], apart: bool) -> str: ...

    def encode(self, text: str, special: bool = False, after: After = After.nothing) -> list[int]:
        """See `Tokenizer.encode`."""
        return self.encode_batch([text], special, after)[0]

    def encode_batch(
        self, texts: Sequence[str], special: bool = False, after: After = After.nothing
    ) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if not self._is_apart(after):
            return self._encoded(texts, special, apart=False)
        cut = [self._cut(text, special) for text in texts]
        heads = self._encoded([head for head, _ in cut], special, apart=True)
        tails = self._encoded([tail for _, tail in cut], special, apart=False)
        return [head + tail for head, tail in zip(heads, tails, strict=True)]

    def decode(self, ids: Sequence[int], after: After = After.nothing) -> str:
        """See `Tokenizer.decode`."""
        return self._decoded(ids, self._is_apart(after))

    def behind(self, text: str, special: bool = False) -> After:
        """See `Tokenizer.behind`."""
        if self.prefix_rule is PrefixRule.never or (self._strips and text[-1:].isspace()):
            return After.nothing
        return After.special if self._breaks[special].ends(text) else After.text

    def _is_apart(self, after: After) -> bool:
        return after is After.text or (after is After.special and self.prefix_rule is PrefixRule.first)

    def _cut(self, text: str, special: bool) -> tuple[str, str]:
        """Split `text` into the part that is encoded without the prefix and the rest."""
        if self._strips and text[:1].isspace():
            return "", text
        return self._breaks[special].cut(text) if self.prefix_rule is PrefixRule.always else (text, "")
