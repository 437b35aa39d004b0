"""Dialogues as lists of messages, in the ways in which they are published, and the rows they give.

OpenAI's messages have `role` and `content`, those of ShareGPT `from` and `value`. A content may be a
list of parts of text.
"""

from collections.abc import Sequence
from typing import Any

from offline_align.config.sections import Turns
from offline_align.data.adapters.columns import DroppedRow, is_blank, objects, optional_text
from offline_align.data.jsonl import RowError

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "ai"), "assistant"),
}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")

type Messages = list[dict[str, str]]
"""Messages with `role` (system, user or assistant) and `content`."""


def messages_of(value: Any, name: str) -> Messages:
    """Return the messages of a column. An empty answer at the end stays.

    Raises RowError for anything else, and by name for tool calls, reasoning and images.
    """
    return [_message(item, name) for item in objects(value, name)]


def text_or_messages(value: Any, name: str, role: str) -> Messages:
    """Return a text as one message of `role`; one message, or a list of them, as they are."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    is_message = isinstance(value, dict) and not all(isinstance(part, list) for part in value.values())
    return messages_of([value] if is_message else value, name)


def is_dialogue(value: Any) -> bool:
    """Return whether a value is one message or a list of messages, rather than a text."""
    return isinstance(value, (list, dict))


def is_plain(value: Any) -> bool:
    """Return whether a prompt is a text, or a list of messages exactly as in our own rows."""
    if not isinstance(value, list):
        return not isinstance(value, dict)
    ours = ("system", "user", "assistant")
    return not any(
        isinstance(item, dict) and (isinstance(item.get("content"), list) or item.get("role") not in ours)
        for item in value
    )


def _message(item: dict[str, Any], name: str) -> dict[str, str]:
    role = item.get("role") or item.get("from")
    tools = [key for key in _TOOL_KEYS if not is_blank(item.get(key))]
    if tools or (isinstance(role, str) and role in _TOOL_ROLES):
        raise RowError(f"{name}: tool calls ({tools[0] if tools else role}) are not supported")
    reasoning = [key for key in _REASONING_KEYS if not is_blank(item.get(key))]
    if reasoning:
        raise RowError(f"{name}: reasoning ({reasoning[0]}) beside an answer is not supported")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError(f"{name}: the role of a message is {role!r}, not system, user or assistant")
    content = next((item[key] for key in ("content", "value", "text") if item.get(key) is not None), "")
    return {"role": ROLES[role.lower()], "content": _text(content, name).strip()}


def _text(content: Any, name: str) -> str:
    """Return a content that is a text, or the joined texts of its parts."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise RowError(f"{name}: the content of a message is not text")
        return content
    return "".join(part if isinstance(part, str) else _part(part, name) for part in content)


def _part(part: Any, name: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "part"
    if kind not in ("text", "input_text", "output_text"):
        what = "images" if "image" in str(kind) else f"parts of type {kind}"
        raise RowError(f"{name}: {what} are not supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError(f"{name}: a part of a message is not text")
    return text


def with_system(messages: Messages, columns: dict[str, Any]) -> Messages:
    """Return messages that begin with the text of the column `system`, if it is not blank.

    Raises RowError if they begin with another system message.
    """
    system = optional_text(columns, "system")
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise RowError("system: differs from the system message of the dialogue")
        return messages
    return [{"role": "system", "content": system}, *messages]


def without_open_answer(messages: Messages) -> Messages:
    """Return messages without an empty answer at the end, which only asks for one."""
    opens = messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]
    return messages[:-1] if opens else messages


def contents(messages: Messages) -> list[str]:
    """Return the texts of messages."""
    return [message["content"] for message in messages]


def answer_rows(
    messages: Messages, turns: Turns, first: int = 0, unlearned: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Return a row for each answer from index `first` on, or for the last one only.

    Messages at the indices `unlearned` are no answers to learn from. Raises DroppedRow if there is no
    answer.
    """
    found = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index >= first and index not in unlearned
    ]
    if not found:
        raise DroppedRow("a dialogue without an answer")
    if turns is Turns.last:
        found = found[-1:]
    return [{"prompt": messages[:index], "response": messages[index]["content"]} for index in found]
