"""The whole pipeline as dependent jobs of a real Slurm: data, two models, labels, three methods, answers, report."""

import json
import time
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.support import REPOSITORY

PIPELINE = REPOSITORY / "scripts" / "slurm" / "pipeline.sh"
SMALL = "data.max_length=256 trainer.micro_batch_size=16 trainer.global_batch_size=32 optim.lr=2e-3"
TWO_NODES = "parallel=tp2 launcher.nodes=2"


def settings(runs: Path) -> dict[str, str]:
    """Return settings for the demo with fewer rows; training uses tensor parallelism over two nodes."""
    return {
        "RUNS": str(runs),
        "SLURM_OPTIONS": "launcher.time=1h",
        "PREPARE_OPTIONS": "prepare.demo_sft_rows=600 prepare.demo_preference_rows=600 prepare.demo_prompt_rows=24",
        "TRAIN_OPTIONS": f"{TWO_NODES} run.device=cpu",
        "SFT_OPTIONS": f"{SMALL} trainer.max_epochs=2",
        "REWARD_OPTIONS": f"{SMALL} trainer.max_epochs=1",
        "ALIGN_OPTIONS": f"{SMALL} trainer.max_steps=12",
        "RWR_OPTIONS": "trainer.log_interval=1",
        "LABEL_OPTIONS": "data.max_length=256 trainer.micro_batch_size=16 launcher.nodes=2 run.device=cpu",
        "GENERATE_OPTIONS": "data.max_length=256 generate.max_new_tokens=24 run.device=cpu",
        "EVALUATE_OPTIONS": "data.max_length=256 trainer.micro_batch_size=16 run.device=cpu",
        "POLL_SECONDS": "2",
    }


def test_the_chain_runs_as_jobs(cluster: Cluster) -> None:
    runs = cluster.folder / "runs"
    started = time.monotonic()
    submitted = cluster.run(str(PIPELINE), more=settings(runs))
    lines = {line.split()[1].rpartition("/")[2]: line for line in submitted.splitlines() if " job " in line}
    assert len(lines) == 12
    ids = {name: line.split("job ")[1].partition(",")[0] for name, line in lines.items()}
    for method in ("fa", "rwr", "ca"):
        assert lines[method].endswith(f"after {ids['sft']} {ids['label']}")
    for name, job in ids.items():
        end = cluster.wait(job, 1800)
        assert end["JobState"] == "COMPLETED", (name, end, (runs / name / "logs").exists())
    print(f"\npipeline: 12 jobs in {time.monotonic() - started:.0f} s")
    for name in ("sft", "reward", "fa", "rwr", "ca"):
        assert json.loads((runs / name / "manifest.json").read_text())["extra"]["ranks"] == 2
    report = (runs / "evaluate" / "report.md").read_text()
    assert all(name in report for name in ("sft", "fa", "rwr", "ca(1.1)", "ca(-1.1)"))
    again = cluster.run(str(PIPELINE), "--wait", more=settings(runs))
    assert " job " not in again
    assert report.strip() in again
