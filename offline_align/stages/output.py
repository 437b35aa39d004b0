"""Printing of results: formatted on a terminal, plain lines in a file or a pipe."""

from rich.console import Console, RenderableType
from rich.text import Text

# Wider than any table, so that a line in a file stays one line.
_UNFOLDED = 10_000


def show(*parts: RenderableType) -> None:
    """Print tables and texts below each other; outside a terminal, without folding or padding."""
    terminal = Console()
    if terminal.is_terminal:
        for part in parts:
            terminal.print(part, soft_wrap=isinstance(part, Text))
        return
    wide = Console(width=_UNFOLDED)
    with wide.capture() as captured:
        wide.print(*parts, sep="\n")
    lines = captured.get().removesuffix("\n").split("\n")
    terminal.out("\n".join(line.rstrip() for line in lines), highlight=False)
