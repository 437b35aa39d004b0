"""How a dialogue becomes token ids: the paper's template, or the tokenizer's chat template.

The paper's (section 4): `User:{instruction}Assistant: {response}`. Earlier answers end with end of
sequence, a system message stands first as `System:{text}`, and Conditional Alignment puts its
condition between `Assistant: ` and the response (Eq. 6). Context, condition and response are encoded
each by itself, in training as in generation, so no token ever reaches over a boundary.

Begin of sequence: the paper's template has none. It is put first only where the rules of a
`tokenizer.json` say so, because models with such a rule were never trained without it; a SentencePiece
model has no such rule. A chat template writes its own.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

from offline_align.config.sections import Template
from offline_align.data.chat import ChatTemplate, Piece
from offline_align.data.records import Message
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError

ASSISTANT = "Assistant: "
PREFIXES = {"system": "System:", "user": "User:"}

Part = Piece | int
"""A piece of text, or the id of a token."""


class Renderer:
    """Turns dialogues into token ids with one tokenizer and one template.

    Raises ConfigError where the chat template is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._chat = _chat_template(tokenizer) if template is Template.chat else None

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the ids of all that stands before the response.

        Raises DataError where the chat template refuses the dialogue.
        """
        return self.encode([self.context_parts(prompt, condition)])[0]

    def target(self, prompt: Sequence[Message], response: str, condition: str = "") -> list[int]:
        """Return the ids of the response, end of sequence last; no condition changes them.

        Raises DataError and ConfigError as `ChatTemplate.answer` does.
        """
        return self.finish_target(self.encode([self.target_parts(prompt, response)])[0])

    def context_parts(self, prompt: Sequence[Message], condition: str = "") -> list[Part]:
        """Return what `encode` turns into the context."""
        parts: list[Part] = [*self._chat.prompt(prompt)] if self._chat else self._paper_context(prompt)
        return [*parts, (condition, True)] if condition else parts

    def target_parts(self, prompt: Sequence[Message], response: str) -> list[Part]:
        """Return what `encode` and then `finish_target` turn into the target."""
        return [*self._chat.answer(prompt, response)] if self._chat else [(response, False)]

    def finish_target(self, ids: list[int]) -> list[int]:
        """Return the ids up to their final end of sequence, which is added where the template wrote none.

        A template that writes a line break after end of sequence loses it: nobody asks a model for it.
        """
        eos = self.tokenizer.eos_id
        if self._chat and eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return [*ids, eos]

    def encode(self, sequences: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Return the ids of every sequence of parts; each distinct text is encoded once."""
        pieces = [part for parts in sequences for part in parts if not isinstance(part, int)]
        ids = {special: self._encode_texts(pieces, special) for special in (False, True)}
        return [
            [token for part in parts for token in ([part] if isinstance(part, int) else ids[part[1]][part[0]])]
            for parts in sequences
        ]

    def _encode_texts(self, pieces: Iterable[Piece], special: bool) -> dict[str, list[int]]:
        texts = list(dict.fromkeys(text for text, kind in pieces if kind is special))
        return dict(zip(texts, self.tokenizer.encode_batch(texts, special), strict=True)) if texts else {}

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

    @cached_property
    def start_ids(self) -> list[int]:
        """Begin of sequence where contexts start with it, else nothing."""
        bos = self.tokenizer.bos_id
        if bos is None:
            return []
        if self._chat:
            return [bos] if self.context([Message("user", "a")])[:1] == [bos] else []
        return [bos] if self.tokenizer.adds_bos else []

    def tail_tokens(self, condition: str) -> int:
        """Return how many tokens at the end of a context ask for the answer, the condition among them."""
        return self._assistant_tokens + self.condition_tokens(condition)

    def condition_tokens(self, condition: str) -> int:
        """Return how many tokens of a context are its condition."""
        return len(self.tokenizer.encode(condition, special=True)) if condition else 0

    @cached_property
    def _assistant_tokens(self) -> int:
        if not self._chat:
            return len(self.tokenizer.encode(ASSISTANT))
        question = [Message("user", "a")]
        pieces = [self._chat.prompt(question, generation_prompt) for generation_prompt in (True, False)]
        whole, asked = self.encode(pieces)
        return len(whole) - len(asked)


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.template=chat: the tokenizer has no chat template; "
            "give a Hugging Face folder that has one, or use data.template=paper"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.named_tokens, tokenizer.special_texts)
