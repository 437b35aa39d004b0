"""Compare training steps and scoring with a plain transformers loop in one process, on a shared machine.

`python -m benchmarks.one_process` measures the processor time of one thread and runs the contenders in
turns, so that other programs distort the result little. Rows are random tokens with the lengths in
`--lengths` (a JSON list). The model has 8 M parameters.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.matrices import multiply, products
from benchmarks.peers import Clock, _padded, _step
from benchmarks.workload import GLOBAL_BATCH, MAX_LENGTH
from offline_align.config.sections import Device, ModelSection, OptimSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.loader import Loader, rows_of_step
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import session

SEED = 1234
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}


def random_rows(lengths: list[int]) -> TokenizedRows:
    """Return rows of random tokens. The second half of each row is the target."""
    ids = np.random.default_rng(SEED).integers(1, CONFIG["vocab_size"], sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    starts = np.maximum(np.array(lengths) // 2, 1).astype(np.int32)
    names = [str(i) for i in range(len(lengths))]
    return TokenizedRows(ids, offsets, starts, np.ones(len(lengths), np.float32), names, {}, 0)


def processor_seconds(work: Callable[[], Any]) -> float:
    """Return the processor time of `work` in seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def contenders(rows: TokenizedRows, ranks: Any) -> dict[str, Callable[[int], float]]:
    """Return, for each contender, a function that runs a step by its number and returns the seconds."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from offline_align.label.scoring import score_all
    from offline_align.model.build import build_model
    from offline_align.model.passes import plan_bins
    from offline_align.objectives.next_token import next_token
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    parallel, source, count = ParallelSection(), SampleSource(rows), len(rows)
    lengths, starts = np.diff(rows.offsets).tolist(), rows.target_start.tolist()
    plain = [
        {"ids": rows.ids[a:b].tolist(), "target_start": s}
        for a, b, s in zip(rows.offsets[:-1], rows.offsets[1:], starts, strict=True)
    ]
    layers = CONFIG["num_hidden_layers"]
    section = ModelSection(num_layers=6, hidden_size=256, ffn_hidden_size=688, num_attention_heads=8, vocab_size=8192)
    wrapped = wrap_model(build_model("policy", section, parallel, ranks.device, False), parallel, False)
    step = TrainStep(wrapped, build_optimizer(wrapped, OptimSection(), parallel, False, False), next_token, 1.0)
    scorer: Any = build_model("reward_model", section, parallel, ranks.device, False).eval()
    loader = Loader(source, GLOBAL_BATCH, 100 * count, MAX_LENGTH, SEED, 0, 1)
    peer = DistributedDataParallel(LlamaForCausalLM(LlamaConfig(**CONFIG, pad_token_id=0)))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    peer_scorer = LlamaForSequenceClassification(LlamaConfig(**CONFIG, pad_token_id=0, num_labels=1)).eval()

    def chosen(number: int) -> list[int]:
        return rows_of_step(number, GLOBAL_BATCH, count, 100 * count, SEED)

    def plain_step(number: int, micro: int) -> float:
        taken = [plain[i] for i in chosen(number)]
        return processor_seconds(lambda: _step(peer, optimizer, taken, micro, Clock()))

    def bare_step(number: int) -> float:
        taken = chosen(number)
        targets = sum(lengths[i] - starts[i] for i in taken)
        needed = products(CONFIG, [(lengths[i], lengths[i]) for i in taken], targets, True, True)
        return processor_seconds(lambda: multiply(needed, layers))

    def score(_: int) -> float:
        bins = plan_bins(source, MAX_LENGTH)
        return processor_seconds(lambda: score_all(scorer, source, bins, ranks))

    @torch.inference_mode()
    def plain_score(micro: int) -> None:
        order = sorted(range(count), key=lambda i: lengths[i])
        for first in range(0, count, micro):
            ids, mask = _padded([plain[i]["ids"] for i in order[first : first + micro]])
            peer_scorer(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()

    forward = products(CONFIG, [(n, n) for n in lengths], count, False, False)
    return {
        "sft: offline-align": lambda k: processor_seconds(lambda: step(loader.step(k).micro_batches, 1e-4)),
        "sft: transformers + DDP, one row": lambda k: plain_step(k, 1),
        "sft: transformers + DDP, sorted, 4 rows": lambda k: plain_step(k, 4),
        "sft: bare matrix products": bare_step,
        "label: offline-align": score,
        "label: transformers, sorted, 16 rows": lambda _: processor_seconds(lambda: plain_score(16)),
        "label: transformers, sorted, 4 rows": lambda _: processor_seconds(lambda: plain_score(4)),
        "label: transformers, one row": lambda _: processor_seconds(lambda: plain_score(1)),
        "label: bare matrix products": lambda _: processor_seconds(lambda: multiply(forward, layers)),
    }


def main() -> None:
    """Print, after every round, the microseconds per token as the median of all rounds but the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, required=True, help="JSON list of row lengths in tokens")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    # Use one thread, since the processor time of waiting threads would be counted.
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
    rows = random_rows([min(n, MAX_LENGTH) for n in json.loads(options.lengths.read_text(encoding="utf-8"))])
    lengths = np.diff(rows.offsets)
    with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)) as ranks:
        torch.set_num_threads(1)
        measures = contenders(rows, ranks)
        found: dict[str, list[float]] = {}
        for number in range(1, options.rounds + 1):
            for name, measure in measures.items():
                taken = rows_of_step(number, GLOBAL_BATCH, len(rows), 100 * len(rows), SEED)
                tokens = int(lengths[taken].sum() if name.startswith("sft") else lengths.sum())
                found.setdefault(name, []).append(measure(number) / tokens * 1e6)
            shown = {n: round(float(np.median(v[1:])), 1) for n, v in found.items() if len(v) > 1}
            print(f"round {number}: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
