"""Parameters, FLOPs and memory against hand-worked numbers and the model that is built."""

from dataclasses import replace

import pytest

from offline_align.config.runs import ModelRun
from offline_align.config.sections import ModelSection, ParallelSection
from offline_align.estimate.hardware import peak_flops
from offline_align.estimate.sizes import (
    ParallelSizes,
    checkpoint_host_bytes,
    model_sizes,
    training_memory,
)
from tests.runs import compose

TINY = ModelSection(
    num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=10
)


def test_parameters_of_a_tiny_model_by_hand() -> None:
    layer = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert model_sizes(TINY, 10).parameters == 2 * layer + 2 * 128 * 8 + 8


def test_a_scalar_head_stands_where_the_vocabulary_was() -> None:
    policy, reward = model_sizes(TINY, 10), model_sizes(TINY, 10, scalar_head=True)
    assert reward.parameters == policy.parameters - 128 * 8 + 8
    tied = replace(TINY, share_embeddings_and_output_weights=True)
    assert model_sizes(tied, 10, scalar_head=True).parameters == reward.parameters
    # Whatever reaches the head, no product with the vocabulary is counted.
    assert reward.train_flops(8, 34, 4, 8) == policy.train_flops(8, 34, 0, 8)


def test_memory_of_a_scalar_head_by_hand() -> None:
    body = model_sizes(TINY, 10, scalar_head=True).parameters - 8
    ranks = ParallelSizes(8, 2, 1)
    policy, reward = (
        training_memory(model_sizes(TINY, 10, scalar_head), ParallelSection(), ranks, 64, True, "none")
        for scalar_head in (False, True)
    )
    # The head is fp32 and whole on both tensor parallel ranks; four data parallel ranks share the optimizer.
    assert reward.weights == body / 2 * 2 + 8 * 4
    assert reward.gradients == body / 2 * 4 + 8 * 4
    assert reward.optimizer == (body / 2 * 12 + 8 * 8) / 4
    # No logits, which are kept in bf16: 64 rows of them are more than the gradient of the output layer, 8 rows.
    assert policy.activations - reward.activations == 64 * 128 / 2 * 2


def test_gradients_in_bf16_are_copied_for_the_update() -> None:
    sizes, ranks = model_sizes(TINY, 100), ParallelSizes(world=4, tensor=2, context=1)
    bf16, fp32 = (ParallelSection(grad_reduce_in_fp32=wide) for wide in (False, True))
    local = sizes.parameters / 2
    memory = training_memory(sizes, bf16, ranks, 1, True, "none")
    # Two data parallel ranks hold half of the copies each; activations of one token are less.
    assert memory.update == local * 4 / 2 > memory.activations
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.update
    assert training_memory(sizes, fp32, ranks, 1, True, "none").update == 0
    lean = training_memory(sizes, bf16, ranks, 1, True, "none", lean_optimizer=True)
    assert (lean.update, lean.optimizer) == (0, memory.optimizer / 2)


def test_a_rank_copies_to_its_host_what_it_writes() -> None:
    sizes = model_sizes(TINY, 100)
    for world, tensor, context, share in ((8, 2, 1, 8), (8, 1, 2, 8), (1, 1, 1, 1)):
        ranks = ParallelSizes(world=world, tensor=tensor, context=context)
        assert checkpoint_host_bytes(sizes, ranks, bf16=True) == sizes.parameters * 14 / share
        assert checkpoint_host_bytes(sizes, ranks, bf16=False) == sizes.parameters * 16 / share


def test_the_papers_model_has_about_8_5_billion() -> None:
    config = compose("sft", ["run.dir=x"]).config
    assert isinstance(config, ModelRun)
    assert model_sizes(config.model, 256000).parameters == pytest.approx(8.5e9, rel=0.01)


def test_llama_3_8b_matches_its_published_size() -> None:
    config = compose("sft", ["run.dir=x", "model=llama3_8b"]).config
    assert isinstance(config, ModelRun)
    assert model_sizes(config.model, 128256).parameters == 8_030_261_248


def test_training_flops_by_hand() -> None:
    sizes = model_sizes(TINY, 10)
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    # Two rows of 3 and 5 tokens, 4 targets: products cost 2 a weight, causal attention QK and AV halves of 2 L^2 H D.
    forward = 2 * matrices * 8 + 2 * (2 * 8 * (9 + 25) * 2 / 2) + 2 * 128 * 8 * 4
    assert sizes.train_flops(8, 34, 4, 8) == 3 * forward
    # The last layer's MLP where 5 tokens are read: three matrices less for the other 3.
    assert sizes.train_flops(8, 34, 4, 5) == 3 * (forward - 2 * 3 * 8 * 16 * 3)


def test_vocabulary_is_padded_whatever_the_layout() -> None:
    assert [TINY.padded(v) for v in (1, 128, 129)] == [128, 128, 256]


def test_data_parallel_is_what_remains() -> None:
    assert ParallelSizes(world=16, tensor=4, context=2).data == 2


def test_distributed_optimizer_shards_moments() -> None:
    sizes, ranks = model_sizes(TINY, 10), ParallelSizes(8, 1, 1)
    whole = training_memory(sizes, ParallelSection(use_distributed_optimizer=False), ranks, 64, True, "none")
    split = training_memory(sizes, ParallelSection(), ranks, 64, True, "none")
    assert split.optimizer == whole.optimizer / 8
    assert whole.optimizer == sizes.parameters * 12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("Some other GPU", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
