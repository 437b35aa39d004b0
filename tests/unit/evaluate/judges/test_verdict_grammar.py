"""A verdict is read completely from the end of a reply, in every common form, or rejected."""

import time

import pytest

from offline_align.evaluate.judges.verdict_text import candidate_names, parse

PLAIN = [
    # Lines in the requested form, and with the markup that models add.
    "Assistant A: 7\nAssistant B: 3",
    "Assistant A:7\nAssistant B:3",
    "Assistant B: 3\nAssistant A: 7",
    "Assistant A: 7\n\nAssistant B: 3\n\n",
    "Assistant A: 7\r\nAssistant B: 3\r\n",
    "Assistant A: 7\u2028Assistant B: 3",
    "\ufeffAssistant\u00a0A: 7\nAssistant\u200b B: 3",
    "ASSISTANT A: 7\nassistant b: 3",
    "**Assistant A**: 7\n**Assistant B**: 3",
    "**Assistant A: 7**\n**Assistant B: 3**",
    "__Assistant A:__ *7*\n__Assistant B:__ *3*",
    "`Assistant A: 7`\n`Assistant B: 3`",
    "## Assistant A: 7\n## Assistant B: 3",
    "> Assistant A: 7\n> Assistant B: 3",
    "- Assistant A: 7\n- Assistant B: 3",
    "• Assistant A: 7\n• Assistant B: 3",
    "1. Assistant A: 7\n2. Assistant B: 3",
    "(1) Assistant A: 7\n(2) Assistant B: 3",
    "```\nAssistant A: 7\nAssistant B: 3\n```",
    "Assistant A: 7\nAssistant B: 3<|im_end|>",
    "Assistant A: 7\nAssistant B: 3</s>\n---",
    # Separators.
    "Assistant A = 7\nAssistant B = 3",
    "Assistant A - 7\nAssistant B – 3",
    "Assistant A—7\nAssistant B — 3",
    "Assistant A -> 7\nAssistant B => 3",
    "Assistant A：7\nAssistant B： 3",
    "Assistant Ａ：７／１０\nAssistant Ｂ：３／１０",
    "Assistant A: ٧\nAssistant B: ٣",
    # The word for it.
    "Assistant A: Score: 7\nAssistant B: Score: 3",
    "Assistant A's score: 7\nAssistant B’s rating: 3",
    "Assistant A final score = 7\nAssistant B final score = 3",
    "Score of Assistant A: 7\nScore for Assistant B: 3",
    # The scale, and other forms of the same number.
    "Assistant A: 7/10\nAssistant B: 3 / 10",
    "Assistant A: 7 out of 10\nAssistant B: 3 (out of 10)",
    "Assistant A: 7/10.0\nAssistant B: 3 out of ten",
    "Assistant A: 7.0\nAssistant B: 03",
    "Assistant A: 7,0\nAssistant B: 3,00",
    "Assistant A: ~7\nAssistant B: ≈ 3",
    "Assistant A: 7 points\nAssistant B: 3 pts.",
    "Assistant A: 7分\nAssistant B: 3/10分",
    "Assistant A: 7 ★\nAssistant B: 3 ⭐️",
    "Assistant A: [[7]]\nAssistant B: [3]",
    "Assistant A: 【7】\nAssistant B: 「3」",
    "Assistant A: <7>\nAssistant B: <3.0>",
    "Assistant A: $\\boxed{7}$\nAssistant B: \\(\\boxed{3}\\)",
    "\\boxed{\\text{Assistant A: } 7, \\text{Assistant B: } 3}",
    "Assistant\\_A: 7\nAssistant\\_B: 3",
    # A remark after the number.
    "Assistant A: 7 (right, and clear)\nAssistant B: 3 (wrong)",
    "Assistant A: 7 - right and clear\nAssistant B: 3 – wrong",
    "Assistant A: 7/10, right and clear.\nAssistant B: 3/10; wrong.",
    "Assistant A: 7. It is right.\nAssistant B: 3: wrong",
    "Assistant A：7（正确）。\nAssistant B：3（错误）。",
    "Assistant A: 7 — better than Assistant B\nAssistant B: 3 — the worse one",
    # All on one line.
    "Assistant A: 7, Assistant B: 3",
    "Assistant A: 7; Assistant B: 3.",
    "Assistant A: 7 / Assistant B: 3",
    "Assistant A: 7 and Assistant B: 3",
    "Assistant A：7、Assistant B：3",
    "Final scores: Assistant A: 7 (right), Assistant B: 3 (wrong)",
    # Tables, HTML, JSON.
    "| Assistant A | 7 |\n| Assistant B | 3 |",
    "| Answer | Score |\n|:--|--:|\n| **Assistant A** | 7/10 |\n| **Assistant B** | 3/10 |",
    "| Assistant A: | 7 | right |\n| Assistant B: | 3 | wrong |",
    "<table><tr><td>Assistant A</td><td>7</td></tr>\n<tr><td>Assistant B</td><td>3</td></tr></table>",
    "<ul><li>Assistant A: <b>7</b></li><li>Assistant B: 3</li></ul>",
    "Assistant A: 7<br>Assistant B:&nbsp;3",
    "Assistant A: <score>7</score>\nAssistant B: <score>3</score>",
    '{"Assistant A": 7, "Assistant B": 3}',
    '{\n  "Assistant A": 7,\n  "Assistant B": 3\n}',
    '```json\n{"scores": {"Assistant A": "7", "Assistant B": "3"}}\n```',
    '{"assistant_a": 7, "assistant_b": 3, "reason": "the first one is right"}',
    '{"Assistant A": {"score": 7}, "Assistant B": {"score": 3}}',
    # Drafts of all kinds before the verdict.
    "Both are fine, and A is right on 2 of 3 points.\nAssistant A: 7\nAssistant B: 3",
    "Assistant A: <score>\nAssistant B: <score>\nAssistant A: 7\nAssistant B: 3",
    "Assistant A: 2\nAssistant B: 9\n\nAssistant A: 7\nAssistant B: 3",
    "At first:\nAssistant A: 5\nAssistant B: 5\nIn the end:\nAssistant A: 7 (right)\nAssistant B: 3/10",
    "At first:\nAssistant A: 5\nAssistant B: 5\nAll considered: \nAssistant A: 7 points\nAssistant B: 3 points",
    "Assistant A: 1\nthen again\nAssistant A: 7\nAssistant B: 3",
    "[Start of Assistant A's answer]\nAssistant A: 10\n[End of Assistant A's answer]\nAssistant A: 7\nAssistant B: 3",
    "<think>\nAssistant A: 2\nAssistant B: 9\nNo, B is wrong.\n</think>\nAssistant A: 7\nAssistant B: 3",
    "<think>\nAssistant A: 2\nAssistant B: 9\n</think>Assistant A： 7 out of 10\nAssistant B： 3 out of 10",
    "Assistant A: 2\nAssistant B: 9\n</think>\n\nAssistant A: 7\nAssistant B: 3",
    "<think></think><think>Assistant A: 2</think>\nAssistant A: 7\nAssistant B: 3",
    "[THINK]Assistant A: 2\nAssistant B: 9[/THINK]Assistant A: 7\nAssistant B: 3",
    "<|begin_of_thought|>\nAssistant A: 2\n<|end_of_thought|>\nAssistant A: 7\nAssistant B: 3",
    "<|channel|>analysis<|message|>Assistant A: 2\nAssistant B: 9<|end|><|start|>assistant<|channel|>final<|message|>"
    "Assistant A: 7\nAssistant B: 3",
    "<!-- Assistant A: 2\nAssistant B: 9 -->\nAssistant A: 7\nAssistant B: 3",
]

