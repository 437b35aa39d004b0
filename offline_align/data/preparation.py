"""The core of `prepare`: read all inputs, drop duplicates, split, and count everything for the report."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from offline_align.config.sections import PrepareSection
from offline_align.data.adapters.convert import Converted, convert
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.adapters.ratings import weights
from offline_align.data.demo import demo_pairs, demo_samples
from offline_align.data.jsonl import BadRows, Line, write_jsonl
from offline_align.data.sources import Source, read_source
from offline_align.data.split import answers, content_digest, is_validation
from offline_align.errors import DataError

FILES = ("sft_train.jsonl", "sft_valid.jsonl", "preferences_train.jsonl", "preferences_valid.jsonl")
LABELLED = ("labelled.jsonl", "labelled_valid.jsonl")
"""Files of rated answers, which exist only if there are any."""
DUPLICATE = "duplicate of an earlier row"
PROGRESS_EVERY_ROWS = 500

_log = logging.getLogger(__name__)


@dataclass
class Preparation:
    """Rows by output file, and counts by input."""

    files: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in (*FILES, *LABELLED)})
    """Rows by file. Those of `LABELLED` have their score in `reward_raw`, but no `reward` yet."""
    inputs: list[InputCounts] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)

    def training_texts(self) -> Iterator[str]:
        """Yield every message and answer of the training rows."""
        for name, rows in self.files.items():
            if not name.endswith("_valid.jsonl"):
                for row in rows:
                    yield from _prompt_texts(row)
                    yield from answers(row).values()


def prepare_rows(sources: Iterable[Source], settings: PrepareSection, seed: int, bad_rows: BadRows) -> Preparation:
    """Return the rows of all inputs without duplicates; raises DataError if there are none."""
    result = Preparation()
    for source in sources:
        counts = InputCounts(source.name)
        result.inputs.append(counts)
        rows = _demo_rows(settings, seed, counts) if source.is_demo else _rows(source, settings, counts, bad_rows)
        bad_before = bad_rows.counts.total()
        for converted in rows:
            _place(converted, result, counts, bad_rows, settings.valid_fraction, seed)
        counts.bad_rows = bad_rows.counts.total() - bad_before
        counts.say(_log)
    if not any(result.files.values()):
        raise DataError(_without_rows(result, bad_rows, settings))
    return result


def _without_rows(result: Preparation, bad_rows: BadRows, settings: PrepareSection) -> str:
    names = ", ".join(counts.name for counts in result.inputs)
    columns = [*dict.fromkeys(name for counts in result.inputs for name in counts.columns)]
    for name in weights(settings.score_column):
        if columns and name not in columns:
            near = get_close_matches(name, columns, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(columns)}"
            return f"{names}: prepare.score_column={name}: no such column; {hint}"
    lost = sum((counts.dropped for counts in result.inputs), Counter(bad_rows.counts))
    reasons = "; ".join(f"{number} {reason}" for reason, number in lost.most_common())
    return f"{names}: no usable row; {reasons or 'there is no row at all'}"


def _rows(source: Source, settings: PrepareSection, counts: InputCounts, bad_rows: BadRows) -> Iterator[Converted]:
    lines = _watched(read_source(source, bad_rows, settings.max_rows), counts, bad_rows)
    return convert(lines, settings, bad_rows, counts)


def _demo_rows(settings: PrepareSection, seed: int, counts: InputCounts) -> Iterator[Converted]:
    held_out = settings.demo_prompt_rows
    for rows in (
        demo_samples(settings.demo_sft_rows, seed, held_out),
        demo_pairs(settings.demo_preference_rows, seed, held_out),
    ):
        for row in rows:
            counts.rows_read += 1
            counts.rows_used += 1
            counts.rows_made += 1
            yield Converted(row)


def _watched(lines: Iterator[Line], counts: InputCounts, bad_rows: BadRows) -> Iterator[Line]:
    """Count lines, including those that the reader rejects, and show count and rate on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[rate]}"))
    console = Console(stderr=True)
    # Disabled without a terminal, where it would write an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(counts.name, total=None, rate="")
        bad_before = bad_rows.counts.total()
        for line in lines:
            counts.rows_read += 1 + bad_rows.counts.total() - bad_before
            if counts.rows_read % PROGRESS_EVERY_ROWS == 0:
                speed = progress.tasks[0].speed or 0
                progress.update(
                    task, completed=counts.rows_read, rate=f"{counts.rows_read:,} rows, {speed:,.0f} a second"
                )
            yield line
            bad_before = bad_rows.counts.total()
        counts.rows_read += bad_rows.counts.total() - bad_before


def _place(
    converted: Converted,
    result: Preparation,
    counts: InputCounts,
    bad_rows: BadRows,
    valid_fraction: float,
    seed: int,
) -> None:
    row, kind = with_source(converted.row, counts), converted.kind
    digest = kind.encode() + content_digest(row)
    if digest in result.digests:
        counts.dropped[DUPLICATE] += 1
    elif row["id"] in result.ids:
        _reject_id(converted, counts, bad_rows)
    else:
        result.digests.add(digest)
        result.ids.add(row["id"])
        counts.rows_kept += 1
        result.files[_file_name(kind, is_validation(row, seed, valid_fraction))].append(row)


def with_source(row: dict[str, Any], counts: InputCounts) -> dict[str, Any]:
    """Return a row with the name of its input in `source`, unless it has a source already."""
    return row | {"source": counts.source} if row.get("source") in (None, "") else row


def _file_name(kind: str, valid: bool) -> str:
    if kind == "labelled":
        return LABELLED[valid]
    return f"{kind}_{'valid' if valid else 'train'}.jsonl"


def _reject_id(converted: Converted, counts: InputCounts, bad_rows: BadRows) -> None:
    reason = "id: duplicate id, with other content"
    if converted.line is None:
        counts.dropped[reason] += 1
    else:
        converted.line.reject(bad_rows, reason)


def write_rows(result: Preparation, folder: Path) -> list[Path]:
    """Write the files of SFT rows and pairs, also empty ones; return their paths. Raises StorageError."""
    paths = [folder / name for name in FILES]
    for path in paths:
        write_jsonl(path, result.files[path.name])
    return paths


def report(result: Preparation, bad_rows: BadRows) -> dict[str, Any]:
    """Return the report: rows and drops by input and reason, and lengths in characters by file."""
    return {
        "inputs": [counts.described() for counts in result.inputs],
        "bad_rows": dict(sorted(bad_rows.counts.items())),
        "duplicates": sum(counts.dropped[DUPLICATE] for counts in result.inputs),
        "files": {name: _file_report(rows) for name, rows in result.files.items() if rows or name in FILES},
    }


def _file_report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sources = Counter(str(row["source"]) for row in rows)
    lengths: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        lengths["prompt"].append(sum(map(len, _prompt_texts(row))))
        for name, text in answers(row).items():
            lengths[name].append(len(text))
    return {
        "rows": len(rows),
        "sources": dict(sorted(sources.items())),
        "characters": {name: _summary(values) for name, values in lengths.items()},
    }


def _summary(values: list[int]) -> dict[str, float]:
    return {
        "min": min(values),
        "mean": round(float(np.mean(values)), 1),
        "median": float(np.median(values)),
        "p95": round(float(np.quantile(values, 0.95)), 1),
        "max": max(values),
    }


def _prompt_texts(row: dict[str, Any]) -> list[str]:
    prompt = row["prompt"]
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
