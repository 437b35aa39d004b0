"""What rows are read, and how they become tokens."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class OnBadRow(StrEnum):
    """`fail` stops at the first bad row; `skip` puts bad rows into `quarantine.jsonl` and goes on."""

    fail = "fail"
    skip = "skip"


class TooLong(StrEnum):
    """Rows over `data.max_length`: cut the prompt from the left, or drop the row. Both are counted."""

    truncate_prompt = "truncate_prompt"
    drop = "drop"


class Template(StrEnum):
    """How a dialogue becomes text: the paper's `User:...Assistant: ...`, or the tokenizer's chat template."""

    paper = "paper"
    chat = "chat"


@dataclass(frozen=True)
class RowDataSection:
    """What every stage that reads rows can set."""

    on_bad_row: OnBadRow = OnBadRow.fail
    """`fail` (exit 65 with file:line) or `skip` (quarantine file, totals)."""


@dataclass(frozen=True)
class RawDataSection(RowDataSection):
    """Raw data sets."""

    input: Any = None
    """Path or list of paths, also `hf:<name>[/<folder>][#<split>]` and `demo`."""


@dataclass(frozen=True)
class DataSection(RowDataSection):
    """How rows are read and turned into tokens."""

    max_length: int = 4096
    """Longest row in tokens, end-of-sequence included (paper: 4096)."""
    too_long: TooLong = TooLong.truncate_prompt
    """What happens to rows over `max_length`; a response alone over it is always dropped and counted."""
    template: Template | None = None
    """`paper` or `chat`; unset: that of the model in `init.from`, `chat` for reward models of others, else `paper`."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) that a chat template writes as today's; unset: the model's, else the day the run began."""
    cache_dir: str | None = None
    """Folder of tokenised data, keyed by content; unset: `cache/` in `run.dir`."""


@dataclass(frozen=True)
class TrainDataSection(DataSection):
    """Training and validation files."""

    train: Any = None
    """Path or list of paths of JSONL rows (`.gz` too)."""
    valid: Any = None
    """Path or list of paths of validation rows; unset: no validation."""
    group_by_prompt: bool = False
    """Take all rows of a prompt in the same step, where `trainer.share_prompts` computes it once; false: any order."""


@dataclass(frozen=True)
class InputDataSection(DataSection):
    """Files to read."""

    input: Any = None
    """Path or list of paths of rows (`.gz` too)."""


@dataclass(frozen=True)
class PrepareSection:
    """Sources, deduplication and splits."""

    format: str | None = None
    """Form of all inputs: hh, oasst1, dolly, flan, self_instruct, sft or preference; unset: by their columns."""
    valid_fraction: float = 0.05
    """Share of prompts that goes to the validation files; no prompt is in both."""
    max_rows: int | None = None
    """Rows read from each input; unset: all."""
    demo_sft_rows: int = 6000
    """SFT rows of the demo corpus (`data.input=demo`)."""
    demo_preference_rows: int = 6000
    """Preference pairs of the demo corpus."""
    demo_prompt_rows: int = 160
    """Held-out evaluation prompts of the demo corpus (paper: 160)."""


@dataclass(frozen=True)
class TokenizerSection:
    """Training of a SentencePiece model on the prepared rows."""

    train: bool = False
    """Train a tokenizer and write `tokenizer.model`."""
    vocab_size: int = 8192
    """Entries, byte fallback included."""
