"""`data.template=auto` is settled when a run begins, recorded, and kept by every continuation."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from offline_align.__main__ import run
from offline_align.config.sections import Template
from offline_align.data.template import Encoding
from offline_align.data.tokenizer import load_tokenizer
from offline_align.model.description import FILE_NAME, ModelDescription
from offline_align.stages.job import Job
from offline_align.stages.origin import resolve
from offline_align.stages.template import fix_template
from tests.random_llama import save_random_llama
from tests.runs import job
from tests.small_tokenizers import CHATML, write_hugging_face
from tests.training import samples, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_random_llama(folder, load_tokenizer(write_hugging_face(folder, CHATML)))
    return write_hugging_face(folder, CHATML)


def sft(base: Path, place: Path, *words: str) -> Job[Any]:
    place.mkdir(exist_ok=True)
    rows = write_jsonl(place / "rows.jsonl", samples(4))
    made = job("sft", [f"run.dir={place / 'run'}", f"init.from={base}", f"data.train={rows}", *words])
    fix_template(made)
    return made


def begun(place: Path, template: str | None) -> None:
    """Write what an unfinished run with one checkpoint has."""
    folder = place / "run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(folder.name)
    (place / "run" / "config.yaml").write_text(yaml.safe_dump({"data": {"template": template}}))


def test_auto_is_the_template_of_the_folder_in_settings_and_key(base: Path, tmp_path: Path) -> None:
    auto, chat = sft(base, tmp_path), sft(base, tmp_path, "data.template=chat")
    assert auto.config.data.template is auto.source.description.template is Template.chat
    assert auto.settings.key == chat.settings.key != sft(base, tmp_path, "data.template=paper").settings.key
    assert auto.template is not None and chat.template is not None
    assert auto.template.in_words() == f"chat, from {base} (tokenizer_config.json)"
    assert chat.template.in_words() == "chat, as data.template says"


@pytest.mark.parametrize(("recorded", "expected"), [("paper", Template.paper), ("chat", Template.chat), (None, None)])
def test_a_continued_run_keeps_its_template(
    base: Path, tmp_path: Path, recorded: str | None, expected: Template | None
) -> None:
    """Versions without `auto` recorded nothing if the key was unset, and used the paper's template."""
    begun(tmp_path, recorded)
    found = sft(base, tmp_path)
    assert found.config.data.template is expected
    assert found.source.description.template is (expected or Template.paper)
    assert found.template is not None and found.template.why == ", as this run began"


def test_settings_of_an_attempt_without_results_do_not_count(base: Path, tmp_path: Path) -> None:
    begun(tmp_path, "paper")
    (tmp_path / "run" / "checkpoints" / "step_00000001").rmdir()
    assert sft(base, tmp_path).config.data.template is Template.chat


def test_a_continued_run_of_an_earlier_version_encodes_as_it_began(base: Path, tmp_path: Path) -> None:
    begun(tmp_path, "chat")
    description = sft(base, tmp_path / "other").source.description
    assert description.encoding is Encoding.whole
    latest = tmp_path / "run" / "checkpoints" / "latest"
    description.save(latest)
    values = json.loads((latest / FILE_NAME).read_text())
    (latest / FILE_NAME).write_text(json.dumps({k: v for k, v in values.items() if k != "encoding"}))
    assert ModelDescription.load(latest).encoding is Encoding.pieces
    assert sft(base, tmp_path).source.description.encoding is Encoding.pieces


def test_a_model_never_records_auto(base: Path, tmp_path: Path) -> None:
    sft(base, tmp_path).source.description.save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["template"] == "chat"


def test_auto_stays_while_earlier_jobs_have_yet_to_write_the_model(tmp_path: Path) -> None:
    assert sft(tmp_path / "later", tmp_path).config.data.template is Template.auto


def test_resolve_alone_settles_it_too(base: Path, tmp_path: Path) -> None:
    made = job("sft", [f"run.dir={tmp_path}", f"init.from={base}"])
    assert resolve(made.config, made.explicit).description.template is Template.chat


def test_stages_without_a_model_leave_it_to_the_models_that_they_read(tmp_path: Path) -> None:
    made = job("plan", [f"run.dir={tmp_path}", "model.tokenizer=demo"])
    fix_template(made)
    assert made.config.data.template is None


def test_the_dry_run_shows_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", samples(4))
    words = [f"run.dir={tmp_path / 'run'}", f"init.from={base}", f"data.train={rows}", "data.max_length=64"]
    assert run(["sft", *words, "dry_run=true"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("template")]
    assert line.split()[1:3] == ["chat,", "from"]
