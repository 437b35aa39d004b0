"""The rows that stages exchange: SFT samples, preference pairs, labelled samples and prompts.

Rows are validated strictly. A prompt is a string (one user message) or a list of messages: an
optional system message, then user and assistant messages in turn, ending with a user message.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows, Line, RowError, input_paths, read_objects, write_jsonl
from offline_align.errors import DataError

__all__ = [
    "BadRows",
    "LabelledSample",
    "Message",
    "PreferencePair",
    "Prompt",
    "RowError",
    "Sample",
    "TrainingRow",
    "input_paths",
    "names_of_files",
    "parse_row",
    "read_rows",
    "read_rows_and_pairs",
    "reject_rows",
    "text_id",
    "without_suffixes",
    "write_jsonl",
]


LARGEST_MARGIN = 3.4e38
"""Largest absolute margin; a larger one would become infinite in float32."""

_SHARD = re.compile(r"-\d+-of-\d+$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with one response; `columns` is the row's JSON object in its order, with ids as text."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    columns: dict[str, Any]
    beside: str | None = field(default=None, kw_only=True)
    """The other answer if this one belongs to a pair; the prompt is then truncated equally for both."""
    file: str = field(default="", kw_only=True, compare=False)
    """Name of the file it was read from, as `names_of_files` gives it; empty if it was made."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a preferred and a rejected response; `margin` is how much better, if known."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None
    columns: dict[str, Any]
    made_of: tuple[str, ...] = ()
    """Ids of the labelled rows that it was made of; empty for a pair from a file."""
    file: str = field(default="", kw_only=True, compare=False)
    """Name of the file it was read from; see `Sample.file`."""


@dataclass(frozen=True, slots=True)
class LabelledSample(Sample):
    """A sample with its reward: raw, and normalised over the labelled set."""

    reward_raw: float
    reward: float
    source_id: str


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sample, the weight of its loss, and the condition inserted right before its response."""

    sample: Sample
    weight: float = 1.0
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer."""

    id: str
    prompt: tuple[Message, ...]
    columns: dict[str, Any]


def read_rows[T](paths: Sequence[Path], kind: type[T], bad_rows: BadRows, every: int = 1) -> Iterator[T]:
    """Yield the rows of the files as `kind`, one of the classes above, in order; or one of `every` so many lines.

    A missing id becomes `<file name>:<line number>`. Ids must be unique over all files, including
    the ids of the two answers of a pair, `<id>/chosen` and `<id>/rejected`. Raises DataError for a
    bad row (unless bad rows are skipped) and if there is no usable row at all.
    """
    return _read(paths, bad_rows, lambda columns, row_id: parse_row(columns, kind, row_id), every)


def read_rows_and_pairs[T](
    paths: Sequence[Path], kind: type[T], bad_rows: BadRows, every: int = 1
) -> Iterator[T | PreferencePair]:
    """Yield rows with a `chosen` or `rejected` column as pairs, others as `kind`; see `read_rows`."""
    return _read(paths, bad_rows, lambda columns, row_id: _row_or_pair(columns, kind, row_id), every)


def reject_rows(
    paths: Sequence[Path], kind: type, reasons: Mapping[str, str], bad_rows: BadRows, and_pairs: bool = False
) -> None:
    """Reject the rows whose ids are in `reasons`, naming file and line.

    With `and_pairs`, the files may hold pairs too, as in `read_rows_and_pairs`. Raises DataError as
    `BadRows.reject`. The files are read again, because rows do not store their line numbers.
    """
    if not reasons:
        return

    def parse(columns: dict[str, Any], row_id: str) -> Any:
        return (_row_or_pair if and_pairs else parse_row)(columns, kind, row_id)

    for line, row in _accepted(paths, BadRows(OnBadRow.skip, None), parse):
        if row.id in reasons:
            line.reject(bad_rows, reasons[row.id])
    bad_rows.report(_log)


def _row_or_pair[T](columns: dict[str, Any], kind: type[T], row_id: str) -> T | PreferencePair:
    is_pair = "chosen" in columns or "rejected" in columns
    return parse_row(columns, PreferencePair, row_id) if is_pair else parse_row(columns, kind, row_id)


def _read[T](
    paths: Sequence[Path], bad_rows: BadRows, parse: Callable[[dict[str, Any], str], T], every: int
) -> Iterator[T]:
    found = False
    for _, row in _accepted(paths, bad_rows, parse, every):
        found = True
        yield row
    bad_rows.report(_log)
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no usable row")


def _accepted[T](
    paths: Sequence[Path], bad_rows: BadRows, parse: Callable[[dict[str, Any], str], T], every: int = 1
) -> Iterator[tuple[Line, T]]:
    """Yield each usable row together with its line."""
    names = Counter(path.name for path in paths)
    files = names_of_files(paths)
    seen: dict[str, bytes] = {}
    for line in read_objects(paths, bad_rows, every):
        name = line.path.name if names[line.path.name] == 1 else str(line.path)
        try:
            row = parse(line.value, f"{name}:{line.number}")
            _check_ids(_occupied_ids(row), line.raw, seen)
        except RowError as error:
            line.reject(bad_rows, str(error))
        else:
            if isinstance(row, (Sample, PreferencePair)):
                row = replace(row, file=files[line.path])
            yield line, row


