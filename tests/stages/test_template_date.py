"""The day that a chat template writes: fixed when a run begins, and the same ever after."""

import datetime
import json
from pathlib import Path

import pytest
import yaml

from offline_align import lineage
from offline_align.__main__ import run
from offline_align.data.tokenizer import load_tokenizer
from offline_align.model.description import ModelDescription
from offline_align.stages import template_date
from tests.random_llama import save_random_llama
from tests.small_tokenizers import CHATML, write_hugging_face
from tests.training import samples, write_jsonl

DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML


def today_is(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls.fromisoformat(day)

    monkeypatch.setattr(template_date, "datetime", Clock)


def random_base(folder: Path, template: str) -> Path:
    tokenizer = load_tokenizer(write_hugging_face(folder, template))
    save_random_llama(folder, tokenizer)
    return write_hugging_face(folder, template)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return random_base(tmp_path / "base", DATED)


def sft(base: Path, run_dir: Path, *words: str) -> int:
    rows = write_jsonl(base.parent / "rows.jsonl", samples(8))
    common = ["data.template=chat", "data.max_length=120", "trainer.global_batch_size=4", "run.device=cpu"]
    return run(["sft", f"run.dir={run_dir}", f"init.from={base}", f"data.train={rows}", *common, *words])


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_day_and_hands_it_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps, one, two = "trainer.max_steps=2", tmp_path / "one", tmp_path / "two"
    today_is("2026-01-31", monkeypatch)
    assert sft(base, one, steps) == 0
    assert yaml.safe_load((one / "config.yaml").read_text())["data"]["template_date"] == "2026-01-31"
    assert ModelDescription.load(one / "checkpoints" / "latest").template_date == "2026-01-31"
    today_is("2026-02-11", monkeypatch)
    assert sft(base, two, steps) == 0
    assert losses(one) != losses(two)
    first, second = (lineage.read_manifest(folder) for folder in (one, two))
    assert first and second and first.key != second.key
    caplog.clear()
    assert sft(base, one, steps) == 0
    assert f"sft: {one} is complete" in caplog.text
    assert sft(base, one, "trainer.max_steps=3", "data.template_date=2026-02-11") == 78
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Name a fox."}])
    common = [f"init.from={one}", f"data.input={prompts}", "data.max_length=120", "generate.max_new_tokens=4"]
    caplog.set_level("INFO", "offline_align")
    assert run(["generate", f"run.dir={tmp_path / 'answers'}", "run.device=cpu", *common]) == 0
    assert "Today is 31 Jan 2026." in caplog.text
    assert run(["generate", f"run.dir={tmp_path / 'x'}", *common, "data.template_date=2026-02-11"]) == 78


def test_a_given_day_is_that_of_the_day_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today_is("2026-01-31", monkeypatch)
    assert sft(base, tmp_path / "one", "trainer.max_steps=1") == 0
    today_is("2026-02-11", monkeypatch)
    assert sft(base, tmp_path / "two", "trainer.max_steps=1", "data.template_date=2026-01-31") == 0
    first, second = (lineage.read_manifest(tmp_path / name) for name in ("one", "two"))
    assert first and second and first.key == second.key
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_an_export_asks_on_the_day_of_training(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    today_is("2026-01-31", monkeypatch)
    assert sft(base, tmp_path / "one", "trainer.max_steps=1") == 0
    assert run(["convert", f"init.from={tmp_path / 'one'}", f"run.dir={tmp_path / 'out'}", "run.device=cpu"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nToday is 31 Jan 2026.<|im_end|>\n")


def test_a_template_without_a_date_has_no_day(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", CHATML)
    assert sft(base, tmp_path / "one", "trainer.max_steps=1") == 0
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["data"]["template_date"] is None


def test_what_is_no_day_is_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("2026-02-30", "20260131", "today"):
        assert sft(base, tmp_path / "one", f"data.template_date={given}") == 78
        assert f"data.template_date={given}: is not a day; write one as 2026-01-31" in capsys.readouterr().err
