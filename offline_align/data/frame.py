"""The text that a template writes around an answer, which is not part of the answer."""

from dataclasses import dataclass

from offline_align.data.prefix import After


@dataclass(frozen=True, slots=True)
class Frame:
    """The text around an answer after decoding, without special tokens."""

    before: str = ""
    """Between the generation prompt and the answer: a space, or an empty thinking block."""
    behind: str = ""
    """Between the answer and the token that ends it."""
    after: After = After.nothing
    """What precedes the answer."""

    def within(self, text: str) -> str:
        """Return generated text without the prefix `before`."""
        return text.removeprefix(self.before)

    def is_before(self, text: str) -> bool:
        """Return whether generated text is still inside `before`."""
        return len(text) < len(self.before) and self.before.startswith(text)

    def touches(self, stop: str) -> bool:
        """Return whether a stop string occurs in `before` or can start there."""
        begins = any(stop.startswith(self.before[k:]) for k in range(len(self.before)))
        return begins or stop in self.before


PLAIN = Frame()
