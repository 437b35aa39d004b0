"""The benchmarks run with tiny shapes, including every part of the script for one GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conditions, workload
from benchmarks.harness import Contender, table
from benchmarks.projection import PUBLISHED_A100_HOURS, hours, table_3_lines
from benchmarks.tokenisation import CONTENDERS
from offline_align.config.sections import OnBadRow
from offline_align.data.records import BadRows, LabelledSample, read_rows
from tests.preloaded import python
from tests.small_tokenizers import write_hugging_face
from tests.training import samples, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_script_for_one_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"SMOKE": "1", "PYTHON": python()}
    script = [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path)]

    def measure(*options: str) -> str:
        command = [*script, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    measure("--task", "check", "sft")
    assert "sft  mixed  transformers  is there already" in measure()
    text = (tmp_path / "gpu.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = {(line["task"], line["rows"], line["contender"]): line["values"] for line in lines}
    assert len(found) == len(lines)
    for kind, outputs in (("policy", "likelihoods"), ("reward_model", "scores with shared prompts")):
        assert f"correctness against fp32, offline-align, torch, {outputs}: passed" in text
        # The differences show that bf16 is used here too, since fp32 would agree to 1e-6.
        assert found["check", kind, "offline-align, torch"]["relative_error"] > 1e-4
    for task, title in (("sft", "SFT, 8 layers"), ("reward", "reward model, 8 layers"), ("label", "labelling, 8 B")):
        apart = ["offline-align, torch, a prompt an answer"] if task == "reward" else []
        for name in ("offline-align, torch", "transformers", *apart):
            assert found[task, "mixed", name]["tokens_per_second"] > 0, (task, name)
            assert f"| {title} | mixed | {name} |" in text


# A stand-in for Python. Its behaviour depends on the contender that is called.
INTERPRETER = r"""#!/usr/bin/env bash
rates='"tokens_per_second": 7, "p95_over_median": 1, "gradient_cosine": 1'
case "$2" in
    *hangs*) sleep 600 & sleep 600 ;;
    *raises*) printf 'ValueError: a | b\n[W] a warning at the end\n' >&2; exit 3 ;;
    *bad*) echo "RESULT {\"relative_error\": 0.02, $rates}" ;;
    *) echo "RESULT {\"relative_error\": 0.001, $rates}" ;;
esac
"""


def test_a_contender_that_fails_or_hangs_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders of a backend whose check failed are skipped, and all others are measured."""
    from benchmarks import gpu

    (tmp_path / "python").write_text(INTERPRETER)
    (tmp_path / "python").chmod(0o755)
    own = [Contender(name, "m", "f", ours=True, arguments=(name,)) for name in ("bad", "good")]
    peers = [Contender(name, name, "f") for name in ("raises", "hangs", "reports")]
    pieces = [("check", "policy", c) for c in own] + [("sft", "mixed", c) for c in (*own, *peers)]
    monkeypatch.setattr(gpu, "contenders", lambda _: pieces)
    monkeypatch.setattr(gpu, "_machine", lambda: "a machine")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--results", str(tmp_path), "--timeout-seconds", "2"])
    with pytest.raises(SystemExit, match="True"):
        gpu.main()
    text = (tmp_path / "gpu.md").read_text()
    assert "bad: FAILED its check" in text
    assert "| bad |" not in text
    assert "| raises | raises failed: exit code 3: ValueError: a / b; see" in text
    assert "| hangs | hangs failed: not done after 2 s; see" in text
    for name in ("good", "reports"):
        assert f"| SFT, 8 layers | mixed | {name} | 7 | peak not known | 1.00 |  |" in text


def test_table_names_ratio_limit_and_fastest_peer() -> None:
    contenders = [
        Contender("own", "m", "f", ours=True),
        Contender("own, slower", "m", "f", ours=True),
        Contender("a", "m", "f"),
        Contender("b", "m", "f"),
        Contender("bare matrix products", "m", "f", limit=True),
    ]
    # The machine was half as fast in the second round, which does not change the ratios.
    rates = {
        "own": [40.0, 20.0, 44.0],
        "own, slower": [30.0, 15.0, 33.0],
        "a": [20.0, 10.0, 20.0],
        "b": [10.0, 5.0, 10.0],
        "bare matrix products": [50.0, 25.0, 50.0],
    }
    found = {n: [{"rate": r, "peak_memory_bytes": 2.0**30} for r in values] for n, values in rates.items()}
    text = table(contenders, found, "rate", "units/s")
    assert "| own | 40.0 |  |" in text
    assert "| own, slower | 30.0 |  |" in text
    assert "| a | 20.0 | 2.00x |" in text
    assert "Against the fastest peer (a): 2.00x." in text
    assert "bare matrix products: 80%" in text


