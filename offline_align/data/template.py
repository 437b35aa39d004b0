"""Turn dialogues into token ids with the paper's template or the tokenizer's chat template.

The paper's template (section 4) is `User:{instruction}Assistant: {response}`. An end-of-sequence
(EOS) token follows each earlier answer, a system message comes first as `System:{text}`, and
Conditional Alignment puts its condition between `Assistant: ` and the response (Eq. 6).

The ids are those that any tokenizer gives for the whole text: all text between two special tokens
is encoded at once, so a token may join a condition or an earlier answer with the text before it. A
policy writes its response behind the context, so only the response is encoded separately. A reward
model reads a finished dialogue, which is encoded as a whole, with its response. Models of earlier
versions keep their own form (see `Encoding`).

Some tokenizers add a space to the start of a text. They do not add it here to a text that follows
other text. Third-party reward models get the same ids as in `transformers` (see `Reading`).

The paper's template has no beginning-of-sequence (BOS) token. It is added only if the rules in a
`tokenizer.json` add it, because models with such a rule were never trained without it. A
SentencePiece model has no such rule. A chat template writes its own BOS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any

from offline_align.config.sections import Template
from offline_align.data.chat import ChatTemplate, Piece, of_tokenizer, uses_date
from offline_align.data.frame import Frame
from offline_align.data.prefix import After
from offline_align.data.records import Message
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError

ASSISTANT = "Assistant: "
PREFIXES = {"system": "System:", "user": "User:"}

Part = Piece | int
"""A piece of text, or a token id."""

_QUESTION = (Message("user", "a"),)


class Encoding(StrEnum):
    """Which texts of a dialogue are encoded together."""

    whole = "whole"
    """All text between two special tokens, as a tokenizer that gets the whole dialogue encodes it."""
    pieces = "pieces"
    """Condition, earlier answers and response each apart from the text before them: the form of
    models that were trained before `whole` existed. Other programs cannot reproduce it."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive texts and tokens that are encoded into one list of ids."""

    parts: list[Part]
    after: After = After.nothing
    """What precedes the first part."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a third-party reward model reads a dialogue.

    The ids are those of `apply_chat_template` on the prompt and the answer with `tokenize=True`, which
    encodes the whole text at once. As in `AutoModelForSequenceClassification`, the score is read at
    the last token that is not padding.
    """

    pad_id: int | None
    """`pad_token_id` of the model's `config.json`."""

    @classmethod
    def from_values(cls, values: Any) -> "Reading | None":
        """Return the `Reading` that a file stores, or None; raises ValueError if it is invalid."""
        if values is None:
            return None
        pad_id = values.get("pad_id") if isinstance(values, dict) else values
        if not isinstance(values, dict) or not (pad_id is None or type(pad_id) is int):
            raise ValueError(f"the reading {values!r} is invalid")
        return cls(pad_id)


