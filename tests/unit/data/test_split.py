"""No prompt is on both sides of the split, the fraction is as requested, and duplicates are recognised."""

import pytest

from offline_align.data.split import content_digest, first_user_message, is_validation

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]


def test_the_first_user_message_decides() -> None:
    assert first_user_message({"prompt": MESSAGES}) == "Why?"
    sides = {
        is_validation({"prompt": prompt, kind: "x"}, seed, 0.5)
        for prompt in ("Why?", " why? ", "WHY?\n", MESSAGES, [*MESSAGES, {"role": "user", "content": "More"}])
        for kind in ("response", "chosen")
        for seed in (3,)
    }
    assert len(sides) == 1


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5])
def test_the_share_of_validation(fraction: float) -> None:
    share = sum(is_validation({"prompt": f"prompt {i}"}, 1, fraction) for i in range(4000)) / 4000
    assert share == pytest.approx(fraction, abs=0.03)


def test_another_seed_is_another_split() -> None:
    sides = [[is_validation({"prompt": str(i)}, seed, 0.5) for i in range(64)] for seed in (1, 2)]
    assert sides[0] != sides[1]


def test_duplicates_are_equal_but_for_space_and_case() -> None:
    row = {"id": "1", "prompt": "Why  so?", "response": "Because."}
    same = {"id": "2", "prompt": [{"role": "user", "content": "why so?\n"}], "response": "BECAUSE."}
    assert content_digest(row) == content_digest(same)


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "Why?", "response": "B"},
        {"prompt": "Why? A", "response": ""},
        {"prompt": [{"role": "system", "content": "Why?"}], "response": "A"},
        {"prompt": "Why?", "chosen": "A", "rejected": "B"},
        {"prompt": "Why?", "chosen": "B", "rejected": "A"},
    ],
)
def test_different_rows_stay_different(other: dict[str, object]) -> None:
    assert content_digest(other) != content_digest({"prompt": "Why?", "response": "A"})


def test_a_swapped_pair_is_no_duplicate() -> None:
    pair = {"prompt": "Why?", "chosen": "A", "rejected": "B"}
    assert content_digest(pair) != content_digest(pair | {"chosen": "B", "rejected": "A"})


def test_a_further_column_of_a_pair_is_no_answer() -> None:
    pair = {"prompt": "Why?", "chosen": "A", "rejected": "B"}
    assert content_digest(pair) == content_digest(pair | {"response": "A"}) == content_digest(pair | {"response": [1]})
