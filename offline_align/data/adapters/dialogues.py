"""Sets of dialogues: OpenAI's messages, ShareGPT's conversations, and prompts with a completion."""

from typing import Any

from offline_align.config.sections import PrepareSection
from offline_align.data.adapters.columns import further, is_blank, objects, text_column
from offline_align.data.adapters.messages import (
    Messages,
    answer_rows,
    contents,
    is_dialogue,
    messages_of,
    text_or_messages,
    with_system,
    without_open_answer,
)
from offline_align.data.adapters.transcripts import transcript
from offline_align.data.adapters.unknown import UnknownForm
from offline_align.data.jsonl import RowError

END_OF_TEXT = "<|endoftext|>"
DIALOGUES = ("messages", "conversations", "conversation")
"""Columns that hold a whole dialogue."""


def dialogue(columns: dict[str, Any], settings: PrepareSection) -> list[dict[str, Any]]:
    """Return the rows of a dialogue: one for each answer, or the last one only, by `prepare.turns`.

    An answer with `weight` 0, in OpenAI's form, is not learned.
    """
    name = next((name for name in DIALOGUES if not is_blank(columns.get(name))), None)
    if name is None:
        raise RowError(f"{DIALOGUES[0]}: missing or empty")
    given = messages_of(columns[name], name)
    messages = with_system(given, columns)
    shift = len(messages) - len(given)
    unlearned = [n + shift for n, item in enumerate(objects(columns[name], name)) if item.get("weight") == 0]
    rest = further(columns, (name, "system"), contents(messages))
    return [row | rest for row in answer_rows(messages, settings.turns, unlearned=unlearned)]


def completion(columns: dict[str, Any], settings: PrepareSection) -> list[dict[str, Any]]:
    """Return the rows of a prompt and its answer in `completion` or `response`: texts or messages.

    Self-Instruct's finetuning data end in `<|endoftext|>`; its markers around the texts are removed.
    """
    name = "completion" if not is_blank(columns.get("completion")) else "response"
    prompt, answer = columns.get("prompt"), columns.get(name)
    if not is_dialogue(prompt) and not is_dialogue(answer):
        return [_of_texts(columns, name)]
    messages = with_system(prompt_messages(prompt, "prompt"), columns)
    whole = [*messages, *text_or_messages(answer, name, "assistant")]
    rest = further(columns, ("prompt", name, "system"), contents(whole))
    return [row | rest for row in answer_rows(whole, settings.turns, first=len(messages))]


def _of_texts(columns: dict[str, Any], name: str) -> dict[str, Any]:
    prompt, answer = text_column(columns, "prompt"), text_column(columns, name)
    if answer.endswith(END_OF_TEXT):
        prompt = prompt.removeprefix("Task:").removesuffix("Output:").strip()
        answer = answer.removesuffix(END_OF_TEXT).strip()
    rest = further(columns, ("prompt", name, "system"), [prompt, answer])
    return {"prompt": prompt_of(prompt, columns), "response": answer, **rest}


def prompt_messages(value: Any, name: str) -> Messages:
    """Return a prompt, given as a text, a transcript or messages, as messages."""
    if isinstance(value, str) and not is_dialogue(value):
        return without_open_answer(transcript(value) or [{"role": "user", "content": value.strip()}])
    return without_open_answer(text_or_messages(value, name, "user"))


def prompt_of(text: str, columns: dict[str, Any]) -> str | Messages:
    """Return a prompt of text: the text itself, or messages if it is a transcript or has a `system` column."""
    found = without_open_answer(transcript(text) or [])
    if not _is_prompt(found):
        found = []
    messages = with_system(found or [{"role": "user", "content": text}], columns)
    return messages if found or len(messages) > 1 else text


def _is_prompt(messages: Messages) -> bool:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    return roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] and all(contents(messages))


def plain_text(columns: dict[str, Any], settings: PrepareSection) -> list[dict[str, Any]]:
    """Return the rows of `text`: those of a transcript, or the text as the answer to `prepare.text_prompt`.

    Raises RowError for other text without that key.
    """
    text = text_column(columns, "text")
    found = transcript(text)
    rest = further(columns, ("text", "system"), [text])
    if found:
        return [row | rest for row in answer_rows(with_system(found, columns), settings.turns)]
    if settings.text_prompt is None:
        raise UnknownForm(
            "text: plain text without turns of User and Assistant has no prompt; set prepare.text_prompt to a "
            "prompt that all texts answer, or give prompt and response"
        )
    return [{"prompt": prompt_of(settings.text_prompt, columns), "response": text, **rest}]
