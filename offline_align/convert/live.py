"""The weights of a model in training under Hugging Face names, in memory and without files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from offline_align.config.sections import ModelSection
from offline_align.convert.export import huggingface_tensors
from offline_align.convert.names import Kind


def live_tensors(
    module: torch.nn.Module, model: ModelSection, kind: Kind, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor of a built model, whole, on this rank's device.

    `module` is the model itself, without a wrapper such as DistributedDataParallel, and its weights are
    complete (inside `train.step.weights_in_place`). With `dtype`, tensors are cast to it, except the scalar
    head of a reward model. All ranks of a tensor parallel group must iterate together. One tensor is
    gathered at a time; on a group of one rank nothing is copied but what the names split. A tensor may
    be a view of a weight: copy it before the next update.
    """
    own = own_tensors(module)
    cast = ((n, t if dtype is None or n.startswith("reward_head.") else t.to(dtype)) for n, t in own)
    yield from huggingface_tensors(cast, model, kind, all_shards)


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of this tensor parallel rank under our names."""
    from offline_align.model.backend import torch_name

    return ((torch_name(name), parameter.detach()) for name, parameter in module.named_parameters())


def all_shards(shard: Tensor) -> list[Tensor]:
    """Return the shards of all tensor parallel ranks, in the order of ranks."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(size)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    return shards
