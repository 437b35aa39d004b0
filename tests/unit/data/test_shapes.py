"""The table of forms in docs/data.md: each form has an example file, and `prepare` makes the rows that it promises."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow, PairsOf, PrepareSection, Rated, Turns
from offline_align.data.adapters.forms import FORMS
from offline_align.data.jsonl import BadRows
from offline_align.data.preparation import Preparation, prepare_rows
from offline_align.data.sources import input_sources
from offline_align.errors import DataError
from tests.support import REPOSITORY

PAGE = REPOSITORY / "docs" / "data.md"
ROW = re.compile(r"^\| `(\w+)` \|.*\| (.*?) \| \[(.+?)\]\((\.\./tests/shapes/.+?)\) \|$", re.MULTILINE)
TABLE = [(name, becomes, (PAGE.parent / path).resolve()) for name, becomes, _, path in ROW.findall(PAGE.read_text())]
KINDS = {"SFT row": "sft_train.jsonl", "pair": "preferences_train.jsonl", "labelled row": "labelled.jsonl"}

PRIME, EVEN = "Name a prime.", "Name an even number."
SAMPLE = {"prompt": PRIME, "response": "Seven."}
BRIEF = {"role": "system", "content": "Be brief."}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


TWO_TURNS = [
    ([BRIEF, *said(PRIME)], "Seven."),
    ([BRIEF, *said(PRIME, "Seven.", "Another one?")], "Eleven."),
]
# What each example becomes: (prompt, response) of SFT rows, (prompt, chosen, rejected, margin) of pairs,
# (prompt, response, reward_raw) of labelled rows.
EXPECTED: dict[str, list[tuple[Any, ...]]] = {
    "sft": [(PRIME, "Seven."), ([BRIEF, *said(PRIME)], "2")],
    "preference": [(PRIME, "Seven.", "Nine.", None)],
    "alpaca": [
        ("Double the number.\n\n2", "4"),
        (
            [{"role": "system", "content": "Answer with a number."}, *said("Double 4.", "8", "And of 5?")],
            "10",
        ),
    ],
    "dolly": [("Which number is prime?\n\n8, 11, 12", "11")],
    "flan": [("Q: Is 7 prime?\nA:", "yes")],
    "self_instruct": [("Double the number.\n\n2", "4"), ("Double the number.\n\n3", "6")],
    "messages": TWO_TURNS,
    "sharegpt": TWO_TURNS,
    "prompt_completion": [("The capital of Japan is", "Tokyo."), (said(PRIME), "Seven.")],
    "kto": [(PRIME, "Seven.")],
    "text": [(said(PRIME), "Seven."), (said(EVEN), "Two.")],
    "hh": [(said(PRIME), "Seven.", "Nine.", None)],
    "pair": [
        (said(PRIME), "Seven.", "Nine.", 7.0),
        ([BRIEF, *said(EVEN)], "Two.", "Three.", None),
        (said("Hi"), "Hello!", "No.", None),
    ],
    "ranked": [(said(PRIME), "Seven.", "Nine.", None), (said(EVEN), "Two.", "Three.", 3.0)],
    "helpsteer2": [(PRIME, "Seven, for example.", 4.0), (PRIME, "Nine.", 0.0)],
    "oasst1": [(said(PRIME), "Seven."), (said(PRIME), "Seven.", "Nine.", None)],
}


def prepared(path: Path, **settings: Any) -> Preparation:
    section = PrepareSection(valid_fraction=0.0, **settings)
    return prepare_rows(input_sources(str(path), "data.input"), section, 0, BadRows(OnBadRow.fail, None))


def brief(row: dict[str, Any]) -> tuple[Any, ...]:
    if "chosen" in row:
        return row["prompt"], row["chosen"], row["rejected"], row.get("margin")
    return row["prompt"], row["response"], *([row["reward_raw"]] if "reward_raw" in row else [])


def test_every_form_is_in_the_table() -> None:
    assert sorted(name for name, _, _ in TABLE) == sorted(FORMS) == sorted(EXPECTED)


@pytest.mark.parametrize(("form", "becomes", "path"), TABLE, ids=[name for name, _, _ in TABLE])
def test_an_example_becomes_what_the_table_says(form: str, becomes: str, path: Path) -> None:
    result = prepared(path)
    assert [*result.inputs[0].forms] == [form]
    filled = {name for name, rows in result.files.items() if rows}
    assert filled == {name for words, name in KINDS.items() if re.search(rf"\b{words}\b", becomes)}
    assert [brief(row) for rows in result.files.values() for row in rows] == EXPECTED[form]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".json.gz"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "pair", "ranked", "kto", "alpaca", "oasst1"])
def test_an_example_gives_the_same_rows_from_every_kind_of_file(tmp_path: Path, form: str, suffix: str) -> None:
    [path] = (path for name, _, path in TABLE if name == form)
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    parts = [rows]
    if suffix in (".parquet", ".arrow") and form in ("pair", "ranked", "messages"):
        # A column of these files has one type, so texts and lists go to different files.
        parts = [[_parts_of_text(row)] for row in rows]
    for number, part in enumerate(parts):
        write(tmp_path / f"rows{number}{suffix}", part)
    made = prepared(tmp_path)
    assert [brief(row) for rows in made.files.values() for row in rows] == EXPECTED[form]


def _parts_of_text(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in row:
        return row
    contents = [m["content"] for m in row["messages"]]
    lists = [[{"type": "text", "text": c}] if isinstance(c, str) else c for c in contents]
    return {"messages": [m | {"content": c} for m, c in zip(row["messages"], lists, strict=True)]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    else:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        store = pyarrow.parquet.write_table if path.suffix == ".parquet" else pyarrow.feather.write_feather
        store(table, path)


def _cell(value: Any) -> Any:
    return "" if value is None else value if isinstance(value, (str, int, float)) else json.dumps(value)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    """Return the rows that are made of the given ones, in brief, and what is dropped."""
    result = prepared(jsonl(tmp_path / "rows.jsonl", *rows), **settings)
    counts = result.inputs[0]
    assert counts.rows_read - counts.rows_used + counts.rows_made == counts.rows_kept + counts.dropped.total()
    return [brief(row) for rows in result.files.values() for row in rows], dict(counts.dropped)


def refused(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        prepared(jsonl(tmp_path / "rows.jsonl", *rows), **settings)
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 65
    return text.removeprefix(f"{tmp_path}/")


# ---- Dialogues


def test_only_the_last_answer_of_a_dialogue_is_learned_if_asked(tmp_path: Path) -> None:
    row = {"messages": said(PRIME, "Seven.", "Another one?", "Eleven.", "And one more?")}
    assert made(tmp_path, row, turns=Turns.last)[0] == [(said(PRIME, "Seven.", "Another one?"), "Eleven.")]
    assert len(made(tmp_path, row)[0]) == 2


def test_answers_that_are_empty_or_not_to_be_learned_give_no_row(tmp_path: Path) -> None:
    messages = said(PRIME, "Seven.", "Another one?", "Eleven.", "A last one?", "")
    messages[1] |= {"weight": 0}  # type: ignore[dict-item]
    rows, dropped = made(tmp_path, {"messages": messages})
    assert rows == [(said(PRIME, "Seven.", "Another one?"), "Eleven.")]
    assert dropped == {"response: empty": 1}
    rows, dropped = made(tmp_path, {"messages": said(PRIME)}, {"messages": said(EVEN, "Two.")})
    assert rows == [(said(EVEN), "Two.")]
    assert dropped == {"a dialogue without an answer": 1}


def test_a_dialogue_that_begins_with_the_assistant_is_dropped_and_counted(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": PRIME}, {"from": "gpt", "value": "Seven."}]
    rows, dropped = made(tmp_path, {"conversations": turns}, {"conversations": turns[1:]})
    assert rows == [(said(PRIME), "Seven.")]
    assert sum(dropped.values()) == 2 and all(reason.startswith("prompt: ") for reason in dropped)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            {"messages": [*said(PRIME), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "tool calls",
        ),
        ({"messages": [*said(PRIME, "Wait."), {"role": "tool", "content": "7"}]}, r"tool calls \(tool\)"),
        ({"messages": said(PRIME, "Seven."), "tools": [{"name": "f"}]}, "tools: tool calls"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "images"),
        ({"prompt": PRIME, "response": "Seven.", "images": ["a.png"]}, "images: images, sound and video"),
        ({"messages": [*said(PRIME), {"role": "assistant", "content": "7", "reasoning_content": "..."}]}, "reasoning"),
        ({"messages": [{"role": "narrator", "content": "Once"}]}, "the role of a message is 'narrator'"),
    ],
)
def test_what_no_stage_can_learn_from_is_refused_by_name(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    assert re.match(rf"rows\.jsonl:2: \w+: .*{what}|rows\.jsonl:2: {what}", refused(tmp_path, {**SAMPLE}, row))


def test_a_first_message_beside_the_dialogue_is_a_copy(tmp_path: Path) -> None:
    assert made(tmp_path, {"prompt": PRIME, "messages": said(PRIME, "Seven.")})[0] == [(said(PRIME), "Seven.")]
    assert "may belong to the prompt" in refused(tmp_path, {"prompt": EVEN, "messages": said(PRIME, "Seven.")})


def test_system_columns_of_own_rows_become_system_messages(tmp_path: Path) -> None:
    pair = {"prompt": said(PRIME), "chosen": "Seven.", "rejected": "Nine.", "system": "Be brief."}
    rows, _ = made(tmp_path, SAMPLE | {"system": "Be brief."}, pair, SAMPLE | {"system": " ", "id": "x"})
    prompt = [BRIEF, *said(PRIME)]
    assert rows == [(prompt, "Seven."), (PRIME, "Seven."), (prompt, "Seven.", "Nine.", None)]
    differs = {"prompt": [BRIEF, *said(PRIME)], "response": "Seven.", "system": "Be long."}
    assert "system: differs from the system message" in refused(tmp_path, differs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:", said("Hi", "Hello", "Why?")),
        ("Human: Hi\n\nAssistant: ", said("Hi")),
        ("User: Hi\nAssistant:", said("Hi")),
        ("Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?", said("Hi", "Hello", "Why?")),
        ("Translate: Human: Hi\n\nAssistant:", None),
        ("Human: Hi\n\nHuman: Hey\n\nAssistant:", None),
        ("Who said 'Assistant: Hi'?", None),
    ],
)
def test_prompts_that_are_transcripts_become_messages(
    tmp_path: Path, text: str, expected: list[dict[str, str]] | None
) -> None:
    assert made(tmp_path, {"prompt": text, "response": "a"})[0] == [(expected or text, "a")]


@pytest.mark.parametrize(
    "text",
    [
        "### Human: Hi### Assistant: Hello".replace("### A", "\n### A"),
        "### System:\nBe brief.\n### User:\nHi\n### Assistant:\nHello",
        "Below is an instruction that describes a task.\n\n### Instruction:\nHi\n\n### Response:\nHello",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>",
        "[INST] Hi [/INST] Hello",
        "Human: Hi\n\nAssistant: Hello",
        "User: Hi\nAssistant: Hello",
    ],
)
def test_transcripts_of_several_styles(tmp_path: Path, text: str) -> None:
    system = [BRIEF] if "brief" in text else []
    assert made(tmp_path, {"text": text})[0] == [([*system, *said("Hi")], "Hello")]


def test_a_transcript_with_several_turns_and_an_input(tmp_path: Path) -> None:
    assert len(made(tmp_path, {"text": "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"})[0]) == 2
    text = "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2"
    assert made(tmp_path, {"text": text})[0] == [(said("Add.\n\n1 1"), "2")]


def test_plain_text_needs_a_prompt(tmp_path: Path) -> None:
    row = {"text": "The lion sleeps."}
    message = refused(tmp_path, row)
    assert "set prepare.text_prompt" in message and "on_bad_row" not in message
    assert made(tmp_path, row, text_prompt="Tell me something.")[0] == [("Tell me something.", "The lion sleeps.")]


# ---- Pairs and ranked answers


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": said(PRIME), "chosen": said(PRIME, "Seven.")[1:], "rejected": said(PRIME, "Nine.")[1:]},
        {"chosen": said(PRIME, "Seven."), "rejected": said(PRIME, "Nine."), "messages": said(PRIME, "Seven.")},
        {"question": PRIME, "chosen": "Seven.", "rejected": "Nine."},
        {"instruction": "Name a", "input": "prime.", "chosen": "Seven.", "rejected": "Nine."},
        {
            "conversations": [{"from": "human", "value": PRIME}],
            "chosen": {"from": "gpt", "value": "Seven."},
            "rejected": {"from": "gpt", "value": "Nine."},
        },
    ],
    ids=["explicit prompt", "implicit prompt", "question", "instruction and input", "one message a side"],
)
def test_pairs_of_every_layout(tmp_path: Path, row: dict[str, Any]) -> None:
    prompt = PRIME if "input" not in row else "Name a\n\nprime."
    assert made(tmp_path, row)[0] == [(said(prompt), "Seven.", "Nine.", None)]


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path: Path) -> None:
    sides = {"chosen": said(PRIME, "Seven."), "rejected": said(PRIME, "Nine.")}
    rows, dropped = made(
        tmp_path,
        sides,
        sides | {"rejected": said(EVEN, "Nine.")},
        sides | {"rejected": said(PRIME, "")},
        sides | {"rejected": said(PRIME, "Seven.")},
        sides | {"chosen": said(PRIME), "rejected": said(PRIME)},
        sides | {"chosen": None},
        {"question": PRIME, "chosen": None, "rejected": "Nine."},
        sides | {"score_chosen": 1, "score_rejected": 2, "id": "x"},
    )
    assert rows == [(said(PRIME), "Seven.", "Nine.", None)]
    assert dropped == {
        "the sides differ before the last answer": 1,
        "rejected: empty": 1,
        "rejected: the same as chosen": 1,
        "the last turn is not an answer": 1,
        "chosen: empty": 2,
        "the rejected answer has the higher rating": 1,
    }


def test_a_pair_with_another_prompt_is_refused(tmp_path: Path) -> None:
    row = {"prompt": EVEN, "chosen": said(PRIME, "Seven."), "rejected": said(PRIME, "Nine.")}
    assert "prompt: is not the beginning of chosen" in refused(tmp_path, row)
    assert "prompt: missing" in refused(tmp_path, {"chosen": said("", "a")[1:], "rejected": said("", "b")[1:]})


RANKED = {"prompt": PRIME, "answers": [{"answer": a, "rank": r} for a, r in [("c", 3), ("a", 1), ("b", 2), ("bb", 2)]]}


def test_ranked_answers_give_all_pairs_or_the_best_and_the_worst(tmp_path: Path) -> None:
    rows, _ = made(tmp_path, RANKED)
    assert [row[1:3] for row in rows] == [("a", "b"), ("a", "bb"), ("a", "c"), ("b", "c"), ("bb", "c")]
    assert [row[1:3] for row in made(tmp_path, RANKED, pairs=PairsOf.best_worst)[0]] == [("a", "c")]
    rows, _ = made(tmp_path, RANKED, rated=Rated.labelled)
    assert [row[1:] for row in rows] == [("c", -3.0), ("a", -1.0), ("b", -2.0), ("bb", -2.0)]
    tied = {"prompt": EVEN, "answers": [{"answer": a, "rank": 1} for a in "ab"]}
    assert made(tmp_path, RANKED, tied)[1] == {"no two answers differ in their rating": 1}


def test_ratings_of_ultrafeedback(tmp_path: Path) -> None:
    def answer(text: str, helpful: str, honest: str) -> dict[str, Any]:
        notes = {"helpfulness": {"Rating": helpful, "Rationale": "x"}, "honesty": {"Rating": honest}}
        return {"response": text, "annotations": notes, "overall_score": 10.0}

    row = {"instruction": PRIME, "completions": [answer("a", "5", "3"), answer("b", "4", "N/A")]}
    assert made(tmp_path, row, rated=Rated.labelled)[0] == [(said(PRIME), "a", 4.0), (said(PRIME), "b", 4.0)]
    assert [r[1:] for r in made(tmp_path, row, score_column="helpfulness")[0]] == [("a", 5.0), ("b", 4.0)]
    assert "an answer has no number in honesty" in refused(tmp_path, row, score_column={"honesty": 1.0})
    lists = {"prompt": PRIME, "responses": ["a", "b"], "scores": [1, 2]}
    assert made(tmp_path, lists)[0] == [(said(PRIME), "b", "a", 1.0)]
    assert "needs as many ratings" in refused(tmp_path, lists | {"scores": [1]})


# ---- Ratings and verdicts


@pytest.mark.parametrize("no", [False, 0, 0.0, -1, "false", "0"])
@pytest.mark.parametrize("rated", [None, Rated.ignore])
def test_an_answer_that_people_rejected_is_never_a_target(tmp_path: Path, no: Any, rated: Rated | None) -> None:
    row = {"prompt": PRIME, "completion": "Nine.", "label": no}
    others = [
        {"prompt": PRIME, "response": "9", "label": no},
        {"messages": said(PRIME, "IX"), "label": no},
        {"conversations": [{"from": "human", "value": PRIME}, {"from": "gpt", "value": "ix"}], "kto_tag": no},
        {"instruction": PRIME, "output": "nine", "kto_tag": no},
    ]
    rows, dropped = made(tmp_path, row, *others, {"prompt": PRIME, "completion": "Seven.", "label": True}, rated=rated)
    assert rows == [(PRIME, "Seven.")]
    assert dropped == {"people rejected the answer": 5}


def test_verdicts_as_ratings_and_as_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": PRIME, "completion": text, "label": text == "Seven."} for text in ("Nine.", "Seven.", "Four.")]
    alone = {"prompt": EVEN, "completion": "Two.", "label": True}
    labelled, _ = made(tmp_path, *rows, rated=Rated.labelled)
    assert labelled == [(PRIME, "Nine.", 0.0), (PRIME, "Seven.", 1.0), (PRIME, "Four.", 0.0)]
    pairs, dropped = made(tmp_path, *rows, alone, rated=Rated.pairs)
    assert pairs == [(PRIME, "Seven.", "Nine.", 1.0), (PRIME, "Seven.", "Four.", 1.0)]
    assert dropped == {"no other answer to the same prompt follows with another rating": 1}


def test_a_label_that_is_no_verdict(tmp_path: Path) -> None:
    assert made(tmp_path, SAMPLE | {"label": "closed_qa"})[0] == [(PRIME, "Seven.")]
    assert "label: neither 1 (accepted) nor 0" in refused(tmp_path, SAMPLE | {"label": 3})
    assert made(tmp_path, SAMPLE | {"label": 3}, score_column="label")[0] == [(PRIME, "Seven.", 3.0)]


@pytest.mark.parametrize("name", ["score", "rating", "reward", "overall_score", "reward_raw", "helpfulness"])
@pytest.mark.parametrize("value", [2, 2.0, "2"])
def test_rated_answers_never_become_sft_rows_unasked(tmp_path: Path, name: str, value: Any) -> None:
    rows: list[dict[str, Any]] = [SAMPLE | {name: value}, {"messages": said(PRIME, "Hm.", "And?", "Nine."), name: 1}]
    expected = [(PRIME, "Seven.", 2.0), (said(PRIME, "Hm.", "And?"), "Nine.", 1.0)]
    assert made(tmp_path, *rows)[0] == expected
    assert len(made(tmp_path, *rows, rated=Rated.ignore)[0]) == 3


def test_helpsteer_gives_pairs_of_neighbours(tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "response": text, "helpfulness": score, "correctness": 1}
        for prompt, text, score in [(PRIME, "a", 1), (PRIME, "b", 3), (EVEN, "c", 2), (EVEN, "d", 2), (PRIME, "e", 0)]
    ]
    pairs, dropped = made(tmp_path, *rows, rated=Rated.pairs)
    assert pairs == [(PRIME, "b", "a", 2.0)]
    assert sum(dropped.values()) == 3


def test_two_ratings_are_refused_until_one_is_named(tmp_path: Path) -> None:
    row = SAMPLE | {"score": 1, "rating": 2}
    assert "score, rating: each may rate the answer; set prepare.score_column=score" in refused(tmp_path, row)
    assert made(tmp_path, row, score_column="rating")[0] == [(PRIME, "Seven.", 2.0)]


def test_scores_of_the_sides_of_a_pair(tmp_path: Path) -> None:
    row = {"prompt": PRIME, "chosen": "a", "rejected": "b", "chosen_rating": "4", "rejected_rating": 1.5}
    wrong = row | {"prompt": EVEN, "chosen_rating": 1}
    rows, dropped = made(tmp_path, row, wrong)
    assert rows == [(PRIME, "a", "b", 2.5)]
    assert dropped == {"the rejected answer has the higher rating": 1}
    assert made(tmp_path, row | {"margin": 0.5})[0] == [(PRIME, "a", "b", 0.5)]
    assert len(made(tmp_path, row, wrong, rated=Rated.ignore)[0]) == 2
    assert made(tmp_path, row, rated=Rated.labelled)[0] == [(PRIME, "a", 4.0), (PRIME, "b", 1.5)]


# ---- Own scores, and the names of columns


def test_a_score_is_a_weighted_sum_and_an_answer_without_one_is_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": PRIME, "response": "a", "x": 1, "y": 10},
        {"prompt": PRIME, "response": "b", "x": None, "y": 10},
        {"prompt": PRIME, "response": "c", "y": 10},
        {"prompt": PRIME, "response": "d", "x": " ", "y": 1},
        {"prompt": PRIME, "chosen": "a", "rejected": "b"},
        {"instruction": PRIME, "output": "e", "x": True, "y": "2"},
    ]
    made_rows, dropped = made(tmp_path, *rows, score_column={"x": 1, "y": 0.5})
    assert made_rows == [(PRIME, "a", "b", None), (PRIME, "a", 6.0), (PRIME, "e", 2.0)]
    assert dropped == {"an answer without a score": 3}
    assert "x: not a number" in refused(tmp_path, {"prompt": PRIME, "response": "a", "x": "good"}, score_column="x")
    message = refused(tmp_path, SAMPLE, score_column="quality")
    assert "prepare.score_column=quality: no such column; the columns are prompt, response" in message


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', '[{"role": "user", "content": "x"}]', "[]"])
def test_texts_that_are_json_stay_texts(tmp_path: Path, text: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": text, "response": text},
        {"prompt": "a", "completion": text},
        {"instruction": "b", "output": text},
        {"prompt": "c", "chosen": text, "rejected": "d"},
        {"question": "e", "chosen": text, "rejected": "f"},
        {"messages": said("g", text)},
    ]
    assert made(tmp_path, *rows)[0] == [
        *[(text, text), ("a", text), ("b", text), (said("g"), text)],
        *[("c", text, "d", None), (said("e"), text, "f", None)],
    ]


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"question": PRIME, "answer": "Seven.", "note": 1}
    assert made(tmp_path, row, columns={"prompt": "question", "response": "answer"})[0] == [(PRIME, "Seven.")]
    pair = {"q": said(PRIME), "good": said("", "Seven.")[1:], "bad": said("", "Nine.")[1:]}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert made(tmp_path, pair, columns=names)[0] == [(said(PRIME), "Seven.", "Nine.", None)]
    message = refused(tmp_path, row, columns={"prompt": "query", "response": "answer"})
    assert "prepare.columns names query, which the row lacks" in message


@pytest.mark.parametrize(
    ("row", "nearest", "key"),
    [
        ({"question": "a", "answer": "b"}, "sft, which lacks prompt, response", "{prompt: question, response: answer}"),
        ({"Prompt": "a", "Response": "b"}, "sft, which lacks prompt, response", "{prompt: Prompt, response: Response}"),
        (
            {"prompt": "a", "preferred": "b", "worse": "c"},
            "lacks chosen, rejected",
            "{chosen: preferred, rejected: worse}",
        ),
        ({"instruction": "a", "outputs": "b"}, "alpaca, which lacks output", "{output: outputs}"),
        ({"x": 1}, "sft, which lacks prompt, response", "{prompt: <column>, response: <column>}"),
    ],
)
@pytest.mark.parametrize("on_bad_row", OnBadRow)
def test_a_file_of_no_known_form(
    tmp_path: Path, row: dict[str, Any], nearest: str, key: str, on_bad_row: OnBadRow
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row, row)
    sources = input_sources(str(path), "data.input")
    with pytest.raises(DataError) as error:
        prepare_rows(sources, PrepareSection(), 0, BadRows(on_bad_row, None))
    message = str(error.value)
    assert message.startswith(f"{path}:1: columns: no known form; the row has {', '.join(row)}; ")
    assert nearest in message and f"prepare.columns='{key}'" in message and "on_bad_row" not in message
