"""Rows to token ids, once: an Arrow cache keyed by everything that determines the ids.

Weights and ids of rows stay outside the cache, so that another `method.beta` tokenises nothing.
Shapes: n rows, T tokens of all rows together.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offline_align.config.sections import DataSection, OnBadRow, TooLong
from offline_align.data.records import BadRows, Message, PreferencePair
from offline_align.data.template import Part, Renderer
from offline_align.data.token_store import KEPT, REFUSED, TRUNCATED, StoredTokens, id_lists, stored
from offline_align.errors import DataError

if TYPE_CHECKING:
    from offline_align.methods import TrainingRow

FORMAT_VERSION = 2
"""Part of every key: a change of how ids are made, or of what is stored beside them, must change it."""

ROWS_PER_BATCH = 512
ROWS_PER_WORKER = 4000
"""Rows that make a further process worth its start."""

_Dialogue = tuple[list[tuple[str, str]], list[str], str]  # turns, responses, condition
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

    def __len__(self) -> int:
        return len(self.row_ids)


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
    rows: "Sequence[TrainingRow]",
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    bad_rows: BadRows | None = None,
    empty_answers: bool = False,
) -> TokenizedRows:
    """Return the token ids of the rows, in their order, from the cache where it has them.

    Rows over `data.max_length` are cut or left out (`dropped`: too_long, response_too_long, no_target). A target of
    end of sequence alone is left out too, unless `empty_answers`: it can be scored, but there is nothing to learn.
    Rows that the chat template refuses raise DataError, or are rejected where `bad_rows` skips. Raises
    DataError too where no row is left, ConfigError for an unusable chat template, StorageError where the
    cache cannot be written.
    """
    tokens = _sample_tokens(rows, renderer, data, cache_dir, empty_answers)
    _reject_refused(tokens, [(r.sample.id, r.sample.columns) for r in rows], bad_rows)
    _check_some_left(tokens, len(rows), data)
    weight = np.array([rows[i].weight for i in tokens.rows], dtype=np.float32)
    return _side(tokens, 0, [rows[i].sample.id for i in tokens.rows], weight)


def unusable_samples(
    rows: "Sequence[TrainingRow]",
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
    rows: "Sequence[TrainingRow]", renderer: Renderer, data: DataSection, cache_dir: Path, empty_answers: bool
) -> StoredTokens:
    dialogues = [_dialogue(r.sample.prompt, [r.sample.response], r.condition) for r in rows]
    limits = _Limits(data.max_length, data.too_long, 1 if empty_answers else 2)
    return _cached(dialogues, renderer, limits, data.num_workers, cache_dir)


def tokenize_pairs(
    rows: Sequence[PreferencePair],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    bad_rows: BadRows | None = None,
) -> TokenizedPairs:
    """Return the token ids of both sides of the pairs; see `tokenize_samples`.

    A pair is left out as a whole, and both its sides have the same, possibly cut, context.
    """
    dialogues = [_dialogue(pair.prompt, [pair.chosen, pair.rejected], "") for pair in rows]
    limits = _Limits(data.max_length, data.too_long)
    tokens = _cached(dialogues, renderer, limits, data.num_workers, cache_dir)
    _reject_refused(tokens, [(pair.id, pair.columns) for pair in rows], bad_rows)
    _check_some_left(tokens, len(rows), data)
    kept = [rows[i] for i in tokens.rows]
    margin = np.array([np.nan if pair.margin is None else pair.margin for pair in kept], dtype=np.float32)
    row_ids = [pair.id for pair in kept]
    weight = np.ones(len(kept), dtype=np.float32)
    chosen, rejected = (_side(tokens, k, row_ids, weight) for k in (0, 1))
    return TokenizedPairs(chosen, rejected, margin, row_ids, tokens.dropped)


def _side(tokens: StoredTokens, k: int, row_ids: list[str], weight: npt.NDArray[np.float32]) -> TokenizedRows:
    ids, offsets, start = (tokens.columns[f"{name}_{k}"] for name in ("ids", "offsets", "start"))
    return TokenizedRows(ids, offsets, start, weight, row_ids, dict(tokens.dropped), tokens.truncated)


def _dialogue(prompt: Sequence[Message], responses: list[str], condition: str) -> str:
    turns = [[message.role, message.content] for message in prompt]
    return json.dumps([turns, responses, condition], ensure_ascii=False)


def _reject_refused(tokens: StoredTokens, rows: Sequence[tuple[str, dict[str, Any]]], bad_rows: BadRows | None) -> None:
    for index, message in tokens.refused:
        row_id, columns = rows[index]
        if bad_rows is None or bad_rows.on_bad_row is OnBadRow.fail:
            raise DataError(f"row {row_id}: {message}; mend the row, or set data.on_bad_row=skip")
        bad_rows.reject(Path(row_id), 0, message, json.dumps(columns, ensure_ascii=False))
    if bad_rows is not None:
        bad_rows.report(_log)


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


def _cached(
    dialogues: list[str], renderer: Renderer, limits: _Limits, num_workers: int | None, cache_dir: Path
) -> StoredTokens:
    if not dialogues:
        raise DataError("no row to tokenise; the files of data.* have none of this form")
    folder = cache_dir / f"tokens-{_key(dialogues, renderer, limits)[:32]}"
    return stored(folder, lambda work: _tokenize(dialogues, renderer, limits, num_workers, work))


def _key(dialogues: list[str], renderer: Renderer, limits: _Limits) -> str:
    rules = [
        FORMAT_VERSION,
        renderer.tokenizer.content_hash,
        renderer.template,
        limits.max_length,
        limits.too_long,
        limits.least_target,
    ]
    digest = hashlib.sha256(json.dumps(rules).encode())
    for dialogue in dialogues:
        digest.update(b"\n" + dialogue.encode())
    return digest.hexdigest()


def _tokenize(dialogues: list[str], renderer: Renderer, limits: _Limits, num_workers: int | None, work: Path) -> Any:
    """Return an Arrow table with one row a dialogue, memory-mapped from `work`."""
    from datasets import Dataset, Features, Value

    source = Dataset.from_dict({"dialogue": dialogues}, features=Features({"dialogue": Value("large_string")}))
    processes = min(num_workers or min(8, len(os.sched_getaffinity(0))), len(source) // ROWS_PER_WORKER)
    with _quiet(), _single_threaded(processes > 1):
        made = source.map(
            _tokenize_batch,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            writer_batch_size=ROWS_PER_BATCH,
            num_proc=processes if processes > 1 else None,
            remove_columns=["dialogue"],
            fn_kwargs={"renderer": renderer, "limits": limits},
            cache_file_name=str(work / "parts.arrow"),
            new_fingerprint="tokens",  # else datasets would hash the tokenizer; the folder is ours alone
            desc="tokenising",
        )
    return made.data.table


@contextmanager
def _quiet() -> Iterator[None]:
    """Show the progress bar of `datasets` to people only, not to log files."""
    import datasets

    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


@contextmanager
def _single_threaded(wanted: bool) -> Iterator[None]:
    """Keep the threads of `tokenizers` out of processes that are forked from this one."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if wanted:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if wanted:
            del os.environ[name]
            os.environ |= {name: before} if before is not None else {}


