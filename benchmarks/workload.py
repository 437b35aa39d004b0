"""The same rows, tokenizer and initial weights for every contender, prepared once into a folder."""

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_LENGTH = 2048
VOCABULARY = 8192
GLOBAL_BATCH = 16
_PRECISION = "precision.json"


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


SHAPES = {"8m": Shape(256, 688, 6, 8), "30m": Shape(512, 1376, 7, 8)}


def prepare(folder: Path, data: Path, shape: Shape, rows: int, seed: int) -> None:
    """Write rows (`sft.jsonl`, `pairs.jsonl`), `model/` and the tokens for the peers (`*_tokens.json`).

    `answers.jsonl` holds the two answers of each pair as separate rows, one after the other. `data`
    is a folder of SFT and preference JSONL files, from which the rows are a random sample.
    """
    from offline_align.__main__ import run

    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(data.glob("*_train.jsonl"))
    assert sources, f"{data}: no *_train.jsonl"
    prepared = folder / "prepared"
    words = [f"run.dir={prepared}", f"data.input=[{','.join(map(str, sources))}]", f"run.seed={seed}"]
    assert run(["prepare", *words, "tokenizer.train=true", f"tokenizer.vocab_size={VOCABULARY}"]) == 0
    _write_model(folder / "model", prepared / "tokenizer.model", shape)
    _sample(prepared / "sft_train.jsonl", folder / "sft.jsonl", rows, seed)
    _add_rewards(folder / "sft.jsonl", folder / "labelled.jsonl", seed)
    _sample(prepared / "preferences_train.jsonl", folder / "pairs.jsonl", rows // 2, seed)
    _split_pairs(folder / "pairs.jsonl", folder / "answers.jsonl")
    _write_tokens(folder)


def copy_for(precision: str, folder: Path) -> Path:
    """Return a copy of a prepared folder whose contenders compute in `precision`, `fp32` or `bf16`.

    Weights, gradient accumulation and updates are fp32 in both.
    """
    copy = folder.with_name(f"{folder.name}_{precision}")
    shutil.copytree(folder, copy)
    _dump(copy / _PRECISION, precision)
    return copy


def in_bf16(folder: str) -> bool:
    """Return whether the contenders of a folder compute in bf16."""
    return bool(load(Path(folder) / _PRECISION) == "bf16")


def _write_model(folder: Path, tokenizer: Path, shape: Shape) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offline_align.convert.tokenizer_files import write_tokenizer
    from offline_align.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    loaded = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=loaded.bos_id,
        eos_token_id=loaded.eos_id,
        # Not the end-of-sequence token: transformers reads the reward at the last token that is not padding.
        pad_token_id=0,
        **asdict(shape),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_tokenizer(loaded, folder, template, 4096, "policy", frozenset({loaded.eos_id}))


def _sample(source: Path, target: Path, count: int, seed: int) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()
    chosen = random.Random(seed).sample(lines, min(count, len(lines)))
    target.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")


def _split_pairs(source: Path, target: Path) -> None:
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"id": f"{p['id']}-{side}", "prompt": p["prompt"], "response": p[side]}
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _add_rewards(source: Path, target: Path, seed: int) -> None:
    drawn = random.Random(seed)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["reward"] = row["reward_raw"] = drawn.gauss(0.0, 1.0)
        row["source_id"] = row["id"]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_tokens(folder: Path) -> None:
    """Tokenise as the stages do, so that all contenders get the same tokens and targets.

    Files of rows for a policy are `<rows>_tokens` and `preference_tokens`, those for a reward model
    `scored_<rows>_tokens` and `pairs_tokens`.
    """
    from offline_align.config.sections import DataSection, OnBadRow, Template
    from offline_align.data.records import BadRows, PreferencePair, Sample, TrainingRow, read_rows
    from offline_align.data.template import Renderer
    from offline_align.data.tokenize import tokenize_pairs, tokenize_samples
    from offline_align.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    policy, scorer = (Renderer(tokenizer, Template.paper, scores=scores) for scores in (False, True))
    section = DataSection(max_length=MAX_LENGTH)
    bad = BadRows(OnBadRow.fail, None)
    for name in ("sft", "answers"):
        samples = [TrainingRow(s) for s in read_rows([folder / f"{name}.jsonl"], Sample, bad)]
        for file, renderer in ((f"{name}_tokens", policy), (f"scored_{name}_tokens", scorer)):
            rows = tokenize_samples(samples, renderer, section, folder / "cache")
            _dump(folder / f"{file}.json", [{"ids": i, "target_start": s} for i, s in _rows(rows)])
    read = list(read_rows([folder / "pairs.jsonl"], PreferencePair, bad))
    for file, renderer in (("preference_tokens", policy), ("pairs_tokens", scorer)):
        pairs = tokenize_pairs(read, renderer, section, folder / "cache")
        sides = zip(_rows(pairs.chosen), _rows(pairs.rejected), strict=True)
        _dump(folder / f"{file}.json", [{"chosen": c[0], "rejected": r[0], "target_start": c[1]} for c, r in sides])


def _rows(rows: Any) -> list[tuple[list[int], int]]:
    bounds = zip(rows.offsets[:-1], rows.offsets[1:], rows.target_start, strict=True)
    return [(rows.ids[a:b].tolist(), int(start)) for a, b, start in bounds]


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def load(path: Path) -> Any:
    """Return what `_dump` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
