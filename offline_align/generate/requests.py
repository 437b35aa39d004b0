"""From prompts to what an engine is asked: token ids, room for the answer, and a place in the output."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from offline_align.config.sections import DataSection, GenerateSection, TooLong
from offline_align.data.frame import PLAIN, Frame
from offline_align.data.records import Prompt
from offline_align.data.template import Renderer
from offline_align.data.tokenize import OnRefused
from offline_align.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to one prompt: `row` counts prompts from 0, `sample_index` the answers to it.

    `variant` counts the conditions that the prompt is asked under.
    """

    row: int
    sample_index: int
    context: list[int]
    max_new_tokens: int
    variant: int = 0
    frame: Frame = PLAIN
    """What the template writes around the answer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its text without end of sequence, why it ended, and its length in tokens."""

    row: int
    sample_index: int
    response: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    variant: int = 0


class Engine(Protocol):
    """Answers requests; the answer to one does not depend on the others beyond rounding."""

    batch_size: int
    """Requests that one call takes best."""

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Yield the answers as they are ready, some at a time, each request's once; closing it ends the work."""


@dataclass(frozen=True)
class Workload:
    """All requests, in the order of the output, and what became of prompts that do not fit."""

    requests: list[Request]
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0


def build_requests(
    prompts: Sequence[Prompt],
    renderer: Renderer,
    conditions: Sequence[str],
    data: DataSection,
    generate: GenerateSection,
    on_refused: OnRefused,
) -> Workload:
    """Return `generate.n` requests for each prompt under each of `conditions` (one, empty, for most policies).

    Prompt and answer share `data.max_length` tokens, of which a quarter (or `max_new_tokens`, if less) is
    kept for the answer; longer prompts lose their left or are left out, as `data.too_long` says. Left out are those
    too that the chat template refuses; `on_refused` is told of them, by id, and what it says. Raises DataError where
    no prompt is left.
    """
    requests: list[Request] = []
    refused: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    truncated = 0
    longest = data.max_length - min(generate.max_new_tokens, data.max_length // 4)
    for row, prompt in enumerate(prompts):
        try:
            whole = [renderer.context(prompt.prompt, condition) for condition in conditions]
            frame = renderer.frame(prompt.prompt)
        except DataError as error:
            refused[prompt.id] = str(error)
            continue
        contexts = [_fit(w, longest, renderer, c, data.too_long) for w, c in zip(whole, conditions, strict=True)]
        if None in contexts:
            # Under one condition but not another a prompt could not be compared.
            dropped["too long"] += 1
            continue
        truncated += any(len(context or []) < len(w) for context, w in zip(contexts, whole, strict=True))
        for variant, context in enumerate(contexts):
            assert context is not None
            room = min(generate.max_new_tokens, data.max_length - len(context))
            requests += [Request(row, sample, context, room, variant, frame) for sample in range(generate.n)]
    if refused:
        on_refused(refused)
        dropped["refused by the chat template"] = len(refused)
    if not requests:
        raise DataError(f"data.input: no prompt is left of {len(prompts)}: {dict(dropped)}")
    if dropped or truncated:
        logger.warning("%d prompts: %d cut from the left, left out: %s", len(prompts), truncated, dict(dropped))
    return Workload(requests, dict(dropped), truncated)


def _fit(context: list[int], longest: int, renderer: Renderer, condition: str, too_long: TooLong) -> list[int] | None:
    """Return the context in at most `longest` tokens, or None where it is to be left out.

    Begin of sequence, the request for the answer and the condition stay.
    """
    if len(context) <= longest:
        return context
    start = renderer.start_ids
    room = longest - len(start)
    if too_long is TooLong.drop or room < renderer.tail_tokens(condition):
        return None
    return start + context[len(context) - room :]
