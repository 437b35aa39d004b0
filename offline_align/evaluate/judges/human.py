"""People as the judge: write a blind rating page, then read the ratings that they save."""

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from offline_align.data.records import Sample
from offline_align.errors import DataError, StoppedEarly, StorageError
from offline_align.evaluate.comparison import prompt_text
from offline_align.evaluate.judges.rater_agreement import krippendorff_alpha
from offline_align.evaluate.judges.verdict_grammar import HIGHEST, LOWEST
from offline_align.evaluate.judges.verdict_text import shuffled
from offline_align.evaluate.page import render_page
from offline_align.lineage import write_atomically

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HumanJudge:
    """Reads `ratings*.jsonl` in the run folder, one file per rater.

    A line is `{"answer": key, "score": 1..10}`.
    """

    run_dir: Path
    seed: int
    name: str = "human rating"
    _raters: int = 0
    _rated_sets: int = 0
    _alpha: float | None = None

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return mean ratings over the raters; NaN for a set with an unrated answer.

        Without ratings, writes the rating page and raises StoppedEarly. Raises DataError for an
        invalid rating.
        """
        files = sorted(self.run_dir.glob("ratings*.jsonl"))
        if not files:
            page = self.run_dir / "rating.html"
            write_atomically(page, self._page(samples).encode())
            raise StoppedEarly(
                f"waiting for ratings: open {page} in a browser, rate the answers, save ratings.jsonl into "
                f"{self.run_dir}, and run the same command again"
            )
        self._raters = len(files)
        ratings = _read(files)
        known = {answer_key(sample, self.seed) for sample in samples}
        self._alpha = krippendorff_alpha([given for key, given in ratings.items() if key in known])
        return self._means(samples, ratings)

    def describe(self) -> dict[str, Any]:
        """Return the numbers of raters and of fully rated sets, and Krippendorff's alpha.

        Alpha is None for a single rater.
        """
        return {
            "kind": "human",
            "raters": self._raters,
            "rated_sets": self._rated_sets,
            "krippendorff_alpha": self._alpha,
        }

    def _means(self, samples: Sequence[Sample], ratings: dict[str, list[float]]) -> list[float]:
        scores: list[float] = []
        self._rated_sets = 0
        for one in _sets(samples):
            given = [ratings.get(answer_key(sample, self.seed), []) for sample in one]
            complete = all(given)
            self._rated_sets += complete
            scores += [sum(g) / len(g) if complete else math.nan for g in given]
        if self._rated_sets == 0:
            raise DataError(
                f"{self.run_dir}/ratings*.jsonl: answer: no set of answers is rated in full; "
                "rate at least one on this run's rating.html"
            )
        return scores

    def _page(self, samples: Sequence[Sample]) -> str:
        sets = [self._shown(one) for one in _sets(samples)]
        content = "".join(answer["key"] for one in sets for answer in one["answers"])
        return render_page("rating.html.j2", {"sets": sets, "storage": _digest(content)})

    def _shown(self, samples: list[Sample]) -> dict[str, Any]:
        order = shuffled(samples, self.seed)
        answers = [{"key": answer_key(samples[i], self.seed), "response": samples[i].response} for i in order]
        # Equal answers have the same key and are rated once.
        unique = list({answer["key"]: answer for answer in answers}.values())
        return {"prompt": prompt_text(samples[0].prompt), "answers": unique}


def answer_key(sample: Sample, seed: int) -> str:
    """Return the opaque key of an answer on the page, which does not reveal the method."""
    return _digest(json.dumps([seed, sample.id, sample.response]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sets(samples: Sequence[Sample]) -> list[list[Sample]]:
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.id)]


def _read(files: Sequence[Path]) -> dict[str, list[float]]:
    """Return all ratings of each answer; only a rater's last rating of an answer counts."""
    ratings: dict[str, list[float]] = defaultdict(list)
    for path in files:
        own: dict[str, float] = {}
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                key, score = _rating(line, f"{path}:{number}")
                own[key] = score
        for key, score in own.items():
            ratings[key].append(score)
    return ratings


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _rating(line: bytes, where: str) -> tuple[str, float]:
    try:
        row = json.loads(line)
        key, score = row["answer"], row["score"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: answer, score: not {{"answer": ..., "score": ...}}; save the ratings again'
        ) from error
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if not isinstance(key, str) or not number or not LOWEST <= score <= HIGHEST:
        raise DataError(f"{where}: score: {score!r} is not a number from {LOWEST:g} to {HIGHEST:g}")
    return key, float(score)
