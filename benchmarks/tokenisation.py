"""Measure tokenisation on all cores.

    python -m benchmarks.tokenisation --data FOLDER --tokenizer HUGGING_FACE_FOLDER

The rate is tokens of the SFT rows per second of wall time, without reading the files. Like TRL's
trainers for prompt-completion rows, the peer encodes the prompt and the whole dialogue of each row
with `datasets.map`. The limit encodes our texts in one call of the tokenizers library and discards the
result.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Contender, report

CONTENDERS = [
    Contender("offline-align, all into a store on disk", "tokenisation", "ours", ours=True),
    Contender("datasets.map, one row a call", "tokenisation", "mapped", arguments=("1", "1")),
    Contender("datasets.map, batches of 1,000", "tokenisation", "mapped", arguments=("1000", "1")),
    Contender("datasets.map, batches of 1,000, two processes", "tokenisation", "mapped", arguments=("1000", "2")),
    Contender("encoding by tokenizers alone", "tokenisation", "alone", limit=True),
]


def _rows(workload: str) -> list[Any]:
    from offline_align.config.sections import OnBadRow
    from offline_align.data.records import BadRows, Sample, TrainingRow, read_rows

    rows = read_rows([Path(workload) / "sft.jsonl"], Sample, BadRows(OnBadRow.fail, None))
    return [TrainingRow(sample) for sample in rows]


def _texts(rows: list[Any]) -> list[tuple[str, str]]:
    """Return the prompt and the response of each row in the paper's template."""
    prompts = ["".join(f"{m.role.title()}:{m.content}" for m in row.sample.prompt) + "Assistant: " for row in rows]
    return [(prompt, row.sample.response) for prompt, row in zip(prompts, rows, strict=True)]


def _report(count: Callable[[], int]) -> None:
    started = time.perf_counter()
    tokens = count()
    report(tokens_per_second=tokens / (time.perf_counter() - started), tokens=tokens)


def ours(workload: str, scratch: str) -> None:
    """Tokenise as every training stage does before its first step."""
    from offline_align.config.sections import DataSection, Template
    from offline_align.data.template import Renderer
    from offline_align.data.tokenize import tokenize_samples
    from offline_align.data.tokenizer import load_tokenizer

    # Import before the clock starts, as for the peer and the limit.
    importlib.import_module("pyarrow")
    rows = _rows(workload)
    renderer = Renderer(load_tokenizer(Path(workload) / "tokenizer"), Template.paper)
    data = DataSection(max_length=4096)
    _report(lambda: int(tokenize_samples(rows, renderer, data, Path(scratch) / "cache").offsets[-1]))


def mapped(workload: str, scratch: str, batch: str, processes: str) -> None:
    """Encode prompt and whole dialogue with transformers' tokenizer into an Arrow file."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(workload) / "tokenizer")
    texts = _texts(_rows(workload))
    source = Dataset.from_dict({"prompt": [p for p, _ in texts], "all": [p + a for p, a in texts]})

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_ids": tokenizer(rows["prompt"])["input_ids"], "ids": tokenizer(rows["all"])["input_ids"]}

    def count() -> int:
        several = {"num_proc": int(processes)} if processes != "1" else {}
        batches = {"batched": True, "batch_size": int(batch)} if batch != "1" else {}
        made = source.map(encode, **batches, **several, cache_file_name=f"{scratch}/mapped.arrow")
        return sum(map(len, made["ids"]))

    _report(count)


def alone(workload: str, scratch: str) -> None:
    """Encode prompts and responses with the tokenizers library alone, with its own threads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{workload}/tokenizer/tokenizer.json")
    texts = [text for pair in _texts(_rows(workload)) for text in pair]
    _report(lambda: sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)))


def main() -> None:
    """Print a Markdown table of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sft_train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and its companions")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workload, scratch = Path(temporary) / "workload", Path(temporary) / "scratch"
        workload.mkdir()
        scratch.mkdir()
        (workload / "sft.jsonl").symlink_to((options.data / "sft_train.jsonl").resolve())
        (workload / "tokenizer").symlink_to(options.tokenizer.resolve())
        found = harness.rounds(CONTENDERS, options.rounds, workload, scratch)
    print(harness.table(CONTENDERS, found, "tokens_per_second", "tokens/s"))


if __name__ == "__main__":
    main()
