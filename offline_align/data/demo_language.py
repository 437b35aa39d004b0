"""The language of the demo corpus: a visitor asks an animal park about an animal.

Prompts and answers are plain English with fewer than 150 different words. A prompt can be parsed
back from its text, so the true quality of any answer is known.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from offline_align.data.records import Message

_FACTS = """
fox red forest mice bark
owl brown tower mice hoot
duck green pond bread quack
frog green pond flies croak
horse brown stable hay neigh
wolf grey forest meat howl
lion yellow savanna meat roar
crow black tower seeds caw
sheep white meadow grass bleat
pig pink barn apples grunt
cow white meadow grass moo
cat black garden fish purr
dog brown barn meat bark
bear black forest honey growl
seal grey sea fish bark
whale blue sea fish sing
"""

ASPECTS = ("colour", "home", "food", "voice")
ANIMALS = {
    animal: dict(zip(ASPECTS, facts, strict=True))
    for animal, *facts in (row.split() for row in _FACTS.strip().splitlines())
}
VALUES = {aspect: sorted({facts[aspect] for facts in ANIMALS.values()}) for aspect in ASPECTS}
STATEMENTS = {
    "colour": "{subject} is {value}.",
    "home": "{subject} lives in the {value}.",
    "food": "{subject} eats {value}.",
    "voice": "{subject} can {value}.",
}
PROMPTS = (
    "Please tell me the {aspects} of the {animal}.",
    "What is the {aspects} of the {animal}?",
    "I would like to know the {aspects} of the {animal}.",
    "Can you help me? I want to learn the {aspects} of the {animal}.",
    "My child asks for the {aspects} of the {animal}.",
    "We are looking for the {aspects} of the {animal}.",
)
GREETINGS = ("Hello!", "Good day!", "Welcome!")
CLOSINGS = ("Enjoy your visit!", "Have a nice day!", "Come back soon!")
VAGUE = ("The {animal} is an animal.", "It depends.", "I am not sure.", "Many people like it.")
RUDE = ("I do not know.", "Look it up yourself.", "That is a silly question.")


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed prompt: the animal, the requested aspects, and the wording."""

    animal: str
    aspects: tuple[str, ...]
    wording: int

    def text(self) -> str:
        """Return the text of the prompt."""
        return PROMPTS[self.wording].format(animal=self.animal, aspects=_enumeration(self.aspects))


def _enumeration(aspects: Sequence[str]) -> str:
    *first, last = aspects
    return f"{', the '.join(first)} and the {last}" if first else last


def _pattern(template: str) -> str:
    slots = {
        "animal": "(?P<animal>[a-z]+)",
        "aspects": "(?P<aspects>[a-z, ]+)",
        "value": "(?P<value>[a-z]+)",
        "subject": "(?:It|The (?P<subject>[a-z]+))",
    }
    pattern = re.escape(template)
    for slot, expression in slots.items():
        pattern = pattern.replace(re.escape(f"{{{slot}}}"), expression)
    return pattern


_PROMPT_PATTERNS = [re.compile(_pattern(text)) for text in PROMPTS]
_STATEMENT_PATTERNS = {aspect: re.compile(_pattern(text)) for aspect, text in STATEMENTS.items()}
_SENTENCE = re.compile(r"[^.!?]+[.!?]?")


def parse_prompt(text: str) -> Request | None:
    """Return the request behind a demo prompt, or None if the text is not a demo prompt."""
    for wording, pattern in enumerate(_PROMPT_PATTERNS):
        match = pattern.fullmatch(text)
        if match:
            aspects = tuple(re.split(r", the | and the ", match["aspects"]))
            request = Request(match["animal"], aspects, wording)
            return request if _is_known(request) and request.text() == text else None
    return None


def _is_known(request: Request) -> bool:
    known = request.animal in ANIMALS
    return known and len(set(request.aspects)) == len(request.aspects) and set(request.aspects) <= set(ASPECTS)


def is_demo_prompt(text: str) -> bool:
    """Return whether `true_quality` is defined for this prompt."""
    return parse_prompt(text) is not None


def true_quality(prompt: Sequence[Message] | str, response: str) -> float:
    """Return the true quality of a response, 0 to 10, from the texts alone.

    Let f be the share of requested facts stated correctly, minus half of the share stated wrongly,
    and at least 0. The quality is 6 f, plus 1.5 if the first sentence is a greeting, 1 if the last
    sentence is friendly, and 1.5 f if there is no fault. Each fault (a repeated sentence, a fact
    that was not requested or is about another animal, a greeting elsewhere, anything vague, rude or
    cut off) costs 0.5. Raises ValueError if the prompt is not from this corpus.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1].content
    request = parse_prompt(text)
    if request is None:
        raise ValueError(f"true quality is known for demo prompts only, not for {text!r}")
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(response) if sentence.strip()]
    stated, faults = _stated_facts(request, sentences)
    greeted = bool(sentences) and sentences[0] in GREETINGS
    closed = bool(sentences) and sentences[-1] in CLOSINGS
    faults += sum(_statement(sentence) is None for sentence in sentences) - greeted - closed
    correct = sum(value == ANIMALS[request.animal][aspect] for aspect, value in stated.items())
    facts = max(0.0, correct - 0.5 * (len(stated) - correct)) / len(request.aspects)
    quality = 6 * facts + 1.5 * greeted + closed + 1.5 * facts * (faults == 0) - 0.5 * faults
    return min(10.0, max(0.0, quality))


def _stated_facts(request: Request, sentences: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return the first value stated for each requested aspect, and the number of other statements.

    `It` refers to the animal named last, or to the requested one.
    """
    stated: dict[str, str] = {}
    faults, topic = 0, request.animal
    for sentence in sentences:
        match = _statement(sentence)
        if match is None:
            continue
        aspect, subject, value = match
        topic = subject or topic
        if aspect in request.aspects and aspect not in stated and topic == request.animal:
            stated[aspect] = value
        else:
            faults += 1
    return stated, faults


def _statement(sentence: str) -> tuple[str, str | None, str] | None:
    for aspect, pattern in _STATEMENT_PATTERNS.items():
        match = pattern.fullmatch(sentence)
        if match and match["value"] in VALUES[aspect]:
            return aspect, match["subject"], match["value"]
    return None
