"""Compare the ids of an exported folder under plain `transformers` with those of training, on a few dialogues."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.data.records import Message
from offline_align.data.template import Encoding, Renderer
from offline_align.errors import DataError
from offline_align.model.description import ModelDescription

_QUESTION = Message("user", "What is the capital of France?")
_TURNS = (Message("user", "Hi, who are you?\n"), Message("assistant", "A model."), Message("user", "2 + 2 = ?"))
_PROMPTS = (
    (_QUESTION,),
    _TURNS,
    (*_TURNS, Message("assistant", "- four\n- or 4"), Message("user", "  Why? ")),
    (Message("system", "Be brief."), _QUESTION),
    (Message("system", "Answer in short lines.\n"), *_TURNS),
)
_ANSWERS = ("Paris.", "- one\n- two", "(4) is right: 2 + 2 = 4\n", " Two  spaces")


@dataclass(frozen=True, slots=True)
class SameIds:
    """How many dialogues have the same ids in `apply_chat_template` as in training."""

    compared: int
    different: int
    fix: str = ""
    """What to do if some differ."""

    def in_words(self) -> str:
        """Return one line for the log."""
        call = "apply_chat_template of plain transformers"
        if not self.different:
            return f"{call} gives the token ids of training ({self.compared} dialogues compared)"
        share = f"{self.different} of {self.compared} dialogues"
        return f"{call} gives other token ids than training for {share}: {self.fix}"


def same_ids(folder: Path, description: ModelDescription, renderer: Renderer, condition: str, fast: bool) -> SameIds:
    """Compare prompts of a policy, or finished dialogues of a reward model, in an exported `folder`.

    `fast` says whether the folder has a `tokenizer.json`. A dialogue that the chat template refuses
    is left out.
    """
    dialogues = list(_dialogues(renderer, condition, scores=description.kind == "reward_model"))
    if not fast:
        return SameIds(len(dialogues), len(dialogues), "encode with tokenizer.model, as README.md says")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    different = _different(AutoTokenizer, folder, dialogues)
    if not different:
        return SameIds(len(dialogues), 0)
    if description.encoding is Encoding.pieces:
        fix = "an earlier version trained this model on other pieces of text; encode with the code in README.md"
    elif not _different(PreTrainedTokenizerFast, folder, dialogues):
        fix = "load the tokenizer with PreTrainedTokenizerFast.from_pretrained instead of AutoTokenizer"
    else:
        fix = f"its tokenizer.json cannot give them; use offline-align {_stage(description)} for this model"
    return SameIds(len(dialogues), different, fix)


def _stage(description: ModelDescription) -> str:
    return "generate" if description.kind == "policy" else "label"


def _dialogues(renderer: Renderer, condition: str, scores: bool) -> Iterator[tuple[tuple[Message, ...], list[int]]]:
    """Yield dialogues with our ids: prompts that ask for an answer, or dialogues that end with one."""
    for prompt in _PROMPTS:
        try:
            if not scores:
                yield prompt, renderer.context(prompt, condition)
                continue
            for answer in _ANSWERS:
                context, target = renderer.row(prompt, answer)
                yield (*prompt, Message("assistant", answer)), context + target
        except DataError:
            continue


def _different(loader: Any, folder: Path, dialogues: list[tuple[tuple[Message, ...], list[int]]]) -> int:
    """Return how many dialogues have other ids with the tokenizer that `loader` loads."""
    tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return sum(_their_ids(tokenizer, dialogue) != ids for dialogue, ids in dialogues)


def _their_ids(tokenizer: Any, dialogue: tuple[Message, ...]) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in dialogue]
    asks = dialogue[-1].role != "assistant"
    ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=asks, return_dict=False)
    return ids
