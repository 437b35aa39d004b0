"""Generation files are named after their methods and aligned by prompt; mismatches are rejected."""

import re
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.data.records import Message
from offline_align.errors import DataError
from offline_align.evaluate.comparison import load_comparison, name_columns, prompt_text
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import PROMPTS, WriteRun, rows_for

STRICT = BadRows(OnBadRow.fail, None)


def names(files: list[Path]) -> tuple[str, ...]:
    return tuple(column.name for column in name_columns(files))


def test_rows_are_aligned_by_prompt_id_in_the_order_of_the_first_file(write_run: WriteRun) -> None:
    a = write_run("a", rows_for(["a1", "a2", "a3"]), "sft")
    b = write_run("b", list(reversed(rows_for(["b1", "b2", "b3"]))), "fa")
    comparison = load_comparison([a, b], STRICT)
    assert comparison.methods == ("sft", "fa")
    assert comparison.shape == (3, 1, 2)
    assert [prompt.id for prompt in comparison.prompts] == ["p1", "p2", "p3"]
    assert [sample.response for sample in comparison.samples()] == ["a1", "b1", "a2", "b2", "a3", "b3"]
    assert [sample.id for sample in comparison.samples()] == ["p1", "p1", "p2", "p2", "p3", "p3"]
    assert [answer.response for answer in comparison.of_method(1)] == ["b1", "b2", "b3"]


def test_several_samples_of_a_prompt_are_sets_of_their_own(write_run: WriteRun) -> None:
    files = []
    for name in ("x", "y"):
        first, second = (rows_for([f"{name}{p}{s}" for p in (1, 2, 3)]) for s in (0, 1))
        rows = [row | {"sample_index": 1} for row in second] + [row | {"sample_index": 0} for row in first]
        files.append(write_run(name, rows))
    comparison = load_comparison(files, STRICT)
    assert comparison.shape == (3, 2, 2)
    samples = comparison.samples()
    assert [s.response for s in samples[:4]] == ["x10", "y10", "x11", "y11"]
    assert [s.id for s in samples[:4]] == ["p1#0", "p1#0", "p1#1", "p1#1"]


def test_an_empty_answer_is_an_answer(write_run: WriteRun) -> None:
    comparison = load_comparison([write_run("a", rows_for(["", " ", "ok"]))], STRICT)
    assert [answer.response for answer in comparison.of_method(0)] == ["", " ", "ok"]


def test_rows_without_ids_are_aligned_by_line(write_run: WriteRun) -> None:
    bare: list[dict[str, Any]] = [{k: v for k, v in p.items() if k != "id"} for p in PROMPTS]
    files = [write_run(name, rows_for([name] * 3, bare)) for name in ("a", "b")]
    assert load_comparison(files, STRICT).shape == (3, 1, 2)


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_missing_prompt_names_file_and_id(write_run: WriteRun, lacking: int) -> None:
    files = [write_run(name, rows_for(["x"] * 3)[: 2 if k == lacking else 3]) for k, name in enumerate(("a", "b"))]
    with pytest.raises(DataError, match=re.escape(str(files[lacking])) + ".*prompt p3 is missing"):
        load_comparison(files, STRICT)


def test_another_text_under_the_same_id_names_file_and_id(write_run: WriteRun) -> None:
    other = [PROMPTS[0], PROMPTS[1] | {"prompt": "Name a lake."}, PROMPTS[2]]
    a, b = write_run("a", rows_for(["x"] * 3)), write_run("b", rows_for(["x"] * 3, other))
    with pytest.raises(DataError, match=re.escape(str(b)) + ": prompt: that of p2 differs"):
        load_comparison([a, b], STRICT)


def test_a_string_prompt_equals_its_message_form(write_run: WriteRun) -> None:
    as_messages = [PROMPTS[0] | {"prompt": [{"role": "user", "content": "What is the sky?"}]}, *PROMPTS[1:]]
    files = [write_run("a", rows_for(["x"] * 3)), write_run("b", rows_for(["y"] * 3, as_messages))]
    assert load_comparison(files, STRICT).shape == (3, 1, 2)


