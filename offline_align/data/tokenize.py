"""Tokenise rows once, into an Arrow cache keyed by everything that determines the token ids.

Row weights and row ids stay outside the cache, so a change of `method.beta` does not tokenise
again. Shapes: n rows, T tokens of all rows together.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import batched, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offline_align.config.sections import DataSection, TooLong
from offline_align.data.fate import say_what_fits
from offline_align.data.prefetch import prefetch
from offline_align.data.records import Message, PreferencePair, TrainingRow
from offline_align.data.template import Renderer, Span
from offline_align.data.token_store import KEPT, REFUSED, TRUNCATED, Fresh, StoredTokens, responses, stored
from offline_align.errors import DataError
from offline_align.progress import Meter

FORMAT_VERSION = 3
"""Part of every cache key. Raise it when the ids, or what is stored with them, are computed differently."""

ROWS_PER_BATCH = 512

OnRefused = Callable[[dict[str, str]], None]
"""Handles the rows that the chat template refuses: a map from row id to the template's message."""

_Dialogue = tuple[Sequence[Message], list[str], str, list[str]]
"""Prompt, responses, condition, and other responses that only take part in cutting the context."""
_Side = tuple[list[int], int]  # ids of context and target, position of the first target token

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Limits:
    """The settings that decide whether a row fits."""

    max_length: int
    too_long: TooLong
    least_target: int = 2
    """Tokens of the shortest usable target, including end of sequence."""


@dataclass(frozen=True)
class _Rendered:
    """One dialogue as text, before it is encoded."""

    sequences: list[Span]
    """The context, then every target (requested ones first); empty if the template refuses the dialogue."""
    status: str
    responses: int
    """How many of the targets are requested."""
    condition: str


@dataclass(frozen=True)
class TokenizedRows:
    """Token ids of rows, memory-mapped; row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: npt.NDArray[np.int32]
    """[T] ids of all rows, concatenated."""
    offsets: npt.NDArray[np.int64]
    """[n + 1] where each row starts."""
    target_start: npt.NDArray[np.int32]
    """[n] position in the row of its first target token; the target extends to the end of the row."""
    weight: npt.NDArray[np.float32]
    """[n] weight of the row's loss."""
    row_ids: list[str]
    """[n] id of each row."""
    dropped: dict[str, int]
    """Number of rows left out, by reason."""
    truncated: int
    """Number of rows whose prompt was truncated."""
    condition_length: npt.NDArray[np.int32] | int = 0
    """[n] tokens of the condition at the end of each context; 0 if no row has a condition."""
    places: list[int] = field(default_factory=list)
    """[n] index of each row in the input."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def weighed(self, weights: Sequence[float] | None) -> "TokenizedRows":
        """Return the same rows with new weights [n]; None keeps the weights they have."""
        return self if weights is None else replace(self, weight=np.array(weights, dtype=np.float32))

    @cached_property
    def prompt_length(self) -> npt.NDArray[np.int32]:
        """[n] tokens before the condition and the response, which all answers to a prompt share."""
        return self.target_start - self.condition_length


@dataclass(frozen=True)
class TokenizedPairs:
    """Preference pairs; both sides are in the same order and share one context per pair."""

    chosen: TokenizedRows
    rejected: TokenizedRows
    margin: npt.NDArray[np.float32]
    """[n] margin of each pair, NaN if it has none."""
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
    announced: bool = True,
) -> TokenizedRows:
    """Return the token ids of the rows, in order, from the cache if it has them.

    If `announced`, the log says how many fit.

    Rows over `data.max_length` are truncated or left out (`dropped`: too_long, response_too_long).
    Rows whose target is end of sequence alone are left out (no_target) unless `empty_answers` is
    set: such a row can be scored, but there is nothing to learn from it. Rows that the chat
    template refuses are left out and handed to `on_refused`. A row with `Sample.beside` is
    truncated or left out together with that other answer, because both share one context.

    Raises DataError if the chat template refuses a row and `on_refused` is None, or if no row is
    left; ConfigError for an unusable chat template; StorageError if the cache cannot be written.
    """
    tokens = _sample_tokens(rows, renderer, data, cache_dir, empty_answers)
    _report_refused({rows[i].sample.id: message for i, message in tokens.refused}, on_refused)
    if announced or tokens.dropped:
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
    """Return the indices of the rows that `tokenize_samples` would leave out, each with the reason.

    If the chat template refuses a row, the reason is `chat_template: ` and the template's message.
    Raises ConfigError and StorageError as `tokenize_samples`.
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

    A pair is left out as a whole. Both sides have the same context, which may be truncated.
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
        raise DataError(f"row {row_id}: {message}; fix the row")
    on_refused(refused)


def _check_some_left(tokens: StoredTokens, asked: int, data: DataSection) -> None:
    say_what_fits(_log, asked, tokens.truncated, tokens.dropped, data)


def _cached(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits, cache_dir: Path) -> StoredTokens:
    if not dialogues:
        raise DataError("no row to tokenise; the files of data.* have no rows of this kind")
    folder = cache_dir / f"tokens-{_key(dialogues, renderer, limits)[:32]}"
    return stored(folder, lambda: _tokenize(dialogues, renderer, limits))


def _key(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits) -> str:
    rules = [
        FORMAT_VERSION,
        renderer.tokenizer.content_hash,
        renderer.form,
        str(renderer.day),
        str(renderer.reading),
        limits.max_length,
        limits.too_long,
        limits.least_target,
    ]
    digest = hashlib.sha256(json.dumps(rules).encode())
    for batch in batched(dialogues, ROWS_PER_BATCH):
        rows = [
            # Rows without `beside` keep the key they had before it existed, so older caches stay valid.
            ([(m.role, m.content) for m in prompt], responses, condition, *([beside] if beside else []))
            for prompt, responses, condition, beside in batch
        ]
        digest.update(json.dumps(rows, ensure_ascii=False).encode())
    return digest.hexdigest()


def _tokenize(dialogues: Sequence[_Dialogue], renderer: Renderer, limits: _Limits) -> Iterator[Fresh]:
    """Yield batches: the status of every dialogue, and the tokens of those that are kept.

    One thread encodes, on all cores, while this one renders the next rows and fits the encoded
    ones. Templates are third-party code and run in this thread, so that a signal can interrupt
    them.
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
    """Return statuses and kept tokens of rendered rows, given the ids of all their sequences."""
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
    """Return each side of one row in at most `limits.max_length` tokens, and the row's status.

    There are no sides if the row is left out.
    Truncation removes tokens from the left of the context. Begin of sequence, the generation prompt
    and the condition stay.
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
    """Return the last `room` tokens of the context, with begin of sequence kept at the front."""
    return context if len(context) <= room else start + context[len(context) - room + len(start) :]


def left_out(context: int, target: int, renderer: Renderer, data: DataSection) -> str | None:
    """Return why training drops a row with these token counts and no condition, or None if it does not."""
    status = _status(context, [target], "", renderer, _Limits(data.max_length, data.too_long))
    return None if status in (KEPT, TRUNCATED) else status


def _status(context: int, targets: list[int], condition: str, renderer: Renderer, limits: _Limits) -> str:
    """Return the status of a row, given its number of context tokens and of tokens of each target."""
    if min(targets) < limits.least_target:
        return "no_target"
    room = limits.max_length - max(targets)
    if context <= room:
        return KEPT
    if room < len(renderer.start_ids) + renderer.tail_tokens(condition):
        return "response_too_long"
    return "too_long" if limits.too_long is TooLong.drop else TRUNCATED
