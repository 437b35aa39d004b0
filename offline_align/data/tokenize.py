"""Rows to token ids, once: an Arrow cache keyed by everything that determines the ids.

Weights and ids of rows stay outside the cache, so that another `method.beta` tokenises nothing.
Shapes: n rows, T tokens of all rows together.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import batched, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offline_align.config.sections import DataSection, TooLong
from offline_align.data.prefetch import prefetch
from offline_align.data.records import Message, PreferencePair, TrainingRow
from offline_align.data.template import Renderer, Span
from offline_align.data.token_store import KEPT, REFUSED, TRUNCATED, Fresh, StoredTokens, responses, stored
from offline_align.errors import DataError
from offline_align.progress import Meter

FORMAT_VERSION = 3
"""Part of every key: a change of how ids are made, or of what is stored beside them, must change it."""

ROWS_PER_BATCH = 512

OnRefused = Callable[[dict[str, str]], None]
"""What is done about rows that the chat template refuses, by id: with what it says against them."""

_Dialogue = tuple[Sequence[Message], list[str], str, list[str]]
"""Prompt, responses, condition, and other responses that share the context but are not asked for."""
_Side = tuple[list[int], int]  # ids of context and target, position of the first target token

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Limits:
    """What decides whether a row fits."""

    max_length: int
    too_long: TooLong
    least_target: int = 2
    """Tokens of the shortest target, end of sequence included."""


@dataclass(frozen=True)
class _Rendered:
    """One dialogue as text, before it is encoded."""

    sequences: list[Span]
    """The context and every target, those that only share it last; nothing if the template refuses the dialogue."""
    status: str
    responses: int
    """How many of the targets are asked for."""
    condition: str


@dataclass(frozen=True)
class TokenizedRows:
    """Token ids of rows, memory-mapped; row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: npt.NDArray[np.int32]
    """[T] all rows, one after the other."""
    offsets: npt.NDArray[np.int64]
    """[n + 1] where each row starts."""
    target_start: npt.NDArray[np.int32]
    """[n] position in the row of its first target token; the target reaches to the row's end."""
    weight: npt.NDArray[np.float32]
    """[n] weight of the row's loss."""
    row_ids: list[str]
    """[n] id of the row that each came from."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    truncated: int
    """Rows whose prompt was cut."""
    condition_length: npt.NDArray[np.int32] | int = 0
    """[n] tokens of the condition that each prompt ends with; 0: no row has one."""
    places: list[int] = field(default_factory=list)
    """[n] place of each among the rows that were asked for."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def weighed(self, weights: Sequence[float] | None) -> "TokenizedRows":
        """Return the same rows with other weights [n]; with their own for None."""
        return self if weights is None else replace(self, weight=np.array(weights, dtype=np.float32))

    @cached_property
    def prompt_length(self) -> npt.NDArray[np.int32]:
        """[n] tokens before the response and its condition: what answers to one prompt have in common."""
        return self.target_start - self.condition_length


@dataclass(frozen=True)
class TokenizedPairs:
    """Preference pairs; both sides in the same order, each pair with one context."""

    chosen: TokenizedRows
    rejected: TokenizedRows
    margin: npt.NDArray[np.float32]
    """[n] margin of each pair, nan where it has none."""
    row_ids: list[str]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.row_ids)


def tokenize_samples(
    rows: Sequence[TrainingRow],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    on_refused: OnRefused | None = None,
    empty_answers: bool = False,
) -> TokenizedRows:
    """Return the token ids of the rows, in their order, from the cache where it has them.

    Rows over `data.max_length` are cut or left out (`dropped`: too_long, response_too_long, no_target). A target of
    end of sequence alone is left out too, unless `empty_answers`: it can be scored, but there is nothing to learn.
    So are those that the chat template refuses, where `on_refused` takes them. A row that has another answer beside it
    (`Sample.beside`) is cut, or left out, as that one is: both have one context. Raises DataError where `on_refused`
    is not given, and where no row is left, ConfigError for an unusable chat template, StorageError where the cache
    cannot be written.
    """
    tokens = _sample_tokens(rows, renderer, data, cache_dir, empty_answers)
    _report_refused({rows[i].sample.id: message for i, message in tokens.refused}, on_refused)
    _check_some_left(tokens, len(rows), data)
    kept = [rows[i] for i in tokens.rows]
    weight = np.array([row.weight for row in kept], dtype=np.float32)
    found = _side(tokens, 0, [row.sample.id for row in kept], weight)
    lengths = {text: renderer.condition_tokens(text) for text in {row.condition for row in kept}}
    return replace(found, condition_length=np.array([lengths[row.condition] for row in kept], dtype=np.int32))