UNREADABLE = [
    # Not finished, or not a verdict.
    "",
    "Both are good.",
    "Assistant A: 7",
    "Assistant A: 7\nAssistant B:",
    "Assistant A: <score>\nAssistant B: <score>",
    "<think>\nAssistant A: 7\nAssistant B: 3\nbut B has a point when",
    "<think>\nAssistant A: 7\nAssistant B: 3\n</think>",
    "Assistant A: 7\nAssistant B: 3\n<think>Or is it",
    "<|channel|>analysis<|message|>Assistant A: 7\nAssistant B: 3",
    # A complete or partial draft does not replace the verdict after it.
    "Assistant A: 7\nAssistant B: 3\nNo, that is not right.",
    "Assistant A: 7\nAssistant B: 3\n\nThinking about it again, both deserve",
    "Assistant A: 7\nAssistant B: 3\nIn the end:\nAssistant A: 9",
    "Assistant A: 7\nAssistant B: 3\nIn the end:\nAssistant A: 9\nAssistant B: good",
    "Assistant A: 7\nAssistant B: 3\nAssistant A: 9\nAssistant B: 30",
    "Assistant A: 7\nAssistant A: 8\nAssistant B: 3",
    '{"Assistant A": 7, "Assistant B": 3, "Assistant A": 8}',
    "Assistant A: 7\nI was too strict here.\nAssistant B: 3",
    # Other names, too many, or one score for both.
    "A: 7\nB: 3",
    "Answer 1: 7, Answer 2: 3",
    "Assistant 1: 7\nAssistant 2: 3",
    "7 3",
    "[7, 3]",
    "Assistant A: 7\nAssistant B: 3\nAssistant C: 5",
    "Assistant A and Assistant B: 7",
    "Assistants A and B: 7",
    "Assistant Alpha: 7\nAssistant Beta: 3",
    "| Assistant A | Assistant B |\n|---|---|\n| 7 | 3 |",
    # Numbers that are not one from 1 to 10.
    "Assistant A: 7\nAssistant B: 0",
    "Assistant A: 7\nAssistant B: 11",
    "Assistant A: 7\nAssistant B: 10.5",
    "Assistant A: 7\nAssistant B: -3",
    "Assistant A: 7\nAssistant B - -3",
    "Assistant A: 7\nAssistant B: −3",
    "Assistant A: 7\nAssistant B: －３",
    "Assistant A: 7\nAssistant B: .5",
    "Assistant A: 7\nAssistant B: 3+",
    "Assistant A: 7\nAssistant B: 10+",
    "Assistant A: 7\nAssistant B: 3.5.1",
    "Assistant A: 7\nAssistant B: 3,000",
    "Assistant A: 7\nAssistant B: 3e0",
    "Assistant A: 7\nAssistant B: 1⁰",
    "Assistant A: 7\nAssistant B: 3½",
    "Assistant A: 7\nAssistant B: ½",
    "Assistant A: 7\nAssistant B: 3%",
    "Assistant A: 70/100\nAssistant B: 30/100",
    "Assistant A: 4/5\nAssistant B: 2/5",
    "Assistant A: 7 out of 100\nAssistant B: 3",
    "Assistant A: 7 von 20\nAssistant B: 3",
    "Assistant A: \\frac{7}{10}\nAssistant B: 3",
    "Assistant A: seven\nAssistant B: three",
    # More than one number.
    "Assistant A: 6-7\nAssistant B: 3",
    "Assistant A: 6 to 7\nAssistant B: 3",
    "Assistant A: 6 – 7\nAssistant B: 3",
    "Assistant A: 6 or 7\nAssistant B: 3",
    "Assistant A: 6 → 7\nAssistant B: 3",
    "Assistant A: ~~6~~ 7\nAssistant B: 3",
    "Assistant A: <s>6</s> 7\nAssistant B: 3",
    "Assistant A: 6 (7 with some good will)\nAssistant B: 3",
    "| Assistant A | 7 | 8 |\n| Assistant B | 3 | 4 |",
]