def names_of_files(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each file: without folder, and with as much of its folder as makes it unique.

    The shards of a data set in one folder have the same name.
    """
    parts = {path: path.with_name(without_suffixes(path.name)).parts for path in paths}
    found: dict[Path, str] = {}
    for path, own in parts.items():
        others = [other for other in parts.values() if other != own]
        unique = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        found[path] = "/".join(own[-next(unique, len(own)) :])
    return found


def without_suffixes(name: str) -> str:
    """Return the name of a file without its suffix, `.gz` or `.zst`, and the number of a shard (`-00001-of-00005`)."""
    return _SHARD.sub("", Path(name.removesuffix(".gz").removesuffix(".zst")).stem)


def _occupied_ids(row: Any) -> list[str]:
    """Return the ids that a row occupies: its own and, for a pair, the ids of its labelled answers."""
    return [row.id, f"{row.id}/chosen", f"{row.id}/rejected"] if isinstance(row, PreferencePair) else [row.id]


def _check_ids(names: list[str], raw: bytes, seen: dict[str, bytes]) -> None:
    digest = hashlib.sha256(raw.strip()).digest()
    taken = [seen[name] for name in names if name in seen]
    if taken:
        raise RowError("id: duplicate id" if taken[0] == digest else "id: duplicate id, with other content")
    seen.update(dict.fromkeys(names, digest))


def parse_row[T](columns: dict[str, Any], kind: type[T], default_id: str) -> T:
    """Return a JSON object as `kind`, with ids as text; raises RowError if it is invalid."""
    parse = _PARSERS[kind]
    numbered = [name for name in ("id", "source_id") if type(columns.get(name)) is int]
    columns = columns | {name: text_id(columns[name]) for name in numbered} if numbered else columns
    return cast(T, parse(columns, _row_id(columns, default_id), _prompt(columns)))


def text_id(value: Any) -> Any:
    """Return an integer id as text, because data sets often number their rows."""
    return str(value) if type(value) is int else value


def _sample(columns: dict[str, Any], row_id: str, prompt: tuple[Message, ...]) -> Sample:
    return Sample(_answer_id(columns, row_id), prompt, _response(columns), columns)


def _answer_id(columns: dict[str, Any], row_id: str) -> str:
    """Return the id of a row; condition and sample index make ids of `generate` answers unique."""
    if "finish_reason" not in columns:
        return row_id
    place = (columns.get("condition"), columns.get("sample_index"))
    return "/".join([row_id, *(str(part) for part in place if part is not None)])


def _pair(columns: dict[str, Any], row_id: str, prompt: tuple[Message, ...]) -> PreferencePair:
    chosen, rejected = _text(columns, "chosen"), _text(columns, "rejected")
    if chosen == rejected:
        raise RowError("rejected: the same as chosen")
    margin = None if columns.get("margin") is None else _number(columns, "margin")
    if margin is not None and abs(margin) > LARGEST_MARGIN:
        raise RowError("margin: number out of range")
    return PreferencePair(row_id, prompt, chosen, rejected, margin, columns)


def _labelled(columns: dict[str, Any], row_id: str, prompt: tuple[Message, ...]) -> LabelledSample:
    rewards = _number(columns, "reward_raw"), _number(columns, "reward")
    response, source_id = _response(columns), _text(columns, "source_id")
    return LabelledSample(row_id, prompt, response, columns, *rewards, source_id)


def _bare_prompt(columns: dict[str, Any], row_id: str, prompt: tuple[Message, ...]) -> Prompt:
    return Prompt(row_id, prompt, columns)


_PARSERS: dict[type, Callable[[dict[str, Any], str, tuple[Message, ...]], object]] = {
    Sample: _sample,
    PreferencePair: _pair,
    LabelledSample: _labelled,
    Prompt: _bare_prompt,
}


def _row_id(columns: dict[str, Any], default: str) -> str:
    return default if columns.get("id") is None else _text(columns, "id")


def _present(columns: dict[str, Any], field: str) -> Any:
    if field not in columns:
        raise RowError(f"{field}: missing")
    if columns[field] is None:
        raise RowError(f"{field}: null")
    return columns[field]


def _text(columns: dict[str, Any], field: str) -> str:
    return _checked_text(_present(columns, field), field)


def _checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{field}: not a string")
    if not value.strip():
        raise RowError(f"{field}: empty")
    if "\0" in value:
        raise RowError(f"{field}: contains a NUL character")
    return value


def _response(columns: dict[str, Any]) -> str:
    """Return the response, which may be empty in answers of `generate`: a policy may end at once."""
    value = columns.get("response")
    if isinstance(value, str) and not value.strip() and "finish_reason" in columns:
        return value
    return _text(columns, "response")


def _number(columns: dict[str, Any], field: str) -> float:
    value = _present(columns, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{field}: not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise RowError(f"{field}: number out of range") from error


def _prompt(columns: dict[str, Any]) -> tuple[Message, ...]:
    value = _present(columns, "prompt")
    if isinstance(value, str):
        return (Message("user", _checked_text(value, "prompt")),)
    if not isinstance(value, list):
        raise RowError("prompt: not a string or a list of messages")
    messages = tuple(_message(item) for item in value)
    _check_turns([message.role for message in messages])
    return messages


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise RowError("prompt: a message is not an object")
    role, content = item.get("role"), item.get("content")
    if role not in ("system", "user", "assistant"):
        raise RowError("prompt: role is not system, user or assistant")
    return Message(role, _checked_text(content, "prompt: content of a message"))


def _check_turns(roles: list[str]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise RowError("prompt: no user message")
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if turns[-1] != "user":
        raise RowError("prompt: the last message is not from the user")
    if turns != expected:
        raise RowError("prompt: roles do not alternate between user and assistant")
