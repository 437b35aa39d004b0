"""Write the logits of Hugging Face folders, computed with tensor parallelism under torchrun:

torchrun --nproc-per-node=2 -m tests.distributed.logits rows.json out.safetensors folder [folder ...]
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.convert.architecture import read_architecture
from offline_align.convert.check import packed
from offline_align.convert.load import load_huggingface
from offline_align.distributed.setup import Ranks, session


def logits(folder: Path, rows: list[list[int]], parallel: ParallelSection, ranks: Ranks) -> torch.Tensor:
    """Return logits [T, V] over the whole vocabulary, without padding, on every rank."""
    from megatron.core import parallel_state

    from offline_align.model.build import build_model
    from offline_align.model.heads import Policy

    found = read_architecture(folder)
    model = build_model("policy", found.model, parallel, ranks.device, bf16=False).eval()
    assert isinstance(model, Policy)
    parameters = dict(model.named_parameters())
    for name, shard in load_huggingface(folder, ranks.tp_rank, ranks.tp_size):
        if name in parameters:
            parameters[name].data.copy_(shard)
    with torch.no_grad():
        own = model.logits(packed(rows)).contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.tp_size)]
    torch.distributed.all_gather(parts, own, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=1)[:, : found.model.vocab_size].contiguous()


def main(rows_file: str, target: str, *folders: str) -> None:
    """Write the logits of every folder under its index."""
    rows = json.loads(Path(rows_file).read_text())
    parallel = ParallelSection(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        found = {str(k): logits(Path(folder), rows, parallel, ranks) for k, folder in enumerate(folders)}
        if ranks.is_main:
            save_file(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
