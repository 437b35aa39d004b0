"""FA, RWR and CA: the equations of the paper, and numeric edge cases of rewards and settings."""

import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from offline_align.config.sections import ConditionalMethodSection, Template
from offline_align.data.condition import ValueCondition, check_format, condition_text
from offline_align.data.records import LabelledSample, Message, TrainingRow
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError, DataError
from offline_align.methods import ca, fa, rwr
from offline_align.methods.conditions import Fitted
from tests.small_tokenizers import write_hugging_face, write_sentencepiece

FORMAT = ConditionalMethodSection().reward_format
LIMIT = ConditionalMethodSection().reward_limit
PLAIN = Fitted(ValueCondition(FORMAT, LIMIT, 5.0))


def labelled(*rewards: float) -> list[LabelledSample]:
    prompt = (Message("user", "Hello"),)
    return [LabelledSample(f"row-{i}", prompt, "Fine", {}, 10 * r, r, "s") for i, r in enumerate(rewards)]


ALL_METHODS: list[Callable[[list[LabelledSample]], list[TrainingRow]]] = [
    lambda rows: fa.keep(rows, 0.0),
    lambda rows: rwr.weigh(rows, 5.0),
    lambda rows: ca.condition(rows, PLAIN),
]


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_bad_data(
    method: Callable[[list[LabelledSample]], list[TrainingRow]], reward: float
) -> None:
    with pytest.raises(DataError, match=r"row row-1: reward: .* is not a finite number"):
        method(labelled(1.0, reward))


@pytest.mark.parametrize(("target", "warns"), [(5.0, True), (1.0, False), (-3.0, True)])
def test_a_target_outside_the_rewards_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: float, warns: bool
) -> None:
    renderer = Renderer(load_tokenizer(write_sentencepiece(tmp_path)), Template.paper)
    rows = labelled(-2.0, 1.5)
    made = ca.training_rows(rows, ca.fit(rows, ConditionalMethodSection(target_reward=target), 1), renderer)
    made.finalize([0, 1])
    assert ("rewards of the rows range from -2.00 to 1.50" in caplog.text) is warns


@pytest.mark.parametrize("method", ALL_METHODS)
def test_no_rows_are_bad_data(method: Callable[[list[LabelledSample]], list[TrainingRow]]) -> None:
    with pytest.raises(DataError, match=r"no usable row"):
        method([])


@pytest.mark.parametrize("method", ALL_METHODS)
def test_one_row_and_rows_in_order(method: Callable[[list[LabelledSample]], list[TrainingRow]]) -> None:
    assert [row.sample.id for row in method(labelled(0.5))] == ["row-0"]
    rows = labelled(0.3, 2.0, 0.1, 1.0)
    assert [row.sample for row in method(rows)] == rows


def test_the_best_answers_to_each_prompt_are_kept() -> None:
    first, second = ((Message("user", text),) for text in ("Hello", "Bye"))
    asked = [(first, 0.5), (second, 0.2), (first, 2.0), (first, 2.0), (second, -1.0), (first, 1.0)]
    rows = [LabelledSample(f"row-{i}", prompt, "Fine", {}, r, r, "s") for i, (prompt, r) in enumerate(asked)]
    assert [row.sample.id for row in fa.keep(rows, 0.0, best_of=1)] == ["row-1", "row-2"]
    assert [row.sample.id for row in fa.keep(rows, 0.0, best_of=3)] == ["row-1", "row-2", "row-3", "row-5"]


def test_filtering_is_strict() -> None:
    kept = fa.keep(labelled(-1.0, 0.0, -0.0, 5e-324, 2.0), 0.0)
    assert [row.sample.id for row in kept] == ["row-3", "row-4"]
    assert all((row.weight, row.condition) == (1.0, "") for row in kept)


def test_filtering_at_extreme_thresholds() -> None:
    rows = labelled(-3.0, 0.0, 3.0)
    assert len(fa.keep(rows, -math.inf)) == 3
    with pytest.raises(ConfigError, match=r"method.threshold=3.0: keeps none of 3 rows; the highest reward is 3,"):
        fa.keep(rows, 3.0)
    with pytest.raises(ConfigError, match=r"method.threshold=nan"):
        fa.keep(rows, math.nan)


