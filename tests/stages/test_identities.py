"""Identities between the methods, tested with the real commands."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import continued, labelled, metrics, pairs, samples, train, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identities")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """The policy from which all runs start."""
    return train("sft", folder / "base", write_jsonl(folder / "base.jsonl", samples()))


@pytest.fixture(scope="module")
def plain(folder: Path, base: Path) -> list[float]:
    """The losses of SFT from that policy."""
    data = write_jsonl(folder / "plain.jsonl", samples())
    return metrics(train("sft", folder / "plain", data, model=continued(base)))


def test_training_lowers_the_loss(base: Path) -> None:
    losses = metrics(base)
    assert losses[-1] < losses[0] - 0.2


def test_rwr_with_equal_rewards_is_sft(folder: Path, base: Path, plain: list[float]) -> None:
    data = write_jsonl(folder / "equal.jsonl", labelled([0.7] * 14))
    assert metrics(train("rwr", folder / "rwr", data, model=continued(base))) == plain


def test_fa_that_keeps_all_is_sft(folder: Path, base: Path, plain: list[float]) -> None:
    data = write_jsonl(folder / "good.jsonl", labelled([0.1 + i for i in range(14)]))
    assert metrics(train("fa", folder / "fa", data, model=continued(base))) == plain


def test_fa_is_sft_on_the_rows_above_the_threshold(folder: Path, base: Path) -> None:
    rewards = [1.0 if i % 3 else -1.0 for i in range(14)]
    mixed = write_jsonl(folder / "mixed.jsonl", labelled(rewards))
    kept = write_jsonl(folder / "kept.jsonl", [row for row, r in zip(samples(), rewards, strict=True) if r > 0])
    filtered = train("fa", folder / "fa_mixed", mixed, model=continued(base))
    assert metrics(filtered) == metrics(train("sft", folder / "sft_kept", kept, model=continued(base)))
    assert json.loads((filtered / "manifest.json").read_text())["extra"]["data"]["kept"] == 9


def test_ca_with_an_empty_prefix_is_sft(folder: Path, base: Path, plain: list[float], monkeypatch: Any) -> None:
    from offline_align.data import condition
    from offline_align.methods import ca

    # Every format writes some text, so the function that makes the text is replaced.
    monkeypatch.setattr(condition, "condition_text", lambda *_: "")
    monkeypatch.setattr(ca, "check_stable", lambda *_: None)
    data = write_jsonl(folder / "conditions.jsonl", labelled([0.5] * 14))
    assert metrics(train("ca", folder / "ca", data, model=continued(base))) == plain


def test_ca_with_a_prefix_is_not_sft(folder: Path, base: Path, plain: list[float]) -> None:
    data = write_jsonl(folder / "rewarded.jsonl", labelled([0.5] * 14))
    losses = metrics(train("ca", folder / "ca_real", data, model=continued(base)))
    assert abs(losses[0] - plain[0]) > 1e-3


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_the_loss(folder: Path, base: Path, plain: list[float], micro: int) -> None:
    data = folder / "plain.jsonl"
    words = [f"trainer.micro_batch_size={micro}", "data.max_length=40"]
    # A row has 40 tokens, so a bin holds from one row to all rows of a step.
    losses = metrics(train("sft", folder / f"micro{micro}", data, *words, model=continued(base)))
    assert losses == pytest.approx(plain, abs=2e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_does_not_change_the_loss(folder: Path, base: Path, plain: list[float], recompute: str) -> None:
    words = [f"trainer.recompute={recompute}"]
    losses = metrics(train("sft", folder / recompute, folder / "plain.jsonl", *words, model=continued(base)))
    assert losses == pytest.approx(plain, abs=1e-5)


def row_nll(base: Path, rows: list[dict[str, Any]], condition: str = "") -> list[list[float]]:
    """Return `-log p` of every response token of every row in float64, each row alone in its forward pass."""
    import numpy as np

    from offline_align.config.sections import ParallelSection, RunSection
    from offline_align.data.bins import SampleSource
    from offline_align.data.records import Message, Sample
    from offline_align.data.template import Renderer
    from offline_align.data.tokenize import TokenizedRows
    from offline_align.data.tokenizer import load_tokenizer
    from offline_align.distributed.setup import session
    from offline_align.model.build import build_model
    from offline_align.model.description import ModelDescription, find_checkpoint
    from offline_align.model.heads import Policy
    from offline_align.train.checkpoint import load_weights

    folder = find_checkpoint(base)
    description = ModelDescription.load(folder)
    renderer = Renderer(load_tokenizer(folder / "tokenizer"), description.template)
    found = []
    with session(ParallelSection(), RunSection(dir="unused")) as ranks:
        model = build_model("policy", description.model, ParallelSection(), ranks.device, bf16=False)
        assert isinstance(model, Policy)
        load_weights(model, folder, ranks)
        for row in rows:
            sample = Sample(row["id"], (Message("user", row["prompt"]),), row["response"], row)
            context = renderer.context(sample.prompt, condition)
            target = renderer.target(sample.prompt, sample.response)
            ids = np.array(context + target, dtype=np.int32)
            one = TokenizedRows(
                ids,
                np.array([0, len(ids)]),
                np.array([len(context)], np.int32),
                np.ones(1, np.float32),
                ["x"],
                {},
                0,
            )
            with torch.no_grad():
                logits = model.logits(SampleSource(one).collate([0], 1)).double()
            log_p = logits.log_softmax(-1)
            found.append([-float(log_p[len(context) - 1 + i, t]) for i, t in enumerate(target)])
    return found


TWO = [
    {"id": "a", "prompt": "Name red", "response": "red owl"},
    {"id": "b", "prompt": "Name dog", "response": "stone"},
]
BY_HAND = ["trainer.global_batch_size=2", "trainer.max_steps=1"]


@pytest.mark.parametrize("rewards", [(1.5, -0.5)])
def test_two_rows_by_hand(folder: Path, base: Path, rewards: tuple[float, float]) -> None:
    """The first loss of each command equals Equations 1, 4, 5 and 6 in float64."""
    first, second = row_nll(base, TWO)
    tokens = len(first) + len(second)
    data = write_jsonl(
        folder / "two.jsonl",
        [{**row, "reward_raw": r, "reward": r, "source_id": row["id"]} for row, r in zip(TWO, rewards, strict=True)],
    )

    def loss(stage: str, *words: str) -> float:
        run = train(stage, folder / f"hand_{stage}{len(words)}", data, *BY_HAND, *words, model=continued(base))
        return metrics(run)[0]

    assert loss("sft") == pytest.approx(math.fsum(first + second) / tokens, abs=1e-5)
    assert loss("fa", "trainer.global_batch_size=1") == pytest.approx(math.fsum(first) / len(first), abs=1e-5)
    raw = [math.exp(r / 5.0) for r in rewards]
    weights = [2 * w / sum(raw) for w in raw]
    expected = (weights[0] * math.fsum(first) + weights[1] * math.fsum(second)) / tokens
    assert loss("rwr") == pytest.approx(expected, abs=1e-5)
    conditioned = [row_nll(base, [row], f"<rm_score>{r:.1f}")[0] for row, r in zip(TWO, rewards, strict=True)]
    assert loss("ca") == pytest.approx(math.fsum(conditioned[0] + conditioned[1]) / tokens, abs=1e-5)


def test_a_pair_by_hand(folder: Path, base: Path) -> None:
    """The first loss of `reward` equals Equation 2 on the scores of its initial reward head by `label`."""
    from offline_align.__main__ import run

    data = write_jsonl(folder / "pairs.jsonl", pairs(4))
    words = ["trainer.global_batch_size=4", "trainer.max_steps=1", "optim.lr=1e-30", "optim.weight_decay=0"]
    reward = train("reward", folder / "reward", data, *words, model=continued(base))
    label = [
        "label",
        f"run.dir={folder / 'label'}",
        f"init.from={reward}",
        f"data.input={data}",
        "data.max_length=128",
    ]
    assert run([*label, "run.device=cpu"]) == 0
    rows = [json.loads(line) for line in (folder / "label" / "labelled.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[:2]] == ["p0/chosen", "p0/rejected"]
    gaps = [a["reward_raw"] - b["reward_raw"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    expected = math.fsum(math.log1p(math.exp(-gap)) for gap in gaps) / 4
    assert metrics(reward)[0] == pytest.approx(expected, abs=1e-5)
    assert metrics(reward, "accuracy")[0] == sum(gap > 0 for gap in gaps) / 4
