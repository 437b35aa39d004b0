"""Published forms: each is converted to the rows that a reader of the data set would expect."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow, PrepareSection
from offline_align.data.adapters.columns import TEXTS
from offline_align.data.adapters.convert import convert
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.adapters.forms import FORMS, recognise
from offline_align.data.adapters.oasst1 import TWICE, UNANSWERED, UNFINISHED, UNRANKED, UNREACHABLE, UNUSABLE
from offline_align.data.jsonl import BadRows, Line, RowError
from offline_align.errors import DataError

STRICT = BadRows(OnBadRow.fail, None)
HH: dict[str, Any] = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant: Fine.\n\nAnd you?",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant: No.",
}
DOLLY: dict[str, Any] = {
    "instruction": "Who?",
    "context": "A text.",
    "response": "Me. ",
    "category": "closed_qa",
}
FLAN: dict[str, Any] = {"inputs": "Q: 1+1?\nA:", "targets": "2", "task": "cot_gsm8k"}
ALPACA: dict[str, Any] = {"instruction": "Add.", "input": "1 1", "output": "2"}
SEED: dict[str, Any] = {
    "id": "seed_task_0",
    "name": "n",
    "instruction": "Add.",
    "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3"}],
}


def converted(
    *rows: dict[str, Any], form: str | None = None, bad_rows: BadRows = STRICT
) -> tuple[list[dict[str, Any]], Counter[str]]:
    counts = InputCounts("f.jsonl")
    lines = [Line(Path("f.jsonl"), number, b"raw", row) for number, row in enumerate(rows, start=1)]
    return [c.row for c in convert(lines, PrepareSection(format=form), bad_rows, counts)], counts.dropped


def test_hh_gives_a_dialogue_and_two_answers() -> None:
    rows, drops = converted(HH)
    assert rows == [
        {
            "id": "f.jsonl:1",
            "source": "hh",
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "How are you?"},
            ],
            "chosen": "Fine.\n\nAnd you?",
            "rejected": "No.",
        }
    ]
    assert not drops


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("rejected", "Hi\n", "Hey\n"), "hh: the sides differ before the last answer"),
        (("rejected", "Human: How", "Assistant: How"), "hh: the sides differ before the last answer"),
        (("rejected", "No.", "Fine.\n\nAnd you?"), "rejected: the same as chosen"),
        (("rejected", "No.", "  "), "rejected: empty"),
        (("rejected", "\n\nHuman: Hi", "Once\n\nHuman: Hi"), "hh: not a transcript of Human and Assistant"),
    ],
)
def test_hh_pairs_without_a_preference_are_dropped(change: tuple[str, str, str], reason: str) -> None:
    side, old, new = change
    rows, drops = converted(HH | {side: HH[side].replace(old, new)}, HH)
    assert len(rows) == 1
    assert drops == {reason: 1}


def test_hh_needs_an_answer_last_and_turns_in_order() -> None:
    _, drops = converted({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hey"})
    assert drops == {"hh: the last turn is not an answer": 1}
    twice = {side: text.replace("Assistant: Hello", "Human: Hello") for side, text in HH.items()}
    _, drops = converted(twice)
    assert drops == {"prompt: roles do not alternate between user and assistant": 1}


def test_dolly_puts_the_context_under_the_instruction() -> None:
    rows, _ = converted(DOLLY, DOLLY | {"context": ""})
    assert rows[0] == {
        "id": "f.jsonl:1",
        "source": "dolly",
        "prompt": "Who?\n\nA text.",
        "response": "Me.",
        "category": "closed_qa",
    }
    assert rows[1]["prompt"] == "Who?"


def test_sets_like_dolly_may_call_the_context_input() -> None:
    row = {"instruction": "Add these.", "input": "2 and 3", "response": "5"}
    rows, _ = converted(row, row | {"input": ""}, row | {"context": ""}, row | {"context": None})
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("Add these.\n\n2 and 3", "5"),
        ("Add these.", "5"),
        ("Add these.\n\n2 and 3", "5"),
        ("Add these.\n\n2 and 3", "5"),
    ]
    with pytest.raises(DataError, match=r"f\.jsonl:1: input: present in addition to context; join the two"):
        converted(row | {"context": "c"})


@pytest.mark.parametrize("name", sorted(TEXTS))
@pytest.mark.parametrize(
    "row",
    [HH, DOLLY, FLAN, ALPACA, SEED, {"prompt": "a", "completion": "b"}],
    ids=["hh", "dolly", "flan", "self_instruct", "seed", "completion"],
)
def test_no_text_of_a_prompt_or_an_answer_is_lost(row: dict[str, Any], name: str) -> None:
    """Any further text column is either read or the row is refused; a blank one changes nothing."""
    form = recognise(row).name
    expected, _ = converted(row)
    if name in row:
        return
    blanks: list[Any] = ["", None, [], " \n"]
    for blank in blanks:
        assert converted(row | {name: blank}, form=form)[0] == expected
    bad_rows = BadRows(OnBadRow.skip, None)
    changed, _ = converted(row | {name: "a text of its own"}, form=form, bad_rows=bad_rows)
    assert bad_rows.counts.total() == 1 or "a text of its own" in str(changed[0]["prompt"])


def test_a_text_that_repeats_the_whole_row_is_left_out() -> None:
    row = ALPACA | {"text": "Below is an instruction.\n\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2"}
    assert converted(row) == converted(ALPACA)
    with pytest.raises(DataError, match=r"text: may belong to the prompt or the answer"):
        converted(row | {"text": row["text"].replace("1 1", "")})


def test_other_columns_are_kept() -> None:
    for row in (HH, DOLLY, FLAN, ALPACA, SEED, {"prompt": "a", "completion": "b"}):
        rows, _ = converted(row | {"licence": "MIT"})
        assert {row["licence"] for row in rows} == {"MIT"}


def test_alpaca_rows_join_the_input() -> None:
    rows, _ = converted(ALPACA, ALPACA | {"input": ""}, {"instruction": "Add.", "output": "3"})
    assert [(row["prompt"], row["response"], row["source"]) for row in rows] == [
        ("Add.\n\n1 1", "2", "alpaca"),
        ("Add.", "2", "alpaca"),
        ("Add.", "3", "alpaca"),
    ]


def test_flan() -> None:
    rows, drops = converted(FLAN, FLAN | {"targets": " "})
    expected = {"prompt": "Q: 1+1?\nA:", "response": "2", "task": "cot_gsm8k"}
    assert rows == [{"id": "f.jsonl:1", "source": "flan"} | expected]
    assert drops == {"response: empty": 1}


def test_a_seed_task_gives_a_row_for_every_instance() -> None:
    rows, _ = converted(SEED)
    assert [(row["id"], row["prompt"], row["response"]) for row in rows] == [
        ("seed_task_0-1", "Add.\n\n1 1", "2"),
        ("seed_task_0-2", "Add.", "3"),
    ]


def test_seed_tasks_without_instances_are_counted() -> None:
    empty = SEED | {"instances": []}
    rows, drops = converted(empty, SEED, empty)
    assert len(rows) == 2
    assert drops == {"self_instruct: a task without an instance": 2}


def test_instances_as_datasets_gives_them() -> None:
    lists = {"input": ["1 1", ""], "output": ["2", "3"]}
    assert converted(SEED | {"instances": lists}) == converted(SEED)
    assert converted(SEED | {"instances": {"input": [], "output": []}})[1].total() == 1
    for wrong in ({"input": ["1"], "output": []}, {"input": "1", "output": "2"}, {}, ["x"], "x", None):
        with pytest.raises(DataError, match=r"f\.jsonl:1: instances: "):
            converted(SEED | {"instances": wrong})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Task: Add 1 and 1.\n\n", "Add 1 and 1."),
        ("Add.\nInput: 1 1\nOutput:", "Add.\nInput: 1 1"),
        ("Task: Add.\nInput: 1 1\nOutput:", "Add.\nInput: 1 1"),
        ("What is the Output: of this Task: of mine?", "What is the Output: of this Task: of mine?"),
    ],
)
def test_self_instruct_markers_are_taken_off_the_ends(prompt: str, expected: str) -> None:
    [row], _ = converted({"prompt": prompt, "completion": " 2<|endoftext|>"})
    assert (row["prompt"], row["response"], row["source"]) == (expected, "2", "prompt_completion")


def message(id_: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": id_, "parent_id": parent, "text": f"text {id_}", "role": role, "lang": "en", **more}


FLAT = [
    message("q", None, "prompter"),
    message("a2", "q", "assistant", rank=2),
    message("a0", "q", "assistant", rank=0),
    message("a1", "q", "assistant", rank=1),
    message("tie", "q", "assistant", rank=1),
    message("new", "q", "assistant", rank=None),
    message("bad", "q", "assistant", rank=3, deleted=True),
    message("q2", "a1", "prompter"),
    message("only", "q2", "assistant"),
    message("lost", "bad", "prompter"),
]


def nested(id_: str) -> dict[str, Any]:
    [node] = [{**m} for m in FLAT if m["message_id"] == id_]
    node["replies"] = [nested(m["message_id"]) for m in FLAT if m["parent_id"] == id_]
    return node


TREE = {"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": nested("q")}


@pytest.mark.parametrize("published", [FLAT, FLAT[::-1], [TREE]], ids=["flat", "any order", "nested"])
def test_oasst1_gives_best_replies_and_ranked_pairs(published: list[dict[str, Any]]) -> None:
    rows, drops = converted(*published)
    samples = {row["id"]: row for row in rows if "response" in row}
    assert sorted(samples) == ["a0", "only"]
    assert samples["a0"]["prompt"] == [{"role": "user", "content": "text q"}]
    assert [m["content"] for m in samples["only"]["prompt"]] == ["text q", "text a1", "text q2"]
    assert [m["role"] for m in samples["only"]["prompt"]] == ["user", "assistant", "user"]
    pairs = {(row["chosen"], row["rejected"]) for row in rows if "chosen" in row}
    ordered = [("a0", "a1"), ("a0", "tie"), ("a0", "a2"), ("a1", "a2"), ("tie", "a2")]
    assert pairs == {(f"text {better}", f"text {worse}") for better, worse in ordered}
    assert drops == {UNUSABLE: 1, UNREACHABLE: 1, UNRANKED: 1}
    assert len({row["id"] for row in rows}) == len(rows)


def test_oasst1_messages_that_point_at_each_other_are_counted() -> None:
    rows, drops = converted(message("x", "y", "prompter"), message("y", "x", "assistant"), FLAT[0], FLAT[2])
    assert [row["id"] for row in rows] == ["a0"]
    assert drops == {UNREACHABLE: 2}


UNFINISHED_STATES = ["growing", "ranking", "aborted_low_grade", "halted_by_moderator", "prompt_lottery_waiting"]


@pytest.mark.parametrize("state", UNFINISHED_STATES)
@pytest.mark.parametrize("nest", [False, True])
def test_oasst1_trees_that_are_not_finished_are_counted(state: str, nest: bool) -> None:
    unfinished = [TREE | {"tree_state": state}] if nest else [m | {"tree_state": state} for m in FLAT]
    finished = [message("p", None, "prompter"), message("b", "p", "assistant")]
    rows, drops = converted(*unfinished, *(m | {"tree_state": "ready_for_export"} for m in finished))
    assert [row["id"] for row in rows] == ["b"]
    assert drops == {f"{UNFINISHED} {state}": len(FLAT)}


def test_oasst1_messages_in_no_row_are_counted() -> None:
    rows, drops = converted(*FLAT[:3], message("open", "a0", "prompter"), FLAT[5], *FLAT[:2])
    assert {row["id"] for row in rows} == {"a0", "a0-a2"}
    assert drops == {UNANSWERED: 1, UNRANKED: 1, TWICE: 2}


def test_oasst1_a_prompt_is_no_reply_to_a_prompt() -> None:
    rows, drops = converted(FLAT[0], message("more", "q", "prompter", rank=0), FLAT[1])
    assert [row["id"] for row in rows] == ["a2"]
    assert drops == {UNANSWERED: 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": "system"}, "role: not prompter or assistant"),
        ({"role": ["prompter"]}, "role: not prompter or assistant"),
        ({"rank": "0"}, "rank: not a number"),
        ({"text": None}, "text: not a string"),
        ({"tree_state": 3}, "tree_state: not a string"),
    ],
)
def test_oasst1_faults(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"f\.jsonl:2: {reason}"):
        converted(FLAT[0], FLAT[1] | change)


def test_own_rows_go_straight_through() -> None:
    sample = {"x": 1, "prompt": "a", "response": " b ", "id": "mine"}
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}
    rows, _ = converted(sample, pair)
    assert rows == [sample, {"id": "f.jsonl:2"} | pair]
    assert list(rows[0]) == list(sample)


def test_a_pair_is_not_read_as_a_sample() -> None:
    row = {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}
    assert converted(row)[0] == [{"id": "f.jsonl:1"} | row]
    with pytest.raises(DataError, match=r"f\.jsonl:1: chosen: makes the row a preference pair"):
        converted(row, form="sft")


def test_rows_of_several_forms_in_one_table() -> None:
    """`datasets` gives every row all columns, with null for missing values."""
    given = [{"prompt": "a", "response": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, DOLLY, HH, SEED]
    names = dict.fromkeys(name for row in given for name in row)
    rows, drops = converted(*(names | row for row in given))
    expected, _ = converted(*given)
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == expected
    assert [{"chosen", "response"} & row.keys() for row in rows] == [
        {"chosen", "response"} & e.keys() for e in expected
    ]
    assert not drops


def test_the_use_of_columns_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    counts, rows = (
        InputCounts("f"),
        [DOLLY, ALPACA | {"text": "Add. 1 1 2"}, {"prompt": "a", "response": "b", "history": "c"}],
    )
    list(convert([Line(Path("f"), 1, b"", row) for row in rows], PrepareSection(), STRICT, counts))
    with caplog.at_level(logging.INFO):
        counts.say(logging.getLogger("offline_align"))
    assert [record.message for record in caplog.records] == [
        "f: 1 row of the form dolly: 1 SFT row; read instruction, context, response; kept category",
        "f: 1 row of the form alpaca: 1 SFT row; read instruction, input, output; left out text",
        "f: 1 row of the form sft: 1 SFT row; read prompt, response; kept history",
        "f: kept, but not part of prompt or answer: history",
    ]


def test_bad_rows_of_ours_are_not_silently_dropped() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: response: empty"):
        converted({"prompt": "a", "response": ""})


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (HH, "hh"),
        (DOLLY, "dolly"),
        (FLAN, "flan"),
        (SEED, "self_instruct"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        (ALPACA, "alpaca"),
        (dict.fromkeys((*HH, *FLAN, "prompt", "instances")) | DOLLY, "dolly"),
        (FLAT[0], "oasst1"),
        (TREE, "oasst1"),
        ({"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, "preference"),
        ({"prompt": "a", "response": "b"}, "sft"),
    ],
)
def test_forms_are_recognised(row: dict[str, Any], form: str) -> None:
    assert recognise(row).name == form
    assert form in FORMS


def test_an_unknown_form_is_a_bad_row() -> None:
    with pytest.raises(RowError, match="columns: no known form"):
        recognise({"question": "a", "answer": "b"})
    bad_rows = BadRows(OnBadRow.skip, None)
    rows, _ = converted({"question": "a"}, DOLLY, bad_rows=bad_rows)
    assert len(rows) == 1
    assert sum(bad_rows.counts.values()) == 1


def test_a_form_of_several_sets_says_what_it_has() -> None:
    with pytest.raises(DataError, match=r"not of the form self_instruct, which has instances\+instruction or "):
        converted({"instruction": "a"}, form="self_instruct")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_was_asked_for_is_not_guessed_again(form: str) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: "):
        converted({"question": "a"}, form=form)
