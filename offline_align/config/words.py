"""Parse the words of a command line: flags, overrides in Hydra's grammar, and paths with `~`."""

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


def split_flags(words: list[str], problems: list[str]) -> tuple[list[str], Path | None, Path | None]:
    """Return the words without `--config-dir DIR` and `--config FILE` (also with `=`), and the paths."""
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


def split_dashed(words: list[str]) -> tuple[list[str], list[tuple[str, str, str | None]]]:
    """Return the words without arguments such as `--name value` or `--name=value`, and those arguments.

    An argument is (the words as typed, the name without dashes, the value or None).
    """
    rest: list[str] = []
    dashed: list[tuple[str, str, str | None]] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-"):
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals and queue and not queue[0].startswith("--") and "=" not in queue[0]:
            value = queue.pop(0)
            word = f"{word} {value}"
        dashed.append((word, name.lstrip("-"), value or None))
    return rest, dashed


def parse(words: list[str], problems: list[str]) -> tuple[list[Override], set[str]]:
    """Return the overrides, and the keys of the words that cannot be parsed."""
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
    """Return the override, or None if the word cannot be parsed.

    If Hydra's grammar rejects the value, the value is quoted and parsed again, which accepts paths
    such as `~/a=b`. Lists, mappings, quoted values and values with a comma are not retried, since
    they are meant for the grammar.
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
    """Return a path, or a list of paths, with `~` expanded."""
    if isinstance(value, list):
        return [with_home(item) for item in value]
    if isinstance(value, str) and value.startswith("~"):
        with contextlib.suppress(RuntimeError):  # there is no such user, so `~name` is a file name
            return str(Path(value).expanduser())
    return value
