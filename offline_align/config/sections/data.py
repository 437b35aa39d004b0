"""Sections for input data, tokenisation and `prepare`."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from offline_align.config.sections.training import PairsOf


class OnBadRow(StrEnum):
    """`fail` stops at the first bad row; `skip` writes bad rows to `quarantine.jsonl`."""

    fail = "fail"
    skip = "skip"


class TooLong(StrEnum):
    """Rows over `data.max_length`: truncate the prompt from the left, or drop the row.

    Both are counted.
    """

    truncate_prompt = "truncate_prompt"
    drop = "drop"


class Template(StrEnum):
    """Format of a dialogue: `User:...Assistant: ...` (paper) or the tokenizer's chat template.

    `auto` chooses one of them when a run begins; a model never records `auto`.
    """

    auto = "auto"
    paper = "paper"
    chat = "chat"


class Rated(StrEnum):
    """What rated answers become: labelled rows, preference pairs, or SFT rows, without their ratings."""

    labelled = "labelled"
    pairs = "pairs"
    ignore = "ignore"


class Turns(StrEnum):
    """Which answers of a dialogue become rows."""

    all = "all"
    last = "last"


class SampleBy(StrEnum):
    """`source` samples evenly from all sources; `row` gives every row the same chance."""

    source = "source"
    row = "row"


@dataclass(frozen=True)
class RowDataSection:
    """Settings of every stage that reads rows."""

    on_bad_row: OnBadRow = OnBadRow.fail
    """`fail` exits with 65 and names file:line. `skip` writes bad rows to `quarantine.jsonl`,
    counts them and continues."""


@dataclass(frozen=True)
class RawDataSection(RowDataSection):
    """Raw data sets."""

    input: Any = None
    """Path or list of paths: files, folders or patterns such as `raw/*.parquet`. Also accepts
    `hf:<name>[/<folder>][#<split>]` for a Hugging Face data set, and `demo` for the demo corpus."""


@dataclass(frozen=True)
class DataSection(RowDataSection):
    """How rows are read and turned into tokens."""

    max_length: int = 4096
    """Maximum length of a row in tokens, including the end-of-sequence token (paper: 4096)."""
    too_long: TooLong = TooLong.truncate_prompt
    """What to do with rows over `max_length`: truncate the prompt from the left, or drop the row. A
    row whose response alone exceeds it is always dropped. Truncated and dropped rows are counted,
    and every stage treats them alike."""
    template: Template | None = Template.auto
    """How a dialogue becomes text: `User:...Assistant: ...` (`paper`) or the tokenizer's chat
    template (`chat`). `auto` is the template that the model in `init.from` records. If it records
    none, `auto` is `chat` if the model's folder has a chat template that can be used, else `paper`."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) that a chat template writes as today's. If unset, the day that the model
    was trained with, else the day on which the run started."""
    cache_dir: str | None = None
    """Folder for the cache of tokenised data. An entry is found by its content, so runs can share
    the folder. If unset, `cache/` in `run.dir`."""
    dry_run_rows: int | None = 1000
    """Number of rows, spread over the files, that a dry run of a training, `label` or `generate`
    reads and tokenises. If `null`, all. 0 reads none."""

    @property
    def named_template(self) -> Template | None:
        """The template, or None if it is not settled."""
        return None if self.template is Template.auto else self.template


@dataclass(frozen=True)
class SampledDataSection(DataSection):
    """The part of the rows that a stage uses."""

    sample: int | None = None
    """Number of rows to use, equally many from each source (see `sample_by`). A pair is one row. Rows
    are chosen by their content and `run.seed`, whatever their order. Validation rows are never
    sampled. If unset, all rows."""
    sample_by: SampleBy = SampleBy.source
    """`source` takes equally many SFT rows and pairs, and of each kind equally many from every
    source; what one of them lacks, the others give. `row` chooses among all rows alike."""
    source_column: str | None = "source"
    """Column that names the source of a row. A row without it has the name of its file as source. If
    null, so have all rows."""


@dataclass(frozen=True)
class TrainDataSection(SampledDataSection):
    """Training and validation files."""

    train: Any = None
    """Path or list of paths of training rows (JSONL, also `.gz` or `.zst`)."""
    valid: Any = None
    """Path or list of paths of validation rows. If unset, there is no validation."""
    group_by_prompt: bool = False
    """Put all rows of a prompt into the same step, so that `trainer.share_prompts` computes the
    prompt once. If false, rows are shuffled independently."""
    weights: dict[str, Any] = field(default_factory=dict, metadata={"kind": "mapping of sources to shares"})
    """Share of each source in an epoch, for example `{hh: 0.7, dolly: 0.3}`. An epoch has as many rows
    as these sources together; rows of a source repeat if it has too few. Sources that are not named
    take no part. If empty, an epoch has every row once."""


@dataclass(frozen=True)
class InputDataSection(DataSection):
    """Input files."""

    input: Any = None
    """Path or list of paths of rows (JSONL, also `.gz` or `.zst`)."""


@dataclass(frozen=True)
class SampledInputDataSection(InputDataSection, SampledDataSection):
    """Input files of which a part may be used."""


@dataclass(frozen=True)
class PromptDataSection(TrainDataSection):
    """Prompts to answer during training, and texts beside them."""

    ptx: Any = None
    """Path or list of paths of SFT rows whose responses are learned beside the answers (see
    `method.ptx_coefficient`)."""


@dataclass(frozen=True)
class PrepareSection:
    """Sources, deduplication and splits."""

    format: str | None = None
    """Form of all inputs, a name from the table in docs/data.md. If unset, it is recognised by the
    columns."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Names of columns in the inputs, by the names that `prepare` reads:
    `'{prompt: question, response: answer}'`."""
    score_column: Any = field(default=None, metadata={"kind": "name or mapping"})
    """Column that rates the answer, for example `rating`, or a mapping of columns to weights, for
    example `'{helpfulness: 0.7, correctness: 0.3}'`, whose weighted sum is the score. Answers become
    labelled rows. An answer without a score is dropped and counted."""
    rated: Rated | None = None
    """What rated answers become: `labelled` rows, `pairs` of answers to the same prompt, or, with
    `ignore`, rows without a rating. If unset, `labelled` for one answer a row, `pairs` for several."""
    pairs: PairsOf = PairsOf.all
    """Pairs from several rated or ranked answers to a prompt: every two of different rating (`all`), or
    one of the best and the worst (`best_worst`)."""
    turns: Turns = Turns.all
    """SFT rows from a dialogue: one for each answer of the assistant (`all`), or the `last` one only."""
    text_prompt: str | None = None
    """Prompt for plain texts, whose column `text` then is the answer. If unset, such texts are
    refused."""
    valid_fraction: float = 0.05
    """Fraction of the prompts that goes to the validation files. No prompt is in both splits."""
    max_rows: int | None = None
    """Maximum number of rows to read from each input. If unset, all."""
    demo_sft_rows: int = 6000
    """SFT rows in the demo corpus (`data.input=demo`)."""
    demo_preference_rows: int = 6000
    """Preference pairs in the demo corpus."""
    demo_prompt_rows: int = 160
    """Held-out evaluation prompts in the demo corpus (paper: 160)."""


@dataclass(frozen=True)
class TokenizerSection:
    """Training of a SentencePiece model on the prepared rows."""

    train: bool = False
    """Train a SentencePiece tokenizer on the prepared rows and write `tokenizer.model`."""
    vocab_size: int = 8192
    """Vocabulary size, including the byte fallback tokens."""
