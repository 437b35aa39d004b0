"""The peers on the same rows: TRL's trainers in several settings, transformers with DDP, batched scoring."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import median_seconds, peak_memory_bytes, report
from benchmarks.workload import GLOBAL_BATCH, MAX_LENGTH, in_bf16, load

_IGNORED = -100


class Clock:
    """Measures the seconds of the second epoch and counts the tokens computed in it."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.end = 0.0
        self.computed = 0
        self.real = 0

    def callback(self) -> Any:
        """Return a callback for transformers' Trainer that records the start and end of epochs."""
        from transformers import TrainerCallback

        clock = self

        class Epochs(TrainerCallback):  # type: ignore[misc]
            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                clock.starts.append(time.perf_counter())
                clock.computed = clock.real = 0

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                clock.end = time.perf_counter()

        return Epochs()

    def watch(self, collator: Any) -> Any:
        """Return the collator, wrapped to count all tokens and the padding of its batches."""

        def collate(examples: Any) -> Any:
            batch = collator(examples)
            mask = batch.get("attention_mask")
            self.computed += batch["input_ids"].numel()
            self.real += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
            return batch

        return collate

    def result(self, unit: str, count: int) -> dict[str, float]:
        """Return the rates of the second epoch, which has `count` units."""
        seconds = self.end - self.starts[-1]
        return {unit: count / seconds, "padding": 1 - self.real / self.computed, "seconds": seconds}


def _arguments(workload: str, scratch: str, micro: str, strategy: str) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": int(micro),
        "gradient_accumulation_steps": GLOBAL_BATCH // int(micro),
        "num_train_epochs": 2,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-4,
        # This keeps fp32 weights and uses torch's autocast.
        "bf16": in_bf16(workload),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "train_sampling_strategy": strategy,
    }


def _tokenizer(workload: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(workload) / "model")
    tokenizer.pad_token_id = 0
    return tokenizer


def trl_sft(
    workload: str, scratch: str, name: str, micro: str, strategy: str, packing: str, checkpointing: str
) -> None:
    """Train with TRL's SFTTrainer on tokenised rows with a completion mask."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = load(Path(workload) / f"{name}_tokens.json")
    columns = [
        {"input_ids": r["ids"], "completion_mask": [int(i >= r["target_start"]) for i in range(len(r["ids"]))]}
        for r in rows
    ]
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(Path(workload) / "model", dtype=torch.float32),
        args=SFTConfig(
            **_arguments(workload, scratch, micro, strategy),
            packing=packing == "packing",
            completion_only_loss=True,
            gradient_checkpointing=checkpointing == "checkpointing",
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=_tokenizer(workload),
        callbacks=[clock.callback()],
    )
    trainer.data_collator = clock.watch(trainer.data_collator)
    trainer.train()
    report(**clock.result("targets_per_second", sum(len(r["ids"]) - r["target_start"] for r in rows)))


def trl_reward(workload: str, scratch: str, micro: str, checkpointing: str) -> None:
    """Train with TRL's RewardTrainer on tokenised pairs."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    pairs = load(Path(workload) / "pairs_tokens.json")
    columns = [{"chosen_ids": p["chosen"], "rejected_ids": p["rejected"]} for p in pairs]
    clock = Clock()
    folder = Path(workload) / "model"
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32),
        args=RewardConfig(
            **_arguments(workload, scratch, micro, "random"), gradient_checkpointing=checkpointing == "checkpointing"
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=_tokenizer(workload),
        callbacks=[clock.callback()],
    )
    trainer.data_collator = clock.watch(trainer.data_collator)
    trainer.train()
    report(**clock.result("pairs_per_second", len(pairs)))