class Renderer:
    """Turns dialogues into token ids with one tokenizer and one template.

    `day` is the date that a chat template writes as today's; None means the current date. `reading` is
    only for third-party reward models. `scores` says that the rows are for a reward model. Raises
    ConfigError if `template` is `chat` and the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        day: date | None = None,
        reading: Reading | None = None,
        encoding: Encoding = Encoding.whole,
        scores: bool = False,
    ) -> None:
        assert template is not Template.auto
        self.tokenizer = tokenizer
        self.template = template
        self.encoding = encoding
        self.day = day if writes_date(tokenizer, template) else None
        self._chat = _chat_template(tokenizer, day) if template is Template.chat else None
        self.reading = reading if self._chat else None
        self._joins = encoding is Encoding.whole
        self._joins_responses = self.reading is not None or (scores and self._joins)

    @property
    def form(self) -> str:
        """What decides, beside tokenizer, date and reading, which ids a dialogue gets: part of cache keys."""
        joined = "" if not self._joins else "/rows" if self._joins_responses else "/contexts"
        return self.template.value + joined

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the ids of everything before the response.

        Raises DataError if the chat template refuses the dialogue.
        """
        return self.encode([self._context_span(prompt, condition)])[0]

    def target(self, prompt: Sequence[Message], response: str, condition: str = "") -> list[int]:
        """Return the ids of the response and EOS, which do not depend on the condition.

        Raises DataError and ConfigError as `ChatTemplate.answer` does.
        """
        return self.row(prompt, response, condition)[1]

    def row(self, prompt: Sequence[Message], response: str, condition: str = "") -> tuple[list[int], list[int]]:
        """Return the ids of context and target; raises the same errors as `target`."""
        return self.rows(self.encode(self.spans(prompt, [response], condition)))[0]

    def spans(self, prompt: Sequence[Message], responses: Sequence[str], condition: str = "") -> list[Span]:
        """Return the spans of the context and of each response: the input of `encode`.

        `rows` turns the result of `encode` into contexts and targets. Raises DataError and
        ConfigError as `ChatTemplate.answer` does.
        """
        context = self._context_span(prompt, condition)
        if self._joins_responses:
            return [context, *(self._whole_span(prompt, response) for response in responses)]
        after = self._after_context(prompt)
        answers = [self._chat.answer(prompt, r) if self._chat else [(r, False)] for r in responses]
        return [context, *(Span([*answer], after) for answer in answers)]

    def rows(self, ids: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
        """Return (context, target) for each response, given `ids = encode(spans(...))`.

        All responses have the same context.
        """
        context, *answers = ids
        if self.reading is not None:
            return _split(context, [_scored(whole, self.reading.pad_id) for whole in answers])
        finished = [self._finished(answer) for answer in answers]
        return _split(context, finished) if self._joins_responses else [(context, answer) for answer in finished]

    def _finished(self, ids: list[int]) -> list[int]:
        """Return the ids of an answer up to EOS, which is appended unless a chat template has closed with it.

        A line break that the template writes after EOS is dropped, because generation stops before it.
        """
        eos = self.tokenizer.eos_id
        if self._chat and eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return [*ids, eos]

    def encode(self, spans: Sequence[Span]) -> list[list[int]]:
        """Return the ids of every span. A text that occurs again after the same `After` is encoded once."""
        placed = [list(self._placed(span)) for span in spans]
        texts: dict[tuple[bool, After], dict[str, list[int]]] = {}
        for parts in placed:
            for part in parts:
                if not isinstance(part, int):
                    texts.setdefault(part[1:], {})[part[0]] = []
        for (special, after), found in texts.items():
            found.update(zip(found, self.tokenizer.encode_batch(list(found), special, after), strict=True))
        return [
            [token for part in parts for token in ([part] if isinstance(part, int) else texts[part[1:]][part[0]])]
            for parts in placed
        ]

    def _placed(self, span: Span) -> Iterator[int | tuple[str, bool, After]]:
        """Yield the parts of a span: token ids, and each text with what precedes it."""
        after, started = span.after, False
        for part in span.parts:
            if isinstance(part, int):
                # A text after token ids alone (BOS) still counts as the start of the sequence.
                after = After.special if started else after
                yield part
            elif part[0]:
                yield *part, after
                after, started = self.tokenizer.behind(*part), True

    def _context_span(self, prompt: Sequence[Message], condition: str) -> Span:
        if self._chat:
            return Span(self._conditioned([*self._chat.prompt(prompt)], condition))
        parts, text = self._paper_turns(prompt)
        return Span(self._conditioned([*parts, (text + ASSISTANT, False)], condition))

    def _whole_span(self, prompt: Sequence[Message], response: str) -> Span:
        """Return the span of a finished dialogue, without the end of sequence that the paper's template adds."""
        if self._chat:
            return Span([*self._chat.whole([*prompt, Message("assistant", response)])])
        parts, text = self._paper_turns(prompt)
        return Span([*parts, (text + ASSISTANT + response, False)])

    def _after_context(self, prompt: Sequence[Message]) -> After:
        """Return what precedes a response."""
        pieces = self._chat.prompt(prompt) if self._chat else [(ASSISTANT, False)]
        return self.tokenizer.behind(*pieces[-1]) if pieces else After.nothing

    def _paper_turns(self, prompt: Sequence[Message]) -> tuple[list[Part], str]:
        """Return the parts up to the last end of sequence, and the text behind it, before `Assistant: `."""
        parts: list[Part] = [*self.start_ids]
        text = ""
        for message in prompt:
            if message.role == "assistant":
                asked, answer = text + ASSISTANT, message.content
                parts += [(asked + answer, False)] if self._joins else [(asked, False), (answer, False)]
                parts.append(self.tokenizer.eos_id)
                text = ""
            else:
                text += PREFIXES[message.role] + message.content
        return parts, text

    def _conditioned(self, parts: list[Part], condition: str) -> list[Part]:
        """Return the parts of a context with the condition, which may name special tokens, at their end."""
        if not condition:
            return parts
        if not self._joins or not parts or isinstance(parts[-1], int):
            return [*parts, (condition, True)]
        text, special = parts[-1]
        # A special token is never joined with the text before it; that text stays plain if it is a user's.
        starts = [condition.find(token) for token in self.tokenizer.special_texts if token in condition]
        plain = len(condition) if special or not starts else min(starts)
        return [*parts[:-1], (text + condition[:plain], special), (condition[plain:], True)]

    def frame(self, prompt: Sequence[Message]) -> Frame:
        """Return the text that the template writes around an answer to `prompt`."""
        if not self._chat:
            return Frame(after=self._after_context(prompt))
        before, behind = self._chat.around(prompt)
        behind, _ = self._chat.first_special(behind)
        return Frame(self._chat.without_special(before), behind, self._after_context(prompt))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: EOS, and the special token that closes an answer in the template."""
        before, behind = self._chat.around(_QUESTION) if self._chat else ("", "")
        end = self._chat.first_special(behind)[1] if self._chat else None
        ids = self.tokenizer.encode(end, special=True, after=After.text) if end and end not in before else []
        return frozenset({self.tokenizer.eos_id, *(ids if len(ids) == 1 else [])})

    @cached_property
    def start_ids(self) -> list[int]:
        """`[bos_id]` if contexts start with BOS, else an empty list."""
        bos = self.tokenizer.bos_id
        if bos is None:
            return []
        if self._chat:
            return [bos] if self.context(_QUESTION)[:1] == [bos] else []
        return [bos] if self.tokenizer.adds_bos else []

    @cached_property
    def ends_rows(self) -> bool:
        """Whether the template itself ends a finished dialogue exactly at EOS."""
        whole = self.encode([self._whole_span(_QUESTION, "b")])[0]
        return self._finished(whole) == whole

    def tail_tokens(self, condition: str) -> int:
        """Return the number of tokens at the end of a context that must survive truncation.

        These are the generation prompt (`Assistant: ` in the paper's template) and the condition.
        """
        if not self._joins:
            return self._assistant_tokens + self.condition_tokens(condition)
        return self._assistant_tokens + len(self._asked(condition)) - len(self._asked(""))

    def condition_tokens(self, condition: str) -> int:
        """Return the number of tokens at the end of a context that are there because of `condition`.

        A token that joins the condition with the end of the generation prompt counts.
        """
        if not condition:
            return 0
        if not self._joins:
            return len(self.tokenizer.encode(condition, special=True, after=self._after_context(_QUESTION)))
        asked = self._asked(condition)
        return len(asked) - _common(self._asked(""), asked)

    @lru_cache(maxsize=512)  # noqa: B019  (a renderer lives as long as its run)
    def _asked(self, condition: str) -> list[int]:
        return self.context(_QUESTION, condition)

    @cached_property
    def _assistant_tokens(self) -> int:
        if not self._chat:
            return len(self.tokenizer.encode(ASSISTANT, after=After.text))
        pieces = [self._chat.prompt(_QUESTION, generation_prompt) for generation_prompt in (True, False)]
        whole, asked = self.encode([Span([*texts]) for texts in pieces])
        return len(whole) - len(asked)


def writes_date(tokenizer: Tokenizer, template: Template) -> bool:
    """Return whether the template writes the date; raises ConfigError for an invalid chat template."""
    source = tokenizer.chat_template if template is Template.chat else None
    return source is not None and uses_date(source)


def _split(context: list[int], wholes: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Split the ids of whole dialogues, which differ in their answers, into context and target.

    The targets start at the first token of any dialogue that differs from the context, and have at
    least one token. So a token that covers both the end of the prompt and the start of an answer
    belongs to the target.
    """
    start = min((_common(context, whole[:-1]) for whole in wholes), default=0)
    return [(whole[:start], whole[start:]) for whole in wholes]


def _scored(whole: list[int], pad_id: int | None) -> list[int]:
    """Return the ids up to the last one that is not padding."""
    end = len(whole)
    while end > 1 and whole[end - 1] == pad_id:
        end -= 1
    return whole[:end]


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    same = (one == other for one, other in zip(first, second, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(first), len(second)))


def _chat_template(tokenizer: Tokenizer, day: date | None) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.template=chat: the tokenizer has no chat template; "
            "give a Hugging Face folder that has one, or use data.template=paper"
        )
    return of_tokenizer(tokenizer, day)
