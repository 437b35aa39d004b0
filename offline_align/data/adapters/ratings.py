"""Ratings and verdicts of answers: what people rejected never becomes a target of SFT.

A rated answer becomes a labelled row or a side of a pair. An answer that people called bad, as in
KTO's sets, is dropped, unless its verdict is used as a rating.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from offline_align.config.sections import PairsOf, PrepareSection, Rated
from offline_align.data.adapters.columns import DroppedRow, number
from offline_align.data.jsonl import RowError

REWARD = "reward_raw"
"""The column of the score in labelled rows."""
VERDICTS = ("label", "kto_tag")
"""Columns that say if people accepted an answer (true, 1) or rejected it (false, 0)."""
RATINGS = (REWARD, "score", "rating", "reward", "overall_score")
"""Columns whose numbers rate an answer, if `prepare.score_column` names none."""
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The ratings of HelpSteer2; the first one is used."""
_JUDGING = frozenset((*VERDICTS, *RATINGS, *HELPSTEER))
REJECTED = "people rejected the answer"
UNSCORED = "an answer without a score"
UNPAIRED = "no other answer to the same prompt follows with another rating"
TIED = "no two answers differ in their rating"
_WORDS = {"true": True, "1": True, "1.0": True, **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0"), False)}


def weights(score_column: Any) -> dict[str, float]:
    """Return `prepare.score_column` as weights by column; {} if it is not set."""
    return {str(score_column): 1.0} if isinstance(score_column, str) else dict(score_column or {})


def verdict(columns: Mapping[str, Any]) -> bool | None:
    """Return what people said of the answer; None if no column holds a verdict.

    A verdict is true or false, 1 or 0, or 1 or -1, also as text.
    """
    for name in VERDICTS:
        said = _WORDS.get(str(columns[name]).strip().lower()) if name in columns else None
        if said is not None:
            return said
    return None


def rating(columns: Mapping[str, Any], settings: PrepareSection) -> float | None:
    """Return the score of the answer of a row; None if the row has no rating, or none is used.

    Raises DroppedRow for an answer that was rejected or that has no score, and RowError if the score
    is not a number or if several columns may be the rating.
    """
    wanted = weights(settings.score_column)
    if wanted:
        return _score(columns, wanted)
    if not _JUDGING & columns.keys():
        return None
    said = verdict(columns)
    if settings.rated is Rated.ignore or (settings.rated is None and said is not None):
        if said is False:
            raise DroppedRow(REJECTED)
        return None
    if said is not None:
        return float(said)
    unclear = [name for name in VERDICTS if number(columns.get(name)) is not None]
    if unclear:
        raise RowError(
            f"{unclear[0]}: neither 1 (accepted) nor 0 (rejected); if it rates the answer, set "
            f"prepare.score_column={unclear[0]}, else prepare.rated=ignore"
        )
    name = rating_column(columns)
    return None if name is None else number(columns[name])


def _score(columns: Mapping[str, Any], wanted: Mapping[str, float]) -> float:
    parts = {name: columns.get(name) for name in wanted}
    if any(part is None or (isinstance(part, str) and not part.strip()) for part in parts.values()):
        raise DroppedRow(UNSCORED)
    numbers = {name: float(part) if isinstance(part, bool) else number(part) for name, part in parts.items()}
    wrong = [name for name, value in numbers.items() if value is None]
    if wrong:
        raise RowError(f"{wrong[0]}: not a number, but prepare.score_column names it")
    return sum(weight * (numbers[name] or 0.0) for name, weight in wanted.items())


def rating_column(columns: Mapping[str, Any]) -> str | None:
    """Return the column that rates the answer, recognised by its name; None if there is none.

    Raises RowError if there are several.
    """
    if sum(number(columns.get(name)) is not None for name in HELPSTEER) > 1:
        return HELPSTEER[0] if number(columns.get(HELPSTEER[0])) is not None else None
    found = [name for name in (*RATINGS, HELPSTEER[0]) if number(columns.get(name)) is not None]
    if found[:1] == [REWARD] or len(found) < 2:
        return found[0] if found else None
    raise RowError(
        f"{', '.join(found)}: each may rate the answer; set prepare.score_column={found[0]}, or prepare.rated=ignore"
    )


def pairs_of(rows: Sequence[Mapping[str, Any]], which: PairsOf) -> Iterator[dict[str, Any]]:
    """Yield pairs of rated answers to one prompt, each of two different ratings, the better one first.

    A pair has the columns that are equal in both rows. Its margin is the difference of the ratings,
    if these are no ranks.
    """
    if not rows:
        return
    ordered = sorted(rows, key=lambda row: -float(row[REWARD]))
    both = combinations(ordered, 2) if which is PairsOf.all else [(ordered[0], ordered[-1])]
    for better, worse in both:
        if better[REWARD] > worse[REWARD]:
            yield _pair(better, worse)


def _pair(better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    own = ("id", "response", "source_id", REWARD)
    shared = {name: value for name, value in better.items() if name not in own and worse.get(name) == value}
    margin = {} if "rank" in better else {"margin": better[REWARD] - worse[REWARD]}
    stem, _, place = str(worse["id"]).rpartition("-")
    beside = place if stem and str(better["id"]).startswith(f"{stem}-") else worse["id"]
    answers = {"chosen": better["response"], "rejected": worse["response"]}
    return {"id": f"{better['id']}-{beside}", **shared, **answers, **margin}