def trl_dpo(workload: str, scratch: str, micro: str, checkpointing: str, reference: str) -> None:
    """Train with TRL's DPOTrainer on tokenised pairs.

    `reference` is `model` (a second model in memory) or `precomputed` (before the first step).
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    pairs = load(Path(workload) / "preference_tokens.json")
    columns = [
        {
            "prompt_ids": p["chosen"][: p["target_start"]],
            "chosen_ids": p["chosen"][p["target_start"] :],
            "rejected_ids": p["rejected"][p["target_start"] :],
        }
        for p in pairs
    ]
    clock, before = Clock(), time.perf_counter()
    trainer = Tokenised(
        model=AutoModelForCausalLM.from_pretrained(Path(workload) / "model", dtype=torch.float32),
        args=DPOConfig(
            **_arguments(workload, scratch, micro, "random"),
            gradient_checkpointing=checkpointing == "checkpointing",
            precompute_ref_log_probs=reference == "precomputed",
            precompute_ref_batch_size=int(micro),
        ),
        train_dataset=Dataset.from_list(columns),
        processing_class=_tokenizer(workload),
        callbacks=[clock.callback()],
    )
    prepared = time.perf_counter() - before
    trainer.data_collator = clock.watch(trainer.data_collator)
    trainer.train()
    report(**clock.result("pairs_per_second", len(pairs)), seconds_before=prepared)


def _padded(rows: list[list[int]], padding: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def transformers_ddp(workload: str, scratch: str, name: str, micro: str, ranks: str = "1") -> None:
    """Train a transformers model with DDP in a plain loop, with each global batch sorted by length."""
    import torch.multiprocessing as mp

    if ranks == "1":
        _ddp_rank(0, workload, scratch, name, micro, 1)
    else:
        mp.spawn(_ddp_rank, (workload, scratch, name, micro, int(ranks)), nprocs=int(ranks))


def _ddp_rank(rank: int, workload: str, scratch: str, name: str, micro: str, ranks: int) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=ranks)
    rows = load(Path(workload) / f"{name}_tokens.json")
    model = DistributedDataParallel(AutoModelForCausalLM.from_pretrained(Path(workload) / "model", dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    clock = Clock()
    for _ in range(2):
        clock.starts.append(time.perf_counter())
        clock.computed = clock.real = 0
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order), GLOBAL_BATCH):
            taken = sorted((rows[i] for i in order[first : first + GLOBAL_BATCH]), key=lambda r: len(r["ids"]))
            _step(model, optimizer, taken[rank::ranks], int(micro), clock, in_bf16(workload))
    clock.end = time.perf_counter()
    if rank == 0:
        memory = peak_memory_bytes() * ranks
        found = clock.result("targets_per_second", sum(len(r["ids"]) - r["target_start"] for r in rows))
        report(**found, peak_memory_bytes=memory)
    dist.destroy_process_group()


def _step(model: Any, optimizer: Any, rows: list[Any], micro: int, clock: Clock, bf16: bool) -> None:
    """Run one optimizer step. DDP averages the gradients over ranks with the last micro-batch."""
    rows = sorted(rows, key=lambda r: len(r["ids"]))
    targets = sum(len(r["ids"]) - r["target_start"] for r in rows)
    for first in range(0, len(rows), micro):
        model.require_backward_grad_sync = first + micro >= len(rows)
        part = rows[first : first + micro]
        ids, mask = _padded([r["ids"] for r in part])
        clock.computed += ids.numel()
        clock.real += int(mask.sum())
        labels = ids.clone()
        for i, row in enumerate(part):
            labels[i, : row["target_start"]] = _IGNORED
            labels[i, len(row["ids"]) :] = _IGNORED
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        (loss / targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _texts(workload: str) -> list[str]:
    """Return the rows as texts in the paper's template, with the end-of-sequence token."""
    rows = (json.loads(line) for line in (Path(workload) / "sft.jsonl").read_text(encoding="utf-8").splitlines())
    names = {"user": "User:", "system": "System:", "assistant": "Assistant: "}

    def text(prompt: Any) -> str:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "".join(names[t["role"]] + t["content"] for t in turns)

    return [f"{text(r['prompt'])}Assistant: {r['response']}</s>" for r in rows]


def _reward_model(workload: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    folder, dtype = Path(workload) / "reward_hf", torch.bfloat16 if in_bf16(workload) else torch.float32
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()


def batched_scoring(workload: str, scratch: str, rows: str, batch: str, order: str) -> None:
    """Score with transformers in batches, with the rows in their order or all sorted by length."""
    model = _reward_model(workload)
    ids = [r["ids"] for r in load(Path(workload) / f"scored_{rows}_tokens.json")]

    @torch.inference_mode()
    def score() -> tuple[int, list[float]]:
        places = sorted(range(len(ids)), key=lambda i: len(ids[i])) if order == "sorted" else list(range(len(ids)))
        found = [0.0] * len(ids)
        computed = 0
        for first in range(0, len(places), int(batch)):
            part = places[first : first + int(batch)]
            tokens, mask = _padded([ids[i] for i in part], model.config.pad_token_id)
            computed += tokens.numel()
            for i, value in zip(part, model(input_ids=tokens, attention_mask=mask).logits[:, 0].tolist(), strict=True):
                found[i] = value
        return computed, found

    computed, scores = score()
    seconds = median_seconds(score)
    tokens = sum(map(len, ids))
    report(tokens_per_second=tokens / seconds, padding=1 - tokens / computed, seconds=seconds, checksum=sum(scores))


def pipeline_scoring(workload: str, scratch: str, batch: str) -> None:
    """Score with the text-classification pipeline of transformers."""
    from transformers import AutoTokenizer, pipeline

    texts = _texts(workload)
    tokenizer = AutoTokenizer.from_pretrained(Path(workload) / "reward_hf")
    scorer = pipeline(
        "text-classification",
        model=_reward_model(workload),
        tokenizer=tokenizer,
        device="cpu",
        function_to_apply="none",
    )
    arguments = {"batch_size": int(batch), "truncation": True, "max_length": MAX_LENGTH, "add_special_tokens": False}

    def score() -> float:
        return sum(r["score"] for r in scorer(texts, **arguments))

    total = score()
    seconds = median_seconds(score)
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"][:MAX_LENGTH]) for t in texts)
    report(tokens_per_second=tokens / seconds, seconds=seconds, checksum=total)
