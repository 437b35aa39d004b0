"""The offline-align contenders on a GPU: model, loader, step and scoring, without files and tokenizers."""

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu_workload import (
    BINS_PER_STEP,
    DEVICE,
    FULL_LAYERS,
    MAX_LENGTH,
    SMOKE,
    TRAINED_LAYERS,
    WIDTHS,
    memory_bytes,
    result,
    row_lengths,
    timed,
)
from benchmarks.harness import apart, report
from offline_align.config.sections import (
    Backend,
    Device,
    ModelSection,
    OptimSection,
    ParallelSection,
    RunSection,
)
from offline_align.data.bins import MOST_KEYS_IN_TRAINING, PairSource, RowSource, SampleSource
from offline_align.data.loader import Loader
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows
from offline_align.distributed.setup import session

PARALLEL = ParallelSection(grad_reduce_in_fp32=False)


def model_section(layers: int, backend: str) -> ModelSection:
    """Return the 8 B shape with the given number of layers."""
    return ModelSection(
        num_layers=layers,
        hidden_size=WIDTHS["hidden_size"],
        ffn_hidden_size=WIDTHS["intermediate_size"],
        num_attention_heads=WIDTHS["num_attention_heads"],
        num_query_groups=WIDTHS["num_key_value_heads"],
        vocab_size=WIDTHS["vocab_size"],
        max_position_embeddings=MAX_LENGTH,
        rotary_base=500000.0,
        backend=Backend(backend),
    )