@pytest.mark.slow
def test_contenders_score_the_same_rows_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two answers per prompt, we compute the prompt once and peers twice; the score sums agree."""
    from benchmarks import cpu
    from offline_align.__main__ import run

    assert run(["prepare", f"run.dir={tmp_path / 'demo'}", "data.input=demo", "run.seed=1"]) == 0
    monkeypatch.setitem(workload.SHAPES, "8m", workload.Shape(32, 64, 2, 2))
    monkeypatch.setattr(workload, "VOCABULARY", 512)
    results = tmp_path / "results"
    options = ["--data", str(tmp_path / "demo"), "--rows", "12", "--rounds", "1", "--results", str(results)]
    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.setattr(sys, "argv", ["cpu", *options, "--task", "answers", "--precision", "fp32", "bf16"])
    cpu.main()
    for precision, allowed in (("fp32", 1e-4), ("bf16", 0.1)):
        found = json.loads((results / f"answers_8m_{precision}.json").read_text())["rounds_of"]
        ours, *peers = [rounds[0]["checksum"] for name, rounds in found.items() if name != "bare matrix products"]
        assert len(peers) == 3
        assert peers == pytest.approx([ours] * 3, abs=allowed)
        assert "| transformers, one row at a time |" in (results / f"answers_8m_{precision}.md").read_text()
    # The verdicts that compare all precisions.
    assert re.search(r"fastest peer \(transformers, .*, (fp32|bf16)\)", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_tokenisation_contenders_make_the_same_number_of_tokens(tmp_path: Path) -> None:
    """Except for our end-of-sequence tokens, and tokens that the peer merges across prompt and response."""
    write_hugging_face(tmp_path / "tokenizer")
    rows = [{"id": str(i), "prompt": f"Hello {i}", "response": "Fine, thank you!"} for i in range(40)]
    write_jsonl(tmp_path / "sft_train.jsonl", rows)
    options = ["--data", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer"), "--rounds", "1"]
    command = [python(), "-m", "benchmarks.tokenisation", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(float(n)) for n in re.findall(r", tokens ([\d.e+]+)", done.stdout)]
    assert len(counts) == len(CONTENDERS)
    assert counts[0] == counts[-1] + len(rows)
    assert len(set(counts[1:-1])) == 1
    assert counts[-1] - 2 * len(rows) <= counts[1] <= counts[-1], counts


def test_rows_with_rewards_are_rows_that_the_methods_read(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "sft.jsonl", samples(5))
    workload._add_rewards(source, tmp_path / "labelled.jsonl", 1)
    found = list(read_rows([tmp_path / "labelled.jsonl"], LabelledSample, BadRows(OnBadRow.fail, None)))
    assert [row.source_id for row in found] == [row["id"] for row in samples(5)]
    assert len({row.reward for row in found}) == 5


def test_table_3_by_hand() -> None:
    # 8.03 B parameters: 6 * 7.5e9 FLOP per token and attention, at 312e12 * 0.5 FLOP/s.
    found = hours("a100_80gb", 500, 0.5, 0.5)
    flops = 100_000 * 500 * 6 * 7.505e9
    assert found["RWR"] == pytest.approx(flops * (1 + 0.31) / (156e12 * 3600), rel=0.02)
    assert found["FA"] < found["RWR"] < PUBLISHED_A100_HOURS["RWR"] / 10
    assert "no projection" in table_3_lines(None)[0]
    assert len(table_3_lines((0.5, 0.5))) == 6


def test_the_table_of_conditions_pairs_differences_by_seed() -> None:
    ends = ("highest target", "lowest target")
    means = {(kind, end): {1: 5.0, 2: 7.0} for kind in conditions.KINDS for end in ends}
    means["quantile", "highest target"] = {2: 8.0, 1: 6.0}
    lines = conditions.table(means)
    assert lines[3].startswith("| quantile | 7.00 [-5.71, 19.71] | 1.00 [1.00, 1.00] | 6.00 [")
    assert lines[2].split(" | ")[2].strip() == ""
