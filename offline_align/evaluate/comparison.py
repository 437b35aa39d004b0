"""Generation files of several methods, named and aligned prompt by prompt."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.data.jsonl import BadRows, Line, RowError, read_objects
from offline_align.data.records import Message, Prompt, Sample, parse_row
from offline_align.errors import DataError, StorageError
from offline_align.lineage import Manifest, read_manifest

ANSWER_COLUMNS = ("response", "finish_reason", "condition", "sample_index")


@dataclass(frozen=True, slots=True)
class Answer:
    """One response of one method; `condition` is the reward text that it was given, if any."""

    response: str
    finish_reason: str
    condition: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answers of all methods to the same prompts."""

    methods: tuple[str, ...]
    files: tuple[Path, ...]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[tuple[Answer, ...], ...], ...]
    """[prompts][samples][methods]; every prompt has the same number of samples."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of prompts, of samples of each prompt, and of methods."""
        return len(self.prompts), len(self.answers[0]), len(self.methods)

    def samples(self) -> list[Sample]:
        """Return all answers, methods fastest; those with one `id` answer one prompt and can be compared.

        Their columns are those of the prompt.
        """
        _, n, _ = self.shape
        return [
            Sample(prompt.id if n == 1 else f"{prompt.id}#{k}", prompt.prompt, answer.response, prompt.columns)
            for prompt, sets in zip(self.prompts, self.answers, strict=True)
            for k, answers in enumerate(sets)
            for answer in answers
        ]

    def of_method(self, method: int) -> list[Answer]:
        """Return the answers of one method, prompt by prompt."""
        return [answers[method] for sets in self.answers for answers in sets]


def load_comparison(files: Sequence[Path], bad_rows: BadRows) -> Comparison:
    """Return the answers of several generation files, in the order of the first file's prompts.

    Raises DataError naming file and prompt where a file lacks a prompt, a sample of it, or holds another
    text under its id.
    """
    tables = [_read(path, bad_rows) for path in files]
    first = tables[0]
    for path, table in zip(files[1:], tables[1:], strict=True):
        _check_same_prompts(files[0], first, path, table)
    methods = name_methods(files)
    answers = tuple(
        tuple(zip(*(tuple(table[row_id].answers.values()) for table in tables), strict=True)) for row_id in first
    )
    return Comparison(methods, tuple(files), tuple(entry.prompt for entry in first.values()), answers)


@dataclass(frozen=True, slots=True)
class _Entry:
    prompt: Prompt
    answers: dict[int, Answer]
    """Sample index to answer, ascending once the file is read."""


def _read(path: Path, bad_rows: BadRows) -> dict[str, _Entry]:
    table: dict[str, _Entry] = {}
    for line in read_objects([path], bad_rows):
        try:
            _add(table, line)
        except RowError as error:
            line.reject(bad_rows, str(error))
    if not table:
        raise DataError(f"{path}: no usable row; generate answers first")
    numbers = Counter(len(entry.answers) for entry in table.values())
    usual = numbers.most_common(1)[0][0]
    for row_id, entry in table.items():
        if sorted(entry.answers) != list(range(usual)):
            raise DataError(
                f"{path}: prompt {row_id}: has samples {sorted(entry.answers)}, others have {usual} from 0; "
                "generate this file again"
            )
    return {i: _Entry(e.prompt, dict(sorted(e.answers.items()))) for i, e in table.items()}


def _add(table: dict[str, _Entry], line: Line) -> None:
    prompt, answer = parse_row(line.value, Prompt, f"line {line.number}"), _answer(line.value)
    index = line.value.get("sample_index", 0)
    if isinstance(index, bool) or not isinstance(index, int):
        raise RowError("sample_index: not a whole number")
    entry = table.setdefault(prompt.id, _Entry(prompt, {}))
    if index in entry.answers:
        raise RowError("id: duplicate id (and sample_index)")
    if entry.prompt.prompt != prompt.prompt:
        raise RowError("prompt: differs from that of an earlier row with this id")
    entry.answers[index] = answer


def _answer(columns: dict[str, Any]) -> Answer:
    """Return the answer of a row; unlike a training row it may be empty, because a policy can say nothing."""
    response, condition = columns.get("response"), columns.get("condition")
    if not isinstance(response, str):
        raise RowError("response: missing or not a string")
    if condition is not None and not isinstance(condition, str):
        raise RowError("condition: not a string or null")
    return Answer(response, str(columns.get("finish_reason") or "unknown"), condition)


def _check_same_prompts(a: Path, first: dict[str, _Entry], b: Path, other: dict[str, _Entry]) -> None:
    for path, has, lacks in ((b, first, other), (a, other, first)):
        missing = [row_id for row_id in has if row_id not in lacks]
        if missing:
            raise DataError(
                f"{path}: id: prompt {missing[0]} is missing ({len(missing)} in all); "
                "generate all files from the same prompts"
            )
    for row_id, entry in first.items():
        if other[row_id].prompt.prompt != entry.prompt.prompt:
            raise DataError(
                f"{b}: prompt: that of {row_id} differs from the one in {a}; generate all files from the same prompts"
            )
        if len(other[row_id].answers) != len(entry.answers):
            raise DataError(
                f"{b}: sample_index: prompt {row_id} has {len(other[row_id].answers)} answers, {a} has "
                f"{len(entry.answers)}; generate all files with the same generate.n"
            )


def name_methods(files: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each file: its method; target reward or else folder where two share a name."""
    manifests = [_manifest(path) for path in files]
    naming: list[Callable[[int], str]] = [
        lambda i: _method(manifests[i]) or _folder(files[i], 1),
        lambda i: _method_with_target(manifests[i]) or _folder(files[i], 1),
        *(lambda i, depth=depth: _folder(files[i], depth) for depth in (1, 2, 3)),
        lambda i: str(files[i].resolve()),
    ]
    names = [naming[0](i) for i in range(len(files))]
    for name in naming[1:]:
        count = Counter(names)
        names = [name(i) if count[names[i]] > 1 else names[i] for i in range(len(files))]
    return tuple(names)


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path.parent)
    except StorageError:
        # A name is no reason to refuse answers that can be read; `verify` reports the damage.
        return None


def _method(manifest: Manifest | None) -> str:
    return str(manifest.extra.get("method") or "") if manifest else ""


def _method_with_target(manifest: Manifest | None) -> str:
    target = target_reward(manifest)
    return f"{_method(manifest)}({target:.1f})" if target is not None else ""


def target_reward(manifest: Manifest | None) -> float | None:
    """Return the normalised reward that a `generate` run asked for, or None for an unconditional policy."""
    if manifest is None:
        return None
    condition = manifest.extra.get("condition")
    target = manifest.extra.get("target_reward")
    if target is None and isinstance(condition, dict):
        target = condition.get("target_reward")
    return float(target) if isinstance(target, int | float) else None


def _folder(path: Path, depth: int) -> str:
    folder = path.resolve().parent
    return "/".join(folder.parts[-depth:])


def prompt_text(prompt: Sequence[Message]) -> str:
    """Return a dialogue as plain text: one user message as it is, longer ones with their roles."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)
