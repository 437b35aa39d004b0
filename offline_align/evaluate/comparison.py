"""Read generation files, name their methods, and align the answers by prompt."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offline_align.data.jsonl import BadRows, Line, RowError, read_objects
from offline_align.data.records import Message, Prompt, Sample, parse_row
from offline_align.errors import DataError, StorageError
from offline_align.evaluate.seed_pools import several_seeds, training_of
from offline_align.lineage import Manifest, read_manifest

ANSWER_COLUMNS = ("response", "finish_reason", "condition", "sample_index")


@dataclass(frozen=True, slots=True)
class Answer:
    """One response of one method; `condition` is the reward text in its prompt, if any."""

    response: str
    finish_reason: str
    condition: str | None


@dataclass(frozen=True, slots=True)
class Column:
    """One method: its name, its file, and its target reward, if any."""

    name: str
    path: Path
    condition: str | None
    """The method's rows in the file have this condition; None: all rows are the method's."""
    target: float | None
    """The number that the policy was asked for: a reward, a bound, or a quantile."""
    is_quantile: bool = False
    """Whether `target` is the number of a quantile."""
    seed: int | None = None
    """The seed of the policy's training, set if other policies differ from it only in the seed."""
    pool: str | None = None
    """The name that these policies share."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answers of all methods to the same prompts."""

    columns: tuple[Column, ...]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[tuple[Answer, ...], ...], ...]
    """[prompts][samples][methods]; every prompt has the same number of samples."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods; a policy with several target rewards is one method for each."""
        return tuple(column.name for column in self.columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """The generation files without duplicates."""
        return tuple(dict.fromkeys(column.path for column in self.columns))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of prompts, samples per prompt, and methods."""
        return len(self.prompts), len(self.answers[0]), len(self.methods)

    def samples(self) -> list[Sample]:
        """Return all answers, the method varying fastest, with the columns of their prompts.

        Answers that share an `id` answer the same prompt and can be compared.
        """
        _, n, _ = self.shape
        return [
            Sample(prompt.id if n == 1 else f"{prompt.id}#{k}", prompt.prompt, answer.response, prompt.columns)
            for prompt, sets in zip(self.prompts, self.answers, strict=True)
            for k, answers in enumerate(sets)
            for answer in answers
        ]

    def of_method(self, method: int) -> list[Answer]:
        """Return the answers of one method in the order of the prompts."""
        return [answers[method] for sets in self.answers for answers in sets]


def load_comparison(files: Sequence[Path], bad_rows: BadRows) -> Comparison:
    """Return the answers of several generation files, in the order of the first file's prompts.

    Raises DataError with file and prompt if a file lacks a prompt or one of its samples, or has
    another text under the same id.
    """
    columns = name_columns(files)
    read = {path: _read(path, [c.condition for c in columns if c.path == path], bad_rows) for path in files}
    tables = [read[column.path][column.condition] for column in columns]
    first = tables[0]
    for column, table in zip(columns[1:], tables[1:], strict=True):
        _check_same_prompts(files[0], first, column.path, table)
    answers = tuple(
        tuple(zip(*(tuple(table[row_id].answers.values()) for table in tables), strict=True)) for row_id in first
    )
    return Comparison(columns, tuple(entry.prompt for entry in first.values()), answers)


@dataclass(frozen=True, slots=True)
class _Entry:
    prompt: Prompt
    answers: dict[int, Answer]
    """Answers by sample index; sorted once the whole file is read."""


Table = dict[str, _Entry]


def _read(path: Path, conditions: Sequence[str | None], bad_rows: BadRows) -> dict[str | None, Table]:
    """Return one table for each condition; the condition None takes all rows of the file."""
    tables: dict[str | None, Table] = {condition: {} for condition in conditions}
    for line in read_objects([path], bad_rows):
        condition = None if None in tables else line.value.get("condition")
        try:
            if condition not in tables:
                raise RowError("condition: not one of the run's manifest")
            _add(tables[condition], line)
        except RowError as error:
            line.reject(bad_rows, str(error))
    return {condition: _checked(path, table) for condition, table in tables.items()}


def _checked(path: Path, table: Table) -> Table:
    """Return the table with sorted samples. Raises DataError if some are missing."""
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
    """Return the answer of a row, which may be empty, unlike in training data."""
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


def name_columns(files: Sequence[Path]) -> tuple[Column, ...]:
    """Return the methods in the files, each with a unique name.

    The name is the method's own. If two methods share it, the target reward, the seed or the folder
    is added. A policy with several target rewards in one file is one method for each of them.
    """
    columns = _with_seeds([column for path in files for column in _columns(path)])
    several = Counter(column.path for column in columns)

    def apart(name: str, column: Column) -> str:
        return _with_target(name, column) if several[column.path] > 1 else name

    def folder(column: Column, depth: int) -> str:
        return apart("/".join(column.path.resolve().parent.parts[-depth:]), column)

    def shared(column: Column) -> str:
        """Return the name of a method without its seed."""
        return _with_target(column.name, column) if column.target is not None else column.name

    naming: list[Callable[[Column], str]] = [
        lambda column: column.name or folder(column, 1),
        lambda column: (
            _with_target(column.name, column)
            if column.name and column.target is not None
            else _with_seed(shared(column), column) or folder(column, 1)
        ),
        lambda column: _with_seed(shared(column), column) or folder(column, 1),
        *(lambda column, depth=depth: folder(column, depth) for depth in (1, 2, 3)),
        lambda column: apart(str(column.path.resolve()), column),
    ]
    names = [naming[0](column) for column in columns]
    for name in naming[1:]:
        count = Counter(names)
        names = [name(c) if count[n] > 1 else n for c, n in zip(columns, names, strict=True)]
    pools = [shared(column) if column.seed is not None else None for column in columns]
    return tuple(replace(c, name=n, pool=p) for c, n, p in zip(columns, names, pools, strict=True))


def _with_seeds(columns: list[Column]) -> list[Column]:
    trainings = [training_of(column.path, generation_manifest(column.path)) for column in columns]
    repeated = several_seeds(trainings, [column.target for column in columns])
    return [replace(c, seed=t.seed if t else None) for c, t in zip(columns, repeated, strict=True)]


def _with_seed(name: str, column: Column) -> str | None:
    return f"{name} seed {column.seed}" if column.name and column.seed is not None else None


def _columns(path: Path) -> list[Column]:
    """Return a column for each condition of a file; its name is the method, empty if unknown."""
    manifest = generation_manifest(path)
    method = str(manifest.extra.get("method") or "") if manifest else ""
    targets = manifest.extra.get("targets") if manifest else None
    if isinstance(targets, dict) and len(targets) > 1:
        quantiles = _asks_for_quantiles(manifest)
        return [Column(method, path, str(text), float(target), quantiles) for text, target in targets.items()]
    return [Column(method, path, None, target_reward(manifest), _asks_for_quantiles(manifest))]


def _asks_for_quantiles(manifest: Manifest | None) -> bool:
    stored = manifest.extra.get("stored_condition") if manifest else None
    return isinstance(stored, dict) and stored.get("kind") == "quantile"


def _with_target(name: str, column: Column) -> str:
    return f"{name}(quantile {column.target:g})" if column.is_quantile else f"{name}({column.target:.1f})"


def policy_of(path: Path) -> tuple[str, ...]:
    """Return what identifies the policy that wrote a generation file: content hashes, else the path."""
    manifest = generation_manifest(path)
    parents = tuple(parent.content_sha256 for parent in manifest.parents) if manifest else ()
    return parents or (str(path),)


def competing(columns: Sequence[Column]) -> list[int]:
    """Return the columns that compete: of a policy with several target rewards, only the highest.

    The lower targets show how far the target steers a policy; they are not meant to win.
    """
    policies = [policy_of(column.path) for column in columns]
    highest: dict[tuple[str, ...], float] = {}
    for policy, column in zip(policies, columns, strict=True):
        if column.target is not None:
            highest[policy] = max(column.target, highest.get(policy, column.target))
    return [
        k
        for k, (policy, column) in enumerate(zip(policies, columns, strict=True))
        if column.target is None or column.target == highest[policy]
    ]


def generation_manifest(path: Path) -> Manifest | None:
    """Return the manifest of the run that wrote a generation file, or None if unreadable."""
    try:
        return read_manifest(path.parent)
    except StorageError:
        # The manifest only supplies a name here; `verify` reports the damage.
        return None


def target_reward(manifest: Manifest | None) -> float | None:
    """Return the target of a `generate` run, a reward or the number of a quantile; None if it has none."""
    if manifest is None:
        return None
    condition = manifest.extra.get("condition")
    target = manifest.extra.get("target_reward")
    if target is None and isinstance(condition, dict):
        target = condition.get("target_reward")
    return float(target) if isinstance(target, int | float) else None


def prompt_text(prompt: Sequence[Message]) -> str:
    """Return a dialogue as plain text, with roles if it has several messages."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)
