"""Reward models of others are scored as `transformers` scores them: its ids, and the place that it reads."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.__main__ import run
from tests.small_tokenizers import CHATML, TEMPLATES, with_spaces_in_front, write_hugging_face
from tests.training import write_jsonl

NO_END = CHATML.replace("<|im_end|>", "")
ENDS_EARLY = CHATML.replace("<|im_end|>\\n'", "<|im_end|>'")
TURNS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Name a prime."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a bird."}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a fish."},
    ],
]
ANSWERS = ["Two is one.", "<think>\nhm\n</think>\n\nAn owl", "\n\nCod, a fish. "]
ROWS = [
    {"id": f"{k}.{n}", "prompt": prompt, "response": answer}
    for k, prompt in enumerate(TURNS)
    for n, answer in enumerate(ANSWERS)
]


def save(folder: Path, **settings: Any) -> Path:
    """Save a random reward model beside the tokenizer in `folder`."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=520, max_position_embeddings=256, num_labels=1, **settings
    )
    model = transformers.LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> list[float]:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for row in ROWS:
        dialogue = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(dialogue, return_dict=False)
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids])).logits))
    return scores


def ours(folder: Path, run_dir: Path, *words: str) -> list[float]:
    rows = write_jsonl(run_dir.with_suffix(".jsonl"), ROWS)
    common = [f"init.from={folder}", f"data.input={rows}", "data.max_length=200", "run.device=cpu"]
    assert run(["label", f"run.dir={run_dir}", *common, *words]) == 0
    return [json.loads(line)["reward_raw"] for line in (run_dir / "labelled.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    ("template", "eos", "pad"),
    [
        (CHATML, "<|im_end|>", "<|pad|>"),  # ends with a line break behind end of sequence
        (ENDS_EARLY, "<|im_end|>", "<|im_end|>"),  # the end is padding, so that nothing is read there
        (NO_END, "<|im_end|>", None),
        (CHATML, "<|pad|>", "<|pad|>"),  # answers end otherwise than texts
        (TEMPLATES["empty_thought"], "<|im_end|>", "<|pad|>"),  # writes something else before an answer than asked for
    ],
)
def test_scores_are_those_of_transformers(
    template: str, eos: str, pad: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hugging_face(tmp_path / "theirs", template, eos_token=eos)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    save(folder, pad_token_id=None if pad is None else tokenizer.convert_tokens_to_ids(pad))
    caplog.set_level(logging.INFO, "offline_align")
    assert ours(folder, tmp_path / "label") == pytest.approx(theirs(folder), abs=1e-5)
    (said,) = [line for line in caplog.messages if line.startswith("first row, as the reward model reads it")]
    assert "a third-party reward model, template chat" in said
    assert "<|im_start|>user\\n\n            Name a prime." in said and "Two is one." in said


def test_a_space_in_front_of_text_changes_nothing(tmp_path: Path) -> None:
    folder = save(with_spaces_in_front(tmp_path / "theirs", "prepend", TEMPLATES["touching"]), pad_token_id=0)
    assert ours(folder, tmp_path / "label") == pytest.approx(theirs(folder), abs=1e-5)


def test_a_conversion_there_and_back_scores_alike(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "theirs", ENDS_EARLY)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    save(folder, pad_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    expected = theirs(folder)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    common = ["run.device=cpu"]
    assert run(["convert", f"init.from={folder}", f"run.dir={checkpoint}", "convert.to=megatron", *common]) == 0
    assert run(["convert", f"init.from={checkpoint}", f"run.dir={back}", *common]) == 0
    assert ours(checkpoint, tmp_path / "one") == pytest.approx(expected, abs=1e-5)
    assert ours(back, tmp_path / "two") == pytest.approx(expected, abs=1e-5)
    assert theirs(back) == pytest.approx(expected, abs=1e-5)


def test_the_template_of_the_paper_is_used_if_it_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(write_hugging_face(tmp_path / "theirs"))
    caplog.set_level(logging.INFO, "offline_align")
    ours(folder, tmp_path / "label", "data.template=paper")
    (said,) = [line for line in caplog.messages if line.startswith("first row")]
    assert "template paper\n  prompt    User:Name a prime.Assistant:\\x20\n" in said
    assert said.endswith("  answer    Two is one.<|im_end|>")
