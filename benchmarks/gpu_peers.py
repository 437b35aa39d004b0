"""The peers on a GPU: transformers with fused AdamW, and vLLM's scoring."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_workload import (
    BINS_PER_STEP,
    DEVICE,
    DTYPE,
    FULL_LAYERS,
    MAX_LENGTH,
    TRAINED_LAYERS,
    WIDTHS,
    cost,
    result,
    row_lengths,
    timed,
)
from benchmarks.harness import report


def _config(layers: int, **further: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **WIDTHS,
        num_hidden_layers=layers,
        max_position_embeddings=MAX_LENGTH,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        # Nothing is generated, so a key/value cache would only add to the measured memory.
        use_cache=False,
        **further,
    )


def _built(kind: Any, layers: int, **further: Any) -> Any:
    """Return a model with random weights created in DTYPE; a later cast would leave the fp32 peak behind."""
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = kind(_config(layers, **further))
    torch.set_default_dtype(torch.float32)
    return model


def _padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    ids = torch.randint(1, WIDTHS["vocab_size"], (len(lengths), longest), device=DEVICE)
    mask = (torch.arange(longest, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None]).long()
    return ids * mask, mask


def _batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Return batches of at most `tokens` tokens with padding, sorted by length to minimise the padding."""
    batches: list[list[int]] = [[]]
    for length in sorted(lengths):
        if batches[-1] and length * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(length)
    return batches


def sft(_: str, __: str, rows: str) -> None:
    """Train LlamaForCausalLM with bf16 weights and fused AdamW, on rows sorted by length."""
    from transformers import LlamaForCausalLM

    lengths = row_lengths(rows == "full", BINS_PER_STEP * MAX_LENGTH)
    model = _built(LlamaForCausalLM, TRAINED_LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [_padded(b) for b in _batches(lengths, MAX_LENGTH)]

    def step() -> None:
        for ids, mask in batches:
            labels = torch.where(mask.bool(), ids, -100)
            labels[:, : ids.size(1) // 2] = -100
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timing = timed(step)
    targets = sum(n - max(n // 2, 1) for n in lengths)
    report(**result(timing, sum(lengths), cost(lengths), targets, TRAINED_LAYERS, training=True))


def reward(_: str, __: str, rows: str) -> None:
    """Train LlamaForSequenceClassification on pairs, with chosen and rejected in one padded batch."""
    from transformers import LlamaForSequenceClassification

    halved = MAX_LENGTH // 2 if rows == "full" else MAX_LENGTH
    lengths = [min(n, halved) for n in row_lengths(rows == "full", BINS_PER_STEP * MAX_LENGTH // 2)]
    model = _built(LlamaForSequenceClassification, TRAINED_LAYERS, num_labels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [_padded([*b, *b]) for b in _batches(lengths, MAX_LENGTH // 2)]

    def step() -> None:
        for ids, mask in batches:
            chosen, rejected = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().chunk(2)
            (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    report(**result(timed(step), 2 * sum(lengths), cost([*lengths, *lengths]), 0, TRAINED_LAYERS, training=True))


def label(_: str, __: str, rows: str) -> None:
    """Score rows sorted by length with LlamaForSequenceClassification."""
    from transformers import LlamaForSequenceClassification

    lengths = row_lengths(rows == "full", 2 * BINS_PER_STEP * MAX_LENGTH)
    model = _built(LlamaForSequenceClassification, FULL_LAYERS, num_labels=1).eval()
    batches = [_padded(b) for b in _batches(lengths, 4 * MAX_LENGTH)]

    @torch.inference_mode()
    def step() -> None:
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()

    report(**result(timed(step), sum(lengths), cost(lengths), 0, FULL_LAYERS, training=False))


def vllm_label(_: str, scratch: str, rows: str) -> None:
    """Score with vLLM's pooling runner and random weights."""
    from vllm import LLM, TokensPrompt

    lengths = row_lengths(rows == "full", 2 * BINS_PER_STEP * MAX_LENGTH)
    folder = Path(scratch) / "model"
    folder.mkdir()
    config = _config(FULL_LAYERS, num_labels=1).to_dict() | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    engine = LLM(
        model=str(folder),
        runner="pooling",
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_LENGTH,
        enable_prefix_caching=False,
    )
    ids = [torch.randint(1, WIDTHS["vocab_size"], (n,)).tolist() for n in lengths]
    prompts = [TokensPrompt(prompt_token_ids=row) for row in ids]
    timing = timed(lambda: engine.classify(prompts, use_tqdm=False))
    found = result(timing, sum(lengths), cost(lengths), 0, FULL_LAYERS, training=False)
    # The engine runs in its own process, whose memory this process cannot read.
    del found["gpu_memory_bytes"]
    report(**found)
