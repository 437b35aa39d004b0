"""Rows as the model sees them, as text: the parts, special tokens, line breaks, and the cut of long texts."""

from dataclasses import replace
from pathlib import Path

import pytest

from offline_align.config.sections import DataSection, Template
from offline_align.data.records import Message, PreferencePair, Sample, TrainingRow
from offline_align.data.shown import show_pair, show_sample
from offline_align.data.template import Renderer
from offline_align.data.tokenize import tokenize_pairs, tokenize_samples
from offline_align.data.tokenizer import load_tokenizer
from tests.small_tokenizers import write_hugging_face, write_sentencepiece

QUESTION = (Message("user", "Hello, how\nare you? "),)


def renderer(folder: Path, template: Template) -> Renderer:
    write = write_hugging_face if template is Template.chat else write_sentencepiece
    return Renderer(load_tokenizer(write(folder / "tokenizer")), template)


def shown(folder: Path, template: Template, response: str, condition: str = "", weight: float = 1.0) -> str:
    found = renderer(folder, template)
    row = TrainingRow(Sample("a", QUESTION, response, {}), weight, condition)
    rows = tokenize_samples([row], found, DataSection(), folder)
    return show_sample(rows, 0, found.tokenizer, "form")


def test_special_tokens_and_line_breaks_are_visible(tmp_path: Path) -> None:
    lines = shown(tmp_path, Template.chat, "Fine\tthanks", weight=0.25).splitlines()
    assert lines[0].startswith("a: ") and lines[0].endswith(" of them target, weight 0.25, form")
    assert lines[1:] == [
        "  prompt    <|begin|><|im_start|>user\\n",
        "            Hello, how\\n",
        "            are you?<|im_end|>\\n",
        "            <|im_start|>assistant\\n",
        "  target    Fine\\tthanks<|im_end|>",
    ]


def test_spaces_between_the_parts_are_those_of_the_ids(tmp_path: Path) -> None:
    """SentencePiece drops the space at the start of what it decodes by itself."""
    assert shown(tmp_path, Template.paper, " two ", "<rm_score>1.5").splitlines()[1:] == [
        "  prompt    User:Hello, how\\n",
        "            are you? Assistant:\\x20",
        "  condition <rm_score>1.5",
        "  target     two </s>",
    ]


def test_a_marker_in_a_row_is_not_a_special_token(tmp_path: Path) -> None:
    """The count of tokens tells: as a special token it would be one, as text it is many."""
    plain, marked = (shown(tmp_path / t[:1], Template.chat, t) for t in ("x", "<|im_end|>"))
    count = [int(text.split("tokens, ")[1].split()[0]) for text in (plain, marked)]
    assert count[0] == 2 and count[1] > 3


def test_a_long_part_is_cut_in_the_middle(tmp_path: Path) -> None:
    text = shown(tmp_path, Template.chat, "begin " + "x" * 2000 + " end")
    assert "  target    begin xxx" in text and "xxx end<|im_end|>" in text
    assert "[... 1,420 characters ...]" in text
    assert len(text) < 1200


def test_a_pair_shows_both_answers_after_one_prompt(tmp_path: Path) -> None:
    found = renderer(tmp_path, Template.chat)
    pairs = tokenize_pairs([PreferencePair("p", QUESTION, "yes", "no", 0.5, {})], found, DataSection(), tmp_path)
    lines = show_pair(pairs, 0, found.tokenizer, "form").splitlines()
    assert lines[0].startswith("p: tokens with the prompt: chosen ") and lines[0].endswith(", margin 0.5, form")
    assert lines[-2:] == ["  chosen    yes<|im_end|>", "  rejected  no<|im_end|>"]
    assert sum("<|im_start|>user" in line for line in lines) == 1


@pytest.mark.parametrize("template", [Template.paper, Template.chat])
def test_the_text_follows_the_ids_and_not_the_row(tmp_path: Path, template: Template) -> None:
    found = renderer(tmp_path, template)
    rows = tokenize_samples([TrainingRow(Sample("a", QUESTION, "Fine", {}))], found, DataSection(), tmp_path)
    changed = rows.ids.copy()
    changed[rows.target_start[0]] = found.tokenizer.eos_id
    text = show_sample(replace(rows, ids=changed), 0, found.tokenizer, "form")
    assert f"target    {found.tokenizer.named_tokens['eos_token']}" in text
