"""The `convert` command: both directions, both kinds of model, and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offline_align import lineage
from offline_align.__main__ import run
from offline_align.data.tokenizer import load_tokenizer
from offline_align.model.description import ModelDescription
from tests.random_llama import save_random_llama
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.training import samples, write_jsonl

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a random model of a transformers class with a tokenizer."""

    def save(class_name: str, dtype: torch.dtype = torch.float32) -> Path:
        import transformers

        torch.manual_seed(5)
        cls = getattr(transformers, class_name)
        labels = {"num_labels": 1} if "Sequence" in class_name else {}
        folder = tmp_path / "theirs"
        cls(cls.config_class(**(SIZES | labels))).to(dtype).save_pretrained(folder)
        write_sentencepiece(folder)
        return folder

    return save


def convert(source: Path, target: Path, to: str, *words: str) -> int:
    return run(["convert", f"init.from={source}", f"run.dir={target}", f"convert.to={to}", "run.device=cpu", *words])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("class_name", "dtype"),
    [
        ("LlamaForCausalLM", torch.float32),
        ("Qwen3ForCausalLM", torch.bfloat16),
        ("Qwen2ForSequenceClassification", torch.float32),
    ],
)
def test_a_round_trip_keeps_every_bit(
    save: Callable[..., Path], tmp_path: Path, class_name: str, dtype: torch.dtype
) -> None:
    theirs, ours, back = save(class_name, dtype), tmp_path / "ours", tmp_path / "back"
    assert convert(theirs, ours, "megatron", "convert.check=true") == 0
    description = ModelDescription.load(ours / "checkpoints" / "latest")
    assert description.kind == ("reward_model" if "Sequence" in class_name else "policy")
    assert convert(ours, back, "huggingface", "convert.max_shard_size=20KB", "convert.check=true") == 0
    checked = lineage.read_manifest(back)
    assert checked is not None
    assert checked.extra["check"]["largest"] < 1e-5
    assert checked.extra["check"]["what"] == ("scores" if "Sequence" in class_name else "logits")
    before, after = tensors(theirs), tensors(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # The reward head is always kept in fp32.
        same_dtype = tensor.to(after[name].dtype) if name == "score.weight" else tensor
        assert torch.equal(same_dtype, after[name]), name
    for folder in (ours, back):
        assert lineage.verify(folder).problems() == []
    manifest = lineage.read_manifest(back)
    assert manifest is not None
    assert manifest.parents[0].path == "../ours"
    assert (back / "model.safetensors.index.json").is_file()


def test_a_round_trip_keeps_the_chat_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_random_llama(theirs, load_tokenizer(write_hugging_face(theirs, CHATML)))
    write_hugging_face(theirs, CHATML)
    caplog.set_level("INFO", "offline_align")
    assert convert(theirs, ours, "megatron") == 0
    assert convert(ours, back, "huggingface") == 0
    assert load_tokenizer(back).chat_template == CHATML
    assert any("gives the token ids of training (5 dialogues compared)" in message for message in caplog.messages)


def test_the_check_scores_padded_batches(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a wrong padding token, batches are read at another position although the weights are right."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(save("Qwen2ForSequenceClassification"), ours, "megatron") == 0
    assert convert(ours, back, "huggingface", "convert.check=true") == 0
    shutil.copytree(back, tmp_path / "edited", ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((back / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    assert convert(tmp_path / "edited", tmp_path / "again", "megatron", "convert.check=true") == 70
    assert "our scores and those of transformers differ" in capsys.readouterr().err


def test_running_again_changes_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    theirs = save("LlamaForCausalLM")
    assert convert(theirs, tmp_path / "ours", "megatron") == 0
    before = (tmp_path / "ours" / "manifest.json").read_bytes()
    assert convert(theirs, tmp_path / "ours", "megatron") == 0
    assert (tmp_path / "ours" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["convert.to=huggingface"], "convert.to=huggingface"),
        (["convert.to=megatron", "convert.max_shard_size=big"], "convert.max_shard_size=big"),
        (["convert.to=megatron", "launcher.nproc_per_node=2", "run.device=cpu"], "launcher.nproc_per_node"),
    ],
)
def test_wrong_settings_are_named(
    save: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
) -> None:
    theirs = save("LlamaForCausalLM")
    assert run(["convert", f"init.from={theirs}", f"run.dir={tmp_path / 'out'}", "dry_run=true", *words]) == 78
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    theirs = save("LlamaForCausalLM")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert convert(theirs, tmp_path / "out", "megatron") == 78
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (theirs / "config.json").write_text(json.dumps(config))
    weights = theirs / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert convert(theirs, tmp_path / "out", "megatron") == 74


def test_a_foreign_reward_model_labels_like_its_conversion(save: Callable[..., Path], tmp_path: Path) -> None:
    theirs, ours = save("Qwen2ForSequenceClassification"), tmp_path / "ours"
    assert convert(theirs, ours, "megatron") == 0
    rows = write_jsonl(tmp_path / "rows.jsonl", samples(6))
    found = []
    for source in (theirs, ours):
        words = [f"init.from={source}", f"data.input={rows}", "data.max_length=64", "run.device=cpu"]
        target = tmp_path / f"label_{source.name}"
        assert run(["label", f"run.dir={target}", *words]) == 0
        found.append([json.loads(line)["reward_raw"] for line in (target / "labelled.jsonl").read_text().splitlines()])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert len(set(found[0])) > 1


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors(folder).values()}


def test_an_export_has_the_precision_of_the_model_that_training_began_with(
    save: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The CPU trains in fp32, and the model was in bf16."""
    theirs, rows = save("LlamaForCausalLM", torch.bfloat16), write_jsonl(tmp_path / "rows.jsonl", samples(4))
    short = ["trainer.max_steps=1", "trainer.global_batch_size=4", "data.max_length=128", "run.device=cpu"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(["sft", f"run.dir={first}", f"init.from={theirs}", f"data.train={rows}", *short]) == 0
    assert run(["sft", f"run.dir={second}", f"init.from={first}", f"data.train={rows}", *short]) == 0
    with caplog.at_level("INFO"):
        assert convert(second, tmp_path / "auto", "huggingface", "convert.check=true") == 0
    assert "bfloat16, the precision of the model that training started from; the checkpoint has float32" in caplog.text
    assert dtypes(tmp_path / "auto") == {torch.bfloat16}
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert(second, tmp_path / "fp32", "huggingface", "convert.dtype=float32") == 0
    assert dtypes(tmp_path / "fp32") == {torch.float32}
    exact, rounded = tensors(tmp_path / "fp32"), tensors(tmp_path / "auto")
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())
    manifest = lineage.read_manifest(tmp_path / "auto")
    assert manifest is not None and manifest.extra["dtype"] == "bfloat16"


def test_the_precision_can_be_chosen_both_ways(
    save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = save("LlamaForSequenceClassification")
    assert convert(theirs, tmp_path / "ours", "megatron", "convert.dtype=bfloat16") == 0
    assert convert(tmp_path / "ours", tmp_path / "half", "huggingface", "convert.dtype=float16") == 0
    found = tensors(tmp_path / "half")
    assert found.pop("score.weight").dtype is torch.float32
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    weight = tensors(theirs)["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], weight.bfloat16().half())
    assert convert(theirs, tmp_path / "no", "megatron", "convert.dtype=float16") == 78
    assert "convert.dtype=float16: a checkpoint" in capsys.readouterr().err