def unusable_samples(
    rows: Sequence[TrainingRow],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    empty_answers: bool = False,
) -> dict[int, str]:
    """Return the places of the rows that `tokenize_samples` would leave out, each with the reason that it counts.

    After `chat_template: ` stands what the template says against a row. Raises as `tokenize_samples` for the rest.
    """
    return dict(_sample_tokens(rows, renderer, data, cache_dir, empty_answers).left_out)


def _sample_tokens(
    rows: Sequence[TrainingRow], renderer: Renderer, data: DataSection, cache_dir: Path, empty_answers: bool
) -> StoredTokens:
    dialogues = [_dialogue(row) for row in rows]
    limits = _Limits(data.max_length, data.too_long, 1 if empty_answers else 2)
    return _cached(dialogues, renderer, limits, cache_dir)


def _dialogue(row: TrainingRow) -> _Dialogue:
    sample = row.sample
    return sample.prompt, [sample.response], row.condition, [] if sample.beside is None else [sample.beside]


def tokenize_pairs(
    rows: Sequence[PreferencePair],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    on_refused: OnRefused | None = None,
) -> TokenizedPairs:
    """Return the token ids of both sides of the pairs; see `tokenize_samples`.

    A pair is left out as a whole, and both its sides have the same, possibly cut, context.
    """
    dialogues: list[_Dialogue] = [(pair.prompt, [pair.chosen, pair.rejected], "", []) for pair in rows]
    tokens = _cached(dialogues, renderer, _Limits(data.max_length, data.too_long), cache_dir)
    _report_refused({rows[i].id: message for i, message in tokens.refused}, on_refused)
    _check_some_left(tokens, len(rows), data)
    kept = [rows[i] for i in tokens.rows]
    margin = np.array([np.nan if pair.margin is None else pair.margin for pair in kept], dtype=np.float32)
    row_ids = [pair.id for pair in kept]
    weight = np.ones(len(kept), dtype=np.float32)
    chosen, rejected = (_side(tokens, k, row_ids, weight) for k in (0, 1))
    return TokenizedPairs(chosen, rejected, margin, row_ids, tokens.dropped)


def _side(tokens: StoredTokens, k: int, row_ids: list[str], weight: npt.NDArray[np.float32]) -> TokenizedRows:
    ids, offsets, start = (tokens.columns[f"{name}_{k}"] for name in ("ids", "offsets", "start"))
    return TokenizedRows(
        ids, offsets, start, weight, row_ids, dict(tokens.dropped), tokens.truncated, places=tokens.rows
    )


def _report_refused(refused: dict[str, str], on_refused: OnRefused | None) -> None:
    if not refused:
        return
    if on_refused is None:
        row_id, message = next(iter(refused.items()))
        raise DataError(f"row {row_id}: {message}; mend the row")
    on_refused(refused)


def _check_some_left(tokens: StoredTokens, asked: int, data: DataSection) -> None:
    kept = len(tokens.rows)
    out = f", left out: {reasons(tokens.dropped)}" if tokens.dropped else ""
    _log.info("%d of %d rows, %d cut%s", kept, asked, tokens.truncated, out)
    if not kept:
        raise DataError(
            f"none of {asked} rows is left: {reasons(tokens.dropped)}; see data.max_length={data.max_length}"
        )