def test_different_numbers_of_samples_are_refused(write_run: WriteRun) -> None:
    a = write_run("a", rows_for(["x"] * 3))
    twice = [row | {"sample_index": k} for row in rows_for(["x"] * 3) for k in (0, 1)]
    with pytest.raises(DataError, match=r"same generate\.n"):
        load_comparison([a, write_run("b", twice)], STRICT)
    with pytest.raises(DataError, match=r"prompt p3: has samples \[0\], others have 2"):
        load_comparison([write_run("c", twice[:-1])], STRICT)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response": None}, "response: missing or not a string"),
        ({"response": 3}, "response: missing or not a string"),
        ({"condition": 5.0}, "condition: not a string or null"),
        ({"sample_index": "0"}, "sample_index: not a whole number"),
        ({"sample_index": True}, "sample_index: not a whole number"),
        ({"id": "p1"}, "duplicate id"),
    ],
)
def test_bad_rows_name_file_line_and_field(write_run: WriteRun, change: dict[str, Any], reason: str) -> None:
    rows = rows_for(["x"] * 3)
    rows[2] |= change
    path = write_run("a", rows)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(reason)):
        load_comparison([path], STRICT)


def test_bad_rows_can_be_skipped_where_all_files_still_agree(write_run: WriteRun, tmp_path: Path) -> None:
    rows = [*rows_for(["x"] * 3), {"prompt": "late", "id": "p4"}]
    skip = BadRows(OnBadRow.skip, tmp_path / "quarantine.jsonl")
    assert load_comparison([write_run("a", rows)], skip).shape == (3, 1, 1)
    assert skip.counts == {"response: missing or not a string": 1}


def test_an_empty_file_is_refused(write_run: WriteRun) -> None:
    path = write_run("a", [])
    with pytest.raises(DataError, match=re.escape(str(path)) + ": no usable row"):
        load_comparison([path], STRICT)


def test_methods_with_two_targets_are_told_apart_by_them(write_run: WriteRun) -> None:
    rows = rows_for(["x"] * 3)
    files = [
        write_run("one", rows, "sft"),
        write_run("two", rows, "ca", 5.0),
        write_run("three", rows, "ca", -2.0),
    ]
    assert names(files) == ("sft", "ca(5.0)", "ca(-2.0)")
    assert names(files[:2]) == ("sft", "ca")


def test_methods_that_share_a_name_get_their_folders(write_run: WriteRun) -> None:
    rows = rows_for(["x"] * 3)
    files = [write_run("one", rows, "fa"), write_run("two", rows, "fa"), write_run("ppo", rows)]
    assert names(files) == ("one", "two", "ppo")


def test_folders_that_share_a_name_get_longer_ones(write_run: WriteRun) -> None:
    rows = rows_for(["x"] * 3)
    files = [write_run("a/out", rows, "ca", 5.0), write_run("b/out", rows, "ca", 5.0)]
    assert names(files) == ("a/out", "b/out")
    second = files[0].with_name("second.jsonl")
    second.write_bytes(files[0].read_bytes())
    assert names([files[0], second]) == (str(files[0]), str(second))


def swept(write_run: WriteRun, name: str, targets: list[float], drop: int = 0) -> Path:
    """Write the output of `generate` for a list of targets."""
    texts = {f"<rm_score>{t:.1f}": t for t in targets}
    rows = [
        {**prompt, "response": f"{name} {target}", "finish_reason": "stop", "condition": text}
        for prompt in PROMPTS
        for text, target in texts.items()
    ]
    path = write_run(name, rows[: len(rows) - drop])
    write_manifest(path.parent, "generate", name, [], [], [path], {"method": "ca", "targets": texts})
    return path


def test_a_policy_asked_for_several_rewards_is_a_method_for_each(write_run: WriteRun) -> None:
    path = swept(write_run, "sweep", [-1.0, 0.0, 2.5])
    comparison = load_comparison([write_run("sft", rows_for(["x"] * 3), "sft"), path], STRICT)
    assert comparison.methods == ("sft", "ca(-1.0)", "ca(0.0)", "ca(2.5)")
    assert [column.target for column in comparison.columns] == [None, -1.0, 0.0, 2.5]
    assert [answer.response for answer in comparison.of_method(2)] == ["sweep 0.0"] * 3
    assert len(comparison.files) == 2
    other = swept(write_run, "other", [0.0, 2.5])
    assert names([path, other]) == ("ca(-1.0)", "sweep(0.0)", "sweep(2.5)", "other(0.0)", "other(2.5)")


def test_every_target_needs_every_prompt(write_run: WriteRun) -> None:
    with pytest.raises(DataError, match="prompt p3 is missing"):
        load_comparison([swept(write_run, "sweep", [0.0, 1.0], drop=1)], STRICT)


def test_prompt_text() -> None:
    assert prompt_text([Message("user", "Hi")]) == "Hi"
    turns = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]
    assert prompt_text(turns) == "User: Hi\n\nAssistant: Hello\n\nUser: Bye"
