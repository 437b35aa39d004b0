"""Count the bytes that a rank sends in one optimizer step.

    torchrun --nproc-per-node=2 -m benchmarks.communication tp

The count assumes ring algorithms: a rank sends (n - 1) / n of a buffer to reduce-scatter or gather
it, and twice that to all-reduce it.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

LAYERS, HIDDEN, FFN, HEADS, VOCABULARY = 3, 64, 128, 4, 256
# For each collective: the position of the whole buffer among its arguments, and how often a ring sends it.
COLLECTIVES = {"all_reduce": (0, 2), "reduce_scatter_tensor": (1, 1), "all_gather_into_tensor": (0, 1)}
sent: dict[str, float] = defaultdict(float)


def _count(name: str, place: int, times: int) -> None:
    whole: Callable[..., Any] = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        n = dist.get_world_size(kwargs.get("group"))
        sent[name] += times * (n - 1) / n * args[place].numel() * args[place].element_size()
        return whole(*args, **kwargs)

    setattr(dist, name, counted)


def main() -> None:
    """Train a small model for two steps with the given layout (tp or dp) and print the second step's bytes."""
    # Replace the functions before megatron-core imports them by name.
    for name, (place, times) in COLLECTIVES.items():
        _count(name, place, times)
    import numpy as np

    from offline_align.config.sections import Device, ModelSection, OptimSection, ParallelSection, RunSection
    from offline_align.data.bins import SampleSource
    from offline_align.data.loader import Loader
    from offline_align.data.tokenize import TokenizedRows
    from offline_align.distributed.setup import session

    parallel = ParallelSection(tensor_model_parallel_size=2 if sys.argv[1] == "tp" else 1)
    lengths = [30, 20, 40, 38]
    ids = np.arange(sum(lengths), dtype=np.int32) % VOCABULARY
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    weights, names = np.ones(4, np.float32), list("abcd")
    source = SampleSource(TokenizedRows(ids, offsets, np.full(4, 10, np.int32), weights, names, {}, 0))
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        from offline_align.model.build import build_model
        from offline_align.objectives.next_token import next_token
        from offline_align.train.optim import build_optimizer, wrap_model
        from offline_align.train.step import TrainStep

        model = ModelSection(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN,
            num_attention_heads=HEADS,
            vocab_size=VOCABULARY,
        )
        wrapped = wrap_model(build_model("policy", model, parallel, ranks.device, False), parallel, False)
        step = TrainStep(
            wrapped, build_optimizer(wrapped, OptimSection(), parallel, False, False), next_token, clip_grad=1.0
        )
        data = Loader(source, 4, 4, 128, 0, ranks.dp_rank, ranks.dp_size).step(0)
        step(data.micro_batches, 1e-3)
        sent.clear()
        step(data.micro_batches, 1e-3)
        targets = sum(b.target_ids.numel() for b in data.micro_batches)
        tokens = sum(b.tokens.numel() for b in data.micro_batches)
        if ranks.is_main:
            print("RESULT " + json.dumps(dict(sent) | {"tokens": tokens, "targets": targets}), flush=True)


if __name__ == "__main__":
    main()
