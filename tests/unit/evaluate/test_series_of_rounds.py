"""Rounds are recognised from manifests: a policy learned from labelled answers of the one before."""

from collections.abc import Sequence
from pathlib import Path

from offline_align.evaluate.comparison import name_columns
from offline_align.evaluate.rounds import find_series
from tests.unit.evaluate.conftest import Rounds


def series(files: Sequence[Path]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the name of each series, with the number of each round and its file's folder."""
    columns = name_columns(files)
    return [
        (one.name, [(r.number, columns[r.column].path.parent.name) for r in one.rounds]) for one in find_series(columns)
    ]


def test_policies_that_follow_each_other_are_rounds(rounds: Rounds) -> None:
    sft = rounds.first()
    one = rounds.next(sft, "dpo_1")
    two = rounds.next(one, "dpo_2")
    files = [rounds.answer(policy, name) for policy, name in ((two, "c"), (sft, "a"), (one, "b"))]
    assert series(files) == [("dpo", [(0, "a"), (1, "b"), (2, "c")])]
    labels = find_series(name_columns(files))[0].first_labels
    assert labels is not None and labels.title == "label_dpo_1"
    # Rounds that are not compared keep their number.
    assert series([files[1], files[0]]) == [("dpo", [(0, "a"), (2, "c")])]
    assert series(files[:1]) == []


def test_methods_that_learn_from_other_data_are_no_rounds(rounds: Rounds) -> None:
    sft = rounds.first()
    data = rounds.folder / "rows.jsonl"
    data.write_text("{}\n")
    rows = rounds.label(data, "label", [1.0, 2.0])
    fa, ca = (rounds.learn(sft, [rows], name) for name in ("fa", "ca"))
    assert series([rounds.answer(policy, f"of_{policy.name}") for policy in (sft, fa, ca)]) == []


def test_two_methods_from_one_policy_are_two_series(rounds: Rounds) -> None:
    sft = rounds.first()
    policies = [sft, rounds.next(sft, "dpo_1"), rounds.next(sft, "fa_1")]
    files = [rounds.answer(policy, f"of_{policy.name}") for policy in policies]
    assert series(files) == [
        ("dpo", [(0, "of_sft"), (1, "of_dpo_1")]),
        ("fa", [(0, "of_sft"), (1, "of_fa_1")]),
    ]


def test_series_of_one_method_are_named_after_their_answers(rounds: Rounds) -> None:
    sft = rounds.first()
    policies = [sft, rounds.next(sft, "fa_x"), rounds.next(sft, "fa_y")]
    files = [rounds.answer(policy, f"of_{policy.name}") for policy in policies]
    assert [name for name, _ in series(files)] == ["of_fa_x", "of_fa_y"]


def test_rows_of_all_rounds_count_from_the_last_one(rounds: Rounds) -> None:
    """A policy may learn from answers of several rounds, and may start from the first policy again."""
    sft = rounds.first()
    rows = [rounds.label(rounds.answer(sft, "answers_0"), "label_0", [1.0, 2.0])]
    one = rounds.learn(sft, rows, "ca_1")
    rows.append(rounds.label(rounds.answer(one, "answers_1"), "label_1", [1.0, 2.0]))
    two = rounds.learn(sft, rows, "ca_2")
    files = [rounds.answer(policy, f"of_{policy.name}") for policy in (sft, one, two)]
    assert series(files) == [("ca", [(0, "of_sft"), (1, "of_ca_1"), (2, "of_ca_2")])]
    (found,) = find_series(name_columns(files))
    assert found.first_labels is not None and found.first_labels.title == "label_0"


def test_the_highest_target_stands_for_a_policy(rounds: Rounds) -> None:
    sft = rounds.first()
    ca = rounds.next(sft, "ca_1")
    files = [rounds.answer(sft, "a"), rounds.answer(ca, "b", targets=[1.0, 2.0, -1.0])]
    (found,) = find_series(name_columns(files))
    assert name_columns(files)[found.rounds[1].column].target == 2.0


def test_a_damaged_manifest_ends_the_series(rounds: Rounds) -> None:
    sft = rounds.first()
    one = rounds.next(sft, "dpo_1")
    files = [rounds.answer(sft, "a"), rounds.answer(one, "b")]
    (rounds.folder / "label_dpo_1" / "manifest.json").write_text('{"stage": 1, "sha256": "x"}')
    assert series(files) == []
