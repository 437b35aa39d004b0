"""Turn prompts into requests to an engine: token ids, length limit, and position in the output."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from offline_align.config.sections import DataSection, GenerateSection, TooLong
from offline_align.data.fate import say_what_fits
from offline_align.data.frame import PLAIN, Frame
from offline_align.data.records import Prompt
from offline_align.data.template import Renderer
from offline_align.data.tokenize import OnRefused
from offline_align.errors import DataError
from offline_align.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one answer. `row` is the index of the prompt, `sample_index` of the answer to it.

    `variant` is the index of the condition.
    """

    row: int
    sample_index: int
    context: list[int]
    max_new_tokens: int
    variant: int = 0
    frame: Frame = PLAIN
    """The text that the template writes around the answer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its text without end of sequence, the reason it ended, and its length in tokens."""

    row: int
    sample_index: int
    response: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    variant: int = 0
    token_ids: tuple[int, ...] = ()
    """The sampled ids, with the one that ended the answer; empty unless the engine gives token details."""
    log_probs: tuple[float, ...] = ()
    """Log-probability of each id under the distribution that it was sampled from, in nats."""


class Engine(Protocol):
    """Answers requests. Up to rounding, an answer does not depend on the other requests."""

    batch_size: int
    """Preferred number of requests per call."""

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Yield answers in batches as they finish, one per request; closing the iterator stops the work."""


class RolloutEngine(Engine, Protocol):
    """An engine whose policy is being trained: its weights change between two calls of `answers`."""

    def reseed(self, seed: int) -> None:
        """Sample from now on with random numbers that depend on (seed, row, sample index) alone."""

    def replace_weights(self, tensors: "Iterable[tuple[str, Tensor]]") -> None:
        """Overwrite the policy's weights by tensors under Hugging Face names, one tensor at a time.

        Tied weights are given once, under the name of the embedding. Raises AlignError if a tensor is
        missing, unknown, repeated or has another shape.
        """

    def release(self) -> None:
        """Free the device's memory until `resume`; `answers` and `replace_weights` must not be called."""

    def resume(self) -> None:
        """Take the memory back. The weights are those from before `release`."""


@dataclass(frozen=True)
class Workload:
    """All requests in output order, and the prompts that did not fit."""

    requests: list[Request]
    left_out: dict[str, str] = field(default_factory=dict)
    """Ids of the prompts that got no request, each with the reason."""
    truncated: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Number of prompts that were left out, by reason."""
        return dict(Counter(self.left_out.values()))


def build_requests(
    prompts: Sequence[Prompt],
    renderer: Renderer,
    conditions: Sequence[str],
    data: DataSection,
    generate: GenerateSection,
    on_refused: OnRefused,
) -> Workload:
    """Return `generate.n` requests for each prompt under each condition.

    Most policies have one condition, the empty text. Prompt and answer share `data.max_length`
    tokens, of which a quarter (or `max_new_tokens`, if that is less) is reserved for the answer.
    Longer prompts are truncated on the left or left out, depending on `data.too_long`. Prompts that
    the chat template refuses are left out and passed to `on_refused`, as a map from id to the
    template's message. Raises DataError if no prompt is left.
    """
    requests: list[Request] = []
    refused: dict[str, str] = {}
    left_out: dict[str, str] = {}
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
            # A prompt must fit under all conditions, or its answers could not be compared.
            left_out[prompt.id] = "too_long"
            continue
        truncated += any(len(context or []) < len(w) for context, w in zip(contexts, whole, strict=True))
        for variant, context in enumerate(contexts):
            assert context is not None
            room = min(generate.max_new_tokens, data.max_length - len(context))
            requests += [Request(row, sample, context, room, variant, frame) for sample in range(generate.n)]
    if refused:
        on_refused(refused)
    if len(refused) == len(prompts):
        raise DataError(f"data.input: the chat template refuses every one of {counted(len(prompts), 'prompt')}")
    dropped = dict(Counter(left_out.values()))
    say_what_fits(logger, len(prompts) - len(refused), truncated, dropped, data, "prompt")
    return Workload(requests, left_out, truncated)


def _fit(context: list[int], longest: int, renderer: Renderer, condition: str, too_long: TooLong) -> list[int] | None:
    """Return the context in at most `longest` tokens, or None if the prompt must be left out.

    Begin of sequence, the generation prompt and the condition stay.
    """
    if len(context) <= longest:
        return context
    start = renderer.start_ids
    room = longest - len(start)
    if too_long is TooLong.drop or room < renderer.tail_tokens(condition):
        return None
    return start + context[len(context) - room :]