def test_constant_rewards_keep_nothing_or_all() -> None:
    with pytest.raises(ConfigError, match=r"method.threshold"):
        fa.keep(labelled(0.0, 0.0), 0.0)
    assert [row.weight for row in rwr.weigh(labelled(0.0, 0.0), 5.0)] == [1.0, 1.0]
    assert [row.condition for row in ca.condition(labelled(0.0, 0.0), PLAIN)] == ["<rm_score>0.0"] * 2


def test_weights_follow_equation_5_up_to_one_factor() -> None:
    rewards = [-2.0, -0.5, 0.0, 1.0, 2.5]
    weights = [row.weight for row in rwr.weigh(labelled(*rewards), 5.0)]
    assert sum(weights) == pytest.approx(5.0, rel=1e-14)
    for reward, weight in zip(rewards, weights, strict=True):
        assert weight / weights[2] == pytest.approx(math.exp(reward / 5.0), rel=1e-14)


def test_weights_do_not_depend_on_a_shift_of_the_rewards() -> None:
    rewards = [random.Random(0).gauss(0, 1) for _ in range(100)]
    plain = rwr.scaled_weights(rewards, 0.7)
    assert rwr.scaled_weights([r + 1000 for r in rewards], 0.7) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(
    ("rewards", "beta"),
    [
        ([0.0, 1.0, 2.0], 1e-300),
        ([0.0, 1.0, 2.0], sys.float_info.min),
        ([1e30, 0.0, -1e30], 5.0),
        ([1.7e308, -1.7e308], 5.0),
        ([-1e4, -2e4], 1.0),
    ],
)
def test_extreme_weights_stay_finite_with_mean_one(rewards: list[float], beta: float) -> None:
    weights = rwr.scaled_weights(rewards, beta)
    assert all(math.isfinite(w) and w >= 0 for w in weights)
    assert sum(weights) == pytest.approx(len(rewards))
    assert rwr.effective_sample_size(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("beta", [0.0, -5.0, math.nan, math.inf])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"method.beta=.*positive"):
        rwr.weigh(labelled(1.0), beta)


def test_effective_sample_size() -> None:
    assert rwr.effective_sample_size([2.0] * 7) == pytest.approx(7.0)
    assert rwr.effective_sample_size([1.0, 0.0, 0.0]) == 1.0
    assert rwr.effective_sample_size([1.0, 3.0]) == pytest.approx(16 / 10)


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (5.0, "5.0"),
        (0.04, "0.0"),
        (-0.04, "0.0"),
        (-0.0, "0.0"),
        (-0.06, "-0.1"),
        (1e30, "9.9"),
        (-1e30, "-9.9"),
    ],
)
def test_condition_texts(reward: float, text: str) -> None:
    (row,) = ca.condition(labelled(reward), PLAIN)
    assert row.condition == f"<rm_score>{text}" == condition_text(reward, FORMAT, LIMIT)
    assert row.weight == 1.0


def test_other_formats() -> None:
    assert condition_text(-0.001, "<rm_score> {reward:.2f}", 9.9) == "<rm_score> 0.00"
    assert condition_text(1.25, "[{reward:+05.1f}]", 9.9) == "[+01.2]"
    assert condition_text(-0.2, "{{{reward:.0f}}}", 9.9) == "{0}"


@pytest.mark.parametrize(
    ("reward_format", "problem"),
    [
        ("<rm_score>", "once"),
        ("<rm_score>5.0", "once"),
        ("{reward:.1f}{reward:.1f}", "once"),
        ("{score:.1f}", "once"),
        ("{:.1f}", "once"),
        ("{reward.__class__}", "once"),
        ("{reward:d}", "cannot be filled in"),
        ("{reward:.1f", "cannot be filled in"),
        ("{reward:{width}}", "cannot be filled in"),
        ("{reward:.0%} {other}", "once"),
        ("{reward!z}", "cannot be filled in"),
        ("<{reward:.0e}", ""),
    ],
)
def test_formats_that_cannot_work(reward_format: str, problem: str) -> None:
    if not problem:
        check_format(reward_format, LIMIT)
        return
    with pytest.raises(ConfigError, match=rf"method.reward_format=.*{problem}"):
        check_format(reward_format, LIMIT)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_limits_that_cannot_work(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"method.reward_limit="):
        check_format(FORMAT, limit)


