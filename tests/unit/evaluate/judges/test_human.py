"""The blind rating page hides the methods; saved ratings are matched to their answers."""

import json
import math
import re
from pathlib import Path

import pytest

from offline_align.data.records import Message, Sample
from offline_align.errors import DataError, StoppedEarly
from offline_align.evaluate.judges.human import HumanJudge, answer_key
from offline_align.evaluate.judges.rater_agreement import krippendorff_alpha

ANSWERS = ["good", "bad", "good"]


def make_samples() -> list[Sample]:
    return [
        Sample(f"p{k}", (Message("user", f"<Question {k}>"),), f"{answer} {k}", {"method": "secret"})
        for k in range(3)
        for answer in ANSWERS
    ]


def rate(run_dir: Path, name: str, samples: list[Sample], scores: list[object], seed: int = 0) -> None:
    rows = [{"answer": answer_key(s, seed), "score": score} for s, score in zip(samples, scores, strict=True)]
    (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_without_ratings_the_page_is_written(tmp_path: Path) -> None:
    samples = make_samples()
    with pytest.raises(StoppedEarly, match=r"rating\.html"):
        HumanJudge(tmp_path, 0).score(samples)
    page = (tmp_path / "rating.html").read_text()
    assert "secret" not in page
    assert "&lt;Question 1&gt;" in page
    assert "<Question" not in page
    keys = re.findall(r'name="([0-9a-f]{16})" value="10"', page)
    # Equal answers to one prompt are rated once.
    assert len(keys) == len(set(keys)) == 6
    assert set(keys) == {answer_key(sample, 0) for sample in samples}


def test_ratings_are_averaged_over_raters(tmp_path: Path) -> None:
    samples = make_samples()
    rate(tmp_path, "ratings_a.jsonl", samples, [8, 2, 8] * 3)
    rate(tmp_path, "ratings_b.jsonl", samples, [9, 4, 9] * 3)
    judge = HumanJudge(tmp_path, 0)
    assert judge.score(samples) == [8.5, 3.0, 8.5] * 3
    described = judge.describe()
    # An answer with two equal texts is rated once, but counts once for each rater.
    assert described.pop("krippendorff_alpha") == pytest.approx(krippendorff_alpha([[8, 9], [2, 4]] * 3))
    assert described == {"kind": "human", "raters": 2, "rated_sets": 3}


def test_sets_that_are_not_rated_in_full_have_no_score(tmp_path: Path) -> None:
    samples = make_samples()
    rate(tmp_path, "ratings_a.jsonl", samples[:4], [8, 2, 8, 7])
    judge = HumanJudge(tmp_path, 0)
    assert [math.isnan(score) for score in judge.score(samples)] == [False] * 3 + [True] * 6
    assert judge.describe()["rated_sets"] == 1


def test_the_last_rating_of_a_rater_counts(tmp_path: Path) -> None:
    samples = make_samples()[:3]
    rate(tmp_path, "ratings.jsonl", samples * 2, [1, 1, 1, 9, 5, 9])
    assert HumanJudge(tmp_path, 0).score(samples) == [9.0, 5.0, 9.0]


def test_ratings_of_another_page_are_refused(tmp_path: Path) -> None:
    rate(tmp_path, "ratings.jsonl", make_samples(), [5] * 9, seed=1)
    with pytest.raises(DataError, match="no set of answers is rated in full"):
        HumanJudge(tmp_path, 0).score(make_samples())


@pytest.mark.parametrize("score", [0, 11, "5", True, None, float("nan")])
def test_bad_ratings_name_file_and_line(tmp_path: Path, score: object) -> None:
    rate(tmp_path, "ratings.jsonl", make_samples()[:2], [5, score])
    with pytest.raises(DataError, match=r"ratings\.jsonl:2: score: "):
        HumanJudge(tmp_path, 0).score(make_samples())


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"answer": "x"}', b"\xff\xfe"])
def test_foreign_files_are_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "ratings.jsonl").write_bytes(b"\n" + line + b"\n")
    with pytest.raises(DataError, match=r"ratings\.jsonl:2: answer, score: "):
        HumanJudge(tmp_path, 0).score(make_samples())


def test_the_same_answer_to_another_prompt_is_rated_on_its_own() -> None:
    one, other = (Sample(f"p{k}", (Message("user", "Hm?"),), "Yes.", {}) for k in range(2))
    assert answer_key(one, 0) != answer_key(other, 0) != answer_key(other, 1)
