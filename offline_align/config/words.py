"""The words of a command line, as they are typed: flags, overrides in Hydra's grammar, and paths in a user's home."""

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


def split_flags(words: list[str], problems: list[str]) -> tuple[list[str], Path | None, Path | None]:
    """Take `--config-dir DIR` and `--config FILE` (also with `=`) out of the words."""
    rest: list[str] = []
    found: dict[str, Path] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, _, value = word.partition("=")
        if name not in ("--config-dir", "--config"):
            rest.append(word)
            continue
        value = value or (queue.pop(0) if queue else "")
        path = Path(with_home(value))
        if not path.exists() or not value:
            problems.append(f"{name}={value}: no such path")
        else:
            found[name] = path.resolve()
    return rest, found.get("--config-dir"), found.get("--config")


def parse(words: list[str], problems: list[str]) -> tuple[list[Override], set[str]]:
    """Return what the words say, and the keys of those that cannot be read."""
    parser = OverridesParser.create()
    overrides: list[Override] = []
    unreadable: set[str] = set()
    for word in words:
        override = _parse_word(parser, word)
        if override is None:
            problem = "cannot be read; write key=value, and quote what has special characters: 'key=\"a, b\"'"
        elif not override.key_or_group or override.is_delete() or override.is_sweep_override():
            problem = "only key=value can be used here; write a list as key=[a,b], a comma in a name as 'key=\"a,b\"'"
        else:
            overrides.append(override)
            continue
        problems.append(f"{word}: {problem}")
        unreadable.add(word.partition("=")[0].lstrip("+"))
    return overrides, unreadable


def _parse_word(parser: OverridesParser, word: str) -> Override | None:
    """Return an override, or None; what Hydra's grammar refuses is tried again as a quoted text.

    That gives paths such as `~/a=b`. A list or a quoted text is meant to be read by the grammar, and a comma may be
    one of a list: they stay as they are.
    """
    key, equals, value = word.partition("=")
    value = value.strip()
    quote = '"' if '"' not in value else "'"
    quotable = equals and "," not in value and not value.startswith(("[", "{", '"', "'"))
    for form in (word, f"{key}={quote}{value}{quote}" if quotable else None):
        with contextlib.suppress(HydraException):
            return parser.parse_override(form) if form else None
    return None


def with_home(value: Any) -> Any:
    """Return a path, or each of a list, with `~` replaced."""
    if isinstance(value, list):
        return [with_home(item) for item in value]
    if isinstance(value, str) and value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no user of this name: it is one of a file
            return str(Path(value).expanduser())
    return value
