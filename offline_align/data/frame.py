"""What a template writes around an answer, which is no part of it."""

from dataclasses import dataclass

from offline_align.data.prefix import After


@dataclass(frozen=True, slots=True)
class Frame:
    """The text around an answer, as decoding shows it: without special tokens."""

    before: str = ""
    """Between the request for the answer and the answer: a space, or an empty thought."""
    behind: str = ""
    """Between the answer and the token that ends it."""
    after: After = After.nothing
    """What the answer stands behind."""

    def within(self, text: str) -> str:
        """Return generated text without `before`."""
        return text.removeprefix(self.before)

    def is_before(self, text: str) -> bool:
        """Return whether generated text has not got beyond `before` yet."""
        return len(text) < len(self.before) and self.before.startswith(text)

    def touches(self, stop: str) -> bool:
        """Return whether a stop string can be found in `before`, or begin there."""
        begins = any(stop.startswith(self.before[k:]) for k in range(len(self.before)))
        return begins or stop in self.before


PLAIN = Frame()
