import pytest

from offline_align.data.tokenizer import Tokenizer
from offline_align.generate.requests import Request
from offline_align.generate.stop import finish, first_stop, window_tokens


def request(max_new_tokens: int = 100) -> Request:
    return Request(3, 1, [5, 6], max_new_tokens)


def test_end_of_sequence_ends_an_answer(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Fine, thank you!")
    answer = finish(request(), [*ids, 2, 2, 2], tokenizer, frozenset({2}), [])
    assert (answer.response, answer.finish_reason) == ("Fine, thank you!", "stop")
    assert answer.num_tokens == len(ids) + 1
    assert (answer.row, answer.sample_index) == (3, 1)


def test_an_answer_that_is_cut_off_says_so(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Fine, thank you!")
    answer = finish(request(), ids, tokenizer, frozenset({2}), [])
    assert (answer.response, answer.finish_reason) == ("Fine, thank you!", "length")
    shorter = finish(request(len(ids) - 1), [*ids, 2], tokenizer, frozenset({2}), [])
    assert (shorter.finish_reason, shorter.num_tokens) == ("length", len(ids) - 1)
    assert "Fine, thank you!".startswith(shorter.response)


def test_stop_strings_are_removed_with_what_follows(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Fine.User:And you?")
    answer = finish(request(), ids, tokenizer, frozenset({2}), ["you", "User:"])
    assert (answer.response, answer.finish_reason) == ("Fine.", "stop")


def test_an_empty_answer_is_an_answer(tokenizer: Tokenizer) -> None:
    answer = finish(request(), [2], tokenizer, frozenset({2}), [])
    assert (answer.response, answer.finish_reason, answer.num_tokens) == ("", "stop", 1)


def test_rows_of_the_embedding_without_a_token_are_left_out(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("Fine"), tokenizer.vocab_size + 5]
    assert finish(request(), ids, tokenizer, frozenset({2}), []).response == "Fine"


@pytest.mark.parametrize(("text", "stop", "place"), [("abcb", ["b", "c"], 1), ("abc", ["x"], None), ("abc", [], None)])
def test_the_first_stop_counts(text: str, stop: list[str], place: int | None) -> None:
    assert first_stop(text, stop) == place


def test_the_window_holds_a_stop_string_of_single_bytes() -> None:
    assert window_tokens(["日本", "ab"]) == 8
