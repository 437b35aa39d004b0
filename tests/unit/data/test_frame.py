"""Text that a template writes around an answer is not part of a generated answer."""

from pathlib import Path

import pytest

from offline_align.config.sections import Template
from offline_align.data.frame import Frame
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from offline_align.generate.requests import Request
from offline_align.generate.stop import finish, is_stopped
from tests.small_tokenizers import TEMPLATES, with_spaces_in_front, write_hugging_face

QUESTION = (Message("user", "Name a prime."),)
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Name a prime."))


def renderer(folder: Path, name: str, form: str, eos: str) -> Renderer:
    if form == "byte_level":
        written = write_hugging_face(folder, chat_template=TEMPLATES[name], eos_token=eos)
    else:
        written = with_spaces_in_front(folder, form, TEMPLATES[name], eos_token="</s>" if eos == "<|pad|>" else eos)
    return Renderer(load_tokenizer(written), Template.chat)


def learnt(renderer: Renderer, prompt: tuple[Message, ...], answer: str, stop: tuple[str, ...] = ()) -> str:
    """Return the answer of `generate` for a model that has memorised a row and continues after its end."""
    context, target = renderer.row(prompt, answer)
    request = Request(0, 0, context, 64, frame=renderer.frame(prompt))
    ids = [*target, *renderer.tokenizer.encode("again"), renderer.tokenizer.eos_id]
    return finish(request, ids, renderer.tokenizer, renderer.end_ids, stop).response


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("form", ["byte_level", "prepend", "always", "first"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_that_is_learnt_by_heart_comes_back_as_it_was(name: str, form: str, eos: str, tmp_path: Path) -> None:
    made = renderer(tmp_path, name, form, eos)
    for prompt in (QUESTION, DIALOGUE):
        for answer in ("Two.", "- one\n- two", "Two.  Or three"):
            assert learnt(made, prompt, answer) == answer
        for answer in (" Two.", "Two. \n", "<think>\nhm\n</think>\n\nTwo."):
            again = learnt(made, prompt, answer)
            assert made.target(prompt, again) == made.target(prompt, answer)


def test_a_thought_is_part_of_the_answer(tmp_path: Path) -> None:
    made = renderer(tmp_path, "thoughts", "byte_level", "<|im_end|>")
    answer = "<think>\nhm\n</think>\n\nTwo."
    assert learnt(made, QUESTION, answer) == answer


def test_an_answer_without_what_the_template_writes_before_it_stays_whole(tmp_path: Path) -> None:
    made = renderer(tmp_path, "empty_thought", "byte_level", "<|im_end|>")
    request = Request(0, 0, [], 64, frame=made.frame(QUESTION))
    ids = [*made.tokenizer.encode("Two."), made.tokenizer.eos_id]
    assert finish(request, ids, made.tokenizer, made.end_ids, ()).response == "Two."


def test_an_answer_that_is_cut_short_keeps_its_white_space(tmp_path: Path) -> None:
    made = renderer(tmp_path, "headings", "byte_level", "<|im_end|>")
    request = Request(0, 0, [], 64, frame=made.frame(QUESTION))
    ids = made.tokenizer.encode("one\n\n")
    assert finish(request, ids, made.tokenizer, made.end_ids, ()).response == "one\n\n"


def test_what_is_written_before_the_answer_stops_nothing(tmp_path: Path) -> None:
    made = renderer(tmp_path, "empty_thought", "byte_level", "<|im_end|>")
    assert learnt(made, QUESTION, "one\n\ntwo", ("\n\n",)) == "one"
    context, target = made.row(QUESTION, "one\n\ntwo")
    request = Request(0, 0, context, 64, frame=made.frame(QUESTION))
    stopped = [is_stopped(request, target[:n], made.tokenizer, ["\n\n"]) for n in range(1, len(target))]
    first = stopped.index(True)
    assert made.tokenizer.decode(target[: first + 1]).startswith("<think>\n\n</think>\n\none\n\n")


def test_stop_strings_that_begin_before_the_answer() -> None:
    frame = Frame(before="x\n ")
    assert frame.touches("\n") and frame.touches("\n User") and frame.touches(" a")
    assert not frame.touches("User") and not frame.touches("\n\n")
    assert not Frame().touches("a")
