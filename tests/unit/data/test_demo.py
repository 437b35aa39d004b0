"""The demo corpus: true quality follows its definition, and rows are as mixed and noisy as documented."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean

import pytest

from offline_align.data.demo import (
    LABEL_NOISE,
    MOST_PROMPTS,
    SMALLEST_GAP,
    answer,
    demo_pairs,
    demo_prompts,
    demo_samples,
    demo_tokenizer_path,
    is_demo_prompt,
    true_quality,
)
from offline_align.data.demo_language import ANIMALS, ASPECTS, PROMPTS, STATEMENTS, Request, parse_prompt
from offline_align.data.records import Message
from tests.support import REPOSITORY

PROMPT = "Please tell me the colour, the home and the food of the fox."
FIRST_PROMPT = "We are looking for the colour, the home, the food and the voice of the lion."
FIRST_RESPONSE = "The lion is yellow. It lives in the savanna."
FACTS = "The fox is red. It lives in the forest. It eats mice."


@pytest.mark.parametrize(
    ("response", "quality"),
    [
        (f"Hello! {FACTS} Have a nice day!", 10),
        (f"Good day! {FACTS}", 9),
        (f"{FACTS} Come back soon!", 8.5),
        (FACTS, 7.5),
        ("It eats mice. The fox lives in the forest. It is red.", 7.5),
        (f"Hello Mia! {FACTS}", 5.5),
        (f"{FACTS} Hello!", 5.5),
        (f"Hello! Welcome! {FACTS}", 7),
        (f"{FACTS} It eats mice.", 5.5),
        (f"{FACTS} It can bark.", 5.5),
        (f"{FACTS} The fox is an animal.", 5.5),
        (f"{FACTS} Enjoy", 5.5),
        ("The fox is red. It lives in the forest.", 5),
        ("The fox is red. It lives in the forest. It eats hay.", 3.75),
        ("The fox is red. It lives in the sea. It eats hay.", 0),
        ("The fox is red.", 2.5),
        ("The whale is red. It lives in the forest. It eats mice.", 0),
        ("The fox is red. The whale is blue. It eats mice.", 1),
        ("Hello! Have a nice day!", 2.5),
        ("I do not know.", 0),
        ("", 0),
        ("red forest mice", 0),
        (FACTS.upper(), 0),
    ],
)
def test_true_quality_counts_what_it_says(response: str, quality: float) -> None:
    assert true_quality(PROMPT, response) == pytest.approx(quality)
    assert true_quality([Message("user", PROMPT)], response) == pytest.approx(quality)


def test_a_good_answer_depends_on_the_prompt() -> None:
    best = f"Hello! {FACTS} Have a nice day!"
    shorter = PROMPT.replace("colour, the home and the food", "food")
    others = [PROMPT.replace("fox", "wolf"), PROMPT.replace("food", "voice"), shorter]
    assert all(true_quality(other, best) < 9 for other in others)


@pytest.mark.parametrize("wording", range(len(PROMPTS)))
@pytest.mark.parametrize("aspects", [ASPECTS[:1], ASPECTS[1:3], ASPECTS])
def test_prompts_are_read_back(wording: int, aspects: tuple[str, ...]) -> None:
    request = Request("whale", aspects, wording)
    assert parse_prompt(request.text()) == request


@pytest.mark.parametrize(
    "text",
    [
        "Why?",
        "",
        PROMPT + " ",
        PROMPT.replace("fox", "unicorn"),
        PROMPT.replace("food", "colour"),
        PROMPT.replace("food", "weight"),
        PROMPT.replace("colour, the", "colour the"),
    ],
)
def test_other_prompts_have_no_true_quality(text: str) -> None:
    assert not is_demo_prompt(text)
    with pytest.raises(ValueError, match="true quality is known for demo prompts only"):
        true_quality(text, "The fox is red.")


def test_every_animal_has_every_fact() -> None:
    assert all(set(facts) == set(ASPECTS) for facts in ANIMALS.values())
    assert len(set(map(str, ANIMALS.values()))) == len(ANIMALS) == 16


def test_samples_are_of_mixed_quality() -> None:
    rows = list(demo_samples(3000, seed=5, held_out=50))
    qualities = [row["quality"] for row in rows]
    assert qualities == [round(true_quality(row["prompt"], row["response"]), 3) for row in rows]
    assert 4.8 < mean(qualities) < 6
    assert min(qualities) == 0
    assert max(qualities) == 10
    assert len(set(qualities)) >= 25
    for low, high in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 10.1)):
        assert 0.05 < mean(low <= quality < high for quality in qualities) < 0.37


def test_the_better_answer_is_chosen_but_for_the_noise() -> None:
    rows = list(demo_pairs(3000, seed=5, held_out=50))
    gaps = [row["quality_chosen"] - row["quality_rejected"] for row in rows]
    assert mean(gap < 0 for gap in gaps) == pytest.approx(LABEL_NOISE, abs=0.015)
    assert min(map(abs, gaps)) >= SMALLEST_GAP - 0.001
    assert mean(abs(gap) < 2 for gap in gaps) > 0.1
    assert all(row["quality_chosen"] == round(true_quality(row["prompt"], row["chosen"]), 3) for row in rows)


def test_nobody_states_a_wrong_value() -> None:
    """A reward model of the demo's size could not learn to detect wrong values, so the corpus has none."""
    text = " ".join(row["response"] for row in demo_samples(2000, seed=5, held_out=50))
    said = re.findall(r"The [a-z]+ (?:is [a-z]+|lives in the [a-z]+|eats [a-z]+|can [a-z]+)\.", text)
    known = [(f"The {animal}", facts) for animal, facts in ANIMALS.items()]
    assert set(said) == {STATEMENTS[a].format(subject=s, value=v) for s, facts in known for a, v in facts.items()}