def _tokenize_batch(batch: dict[str, list[str]], renderer: Renderer, limits: _Limits) -> Any:
    """Return an Arrow table: `status` of each dialogue, and `ids_k`, `start_k` of its k-th response."""
    import pyarrow as pa

    dialogues = [json.loads(text) for text in batch["dialogue"]]
    rendered = [_render(dialogue, renderer) for dialogue in dialogues]
    encoded = iter(renderer.encode([parts for sequences, _ in rendered for parts in sequences]))
    statuses: list[str] = []
    sides: list[list[_Side]] = []
    for (_, responses, condition), (sequences, status) in zip(dialogues, rendered, strict=True):
        made: list[_Side] = [([], 0)] * len(responses)
        if sequences:
            ids = list(islice(encoded, len(sequences)))
            fitted, status = _fit(ids, condition, renderer, limits)
            made = fitted or made
        statuses.append(status)
        sides.append(made)
    columns: dict[str, Any] = {"status": pa.array(statuses, pa.string())}
    for k, column in enumerate(zip(*sides, strict=True)):
        columns[f"ids_{k}"] = id_lists([ids for ids, _ in column])
        columns[f"start_{k}"] = pa.array([start for _, start in column], pa.int32())
    return pa.table(columns)


def _render(dialogue: _Dialogue, renderer: Renderer) -> tuple[list[list[Part]], str]:
    """Return the parts of the context and of every target, or none and the reason for it."""
    turns, responses, condition = dialogue
    prompt = [Message(role, content) for role, content in turns]
    try:
        targets = [renderer.target_parts(prompt, response) for response in responses]
        return [renderer.context_parts(prompt, condition), *targets], KEPT
    except DataError as error:
        return [], f"{REFUSED}{error}"


def _fit(ids: list[list[int]], condition: str, renderer: Renderer, limits: _Limits) -> tuple[list[_Side], str]:
    """Return each side of one row, in at most `limits.max_length` tokens, and a status; no side if it is left out.

    Cut is the left of the context: begin of sequence, the request for the answer and the condition stay.
    """
    context, targets = ids[0], [renderer.finish_target(target) for target in ids[1:]]
    if min(map(len, targets)) < limits.least_target:
        return [], "no_target"
    room = limits.max_length - max(map(len, targets))
    status = KEPT
    if len(context) > room:
        start = renderer.start_ids
        if room < len(start) + renderer.tail_tokens(condition):
            return [], "response_too_long"
        if limits.too_long is TooLong.drop:
            return [], "too_long"
        context, status = start + context[len(context) - room + len(start) :], TRUNCATED
    return [(context + target, len(context)) for target in targets], status
