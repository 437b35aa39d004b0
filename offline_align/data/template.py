"""Turn dialogues into token ids with the paper's template or the tokenizer's chat template.

The paper's template (section 4) is `User:{instruction}Assistant: {response}`. An end-of-sequence
(EOS) token follows each earlier answer, a system message comes first as `System:{text}`, and
Conditional Alignment puts its condition between `Assistant: ` and the response (Eq. 6).

Context, condition and response are encoded separately, in training and in generation, so no token
crosses a boundary between them. Some tokenizers add a space to the start of a text. They do not add
it here to a text that follows other text.

Third-party reward models get the same ids as in `transformers` (see `Reading`).

The paper's template has no beginning-of-sequence (BOS) token. It is added only if the rules in a
`tokenizer.json` add it, because models with such a rule were never trained without it. A
SentencePiece model has no such rule. A chat template writes its own BOS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from offline_align.config.sections import Template
from offline_align.data.chat import ChatTemplate, Piece, uses_date
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
    only for third-party reward models. Raises ConfigError if `template` is `chat` and the tokenizer
    has no chat template.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Template, day: date | None = None, reading: Reading | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.day = day if writes_date(tokenizer, template) else None
        self._chat = _chat_template(tokenizer, day) if template is Template.chat else None
        self.reading = reading if self._chat else None

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
        if self._chat and self.reading:
            dialogues = [[*prompt, Message("assistant", response)] for response in responses]
            return [context, *(Span([*self._chat.whole(dialogue)]) for dialogue in dialogues)]
        after = self._after_context(prompt)
        answers = [self._chat.answer(prompt, r) if self._chat else [(r, False)] for r in responses]
        return [context, *(Span([*answer], after) for answer in answers)]

    def rows(self, ids: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
        """Return (context, target) for each response, given `ids = encode(spans(...))`."""
        context, *answers = ids
        if self.reading is None:
            return [(context, self._finished(answer)) for answer in answers]
        return [_split(context, self.reading, whole) for whole in answers]

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
        parts: list[Part] = [*self._chat.prompt(prompt)] if self._chat else self._paper_context(prompt)
        return Span([*parts, (condition, True)] if condition else parts)

    def _after_context(self, prompt: Sequence[Message]) -> After:
        """Return what precedes a response."""
        pieces = self._chat.prompt(prompt) if self._chat else [(ASSISTANT, False)]
        return self.tokenizer.behind(*pieces[-1]) if pieces else After.nothing

    def _paper_context(self, prompt: Sequence[Message]) -> list[Part]:
        parts: list[Part] = [*self.start_ids]
        text = ""
        for message in prompt:
            if message.role == "assistant":
                parts += [(text + ASSISTANT, False), (message.content, False), self.tokenizer.eos_id]
                text = ""
            else:
                text += PREFIXES[message.role] + message.content
        return [*parts, (text + ASSISTANT, False)]

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

    def tail_tokens(self, condition: str) -> int:
        """Return the number of tokens at the end of a context that must survive truncation.

        These are the generation prompt (`Assistant: ` in the paper's template) and the condition.
        """
        return self._assistant_tokens + self.condition_tokens(condition)

    def condition_tokens(self, condition: str) -> int:
        """Return the number of tokens that `condition` adds to a context."""
        if not condition:
            return 0
        return len(self.tokenizer.encode(condition, special=True, after=self._after_context(_QUESTION)))

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


def _split(context: list[int], reading: Reading, whole: list[int]) -> tuple[list[int], list[int]]:
    """Split the ids of a whole dialogue into context and target; the target ends with the scored token.

    The target starts at the first token that differs from the context. So a token that covers both
    the end of the prompt and the start of the answer belongs to the target.
    """
    end = len(whole)
    while end > 1 and whole[end - 1] == reading.pad_id:
        end -= 1
    same = (ours == theirs for ours, theirs in zip(context, whole[: end - 1], strict=False))
    start = next((place for place, equal in enumerate(same) if not equal), min(len(context), end - 1))
    return whole[:start], whole[start:end]


def _chat_template(tokenizer: Tokenizer, day: date | None) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.template=chat: the tokenizer has no chat template; "
            "give a Hugging Face folder that has one, or use data.template=paper"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.named_tokens, tokenizer.special_texts, day)
