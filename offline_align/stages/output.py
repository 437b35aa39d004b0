"""What a command prints as its result: for people on a terminal, for programs in a file or a pipe."""

from rich.console import Console, RenderableType
from rich.text import Text

# Wider than any table: a line in a file stays one line.
_UNFOLDED = 10_000


def show(*parts: RenderableType) -> None:
    """Print tables and texts, one below the other; outside a terminal lines are neither folded nor padded."""
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