def random_rows(lengths: list[int], seed: int = 0) -> TokenizedRows:
    """Return rows of random tokens. The second half of each row is the target."""
    ids = np.random.Generator(np.random.PCG64(seed)).integers(0, WIDTHS["vocab_size"], sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    starts = np.maximum(np.array(lengths, dtype=np.int32) // 2, 1)
    return TokenizedRows(
        ids, offsets, starts, np.ones(len(lengths), np.float32), [str(i) for i in range(len(lengths))], {}, 0
    )


def random_pairs(lengths: list[int]) -> TokenizedPairs:
    """Return pairs of random tokens. The prompt is the first half of each row and shared by both answers."""
    chosen, other = random_rows(lengths, 1), random_rows(lengths, 2)
    place = np.arange(sum(lengths)) - np.repeat(chosen.offsets[:-1], lengths)
    ids = np.where(place < np.repeat(chosen.target_start, lengths), chosen.ids, other.ids)
    rejected = replace(other, ids=ids)
    return TokenizedPairs(chosen, rejected, np.zeros(len(lengths), np.float32), chosen.row_ids, {})


def sft(_: str, __: str, backend: str, rows: str, precision: str = "bf16") -> None:
    """Measure SFT steps of the 8 B shape with a quarter of its layers, in bf16 or fp8."""
    lengths = row_lengths(rows == "full", BINS_PER_STEP * MAX_LENGTH)
    source = SampleSource(random_rows(lengths))
    targets = sum(n - max(n // 2, 1) for n in lengths)
    _train("policy", source, backend, lengths, targets, precision == "fp8")


def answers(_: str, __: str, backend: str, rows: str, prompts: str = "once") -> None:
    """Measure SFT steps on two answers to each prompt, with the prompt computed once or per answer."""
    lengths = _lengths_of_pairs(rows)
    pairs = random_pairs(lengths)
    source = SampleSource(_both_sides(pairs), prompts == "once", MOST_KEYS_IN_TRAINING)
    targets = 2 * sum(n - max(n // 2, 1) for n in lengths)
    _train("policy", source, backend, [*lengths, *lengths], targets)


def _both_sides(pairs: TokenizedPairs) -> TokenizedRows:
    chosen, rejected = pairs.chosen, pairs.rejected
    return replace(
        chosen,
        ids=np.concatenate((chosen.ids, rejected.ids)),
        offsets=np.concatenate((chosen.offsets, chosen.offsets[-1] + rejected.offsets[1:])),
        target_start=np.concatenate((chosen.target_start, rejected.target_start)),
        weight=np.concatenate((chosen.weight, rejected.weight)),
        row_ids=[*chosen.row_ids, *rejected.row_ids],
    )


def reward(_: str, __: str, backend: str, rows: str, prompts: str = "once") -> None:
    """Measure reward-model steps on packed pairs, with the prompt computed once or per answer."""
    lengths = _lengths_of_pairs(rows)
    _train("reward_model", PairSource(random_pairs(lengths), prompts == "once"), backend, [*lengths, *lengths], 0)


def _lengths_of_pairs(rows: str) -> list[int]:
    # Both answers of a pair share a bin, so full rows are half as long.
    halved = MAX_LENGTH // 2 if rows == "full" else MAX_LENGTH
    return [min(n, halved) for n in row_lengths(rows == "full", BINS_PER_STEP * MAX_LENGTH // 2)]


def _train(kind: str, source: RowSource, backend: str, lengths: list[int], targets: int, fp8: bool = False) -> None:
    with session(PARALLEL, RunSection(dir="unused", device=Device(DEVICE.type))) as ranks:
        from offline_align.data.pack import padding_multiple
        from offline_align.model.build import build_model
        from offline_align.objectives.next_token import next_token
        from offline_align.objectives.pairwise import pairwise
        from offline_align.train.optim import build_optimizer, wrap_model
        from offline_align.train.step import TrainStep

        bf16, on_cuda = not SMOKE, DEVICE.type == "cuda"
        shape = model_section(TRAINED_LAYERS, backend)
        model = wrap_model(build_model(kind, shape, PARALLEL, ranks.device, bf16, fp8=fp8), PARALLEL, on_cuda)
        optimizer = build_optimizer(model, OptimSection(), PARALLEL, bf16, on_cuda)
        step = TrainStep(model, optimizer, next_token if kind == "policy" else pairwise(), 1.0)
        count = len(source)
        multiple = padding_multiple(1, 1, False, fp8)
        upcoming: Any = Loader(source, count, count * 100, MAX_LENGTH, 0, 0, 1, multiple).steps(0, pinned=on_cuda)
        timing = timed(lambda: step(next(upcoming).micro_batches, 1e-5))
        upcoming.close()
    groups = source.groups(range(count), MAX_LENGTH)
    computed = sum(g.tokens for g in groups), sum(g.squared_lengths for g in groups)
    report(**result(timing, sum(lengths), computed, targets, TRAINED_LAYERS, training=True))


def label(_: str, __: str, backend: str, rows: str) -> None:
    """Measure scoring with all layers of the 8 B shape on one GPU, in bins of four full rows."""
    lengths = row_lengths(rows == "full", 2 * BINS_PER_STEP * MAX_LENGTH)
    source = SampleSource(random_rows(lengths))
    with session(PARALLEL, RunSection(dir="unused", device=Device(DEVICE.type))) as ranks:
        from offline_align.label.scoring import score_all
        from offline_align.model.build import build_model
        from offline_align.model.passes import plan_bins

        model: Any = build_model(
            "reward_model", model_section(FULL_LAYERS, backend), PARALLEL, ranks.device, not SMOKE
        ).eval()
        bins = plan_bins(source, 4 * MAX_LENGTH)
        timing = timed(lambda: score_all(model, source, bins, ranks))
    computed = source.num_tokens(), source.size(range(len(source))).squared_lengths
    report(**result(timing, sum(lengths), computed, 0, FULL_LAYERS, training=False))


def correctness(_: str, __: str, backend: str, kind: str) -> None:
    """Compare outputs and gradients in bf16 on the device with fp32 on the CPU, for the same weights.

    The outputs are the likelihoods of a policy, or the scores of a reward model with shared prompts.
    """
    lengths = row_lengths(False, 2 * MAX_LENGTH, seed=3)
    error, cosine = against_fp32(backend, kind, lengths, Device(DEVICE.type), bf16=True)
    report(relative_error=error, gradient_cosine=cosine, gpu_memory_bytes=memory_bytes())


def against_fp32(backend: str, kind: str, lengths: list[int], device: Device, bf16: bool) -> tuple[float, float]:
    """Return the mean difference of the outputs relative to their mean, and the cosine of the gradients."""
    exact, exact_gradient = apart(outputs, kind, lengths, Device.cpu, False, "torch")
    found, gradient = outputs(kind, lengths, device, bf16, backend)
    cosine = gradient @ exact_gradient / np.linalg.norm(gradient) / np.linalg.norm(exact_gradient)
    return float(np.abs(found - exact).mean() / np.abs(exact).mean()), float(cosine)


def outputs(kind: str, lengths: list[int], device: Device, bf16: bool, backend: str) -> tuple[Any, Any]:
    """Return the outputs of a small model with fixed weights, and the gradient of their sum, in fp32.

    The gradient is the one that a training step with two equal micro-batches applies.
    """
    import torch

    with session(PARALLEL, RunSection(dir="unused", device=device)) as ranks:
        from offline_align.model.build import build_model
        from offline_align.train.optim import wrap_model

        small = ModelSection(
            num_layers=2,
            hidden_size=256,
            ffn_hidden_size=512,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=WIDTHS["vocab_size"],
            backend=Backend(backend),
        )
        model: Any = build_model(kind, small, PARALLEL, ranks.device, bf16)
        _fill(model)
        source: RowSource = SampleSource(random_rows(lengths))
        if kind == "reward_model":
            source = PairSource(random_pairs(lengths), share_prompts=True)
        batch = source.collate(range(len(lengths)), 16).to(ranks.device)
        wrapped = wrap_model(model, PARALLEL, ranks.device.type == "cuda")
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            wrapped(batch).sum().backward()
        output = wrapped(batch)
        output.sum().backward()
        wrapped.finish_grad_sync()
        gradient = torch.cat([p.main_grad.flatten().float().cpu() for _, p in sorted(_canonical(model).items())])
        return output.detach().float().cpu().numpy(), gradient.numpy()


def _canonical(model: Any) -> dict[str, Any]:
    """Return the parameters by names that do not depend on the backend."""
    from offline_align.model.backend import torch_name

    return {torch_name(name): p for name, p in model.named_parameters()}


def _fill(model: Any) -> None:
    """Set every parameter to values that depend only on its name and shape."""
    import zlib

    import torch

    with torch.no_grad():
        for name, parameter in _canonical(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else 0.05 * drawn)
