"""The `evaluate` command: files, numbers, repeated runs, errors, and judges that are not done yet."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data import demo
from offline_align.data.demo_language import parse_prompt
from offline_align.data.jsonl import BadRows
from offline_align.errors import ConfigError, DataError, StoppedEarly
from offline_align.lineage import Status, read_manifest, verify
from offline_align.stages.evaluate import run
from tests.runs import compose, job, write_manifest
from tests.unit.evaluate.judges.chat_server import Endpoint

PROMPTS = 12
Start = Callable[..., int]


def answers(style: Any, seed: int) -> Iterator[dict[str, Any]]:
    random = Random(seed)
    for row in islice(demo.demo_prompts(PROMPTS, 0), PROMPTS):
        text = style(parse_prompt(row["prompt"]), random)
        yield {**row, "response": text if isinstance(text, str) else " ".join(text), "finish_reason": "stop"}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return the answers of a mixed, a careful and a careless method, each in a finished run of its own."""
    styles = [("sft", demo.answer, None), ("ca_high", demo.careful, 5.0), ("ca_low", demo.careless, -2.0)]
    paths = []
    for name, style, target in styles:
        path = tmp_path / name / "generations.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in answers(style, 1)))
        extra = {"method": name[:2] if target else name, "condition": None, "target_reward": target}
        write_manifest(path.parent, "generate", name, [], [], [path], extra)
        paths.append(path)
    return paths


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(inputs: list[Path], *words: str, name: str = "report") -> int:
        listed = ",".join(f"'{path}'" for path in inputs)
        given = [f"data.input=[{listed}]"] if inputs else []
        return run(job("evaluate", [*given, f"run.dir={tmp_path / name}", *words]))

    return start


