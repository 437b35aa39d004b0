"""A small chain of finished runs."""

from pathlib import Path

from offline_align.lineage import write_config
from tests.runs import content_key, write_manifest

CONFIG = {"run": {"dir": "runs/a", "seed": 1}, "optim": {"lr": 1e-5}, "launcher": {"nodes": 1}}


def make_run(run_dir: Path, stage: str, inputs: list[Path], parents: list[Path], name: str = "out.jsonl") -> Path:
    run_dir.mkdir(parents=True)
    output = run_dir / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"{stage}\n")
    write_config(run_dir, CONFIG)
    key = content_key(stage, CONFIG, inputs, parents)
    write_manifest(run_dir, stage, key, inputs, parents, [output], {"method": stage})
    return output
