"""The `plan` command: the source of its token counts, its output and its files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.runs import PlanMethodSection, PlanRun
from offline_align.config.sections import (
    ConditionKind,
    ModelSection,
    OnBadRow,
    RunSection,
    SampledInputDataSection,
    Template,
)
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError, DataError
from offline_align.lineage import Status, verify
from offline_align.model.description import ModelDescription
from offline_align.stages import plan
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES
from tests.runs import write_manifest
from tests.small_tokenizers import write_hugging_face, write_sentencepiece

REWARDS = [-1.5, -0.2, 0.0, 0.3, 1.4]


def write_labelled(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": f"Question {i}",
            "response": "word " * (i + 1),
            "reward_raw": 9.0,
            "reward": r,
            "source_id": f"s{i}",
        }
        for i, r in enumerate(REWARDS)
    ]
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(path: Path, tokenizer: Path | None = None, **data: Any) -> PlanRun:
    model = ModelSection(tokenizer=str(tokenizer) if tokenizer else None)
    return PlanRun(run=RunSection(dir="???"), model=model, data=SampledInputDataSection(input=str(path), **data))


def test_characters_are_counted_if_no_tokenizer_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_labelled(tmp_path / "data")
    assert plan.run(Job(STAGES["plan"], settings(path))) == 0
    shown = capsys.readouterr().out
    characters = sum(len("Question 0") + 5 * (i + 1) for i in range(5))
    assert f"5 rows, {characters} characters" in shown
    assert "set model.tokenizer" in shown
    assert "outside the rewards of the data (-1.50 to 1.40)" in shown
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "labelled.jsonl"]


def expected_tokens(renderer: Renderer) -> int:
    prompts = [(Message("user", f"Question {i}"),) for i in range(5)]
    targets = [renderer.target(p, "word " * (i + 1)) for i, p in enumerate(prompts)]
    return sum(len(renderer.context(p)) for p in prompts) + sum(map(len, targets))


@pytest.mark.parametrize("template", [Template.paper, Template.chat])
def test_tokens_of_the_given_tokenizer_are_counted(
    template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_hugging_face(tmp_path / "hf")
    plan.run(Job(STAGES["plan"], settings(write_labelled(tmp_path), folder, template=template)))
    total = expected_tokens(Renderer(load_tokenizer(folder), template))
    assert f"5 rows, {total} tokens" in capsys.readouterr().out


def test_tokens_of_the_reward_model_that_labelled_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward, label = tmp_path / "reward", tmp_path / "label"
    checkpoint = reward / "checkpoints" / "latest"
    write_sentencepiece(checkpoint / "tokenizer")
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    size = tokenizer.vocab_size
    sizes = ModelSection(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=size)
    ModelDescription("reward_model", sizes, Template.paper, tokenizer.content_hash).save(checkpoint)
    (reward / "log").write_text("x")
    write_manifest(reward, "reward", "key", [], [], [reward / "log"], {})
    path = write_labelled(label)
    write_manifest(label, "label", "key", [], [checkpoint], [path], {})
    plan.run(Job(STAGES["plan"], settings(path)))
    total = expected_tokens(Renderer(tokenizer, Template.paper))
    assert f"5 rows, {total} tokens" in capsys.readouterr().out


def test_run_folder_is_complete_and_repeatable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run_dir = write_labelled(tmp_path), tmp_path / "run"
    config = replace(settings(path), run=RunSection(dir=str(run_dir)))
    plan.run(Job(STAGES["plan"], config))
    first = capsys.readouterr().out
    values = json.loads((run_dir / "plan.json").read_text())
    assert values["rows"] == 5
    assert values["filtering"]["rows"] == 2
    assert values["conditional"]["conditions"]["<rm_score>0.3"] == 1
    assert values["conditional"]["target_condition"] == "<rm_score>5.0"
    assert values["warnings"] == []
    assert verify(run_dir).status is Status.whole
    stamp = (run_dir / "plan.json").stat().st_mtime_ns
    plan.run(Job(STAGES["plan"], config))
    assert (run_dir / "plan.json").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == first
    with pytest.raises(ConfigError, match=r"run\.dir=.*other settings"):
        plan.run(Job(STAGES["plan"], replace(config, method=PlanMethodSection(beta=1.0))))


def test_quantiles_are_shown_with_their_rewards_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = PlanMethodSection(condition=ConditionKind.quantile, quantiles=2, weight_by_reward=True)
    config = replace(settings(write_labelled(tmp_path)), run=RunSection(dir=str(tmp_path / "run")), method=method)
    plan.run(Job(STAGES["plan"], config))
    shown = " ".join(capsys.readouterr().out.split())
    assert "writes 2 quantiles, <rm_score>1 to <rm_score>2; asks for <rm_score>2; weighs" in shown
    assert "<rm_score>1 (-1.50 to 0.00) │ 3" in shown
    assert "<rm_score>2 (above 0.00 to 1.40) │ 2" in shown
    assert "outside" not in shown
    values = json.loads((tmp_path / "run" / "plan.json").read_text())["conditional"]
    assert (values["kind"], values["cut_points"]) == ("quantile", [0.0])
    wrong = replace(config, run=RunSection(dir="???"), method=replace(method, target_reward=3.0))
    with pytest.raises(ConfigError, match=r"method.target_reward=3: .* from 1 \(lowest rewards\) to 2"):
        plan.run(Job(STAGES["plan"], wrong))


def test_bounds_beyond_those_of_the_rows_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(settings(write_labelled(tmp_path)), method=PlanMethodSection(condition=ConditionKind.at_least))
    plan.run(Job(STAGES["plan"], config))
    shown = " ".join(capsys.readouterr().out.split())
    assert "writes" in shown
    assert "bounds, <rm_score>-1.5 to" in shown
    assert "ca asks for <rm_score>5.0, outside the bounds of the data (-1.50 to" in shown


def test_rows_that_training_drops_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = write_hugging_face(tmp_path / "hf"), write_labelled(tmp_path / "data")
    long = json.loads(path.read_text().splitlines()[0]) | {"response": "word " * 200, "reward": 3.0}
    found = {}
    for name, rows in (("without", path.read_text()), ("with", json.dumps(long) + "\n" + path.read_text())):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(rows)
        config = replace(settings(file, folder, max_length=64), run=RunSection(dir=str(tmp_path / name)))
        plan.run(Job(STAGES["plan"], config))
        found[name] = json.loads((tmp_path / name / "plan.json").read_text())
    warned = found["with"].pop("warnings")
    assert warned == ["1 row is left out, as training does: 1 response_too_long; see data.max_length=64"]
    assert warned[0] in " ".join(capsys.readouterr().out.split())
    assert found["with"].pop("left_out") == {"response_too_long": 1}
    assert found["with"].pop("sources") == {"with": {"rows": 6, "sampled": 6}}
    assert found["without"].pop("sources") == {"without": {"rows": 5, "sampled": 5}}
    assert found["with"] | {"warnings": [], "left_out": {}} == found["without"]
    with pytest.raises(DataError, match="none of 5 rows is left: 5 response_too_long"):
        plan.run(Job(STAGES["plan"], settings(path, folder, max_length=4)))


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = write_labelled(tmp_path)
    plan.run(Job(STAGES["plan"], replace(settings(path), run=RunSection(dir=str(tmp_path / "run")), dry_run=True)))
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_repeated_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(settings(write_labelled(tmp_path / "data")), run=RunSection(dir=str(tmp_path / "run")))
    assert plan.run(Job(STAGES["plan"], config)) == 0
    made = (tmp_path / "run" / "plan.json").read_text()
    (tmp_path / "run" / "plan.json").write_text(made[:-9])
    assert plan.run(Job(STAGES["plan"], config)) == 0
    assert (tmp_path / "run" / "plan.json").read_text() == made
    assert caplog.text.count("plan.json is missing or incomplete and is written again") == 1


def test_bad_rows_fail_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_labelled(tmp_path)
    path.write_text(path.read_text() + '{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"labelled\.jsonl:6: reward_raw: missing; .*score_column$"):
        plan.run(Job(STAGES["plan"], settings(path)))
    config = replace(settings(path, on_bad_row=OnBadRow.skip), run=RunSection(dir=str(tmp_path / "run")))
    plan.run(Job(STAGES["plan"], config))
    assert "5 rows" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())["line"] == 6
    assert verify(tmp_path / "run").status is Status.whole


def test_an_unstable_reward_format_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = PlanMethodSection(target_reward=12.0, reward_limit=20.0, threshold=2.0, reward_format="[b]{reward:.1f}")
    config = settings(write_labelled(tmp_path), write_sentencepiece(tmp_path / "sp"))
    plan.run(Job(STAGES["plan"], replace(config, method=method)))
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: method.reward_format='[b]{reward:.1f}': '[b]12.0' takes" in shown
    assert "warning: fa keeps nothing above 2: the highest reward is 1.4" in shown
    assert "asks for [b]12.0" in shown


@pytest.mark.parametrize(
    "method",
    [
        PlanMethodSection(beta=0.0),
        PlanMethodSection(reward_format="x"),
        PlanMethodSection(threshold=float("nan")),
    ],
)
def test_invalid_settings_are_refused(method: PlanMethodSection, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method"):
        plan.run(Job(STAGES["plan"], replace(settings(write_labelled(tmp_path)), method=method)))
    with pytest.raises(ConfigError, match=r"data.input"):
        plan.run(Job(STAGES["plan"], settings(tmp_path / "none.jsonl")))
