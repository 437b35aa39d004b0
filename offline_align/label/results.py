"""Write scored rows: `labelled.jsonl`, the statistics of their rewards, and the histogram of Figure 3."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offline_align import lineage
from offline_align.data.records import Sample, write_jsonl
from offline_align.label.statistics import RewardStats, Scale, fit, normalise

LABELLED = "labelled.jsonl"
STATISTICS = "reward_stats.json"
HISTOGRAM = "reward_histogram.png"
BEST = "best.jsonl"


def write_results(
    folder: Path, rows: Iterable[Mapping[str, Any]], raw: Sequence[float], bins: int, scale: Scale | None = None
) -> tuple[RewardStats, list[Path]]:
    """Write the rows with their rewards, the statistics and the histogram; return these and the paths.

    `raw` has the raw rewards of the rows. They are normalised on `scale`, or else on their own. Raises
    DataError if one is not finite, and StorageError.
    """
    from offline_align.label.figures import draw_reward_histogram

    stats = replace(fit(raw), normalised_with=scale)
    normalised = normalise(raw, stats).tolist()
    paths = [folder / name for name in (LABELLED, STATISTICS, HISTOGRAM)]
    write_jsonl(paths[0], labelled_rows(rows, raw, normalised))
    lineage.write_atomically(paths[1], (json.dumps(stats.as_json(), indent=2) + "\n").encode())
    draw_reward_histogram(paths[2], raw, normalised, bins)
    return stats, paths


def best_answers(rows: Sequence[Sample], rewards: Sequence[float], count: int) -> list[dict[str, Any]]:
    """Return the columns of the `count` answers to each prompt with the highest rewards, best first.

    `rewards` has the raw rewards of the rows, which are answers of `generate`. Answers to one prompt
    under several conditions are ranked by condition. Of equal rewards the earlier row comes first. A
    prompt with fewer answers keeps them all.
    """
    by_prompt: dict[tuple[Any, Any], list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault((row.columns.get("id"), row.columns.get("condition")), []).append(place)
    ranked = (sorted(places, key=lambda place: -rewards[place])[:count] for places in by_prompt.values())
    return [
        {**rows[place].columns, "sample_index": rank, "reward_raw": rewards[place]}
        for places in ranked
        for rank, place in enumerate(places)
    ]


def labelled_rows(
    rows: Iterable[Mapping[str, Any]], raw: Sequence[float], normalised: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield labelled rows: the columns of each row in their order, then the rewards and `source_id`.

    A row that already has a `source_id`, because it is an answer of a pair or was labelled before,
    keeps it. For other rows it is their `id`.
    """
    for row, raw_reward, reward in zip(rows, raw, normalised, strict=True):
        known = row.get("source_id")
        source_id = known if isinstance(known, str) and known.strip() else row["id"]
        own = {"reward_raw": raw_reward, "reward": reward, "source_id": source_id}
        yield {"id": row["id"], **{k: v for k, v in row.items() if k not in own and k != "id"}, **own}