def test_the_report_ranks_the_methods_by_their_quality(
    start: Start, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(files, "judge=ground_truth") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["methods"] == ["sft", "ca(5.0)", "ca(-2.0)"]
    overall = report["overall"]
    assert overall["ca(5.0)"]["score"]["mean"] > overall["sft"]["score"]["mean"] > overall["ca(-2.0)"]["score"]["mean"]
    assert overall["ca(5.0)"]["win_rate"]["low"] > 0.5
    assert report["judged_prompts"] == PROMPTS
    printed = capsys.readouterr().out
    assert "ca(5.0) scores highest and wins against sft" in printed
    assert f"report: {tmp_path / 'report' / 'report.html'}" in printed
    for name in ("report.md", "report.html"):
        assert "ca(-2.0)" in (tmp_path / "report" / name).read_text()


def test_the_run_is_recorded_and_not_done_twice(start: Start, files: list[Path], tmp_path: Path) -> None:
    start(files, "judge=ground_truth")
    folder = tmp_path / "report"
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.stage == "evaluate"
    assert [parent.stage for parent in manifest.parents] == ["generate"] * 3
    assert verify(folder).status is Status.whole
    before = (folder / "report.json").stat().st_mtime_ns
    assert start(files, "judge=ground_truth") == 0
    assert (folder / "report.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other settings or inputs"):
        start(files, "judge=ground_truth", "run.seed=2")


def test_a_report_is_repeatable_to_the_byte(start: Start, files: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        start(files, "judge=ground_truth", name=name)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_people_rate_blindly_and_the_true_quality_is_reported_too(
    start: Start, files: list[Path], tmp_path: Path
) -> None:
    from offline_align.evaluate.comparison import load_comparison
    from offline_align.evaluate.judges.human import answer_key

    with pytest.raises(StoppedEarly, match=r"rating\.html"):
        start(files, "judge.kind=human")
    assert read_manifest(tmp_path / "report") is None
    samples = load_comparison(files, BadRows(OnBadRow.fail, None)).samples()
    rows = [
        {"answer": answer_key(s, 1234), "score": 1 + 9 * (demo.true_quality(s.prompt, s.response) > 5)} for s in samples
    ]
    (tmp_path / "report" / "ratings_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert start(files, "judge.kind=human") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["judge"]["rated_sets"] == PROMPTS
    assert report["overall"]["ca(5.0)"]["score"]["mean"] > 9
    assert report["overall"]["ca(5.0)"]["true_quality"]["mean"] > 9
    outputs = {record.path for record in read_manifest(tmp_path / "report").outputs}  # type: ignore[union-attr]
    assert {"ratings_a.jsonl", "rating.html", "report.html"} <= outputs


def test_other_prompts_have_no_true_quality(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text('{"prompt": "Why?", "response": "So."}\n')
    with pytest.raises(ConfigError, match="is not from the demo corpus"):
        start([path], "judge=ground_truth")


def edit(path: Path, content: str) -> None:
    """Write other content, so that the file no longer belongs to its run."""
    path.write_text(content)
    (path.parent / "manifest.json").unlink()


def test_answers_that_were_edited_in_their_run_are_refused(start: Start, files: list[Path]) -> None:
    files[0].write_text(files[0].read_text().replace(".", "!", 1))
    with pytest.raises(DataError, match="is not the file that `generate` wrote into"):
        start(files, "judge=ground_truth")


def test_a_prompt_that_one_file_lacks_is_named(start: Start, files: list[Path]) -> None:
    lines = files[1].read_text().splitlines(keepends=True)
    edit(files[1], "".join(lines[:-1]))
    with pytest.raises(DataError, match=r"ca_high/generations\.jsonl: id: prompt demo-prompt-0012 is missing"):
        start(files, "judge=ground_truth")


def test_bad_rows_can_be_skipped_into_quarantine(start: Start, files: list[Path], tmp_path: Path) -> None:
    edit(files[0], files[0].read_text() + "{\n")
    with pytest.raises(DataError, match=rf"generations\.jsonl:{PROMPTS + 1}: json"):
        start(files, "judge=ground_truth")
    start(files, "judge=ground_truth", "data.on_bad_row=skip", name="skipped")
    (line,) = (tmp_path / "skipped" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == PROMPTS + 1


def test_an_unknown_baseline_is_refused_before_anything_is_read(start: Start, files: list[Path]) -> None:
    files[0].write_text("{\n")
    with pytest.raises(ConfigError, match=r"evaluate\.baseline=dpo"):
        start(files, "judge=ground_truth", "evaluate.baseline=dpo")


def test_a_dry_run_writes_nothing(
    start: Start, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(files, "judge=ground_truth", "dry_run=true") == 0
    assert not (tmp_path / "report").exists()
    assert f"ca(-2.0): {files[2]}" in capsys.readouterr().out


def test_only_one_rank_reports(
    start: Start, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert start(files, "judge=ground_truth") == 0
    assert not (tmp_path / "report").exists()


@pytest.fixture
def judged_pairs(tmp_path: Path) -> Path:
    """Return preference rows of the demo corpus in which people always prefer the careful answer."""
    rows = list(zip(answers(demo.careful, 1), answers(demo.careless, 1), strict=True))
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"id": a["id"], "prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]} for a, b in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_judge_is_compared_with_people_without_any_answers(
    start: Start, judged_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([], "judge=ground_truth", f"judge.calibration={judged_pairs}") == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["calibration"]
    assert found["agreement"]["accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert "The judge agrees with people on 100.0%" in capsys.readouterr().out
    assert "Can this judge be trusted?" in (tmp_path / "report" / "report.md").read_text()
    manifest = read_manifest(tmp_path / "report")
    assert manifest is not None
    assert [Path(record.path).name for record in manifest.inputs] == ["pairs.jsonl"]


def test_comparison_and_calibration_are_in_one_report(
    start: Start, files: list[Path], judged_pairs: Path, tmp_path: Path
) -> None:
    assert start(files, "judge=ground_truth", f"judge.calibration={judged_pairs}") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["judged_prompts"] == PROMPTS
    assert report["calibration"]["agreement"]["pairs"] == PROMPTS
    judged_pairs.write_text(judged_pairs.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="other settings or inputs"):
        start(files, "judge=ground_truth", f"judge.calibration={judged_pairs}")


def test_people_are_not_compared_with_people(tmp_path: Path, judged_pairs: Path) -> None:
    from offline_align.config import checks

    words = [f"run.dir={tmp_path / 'r'}", "judge=human", f"judge.calibration={judged_pairs}"]
    composed = compose("evaluate", words)
    assert any("judge.calibration" in problem for problem in checks.problems(composed.config, None, 1))


def test_runs_alone_need_neither_answers_nor_a_judge(
    start: Start, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start([], f"evaluate.runs={tmp_path}") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["judge"] is None
    assert [run["stage"] for run in report["lineage"]] == ["generate"] * 3
    assert report["runs"]["runs"].keys() == {"sft", "ca_high", "ca_low"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "3 runs: 3 generate." in page
    assert page.count('<article class="answer"') == 3 * PROMPTS
    assert "These answers have not been judged." in page
    assert "no score" not in page
    assert "No time is recorded for" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "report")
    assert manifest is not None
    assert [parent.stage for parent in manifest.parents] == ["generate"] * 3
    assert verify(tmp_path / "report").status is Status.whole


def test_a_report_on_runs_is_made_again_only_if_a_run_has_changed(
    start: Start, files: list[Path], tmp_path: Path
) -> None:
    words = f"evaluate.runs=[{tmp_path / 'sft'},{tmp_path / 'ca_low'}]"
    assert start([], words) == 0
    before = (tmp_path / "report" / "report.html").stat().st_mtime_ns
    assert start([], words) == 0
    assert (tmp_path / "report" / "report.html").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other settings or inputs"):
        start([], f"evaluate.runs={tmp_path / 'sft'}")


def test_the_browser_of_answers_omits_other_prompts(start: Start, files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "generations.jsonl"
    other.parent.mkdir()
    other.write_text('{"id": "x", "prompt": "Why?", "response": "So."}\n')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "x", "prompt": "Why?"}\n')
    write_manifest(other.parent, "generate", "other", [prompts], [], [other], {"method": "fa"})
    assert start([], f"evaluate.runs={tmp_path}") == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('<article class="answer"') == 3 * PROMPTS
    assert "4 runs" in page


def test_a_folder_without_runs_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    from offline_align.__main__ import run as command

    assert command(["evaluate", f"run.dir={tmp_path / 'report'}", f"evaluate.runs={tmp_path / 'empty'}"]) == 78
    assert not (tmp_path / "report").exists()


def test_tensorboard_has_the_numbers_and_the_figures(
    start: Start, files: list[Path], judged_pairs: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert start(files, "judge=ground_truth", f"judge.calibration={judged_pairs}") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    board = EventAccumulator(str(tmp_path / "report" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    for method in report["methods"]:
        (event,) = board.Scalars(f"score/{method}")
        assert event.value == pytest.approx(report["overall"][method]["score"]["mean"])
        assert f"scores/{method}" in tags["histograms"]
    (event,) = board.Scalars("calibration/agreement/accuracy")
    assert event.value == report["calibration"]["agreement"]["accuracy"]["mean"]
    assert {"report/score", "report/lineage", "report/optimisation/Gain by words"} <= set(tags["images"])
    (image,) = board.Images("report/score")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.width, image.height) > (100, 100)
    assert "report/text_summary" in tags["tensors"]


def test_a_prompt_that_the_judge_refuses_is_left_out_of_the_report(
    start: Start, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused = json.loads(files[0].read_text().splitlines()[0])["prompt"]
    endpoint = Endpoint()
    endpoint.reply = lambda body: (
        (400, "blocked by the content filter")
        if f"{refused}\n" in body["messages"][1]["content"]
        else (200, "Assistant A: 9\nAssistant B: 5\nAssistant C: 4")
    )
    try:
        words = ["judge=openai", "judge.model=m", f"judge.base_url={endpoint.url}"]
        assert start(files, *words) == 0
    finally:
        endpoint.stop()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["prompts"], report["judged_prompts"]) == (PROMPTS, PROMPTS - 1)
    assert report["judge"]["unreadable_reasons"] == {"content filter": 1}
    assert report["judge"]["unreadable_by_answer"] == [1, 1, 1]
    means = [report["overall"][method]["score"]["mean"] for method in report["methods"]]
    assert sum(means) == pytest.approx(18), "means are over the prompts that were judged"
    assert "could not be read (content filter: 1)" in capsys.readouterr().out