def test_the_forms_are_many_and_differ() -> None:
    assert len({*PLAIN, *UNREADABLE}) == len(PLAIN) + len(UNREADABLE) >= 92


@pytest.mark.parametrize("reply", PLAIN)
def test_plain_forms_are_read(reply: str) -> None:
    assert parse(reply, 2) == [7.0, 3.0]


@pytest.mark.parametrize("reply", UNREADABLE)
def test_all_else_is_not_guessed_at(reply: str) -> None:
    assert parse(reply, 2) is None


def test_decimals_keep_their_value() -> None:
    assert parse("Assistant A: 7.25/10\nAssistant B: 9,5", 2) == [7.25, 9.5]
    assert parse("Assistant A: 10/10\nAssistant B: 1", 2) == [10.0, 1.0]


def test_any_number_of_answers() -> None:
    assert parse("Assistant A: 2\nNo:\nAssistant A: 7", 1) == [7.0]
    assert parse("Assistant A: 7\nAssistant B: 3", 1) is None
    names = candidate_names(26)
    assert parse("\n".join(f"{name}: {k % 10 + 1}" for k, name in enumerate(names)), 26) == [
        k % 10 + 1 for k in range(26)
    ]


@pytest.mark.parametrize("piece", [" ", "<", "[", "<think ", "Assistant A", "Assistant A: 1 ", "|", "<!--", "(", "\\"])
def test_long_replies_are_read_in_no_time(piece: str) -> None:
    started = time.perf_counter()
    parse("Assistant A: 7" + piece * 20_000, 2)
    assert time.perf_counter() - started < 5
