"""Hand weights of tensor parallel ranks to engines, and roll out on all ranks, under torchrun:

torchrun --nproc-per-node=2 -m tests.distributed.rollouts out.safetensors rows folder [folder ...]
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.convert.architecture import read_architecture
from offline_align.convert.live import live_tensors
from offline_align.convert.load import load_huggingface
from offline_align.data.journal import Journal
from offline_align.distributed.setup import Ranks, session
from offline_align.distributed.stopping import StopRequest
from offline_align.generate.requests import Completion, Request
from offline_align.generate.rollout import rollout


def gathered(folder: Path, parallel: ParallelSection, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of our model, which holds the shards of a folder's weights."""
    from offline_align.model.build import build_model

    found = read_architecture(folder)
    model = build_model(found.kind, found.model, parallel, ranks.device, bf16=False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, shard in load_huggingface(folder, ranks.tp_rank, ranks.tp_size):
            if name in parameters:
                parameters[name].copy_(shard)
    return {name: tensor.clone() for name, tensor in live_tensors(model, found.model, found.kind)}


class Signed:
    """Answers with the row and the rank, and counts the requests."""

    batch_size = 4

    def __init__(self, rank: int, stop: StopRequest) -> None:
        self.rank, self.stop, self.requests = rank, stop, 0

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        self.requests += len(requests)
        yield [Completion(r.row, 0, f"{r.row} by {self.rank}", "length", 1, 0, (r.row,), (-1.0,)) for r in requests]


def main(target: str, rows: str, *folders: str) -> None:
    """Write the tensors of every folder, seen by the last rank, and beside them the answers of each rank."""
    parallel = ParallelSection(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        found = {
            f"{k}:{name}": t
            for k, folder in enumerate(folders)
            for name, t in gathered(Path(folder), parallel, ranks).items()
        }
        if ranks.rank == ranks.world_size - 1:
            save_file(found, target)
        stop = StopRequest()
        engine = Signed(ranks.rank, stop)
        requests = [Request(row, 0, [1] * (1 + row % 3), 4) for row in range(int(rows))]
        journal = Journal(Path(target).parent, "k" * 16, ranks.rank)
        answers = [answer.response for answer in rollout(engine, requests, journal, ranks, stop)]
        said = {"answers": answers, "computed": engine.requests}
        Path(f"{target}.{ranks.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