def reasons(dropped: Mapping[str, int]) -> str:
    """Return in words how many rows were left out, and why: `3 too_long, 1 no_target`."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items())


def _cached(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits, cache_dir: Path) -> StoredTokens:
    if not dialogues:
        raise DataError("no row to tokenise; the files of data.* have none of this form")
    folder = cache_dir / f"tokens-{_key(dialogues, renderer, limits)[:32]}"
    return stored(folder, lambda: _tokenize(dialogues, renderer, limits))


def _key(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits) -> str:
    rules = [
        FORMAT_VERSION,
        renderer.tokenizer.content_hash,
        renderer.template,
        str(renderer.day),
        str(renderer.reading),
        limits.max_length,
        limits.too_long,
        limits.least_target,
    ]
    digest = hashlib.sha256(json.dumps(rules).encode())
    for batch in batched(dialogues, ROWS_PER_BATCH):
        rows = [
            # What most rows do not have is in no key of theirs, so that caches stay good.
            ([(m.role, m.content) for m in prompt], responses, condition, *([beside] if beside else []))
            for prompt, responses, condition, beside in batch
        ]
        digest.update(json.dumps(rows, ensure_ascii=False).encode())
    return digest.hexdigest()


def _tokenize(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits) -> Iterator[Fresh]:
    """Yield the status of every dialogue and the tokens of those that are kept, some dialogues at a time.

    A thread encodes, on all cores, while this one renders the rows to come and fits those that are encoded. Templates
    are foreign code: here a stop ends one of them in the middle.
    """

    def encode(rows: list[_Rendered]) -> tuple[list[_Rendered], list[list[int]]]:
        return rows, renderer.encode([span for row in rows for span in row.sequences])

    batches = ([_render(dialogue, renderer) for dialogue in batch] for batch in batched(dialogues, ROWS_PER_BATCH))
    with (
        closing(prefetch(encode, batches)) as ahead,
        Meter("tokenising", len(dialogues), "rows", least_seconds=1.0) as meter,
    ):
        for rows, ids in ahead:
            yield _fitted(rows, ids, renderer, limits)
            meter.advance(len(rows))


def _render(dialogue: _Dialogue, renderer: Renderer) -> _Rendered:
    prompt, responses, condition, beside = dialogue
    try:
        sequences = renderer.spans(prompt, [*responses, *beside], condition)
        return _Rendered(sequences, KEPT, len(responses), condition)
    except DataError as error:
        return _Rendered([], f"{REFUSED}{error}", len(responses), condition)


def _fitted(rows: Sequence[_Rendered], ids: Iterable[list[int]], renderer: Renderer, limits: _Limits) -> Fresh:
    """Return what `_tokenize` yields, of rows and the ids of all their sequences."""
    upcoming = iter(ids)
    statuses: list[str] = []
    kept: list[list[_Side]] = []
    for row in rows:
        status = row.status
        if row.sequences:
            sides, status = _fit(list(islice(upcoming, len(row.sequences))), row.condition, renderer, limits)
            kept += [sides[: row.responses]] if sides else []
        statuses.append(status)
    return statuses, [responses([sides[k] for sides in kept]) for k in range(rows[0].responses)]


def _fit(ids: list[list[int]], condition: str, renderer: Renderer, limits: _Limits) -> tuple[list[_Side], str]:
    """Return each side of one row, in at most `limits.max_length` tokens, and a status; no side if it is left out.

    Cut is the left of the context: begin of sequence, the request for the answer and the condition stay.
    """
    rows = renderer.rows(ids)
    lengths = [len(target) for _, target in rows]
    status = _status(max(len(context) for context, _ in rows), lengths, condition, renderer, limits)
    if status not in (KEPT, TRUNCATED):
        return [], status
    room = limits.max_length - max(lengths)
    cut = [(_cut(context, room, renderer.start_ids), target) for context, target in rows]
    return [(context + target, len(context)) for context, target in cut], status


def _cut(context: list[int], room: int, start: list[int]) -> list[int]:
    """Return the context in at most `room` tokens, begin of sequence kept."""
    return context if len(context) <= room else start + context[len(context) - room + len(start) :]


def left_out(context: int, target: int, renderer: Renderer, data: DataSection) -> str | None:
    """Return why training leaves out a row of so many tokens, without a condition, or None if it does not."""
    status = _status(context, [target], "", renderer, _Limits(data.max_length, data.too_long))
    return None if status in (KEPT, TRUNCATED) else status


def _status(context: int, targets: list[int], condition: str, renderer: Renderer, limits: _Limits) -> str:
    """Return what becomes of a row with so many tokens of context and of each target."""
    if min(targets) < limits.least_target:
        return "no_target"
    room = limits.max_length - max(targets)
    if context <= room:
        return KEPT
    if room < len(renderer.start_ids) + renderer.tail_tokens(condition):
        return "response_too_long"
    return "too_long" if limits.too_long is TooLong.drop else TRUNCATED
