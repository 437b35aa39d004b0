"""Python code for the model card of an older model that encodes a dialogue with `transformers` as in training.

Earlier versions encoded context, condition and response separately (`Encoding.pieces`). A tokenizer
that gets the whole text can join their ends into one token, so this code encodes them separately too.
"""

import json

from offline_align.config.sections import Template
from offline_align.data.prefix import After, PrefixRule
from offline_align.data.records import Message
from offline_align.data.template import ASSISTANT, PREFIXES, Encoding, Renderer
from offline_align.data.tokenizer import Tokenizer
from offline_align.model.description import ModelDescription

_QUESTION = (Message("user", "a"),)
_MARKS = ("\n", "=", "~", "|", "#", "a")
_PROBES = ("Fine, thanks.", " two", "\nline", "5.0", "-1.5", "(a)", "<rm_score>5.0", "日本", "==", "aa")


def recipe(description: ModelDescription, tokenizer: Tokenizer) -> str:
    """Return the code, or "" if `apply_chat_template` alone is meant to give the tokens of training.

    It defines `prompt_ids(messages)` for a policy and `row_ids(messages)` for a reward model.
    """
    renderer = description.renderer(tokenizer)
    is_policy = description.kind == "policy"
    condition = description.condition.text if description.condition else ""
    if renderer.encoding is Encoding.whole or renderer.reading:
        return ""
    if description.template is Template.chat and is_policy and not condition:
        return ""
    behind = "behind" if _is_apart(renderer) else "encode"
    paper = description.template is Template.paper
    restarts = paper and tokenizer.prefix_rule is PrefixRule.first
    lines = [*_HEAD, *(_behind(tokenizer) if behind == "behind" or restarts else [])]
    if paper:
        lines += _paper_prompt(renderer, condition, behind)
        lines += [] if is_policy else _paper_row(behind)
    else:
        lines += _chat_prompt(condition, behind) if is_policy else _chat_row(renderer, behind)
    return "\n".join(lines)


def _is_apart(renderer: Renderer) -> bool:
    """Return whether text after the generation prompt is encoded differently from the start of a text."""
    after = renderer.frame(_QUESTION).after
    rule = renderer.tokenizer.prefix_rule
    return rule is not PrefixRule.never and (after is After.text or (after, rule) == (After.special, PrefixRule.first))


_HEAD = [
    # `AutoTokenizer` of transformers 5 replaces this class for some families.
    "from transformers import PreTrainedTokenizerFast",
    "",
    'tokenizer = PreTrainedTokenizerFast.from_pretrained(".")  # this folder',
    "",
    "",
    "def encode(text):",
    "    return tokenizer.encode(text, add_special_tokens=False)",
]


def _behind(tokenizer: Tokenizer) -> list[str]:
    mark = next((mark for mark in _MARKS if _shows_text_behind(tokenizer, mark)), _MARKS[0])
    return [
        "",
        "",
        "def behind(text):  # ids of text that follows other text, without a space added at its start",
        f"    return encode({_literal(mark + '%s')} % text)[len(encode({_literal(mark)})) :]",
    ]


def _shows_text_behind(tokenizer: Tokenizer, mark: str) -> bool:
    """Return whether ids after `mark` are those of text after text: no token crosses the end of `mark`."""
    length = len(tokenizer.encode(mark))
    return all(tokenizer.encode(mark + text)[length:] == tokenizer.encode(text, after=After.text) for text in _PROBES)


def _paper_prompt(renderer: Renderer, condition: str, behind: str) -> list[str]:
    again = ["            start = behind"] if renderer.tokenizer.prefix_rule is PrefixRule.first else []
    return [
        "",
        "",
        "def prompt_ids(messages):",
        f'    ids, text, start = {renderer.start_ids}, "", encode',
        "    for message in messages:",
        '        if message["role"] == "assistant":',
        f'            ids += start(text + {_literal(ASSISTANT)}) + {behind}(message["content"])',
        '            ids, text = [*ids, tokenizer.eos_token_id], ""',
        *again,
        "        else:",
        f'            text += {json.dumps(PREFIXES)}[message["role"]] + message["content"]',
        f"    return ids + start(text + {_literal(ASSISTANT)})"
        + (f" + {behind}({_literal(condition)})" if condition else ""),
    ]


def _paper_row(behind: str) -> list[str]:
    return [
        "",
        "",
        "def row_ids(messages):  # the answer is the last message",
        f'    return prompt_ids(messages[:-1]) + {behind}(messages[-1]["content"]) + [tokenizer.eos_token_id]',
    ]


def _chat_prompt(condition: str, behind: str) -> list[str]:
    return [
        "",
        "",
        "def prompt_ids(messages):",
        f"    condition = {_literal(condition)}",
        "    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
        f"    return encode(text.removesuffix(condition)) + {behind}(condition)",
    ]


def _chat_row(renderer: Renderer, behind: str) -> list[str]:
    whole = renderer.encode(renderer.spans(_QUESTION, ["b"]))
    closes = len(renderer.rows(whole)[0][1]) <= len(whole[1])
    return [
        "",
        "",
        "def row_ids(messages):  # the answer is the last message",
        "    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)",
        "    answer = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(prompt)",
        f"    ids, end = {behind}(answer), tokenizer.eos_token_id",
        "    return encode(prompt) + " + ("ids[: len(ids) - ids[::-1].index(end)]" if closes else "[*ids, end]"),
    ]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
