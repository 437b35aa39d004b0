"""Log-likelihoods of answers equal those of transformers; divergences are computed from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.__main__ import run
from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import Device, EvaluateSection, InputDataSection, OnBadRow, RunSection
from offline_align.data.jsonl import BadRows
from offline_align.data.records import Message, Sample
from offline_align.data.template import Renderer
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.divergence import Divergence, measure_divergence, policy_checkpoint
from offline_align.evaluate.likelihood import Given, log_likelihoods
from offline_align.lineage import write_config
from offline_align.model.description import ModelDescription, find_checkpoint
from tests.runs import write_manifest
from tests.training import continued, samples, train, write_jsonl

PROMPTS = ("Name red", "Say owl", "Name house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("likelihood")


@pytest.fixture(scope="module")
def sft(folder: Path) -> Path:
    return train("sft", folder / "sft", write_jsonl(folder / "rows.jsonl", samples()))


@pytest.fixture(scope="module")
def other(folder: Path, sft: Path) -> Path:
    """Return a policy with different weights."""
    rows = [{"id": str(k), "prompt": p, "response": "stone stone seven"} for k, p in enumerate(PROMPTS * 4)]
    return train("sft", folder / "other", write_jsonl(folder / "others.jsonl", rows), model=continued(sft))


def settings(run_dir: Path, **evaluate: Any) -> EvaluateRun:
    return EvaluateRun(
        run=RunSection(dir=str(run_dir), device=Device.cpu),
        data=InputDataSection(max_length=128),
        evaluate=EvaluateSection(bootstrap_samples=50, **evaluate),
    )


def sample(prompt: str, response: str) -> Sample:
    return Sample("s", (Message("user", prompt),), response, {})


def write_answers(folder: Path, name: str, policy: Path, texts: tuple[str, ...], **columns: Any) -> Path:
    """Write the output of `generate` with one answer to every prompt."""
    run_dir = folder / "answers" / name
    run_dir.mkdir(parents=True)
    rows = [
        {"id": str(k), "prompt": p, "response": text, "finish_reason": "stop", **columns}
        for k, (p, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    file = write_jsonl(run_dir / "generations.jsonl", rows)
    write_config(run_dir, {"generate": {"temperature": 1.0, "top_p": 1.0}})
    write_manifest(run_dir, "generate", name, [], [find_checkpoint(policy)], [file], {"method": name})
    return file


def diverge(files: list[Path], run_dir: Path, **evaluate: Any) -> Divergence | None:
    return measure_divergence(load_comparison(files, BadRows(OnBadRow.fail, None)), settings(run_dir, **evaluate))


def test_likelihoods_are_those_of_transformers(folder: Path, sft: Path) -> None:
    import torch
    import transformers

    assert run(["convert", f"run.dir={folder / 'hf'}", f"init.from={sft}", "run.device=cpu", "debug=true"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    checkpoint = find_checkpoint(sft)
    description = ModelDescription.load(checkpoint)
    renderer = Renderer(description.load_tokenizer(checkpoint), description.template)
    answers = [
        Given(sample("Name red", "red owl seven")),
        Given(sample("Say owl", "owl"), condition="<rm_score>1.0"),
        Given(sample("Name house", "tree river stone " * 6), finished=False),
        Given(sample("Name house", "")),
        Given(sample("Name house", ""), finished=False),
    ]
    found = log_likelihoods(checkpoint, answers, settings(folder / "scratch"))
    for given, nats, tokens in zip(answers, found.nats, found.tokens, strict=True):
        context = renderer.context(given.sample.prompt, given.condition)
        target = renderer.target(given.sample.prompt, given.sample.response)[: None if given.finished else -1]
        with torch.no_grad():
            logits = theirs(torch.tensor([context + target])).logits[0].double()
        own = logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, torch.tensor(target, dtype=torch.int64)[:, None])
        assert tokens == len(target)
        assert nats == pytest.approx(float(own.sum()) if target else 0.0, abs=1e-5)


def test_an_answer_that_does_not_fit_has_no_likelihood(folder: Path, sft: Path) -> None:
    answers = [Given(sample("Name red", "red " * 400)), Given(sample("Name red", "red"))]
    found = log_likelihoods(find_checkpoint(sft), answers, settings(folder / "scratch"))
    assert np.isfinite(found.nats).tolist() == [False, True]
    assert found.tokens[0] == 0


def test_a_policy_is_at_no_distance_from_itself(folder: Path, sft: Path) -> None:
    files = [write_answers(folder, name, sft, ("red", "owl cat", "green tree")) for name in ("sft", "again")]
    found = diverge(files, folder / "scratch")
    assert found is not None
    assert (found.nats[:, :, 0] == 0).all()
    assert found.nats[:, :, 1] == pytest.approx(np.zeros((3, 1)), abs=1e-5)
    assert (found.tokens > 0).all()
    assert found.sampled == (True, True)


def test_the_distance_is_that_of_the_two_likelihoods(folder: Path, sft: Path, other: Path) -> None:
    texts = ("stone stone seven",) * 3
    files = [write_answers(folder, "base", sft, ("red",) * 3), write_answers(folder, "moved", other, texts)]
    found = diverge(files, folder / "scratch", baseline="base")
    assert found is not None
    answers = [Given(sample(p, t)) for p, t in zip(PROMPTS, texts, strict=True)]
    p, q = (log_likelihoods(find_checkpoint(run), answers, settings(folder / "scratch")).nats for run in (other, sft))
    assert found.nats[:, 0, 1] == pytest.approx(p - q, abs=1e-5)
    assert found.nats[:, 0, 1].mean() > 1, "the policy that learned these answers must find them likelier"


def test_conditions_are_asked_of_the_policy_and_not_of_the_baseline(folder: Path, sft: Path, other: Path) -> None:
    condition = "<rm_score>2.0"
    files = [
        write_answers(folder, "plain", sft, ("red",) * 3),
        write_answers(folder, "told", other, ("owl",) * 3, condition=condition),
    ]
    found = diverge(files, folder / "scratch", baseline="plain")
    assert found is not None
    told = [Given(sample(p, "owl"), condition) for p in PROMPTS]
    untold = [Given(sample(p, "owl")) for p in PROMPTS]
    expected = (
        log_likelihoods(find_checkpoint(other), told, settings(folder / "scratch")).nats
        - log_likelihoods(find_checkpoint(sft), untold, settings(folder / "scratch")).nats
    )
    assert found.nats[:, 0, 1] == pytest.approx(expected, abs=1e-5)


def test_a_policy_that_is_gone_or_has_changed_is_not_measured(folder: Path, sft: Path, other: Path) -> None:
    file = write_answers(folder, "lost", other, ("owl",) * 3)
    (column,) = load_comparison([file], BadRows(OnBadRow.fail, None)).columns
    assert policy_checkpoint(column) == find_checkpoint(other)
    description = find_checkpoint(other) / "model.json"
    manifest, content = other / "manifest.json", description.read_text()
    sealed = manifest.read_text()
    try:
        # Without a manifest the folder is known by its files, which are still the same.
        manifest.unlink()
        assert policy_checkpoint(column) == find_checkpoint(other)
        description.write_text(content + "\n")
        assert policy_checkpoint(column) is None
    finally:
        manifest.write_text(sealed)
        description.write_text(content)
    moved = other.rename(folder / "moved_away")
    try:
        assert policy_checkpoint(column) is None
    finally:
        moved.rename(other)
    files = [write_answers(folder, "kept", sft, ("red",) * 3), folder / "nobody" / "generations.jsonl"]
    files[1].parent.mkdir()
    files[1].write_text(files[0].read_text())
    assert diverge(files, folder / "scratch", baseline="kept") is None