ALL_VALUES = [i / 10 for i in range(-99, 100)]


@pytest.mark.parametrize("template", [Template.paper, Template.chat])
def test_the_default_format_is_stable_with_a_byte_level_tokenizer(template: Template, tmp_path: Path) -> None:
    renderer = Renderer(load_tokenizer(write_hugging_face(tmp_path)), template)
    ca.check_stable(renderer, ValueCondition(FORMAT, LIMIT, 5.0), ALL_VALUES)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_default_format_is_stable_with_split_digits(kind: str, tmp_path: Path) -> None:
    renderer = Renderer(load_tokenizer(write_sentencepiece(tmp_path, kind=kind)), Template.paper)
    ca.check_stable(renderer, ValueCondition(FORMAT, LIMIT, 5.0), ALL_VALUES)


def test_conditions_with_different_numbers_of_tokens_are_refused(tmp_path: Path) -> None:
    renderer = Renderer(load_tokenizer(write_sentencepiece(tmp_path)), Template.paper)
    with pytest.raises(ConfigError, match=r"method.reward_format=.*'<rm_score>12.0' takes \d tokens but"):
        ca.check_stable(renderer, ValueCondition(FORMAT, 20.0, 5.0), [1.0, 12.0])
    ca.check_stable(renderer, ValueCondition(FORMAT, 9.9, 5.0), [1.0, 12.0])


class FakeRenderer:
    """Encodes each character as one id, then applies `change` to imitate a tokenizer."""

    def __init__(self, change: Callable[[list[int]], list[int]]) -> None:
        self.change = change

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        return self.change([ord(c) for c in "".join(m.content for m in prompt) + "!" + condition])

    def tail_tokens(self, condition: str) -> int:
        return 1 + len(condition)


def test_conditions_with_the_same_tokens_are_refused() -> None:
    unknown = FakeRenderer(lambda ids: [0 if chr(i).isdigit() else i for i in ids])
    with pytest.raises(ConfigError, match=r"'<rm_score>2.0' and '<rm_score>1.0' are the same tokens"):
        ca.check_stable(unknown, ValueCondition(FORMAT, LIMIT, 5.0), [1.0, 2.0])


def test_conditions_that_change_the_prompt_are_refused() -> None:
    merging = FakeRenderer(lambda ids: ids[1:] if len(ids) > 2 else ids)
    with pytest.raises(ConfigError, match=r"'<rm_score>1.0' changes the tokens of the prompt"):
        ca.check_stable(merging, ValueCondition(FORMAT, LIMIT, 5.0), [1.0])


def test_conditions_may_join_the_generation_prompt_if_all_do() -> None:
    def join(pattern: str) -> FakeRenderer:
        return FakeRenderer(lambda ids: [ord(c) for c in re.sub(pattern, "\x01", "".join(map(chr, ids)))])

    ca.check_stable(join("!<"), ValueCondition(FORMAT, LIMIT, 5.0), [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"'2.0>' changes the tokens of the prompt"):
        ca.check_stable(join("!2"), ValueCondition("{reward:.1f}>", LIMIT, 5.0), [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"'<rm_score>1.0' changes the tokens of the prompt"):
        ca.check_stable(join("a!<"), ValueCondition(FORMAT, LIMIT, 5.0), [1.0, 2.0])


def test_merged_digits_are_refused_only_among_values_of_one_sign() -> None:
    def merge(ids: list[int]) -> list[int]:
        text = "".join(map(chr, ids))
        return [ord(c) for c in text.replace("5.0", "\x01")]

    with pytest.raises(ConfigError, match=r"takes 11 tokens but '<rm_score>1.0' takes 13"):
        ca.check_stable(FakeRenderer(merge), ValueCondition(FORMAT, LIMIT, 5.0), [1.0, 5.0])
    ca.check_stable(FakeRenderer(merge), ValueCondition(FORMAT, LIMIT, 5.0), [-1.0, 5.0])