def test_length_alone_does_not_decide() -> None:
    rows = list(demo_pairs(3000, seed=5, held_out=50))
    assert mean(len(row["chosen"]) > len(row["rejected"]) for row in rows) < 0.72


def greedy(answers: list[list[str]]) -> str:
    """Return the answer of a perfect learner that always takes the most frequent next sentence."""
    said: list[str] = []
    while True:
        following = [a[len(said)] if len(a) > len(said) else "" for a in answers if a[: len(said)] == said]
        sentence = Counter(following).most_common(1)[0][0]
        if not sentence:
            return " ".join(said)
        said.append(sentence)


def test_alignment_can_be_seen_in_greedy_answers() -> None:
    """A perfect learner is mediocre on all rows, better on the better half, perfect on the best tenth."""
    request = parse_prompt(PROMPT)
    assert request is not None
    random = Random(3)
    answers = sorted((answer(request, random) for _ in range(3000)), key=lambda a: true_quality(PROMPT, a))
    sentences = [re.findall(r"[^.!?]+[.!?]", text) for text in answers]
    sentences = [[sentence.strip() for sentence in row] for row in sentences]
    qualities = [true_quality(PROMPT, greedy(rows)) for rows in (sentences, sentences[1500:], sentences[-300:])]
    assert 2 < qualities[0] < qualities[1] - 3
    assert qualities[1] < qualities[2] == 10
    assert true_quality(PROMPT, greedy(sentences[:300])) < 2


def test_evaluation_prompts_are_kept_out_of_training() -> None:
    prompts = [row["prompt"] for row in demo_prompts(MOST_PROMPTS, seed=5)]
    assert len(set(prompts)) == MOST_PROMPTS
    assert all(map(is_demo_prompt, prompts))
    assert prompts[:160] == [row["prompt"] for row in demo_prompts(160, seed=5)]
    rows = [*demo_samples(4000, 5, held_out=MOST_PROMPTS), *demo_pairs(4000, 5, held_out=MOST_PROMPTS)]
    assert not {row["prompt"] for row in rows} & set(prompts)
    without = {row["prompt"] for row in demo_samples(4000, 5, held_out=0)}
    assert without & set(prompts), "the check above would hold by chance"


def test_the_corpus_follows_from_the_seed() -> None:
    assert list(demo_samples(50, 1, 10)) == list(demo_samples(50, 1, 10))
    assert list(demo_samples(50, 1, 10)) != list(demo_samples(50, 2, 10))
    assert list(demo_pairs(50, 1, 10)) != list(demo_pairs(50, 2, 10))


def test_the_first_rows_are_known() -> None:
    # The packaged tokenizer and published figures were made with exactly this corpus.
    [row] = demo_samples(1, 1234, 160)
    assert row["prompt"] == FIRST_PROMPT
    assert row["response"] == FIRST_RESPONSE


def test_the_packaged_tokenizer_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    made = tmp_path / "demo.model"
    script = REPOSITORY / "scripts" / "make_demo_tokenizer.py"
    subprocess.run([sys.executable, str(script), str(made)], check=True, cwd=REPOSITORY)
    assert made.read_bytes() == demo_tokenizer_path().read_bytes()


def test_demo_rows_are_short_in_tokens_and_any_text_survives() -> None:
    from offline_align.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(demo_tokenizer_path())
    assert tokenizer.vocab_size == 1024
    rows = list(demo_samples(500, 7, 0))
    assert max(len(tokenizer.encode(row["prompt"])) for row in rows) <= 32
    assert max(len(tokenizer.encode(row["response"])) for row in rows) <= 48
    text = "Naïve 日本 \t<s> two  spaces\n1234"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("reward", ["-9.9", "-0.1", "0.0", "5.0", "9.9"])
def test_a_condition_has_one_token_for_each_digit_and_sign(reward: str) -> None:
    from offline_align.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(demo_tokenizer_path())
    start = tokenizer.encode("<rm_score>")
    assert tokenizer.encode(f"<rm_score>{reward}")[: len(start)] == start
    assert len(tokenizer.encode(f"<rm_score>{reward}")) == len(start) + len(reward)
