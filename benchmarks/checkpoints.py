"""Compare saving and loading of a training state with megatron's `fully_reshardable` format.

    python -m benchmarks.checkpoints [--ranks 4] [--layers 6] [--rounds 3]

Measures the seconds and the memory of a rank. The ranks form one data parallel group on the CPU, with
one thread each and the distributed optimizer. Both formats write the same tensors with the same
writer. Each save and each load runs in its own processes, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_GIB = 2**30
_CONTENDERS = {"ours": "ours", "megatron": "megatron's `fully_reshardable`"}


def main() -> None:
    """Run both contenders in turns and print one table, or run one rank if a launcher started this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 4), ("layers", 6), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _rank(options.layers, **json.loads(options.work))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for contender in _CONTENDERS:
                for action in ("save", "load"):
                    work = {"contender": contender, "action": action, "folder": f"{folder}/{contender}"}
                    result = _run(options.ranks, options.layers, work)
                    found.setdefault((action, contender), []).append(result)
                    print(f"round {number}: {contender} {action}: {result}", flush=True)
    print(_table(found, options.ranks))


def _run(ranks: int, layers: int, work: dict[str, str]) -> dict[str, float]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", "-m", "benchmarks.checkpoints", f"--layers={layers}"]
    done = subprocess.run(
        [*command, "--work", json.dumps(work)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-4000:])
    result: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def _table(found: dict[tuple[str, str], list[dict[str, float]]], ranks: int) -> str:
    size = next(iter(found.values()))[0]
    lines = [
        f"{ranks} ranks, {size['parameters'] / 1e6:.0f} M parameters, state of {size['state']:.2f} GiB",
        "",
        "| what | seconds | ratio | memory of a rank beside its own | ratio |",
        "|---|---|---|---|---|",
    ]
    for action in ("save", "load"):
        ours = found[action, "ours"]
        for contender, title in _CONTENDERS.items():
            theirs = found[action, contender]
            cells = [f"{action}, {title}"]
            for name, unit in (("seconds", ""), ("peak", " GiB")):
                ratio = statistics.median(b[name] / a[name] for a, b in zip(ours, theirs, strict=True))
                cells += [f"{statistics.median(r[name] for r in theirs):.2f}{unit}", f"{ratio:.1f}x"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rank(layers: int, contender: str, action: str, folder: str) -> None:
    from offline_align.config.sections import Device, ModelSection, OptimSection, ParallelSection, RunSection
    from offline_align.distributed.setup import session

    parallel = ParallelSection()
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        import torch

        from offline_align.model.build import build_model
        from offline_align.train import checkpoint
        from offline_align.train.optim import build_optimizer, wrap_model
        from offline_align.train.saving import Saver

        if contender == "megatron":
            use_megatrons_form()
        torch.manual_seed(0)
        model = ModelSection(
            num_layers=layers, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, vocab_size=8192
        )
        wrapped = wrap_model(build_model("policy", model, parallel, ranks.device, False), parallel, False)
        optimizer = build_optimizer(wrapped, OptimSection(), parallel, False, False)
        for parameter in wrapped.parameters():
            parameter.main_grad.normal_()
        optimizer.step()
        # Only tensors are measured, not the other records of a run.
        no_description: Any = SimpleNamespace(save=lambda _: None)
        no_tokenizer: Any = SimpleNamespace(save=lambda path: path.mkdir())
        run_dir = Path(folder)
        saver = Saver(run_dir, wrapped.module, optimizer, no_description, no_tokenizer, ranks)
        actions: dict[str, Callable[[], Any]] = {
            "save": lambda: saver.save(checkpoint.TrainState(step=1)),
            "load": lambda: checkpoint.load(wrapped.module, optimizer, checkpoint.step_folder(run_dir, 1)),
        }
        ranks.barrier()
        seconds, peak = _watched(actions[action])
        parameters = sum(parameter.numel() for parameter in wrapped.parameters())
        result = {
            "seconds": max(ranks.gather(seconds)),
            "peak": max(ranks.gather(peak)) / _GIB,
            "parameters": parameters,
            "state": parameters * 12 / _GIB,
        }
        if ranks.is_main:
            print("RESULT " + json.dumps(result), flush=True)


def use_megatrons_form() -> None:
    """Make megatron use its `fully_reshardable` format for the optimizer state in this process."""
    from offline_align.train import optimizer_state

    form = dict(optimizer_state.FORM)
    state: Any = optimizer_state
    state.to_save = lambda optimizer, weights: optimizer.sharded_state_dict(dict(weights), metadata=form)
    state.to_load = lambda optimizer, weights: optimizer.sharded_state_dict(
        dict(weights), is_loading=True, metadata=form
    )
    state.load_state = lambda optimizer, loaded: optimizer.load_state_dict(loaded)


def _watched(action: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that an action took and by how many bytes it raised this process's peak memory."""
    before, most, over = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], _anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    action()
    seconds = time.monotonic() - started
    over.set()
    watcher.join()
    return seconds, most[0]


def _anonymous_bytes() -> int:
    """Return the memory of this process that is not backed by files, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) * 1024


if __name__ == "__main__":
    main()
