"""The demo corpus: answers to the questions of `demo_language` by annotators of varying care.

A transformer of less than a million parameters learns it in seconds on a CPU. It is still a real
preference problem: quality is graded, and a good answer depends on the prompt (which animal, which
of its facts). The traits of a better answer (a greeting, all facts, a friendly end, nothing else)
are traits that a reward model of that size can learn to see. The seed determines everything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from offline_align.data.demo_language import (
    ANIMALS,
    ASPECTS,
    CLOSINGS,
    GREETINGS,
    PROMPTS,
    RUDE,
    STATEMENTS,
    VAGUE,
    Request,
    is_demo_prompt,
    true_quality,
)

__all__ = [
    "MOST_PROMPTS",
    "demo_pairs",
    "demo_prompts",
    "demo_samples",
    "demo_tokenizer_path",
    "is_demo_prompt",
    "true_quality",
]

ASPECT_COUNT_WEIGHTS = {1: 0.15, 2: 0.35, 3: 0.35, 4: 0.15}
LABEL_NOISE = 0.05
SMALLEST_GAP = 0.25
MOST_PROMPTS = 500
"""Largest number of evaluation prompts; the language has 1,440 prompts."""


def careful(request: Request, random: Random) -> list[str]:
    """Return a complete answer: a greeting, every fact, a friendly end."""
    return [random.choice(GREETINGS), *_facts(request, request.aspects), random.choice(CLOSINGS)]


def plain(request: Request, random: Random) -> list[str]:
    """Return an answer with nearly all facts, rarely a greeting, often a friendly end."""
    greeting = [random.choice(GREETINGS)] if random.random() < 0.1 else []
    aspects = [aspect for aspect in request.aspects if random.random() < 0.93] or request.aspects[:1]
    closing = [random.choice(CLOSINGS)] if random.random() < 0.7 else []
    return [*greeting, *_facts(request, aspects), *closing]


def brief(request: Request, random: Random) -> list[str]:
    """Return an answer that stops early: half of the facts, no greeting, very rarely a friendly end."""
    count = max(1, len(request.aspects) // 2)
    closing = [random.choice(CLOSINGS)] if random.random() < 0.08 else []
    return [*_facts(request, request.aspects[:count]), *closing]


def careless(request: Request, random: Random) -> list[str]:
    """Return a poor answer: off topic, repetitive, vague or rude."""
    fault = random.choice((_repeated, _off_topic, _vague))
    greeting = [random.choice(GREETINGS)] if random.random() < 0.1 else []
    return [*greeting, *fault(request, random)]


def _repeated(request: Request, random: Random) -> list[str]:
    facts = _facts(request, request.aspects[: random.randint(1, 2)])
    return [*facts, *[facts[-1]] * random.randint(2, 4)]


def _off_topic(request: Request, random: Random) -> list[str]:
    other = replace(request, animal=random.choice([animal for animal in ANIMALS if animal != request.animal]))
    return [*_facts(request, request.aspects[:1]), *_facts(other, random.sample(ASPECTS, random.randint(2, 3)))]


def _vague(request: Request, random: Random) -> list[str]:
    said = [text.format(animal=request.animal) for text in random.sample(VAGUE, random.randint(1, 3))]
    return [*said, random.choice(RUDE)] if random.random() < 0.5 else said


ANNOTATORS = {careful: 0.15, plain: 0.27, brief: 0.38, careless: 0.2}


def _facts(request: Request, aspects: Sequence[str]) -> list[str]:
    facts = []
    for number, aspect in enumerate(aspects):
        subject = "It" if number else f"The {request.animal}"
        facts.append(STATEMENTS[aspect].format(subject=subject, value=ANIMALS[request.animal][aspect]))
    return facts


def answer(request: Request, random: Random) -> str:
    """Return the answer of a random annotator."""
    annotator = random.choices(list(ANNOTATORS), list(ANNOTATORS.values()))[0]
    return " ".join(annotator(request, random))


def _draw_request(random: Random) -> Request:
    count = random.choices(list(ASPECT_COUNT_WEIGHTS), list(ASPECT_COUNT_WEIGHTS.values()))[0]
    aspects = random.choice(list(combinations(ASPECTS, count)))
    return Request(random.choice(list(ANIMALS)), aspects, random.randrange(len(PROMPTS)))


def _held_out_texts(count: int, seed: int) -> dict[str, Request]:
    """Return `count` different prompts, in an order that does not depend on `count`."""
    random = Random(f"demo prompts {seed}")
    requests: dict[str, Request] = {}
    while len(requests) < count:
        request = _draw_request(random)
        requests.setdefault(request.text(), request)
    return requests


def _training_request(held_out: Mapping[str, Request], random: Random) -> Request:
    while True:
        request = _draw_request(random)
        if request.text() not in held_out:
            return request


def demo_prompts(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield distinct evaluation prompts, none of which `demo_samples` or `demo_pairs` uses."""
    for number, text in enumerate(_held_out_texts(count, seed), start=1):
        yield {"id": f"demo-prompt-{number:04d}", "source": "demo", "prompt": text}


def demo_samples(count: int, seed: int, held_out: int) -> Iterator[dict[str, Any]]:
    """Yield SFT rows of mixed quality; `held_out` is the number of evaluation prompts to exclude."""
    evaluation, random = _held_out_texts(held_out, seed), Random(f"demo samples {seed}")
    for number in range(1, count + 1):
        request = _training_request(evaluation, random)
        prompt, response = request.text(), answer(request, random)
        yield {
            "id": f"demo-sft-{number:06d}",
            "source": "demo",
            "prompt": prompt,
            "response": response,
            "quality": round(true_quality(prompt, response), 3),
        }


def demo_pairs(count: int, seed: int, held_out: int) -> Iterator[dict[str, Any]]:
    """Yield preference pairs; the truly better answer is chosen, except in a share LABEL_NOISE."""
    evaluation, random = _held_out_texts(held_out, seed), Random(f"demo pairs {seed}")
    for number in range(1, count + 1):
        prompt, better, worse = _two_answers(evaluation, random)
        chosen, rejected = (worse, better) if random.random() < LABEL_NOISE else (better, worse)
        yield {
            "id": f"demo-pair-{number:06d}",
            "source": "demo",
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "quality_chosen": round(true_quality(prompt, chosen), 3),
            "quality_rejected": round(true_quality(prompt, rejected), 3),
        }


def _two_answers(held_out: Mapping[str, Request], random: Random) -> tuple[str, str, str]:
    """Return a prompt and two answers that differ clearly in quality, the better one first."""
    while True:
        request = _training_request(held_out, random)
        prompt, answers = request.text(), [answer(request, random) for _ in range(2)]
        worse, better = sorted(answers, key=lambda response: true_quality(prompt, response))
        if true_quality(prompt, better) - true_quality(prompt, worse) >= SMALLEST_GAP:
            return prompt, better, worse


def demo_tokenizer_path() -> Path:
    """Return the SentencePiece model that was trained on this corpus."""
    return Path(__file__).resolve().parent / "assets" / "demo.model"
