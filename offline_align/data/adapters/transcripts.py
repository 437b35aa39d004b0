"""Dialogues written into one text, with a marker before each turn.

Read are `Human:` and `Assistant:` (HH-RLHF, Nectar), the same after `###` (Guanaco), Alpaca's
`### Instruction:` and `### Response:`, ChatML, Llama 2's `[INST]`, and `<extra_id_1>` before each
turn but the first (HelpSteer2).
"""

import re

from offline_align.data.adapters.messages import Messages

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "instruction": "user",
    "input": "user",
    "assistant": "assistant",
    "response": "assistant",
    "system": "system",
}
_STYLES = (
    re.compile(r"(?:^|\n\n)(Human|Assistant):"),
    re.compile(r"(?:^|\n)### ?(Human|User|Assistant|System): ?"),
    re.compile(r"(?:^|\n)### ?(Instruction|Input|Response):[ \n]?"),
    re.compile(r"(?:^|\n)(User|Human|Assistant|System): ?"),
    re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)\n"),
)
_HELPSTEER = "<extra_id_1>"
_ALPACA = re.compile(r"\ABelow is an instruction[^\n]*\n+(?=### ?Instruction)")
_CHATML = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
_LLAMA = re.compile(r"(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\])|\Z)", re.DOTALL)
_LLAMA_SYSTEM = re.compile(r"\A\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def transcript(text: str) -> Messages | None:
    """Return the messages of a text that is a transcript from its start; None for any other text.

    A text with only one side of a dialogue is none.
    """
    stripped = text.strip()
    if _HELPSTEER in stripped and not stripped.startswith(_HELPSTEER):
        stripped = f"{_HELPSTEER}User\n{stripped}"
    for found in (_chatml(stripped), _llama(stripped), *(_marked(stripped, style) for style in _STYLES)):
        if found and {"user", "assistant"} <= {message["role"] for message in found}:
            return found
    return None


def _marked(text: str, style: re.Pattern[str]) -> Messages:
    text = _ALPACA.sub("", text)
    if not style.match(text):
        return []
    _, *parts = style.split(text)
    messages: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _SPEAKERS[speaker.lower()], content.strip()
        if speaker == "Input" and messages:  # Alpaca's input belongs to the instruction
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    return messages


def _chatml(text: str) -> Messages:
    if not text.startswith("<|im_start|>"):
        return []
    return [{"role": role, "content": content.strip()} for role, content in _CHATML.findall(text)]


def _llama(text: str) -> Messages:
    if not text.startswith(("<s>", "[INST]")):
        return []
    messages: Messages = []
    for question, answer in _LLAMA.findall(text):
        system = _LLAMA_SYSTEM.match(question)
        if system:
            messages.append({"role": "system", "content": system[1].strip()})
        messages.append({"role": "user", "content": question[system.end() if system else 0 :].strip()})
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages
