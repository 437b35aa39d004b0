"""Twenty steps of three trainers beside TRL's, from the same weights, on the same rows in the same order.

TRL gets the token ids of our rows, so the comparison covers losses, gradients and updates. The tests
need the extra `bench`.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.config.sections import DataSection, OnBadRow
from offline_align.data.loader import rows_of_step
from offline_align.data.records import BadRows, PreferencePair, Sample, TrainingRow, read_rows
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedRows, tokenize_pairs, tokenize_samples
from tests.runs import job
from tests.small_tokenizers import write_hugging_face
from tests.training import metrics, pairs, samples, train, write_jsonl

pytest.importorskip("trl", reason="TRL is not installed; it is part of the extra `bench`")
datasets = pytest.importorskip("datasets")

STEPS, BATCH, RATE = 20, 4, 1e-3
WORDS = [
    f"trainer.global_batch_size={BATCH}",
    f"trainer.max_steps={STEPS}",
    f"optim.lr={RATE}",
    "optim.lr_decay_style=constant",
]
MODEL = ["data.max_length=128", "run.device=cpu", "debug=true"]
STRICT = BadRows(OnBadRow.fail, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Undo what TRL and transformers do to the global state."""
    level, threads = logging.getLogger().level, torch.get_num_threads()
    yield
    logging.getLogger().setLevel(level)
    torch.set_num_threads(threads)


def save(folder: Path, kind: type, **settings: Any) -> Path:
    """Write a small random Llama with a tokenizer in Hugging Face format."""
    write_hugging_face(folder)
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=520, max_position_embeddings=128, pad_token_id=3, **settings
    )
    model = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def arguments(scratch: Path) -> dict[str, Any]:
    """Return the settings of TRL's trainers that equal `WORDS` and our defaults."""
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.98,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "max_length": 128,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }


def encoding(stage: str, model: Path, data: Path) -> tuple[Renderer, DataSection]:
    """Return how training encodes rows: the renderer and the settings of the data."""
    made = job(stage, ["run.dir=unused", f"data.train={data}", f"init.from={model}", *MODEL[:2]])
    source = made.source
    return replace(source.description, reading=None).renderer(source.tokenizer), made.config.data


def in_order[T](rows: list[T]) -> list[T]:
    """Return the rows in the order of our steps."""
    return [rows[i] for step in range(STEPS) for i in rows_of_step(step, BATCH, len(rows), STEPS * BATCH, 1234)]


def split(rows: TokenizedRows) -> list[tuple[list[int], list[int]]]:
    """Return the ids of context and target of each row."""
    ends = zip(rows.offsets[:-1], rows.offsets[1:], rows.target_start, strict=True)
    return [(rows.ids[a : a + s].tolist(), rows.ids[a + s : b].tolist()) for a, b, s in ends]


def losses(trainer: Any) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_sft_has_the_losses_of_trl(folder: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = save(folder / "policy", transformers.LlamaForCausalLM)
    data = write_jsonl(folder / "samples.jsonl", samples())
    ours = metrics(train("sft", folder / "sft", data, *WORDS, model=[f"init.from={model}", *MODEL]))
    rows = [TrainingRow(row) for row in read_rows([data], Sample, STRICT)]
    found = tokenize_samples(rows, *encoding("sft", model, data), folder / "cache")
    columns = [{"input_ids": c + t, "completion_mask": [0] * len(c) + [1] * len(t)} for c, t in in_order(split(found))]
    trainer = SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**arguments(folder / "out"), completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    assert ours == pytest.approx(losses(trainer), abs=1e-4)
    assert ours[0] - ours[-1] > 0.1


def paired(stage: str, model: Path, data: Path, cache: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the ids of prompt, chosen and rejected answer of each pair, in the order of our steps."""
    rows = list(read_rows([data], PreferencePair, STRICT))
    found = tokenize_pairs(rows, *encoding(stage, model, data), cache)
    both = zip(split(found.chosen), split(found.rejected), strict=True)
    return in_order([(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in both])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_has_the_losses_of_trl(folder: Path, loss: str) -> None:
    from trl import DPOConfig, DPOTrainer

    model = save(folder / "policy", transformers.LlamaForCausalLM)
    data = write_jsonl(folder / "pairs.jsonl", pairs())
    run = train(
        "dpo", folder / f"dpo_{loss}", data, *WORDS, f"method.loss={loss}", model=[f"init.from={model}", *MODEL]
    )
    columns = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in paired("dpo", model, data, folder / "cache")
    ]

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    trainer = Tokenised(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(**arguments(folder / "out"), loss_type=[loss]),
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    ours, theirs = metrics(run), losses(trainer)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[0] - ours[-1]) > 0.1


def test_reward_model_has_the_losses_of_trl(folder: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    model = save(folder / "scorer", transformers.LlamaForSequenceClassification, num_labels=1)
    data = write_jsonl(folder / "pairs.jsonl", pairs())
    ours = metrics(train("reward", folder / "reward", data, *WORDS, model=[f"init.from={model}", *MODEL]))
    columns = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in paired("reward", model, data, folder / "cache")
    ]
    trainer = RewardTrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32),
        args=RewardConfig(**arguments(folder / "out")),
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    assert ours == pytest.approx(losses(trainer), abs=1e-4)
    assert ours[0] - ours[-1] > 0.1
