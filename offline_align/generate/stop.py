"""Find the end of an answer: at an end-of-sequence id, or before a stop string."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from offline_align.data.prefix import After
from offline_align.data.tokenizer import Tokenizer
from offline_align.generate.requests import Completion, Request


def finish(
    request: Request,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    eos_ids: frozenset[int],
    stop: Sequence[str],
    log_probs: Sequence[float] | None = None,
) -> Completion:
    """Return the answer in the generated `ids`, which may continue past its end.

    A model also generates the text that the template writes around answers; it is removed. With the
    `log_probs` of the ids, the answer has token details.
    """
    ids = ids[: request.max_new_tokens]
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    text = request.frame.within(decode(tokenizer, ids[:end], request.frame.after))
    cut = first_stop(text, stop)
    if end is not None and cut is None:
        text = text.removesuffix(request.frame.behind)
    ended = end is not None or cut is not None
    reason: Literal["stop", "length"] = "stop" if ended else "length"
    num_tokens = len(ids) if end is None else end + 1
    answer = Completion(request.row, request.sample_index, text[:cut], reason, num_tokens, request.variant)
    if log_probs is None:
        return answer
    return replace(answer, token_ids=tuple(ids[:num_tokens]), log_probs=tuple(log_probs[:num_tokens]))


def decode(tokenizer: Tokenizer, ids: Sequence[int], after: After) -> str:
    """Return the text of `ids`; ids beyond the tokenizer's vocabulary are skipped."""
    return tokenizer.decode([token for token in ids if token < tokenizer.vocab_size], after)


def is_stopped(request: Request, ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> bool:
    """Return whether the answer in the `ids` generated so far contains a stop string.

    Checking the last tokens is enough in most calls. The template's text before the answer does not
    count.
    """
    if first_stop(decode(tokenizer, ids[-window_tokens(stop) :], After.text), stop) is None:
        return False
    text = decode(tokenizer, ids, request.frame.after)
    return not request.frame.is_before(text) and first_stop(request.frame.within(text), stop) is not None


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the position of the first stop string in `text`, or None."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return min(places, default=None)


def window_tokens(stop: Sequence[str]) -> int:
    """Return how many last tokens always contain a stop string that just ended: one per byte, plus 2."""
    return max((len(string.encode()) for string in stop), default=0) + 2
