"""The stage `dpo`: its reference likelihoods, its gradient against float64, and pairs of labelled rows."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from offline_align.__main__ import run
from tests.training import STEPS, TINY, continued, labelled, metrics, pairs, samples, train, write_jsonl

DPO = ["optim.lr=1e-2", "trainer.global_batch_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    return train("sft", folder / "sft", write_jsonl(folder / "samples.jsonl", samples()))


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", pairs())


@pytest.fixture(scope="module")
def whole(folder: Path, start: Path, data: Path) -> Path:
    """Return an uninterrupted run with a checkpoint after its third step."""
    words = [*DPO, f"data.valid={data}", "trainer.save_interval=3", "trainer.keep_checkpoints=9"]
    return train("dpo", folder / "whole", data, *words, model=continued(start))


def reference_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference-*.npy"))


def test_training_starts_at_ln_2_and_learns_the_pairs(whole: Path) -> None:
    losses = metrics(whole)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    assert metrics(whole, "valid_accuracy") == [1.0]
    assert metrics(whole, "count") == [4] * 5
    model = json.loads((whole / "checkpoints" / "latest" / "model.json").read_text())
    assert (model["kind"], model["method"]) == ("policy", "dpo")


def test_loss_and_gradient_are_those_of_float64(folder: Path, start: Path, data: Path) -> None:
    """One step over all pairs, from a policy that has moved away from its reference, beside transformers."""
    moved = [*DPO, "trainer.global_batch_size=12", "trainer.max_steps=2", "method.beta=0.5", "optim.clip_grad=0"]
    moved += ["method.sft_coefficient=0.2", "method.label_smoothing=0.1", "trainer.save_interval=1"]
    own = train("dpo", folder / "float64", data, *moved, "trainer.keep_checkpoints=2", model=continued(start))
    policies = []
    for name, checkpoint in (("start", start), ("moved", own / "checkpoints" / "step_00000001")):
        target = folder / f"huggingface_{name}"
        words = [f"run.dir={target}", f"init.from={checkpoint}", "convert.to=huggingface", "run.device=cpu"]
        assert run(["convert", *words]) == 0
        exported = next(target.glob("**/config.json")).parent
        policies.append(transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64))
    reference, policy = policies
    loss = torch.stack([_loss(policy, reference, *ids) for ids in _token_ids(own)]).mean()
    torch.autograd.backward(loss)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in policy.parameters() if p.grad is not None))
    assert metrics(own)[1] == pytest.approx(float(loss), rel=1e-5)
    assert metrics(own, "grad_norm")[1] == pytest.approx(norm, rel=1e-4)


def _token_ids(own: Path) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Return the ids of both answers of each pair and where they start, from the run's token store."""
    from offline_align.data.token_store import stored

    (store,) = (own / "cache").glob("tokens-*")
    columns = stored(store, list).columns
    both = []
    for k in (0, 1):
        ids, offsets = columns[f"ids_{k}"], columns[f"offsets_{k}"]
        both.append([torch.tensor(ids[a:b].astype(np.int64)) for a, b in pairwise(offsets)])
    return list(zip(*both, columns["start_0"].tolist(), strict=True))


def _loss(
    policy: torch.nn.Module, reference: torch.nn.Module, chosen: torch.Tensor, rejected: torch.Tensor, start: int
) -> torch.Tensor:
    def likelihood(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logs: torch.Tensor = model(ids[None]).logits[0].log_softmax(-1)
        return logs[start - 1 : -1].gather(1, ids[start:, None]).sum()

    own = [likelihood(policy, ids) for ids in (chosen, rejected)]
    with torch.no_grad():
        before = [likelihood(reference, ids) for ids in (chosen, rejected)]
    h = 0.5 * ((own[0] - before[0]) - (own[1] - before[1]))
    logistic = torch.nn.functional.logsigmoid
    return -0.9 * logistic(h) - 0.1 * logistic(-h) - 0.2 * own[0] / (len(chosen) - start)


def test_runs_with_other_settings_use_the_same_reference(
    folder: Path, start: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = folder / "shared_cache"
    words = [*DPO, f"data.cache_dir={cache}"]
    train("dpo", folder / "first", data, *words, model=continued(start))
    (file,) = reference_files(cache)
    from offline_align.train import reference

    monkeypatch.setattr(reference, "complete_journal", lambda *_, **__: pytest.fail("computed again"))
    train("dpo", folder / "second", data, *words, "method.beta=0.3", "run.seed=9", model=continued(start))
    monkeypatch.undo()
    # Other weights need another reference.
    train("dpo", folder / "third", data, *words, model=continued(folder / "first"))
    assert len(reference_files(cache)) == 2
    file.write_bytes(file.read_bytes()[:-8])
    again = train("dpo", folder / "fourth", data, *words, model=continued(start))
    assert metrics(again) == metrics(folder / "first")


def test_a_continued_run_without_its_reference_computes_that_of_the_start(
    folder: Path, start: Path, data: Path, whole: Path
) -> None:
    own = folder / "continued"
    shutil.copytree(whole, own, symlinks=True)
    (own / "manifest.json").unlink()
    shutil.rmtree(own / "checkpoints" / "step_00000005")
    for file in reference_files(own / "cache"):
        file.unlink()
    words = [*DPO, f"data.valid={data}", "trainer.save_interval=3", "trainer.keep_checkpoints=9"]
    train("dpo", own, data, *words, model=continued(start))
    assert metrics(own) == metrics(whole)
    assert metrics(own, "valid_loss") == metrics(whole, "valid_loss")


def test_a_stop_keeps_the_likelihoods_that_are_done(
    folder: Path, start: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_align.model import passes

    class StopsAtOnce:
        def __init__(self, *_: object) -> None:
            self.rounds = 0

        def __call__(self) -> bool:
            self.rounds += 1
            return self.rounds == 2

        def newest(self) -> bool:
            return True

    own, words = folder / "stopped", [*DPO, f"data.valid={data}"]
    words += ["trainer.save_interval=3", "trainer.keep_checkpoints=9", "data.max_length=24"]
    command = ["dpo", f"run.dir={own}", f"data.train={data}", *continued(start), *STEPS, *words]
    monkeypatch.setattr(passes, "StopVote", StopsAtOnce)
    assert run(command) == 75
    monkeypatch.undo()
    (journal,) = (own / "journal").glob("*/part_00000.jsonl")
    done = len(journal.read_text().splitlines())
    assert 0 < done < 12
    computed: list[str] = []
    likelihoods = passes._launch

    def watched(compute: object, rows: list[int], *more: object) -> object:
        computed.extend(map(str, rows))
        return likelihoods(compute, rows, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(passes, "_launch", watched)
    assert run(command) == 0
    assert not (own / "journal").exists()
    assert len(computed) < 24


def test_pairs_of_labelled_rows(folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "prompt": f"Say {k % 4}"} for k, row in enumerate(labelled([k / 4 for k in range(12)]))]
    data = write_jsonl(folder / "labelled.jsonl", [*rows, *pairs(2)])
    own = train("dpo", folder / "labelled", data, *DPO, "method.pairs=all", model=continued(start))
    facts = json.loads((own / "manifest.json").read_text())["extra"]["data"]
    assert (facts["pairs_given"], facts["pairs_made"], facts["rows"]) == (2, 12, 14)
    alone = write_jsonl(folder / "alone.jsonl", labelled([0.5, 1.0]))
    words = [f"run.dir={folder / 'none'}", f"data.train={alone}", *TINY[:-1], *STEPS]
    assert run(["dpo", *words]) == 65
    assert "no two of the 2 labelled answers make a pair" in capsys.readouterr().err
