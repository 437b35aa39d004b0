from dataclasses import replace

import pytest

from offline_align.config.sections import DataSection, GenerateSection, Template, TooLong
from offline_align.data.records import Message, Prompt
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import DataError
from offline_align.generate.requests import build_requests

GENERATE = GenerateSection(max_new_tokens=20)
DATA = DataSection(max_length=60)
CONDITION = "<rm_score>5.0"


def prompt(text: str, row_id: str = "a") -> Prompt:
    return Prompt(row_id, (Message("user", text),), {"prompt": text})


def nothing_refused(refused: dict[str, str]) -> None:
    raise AssertionError(refused)


@pytest.fixture
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer, Template.paper)


def test_a_prompt_becomes_the_context_of_training(renderer: Renderer) -> None:
    work = build_requests([prompt("Hello")], renderer, [CONDITION], DATA, GENERATE, nothing_refused)
    (request,) = work.requests
    assert request.context == renderer.context(prompt("Hello").prompt, CONDITION)
    assert (request.row, request.sample_index, request.max_new_tokens) == (0, 0, 20)


def test_every_prompt_is_asked_n_times(renderer: Renderer) -> None:
    work = build_requests([prompt("Hello")] * 2, renderer, [""], DATA, replace(GENERATE, n=3), nothing_refused)
    assert [(r.row, r.sample_index) for r in work.requests] == [(i, k) for i in range(2) for k in range(3)]


def test_a_long_prompt_loses_its_left_and_keeps_the_condition(renderer: Renderer) -> None:
    long = prompt("a quick fox " * 40)
    work = build_requests([long], renderer, [CONDITION], DATA, GENERATE, nothing_refused)
    (request,) = work.requests
    assert len(request.context) == 45
    assert request.max_new_tokens == 15
    tail = renderer.tail_tokens(CONDITION)
    assert request.context[-tail:] == renderer.context(long.prompt, CONDITION)[-tail:]
    assert work.truncated == 1


def test_a_long_prompt_can_be_left_out(renderer: Renderer) -> None:
    data = replace(DATA, too_long=TooLong.drop)
    work = build_requests([prompt("fox " * 100), prompt("Hello", "b")], renderer, [""], data, GENERATE, nothing_refused)
    assert [request.row for request in work.requests] == [1]
    assert work.dropped == {"too_long": 1}
    assert work.left_out == {"a": "too_long"}


def test_the_answer_takes_what_the_prompt_leaves(renderer: Renderer) -> None:
    text = "fox " * 17
    work = build_requests([prompt(text)], renderer, [""], DATA, GENERATE, nothing_refused)
    (request,) = work.requests
    assert 45 >= len(request.context) > 40
    assert request.max_new_tokens == 60 - len(request.context) < 20
    assert work.truncated == 0


def test_no_prompt_left_is_an_error(renderer: Renderer) -> None:
    data = replace(DATA, too_long=TooLong.drop)
    with pytest.raises(DataError, match="none of 1 prompt is left: 1 too_long; see data.max_length=60"):
        build_requests([prompt("fox " * 100)], renderer, [""], data, GENERATE, nothing_refused)


class Refusing(Renderer):
    def context(self, prompt: object, condition: str = "") -> list[int]:
        raise DataError("chat template: roles must alternate")


def test_refused_prompts_are_told_and_left_out(tokenizer: Tokenizer) -> None:
    renderer = Refusing(tokenizer, Template.paper)
    told: list[dict[str, str]] = []
    with pytest.raises(DataError, match="the chat template refuses every one of 2 prompts"):
        build_requests([prompt("Hello"), prompt("Hi", "b")], renderer, [""], DATA, GENERATE, told.append)
    assert told == [dict.fromkeys("ab", "chat template: roles must alternate")]


def test_several_conditions_keep_or_lose_a_prompt_together(renderer: Renderer) -> None:
    conditions = ["<rm_score>1.0", "<rm_score>-1.0"]
    work = build_requests([prompt("Hello")], renderer, conditions, DATA, GENERATE, nothing_refused)
    assert [(r.row, r.variant) for r in work.requests] == [(0, 0), (0, 1)]
    assert work.requests[0].context != work.requests[1].context
    # There is room only for the shorter condition.
    short = len(work.requests[0].context)
    assert len(work.requests[1].context) > short
    data = replace(DATA, max_length=short + 1, too_long=TooLong.drop)
    generate = replace(GENERATE, max_new_tokens=1)
    alone = build_requests([prompt("Hello")], renderer, conditions[:1], data, generate, nothing_refused)
    assert len(alone.requests) == 1
    with pytest.raises(DataError, match="none of 1 prompt is left: 1 too_long"):
        build_requests([prompt("Hello")], renderer, conditions, data, generate, nothing_refused)
