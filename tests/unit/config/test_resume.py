"""The table of settings that may change when a run is continued, and its copy in the how-to page."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.compose import to_mapping
from offline_align.config.resume import Change, change_class, refused, table
from offline_align.lineage import RunSettings, flat, read_sources, run_settings
from offline_align.stages.registry import STAGES
from tests.runs import compose

RECIPES = Path(__file__).resolve().parents[3] / "docs" / "how-to.md"
EVERY_KEY = sorted({key for stage in STAGES for key in flat(to_mapping(compose(stage, ["run.dir=x"]).config))})
BEFORE = flat(to_mapping(compose("sft", ["run.dir=x"]).config)) | {"inputs": ["a"], "parents": ["b"]}
CELLS = [
    ("run.dir", "y", Change.allow),
    ("run.device", "cuda", Change.allow),
    ("launcher.nproc_per_node", 8, Change.allow),
    ("parallel.tensor_model_parallel_size", 4, Change.allow),
    ("trainer.micro_batch_size", 4, Change.allow),
    ("trainer.recompute", "full", Change.allow),
    ("trainer.max_time", "1h", Change.allow),
    ("trainer.keep_checkpoints", 5, Change.allow),
    ("trainer.log_interval", 5, Change.allow),
    ("data.cache_dir", "c", Change.allow),
    ("label.flush_rows", 3, Change.allow),
    ("generate.batch_size", 3, Change.allow),
    ("judge.retries", 3, Change.allow),
    ("trainer.save_interval", 5, Change.warn),
    ("trainer.eval_interval", 5, Change.warn),
    ("optim.lr", 1e-3, Change.warn),
    ("optim.min_lr", 1e-7, Change.warn),
    ("optim.lr_decay_style", "constant", Change.warn),
    ("optim.lr_decay_steps", 100, Change.warn),
    ("optim.lr_warmup_steps", 100, Change.warn),
    ("optim.clip_grad", 0.5, Change.warn),
    ("label.histogram_bins", 10, Change.warn),
    ("inputs", ["c"], Change.refuse),
    ("parents", ["c"], Change.refuse),
    ("run.seed", 5, Change.refuse),
    ("init.from", "other", Change.refuse),
    ("model.num_layers", 5, Change.refuse),
    ("model.tokenizer", "other", Change.refuse),
    ("model.overrides.attention_softmax_in_fp32", True, Change.refuse),
    ("data.train", "other", Change.refuse),
    ("data.valid", "other", Change.refuse),
    ("data.template", "chat", Change.refuse),
    ("data.max_length", 77, Change.refuse),
    ("data.too_long", "drop", Change.refuse),
    ("data.on_bad_row", "skip", Change.refuse),
    ("data.sample", 5, Change.refuse),
    ("data.sample_by", "row", Change.refuse),
    ("data.source_column", None, Change.refuse),
    ("data.weights.hh", 0.5, Change.refuse),
    ("trainer.global_batch_size", 7, Change.refuse),
    ("trainer.precision", "bf16", Change.refuse),
    ("optim.weight_decay", 0.7, Change.refuse),
    ("optim.adam_beta1", 0.7, Change.refuse),
    ("optim.adam_beta2", 0.7, Change.refuse),
    ("optim.adam_eps", 0.7, Change.refuse),
    ("method.beta", 7.0, Change.refuse),
    ("generate.temperature", 0.7, Change.refuse),
    ("a.key.of.tomorrow", 7, Change.refuse),
]


@pytest.mark.parametrize(("key", "value", "expected"), CELLS, ids=lambda cell: str(cell))
def test_each_change_is_classified(key: str, value: Any, expected: Change) -> None:
    assert change_class(key) is expected
    assert (key in refused(BEFORE, BEFORE | {key: value})) is (expected is Change.refuse)


@pytest.mark.parametrize("key", EVERY_KEY)
def test_every_key_affects_the_content_keys_as_its_class_says(key: str) -> None:
    """allow changes no content key, warn that of the result, and refuse that of a continuation as well."""
    section, _, name = key.partition(".")

    def settings(value: str) -> RunSettings:
        return run_settings("sft", {section: {name: value}} if name else {section: value}, read_sources([], []))

    one, other = settings("one"), settings("other")
    assert (one.key == other.key) is (change_class(key) is Change.allow)
    assert (one.continuation == other.continuation) is (change_class(key) is not Change.refuse)


@pytest.mark.parametrize("key", ["trainer.max_steps", "trainer.max_epochs"])
@pytest.mark.parametrize("style", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("decay_steps", [None, 50])
def test_the_length_may_change_if_the_learning_rate_does_not_depend_on_it(
    key: str, style: str, decay_steps: int | None
) -> None:
    before = BEFORE | {"optim.lr_decay_style": style, "optim.lr_decay_steps": decay_steps}
    wrong = refused(before, before | {key: 200})
    assert (key in wrong) is (style != "constant" and decay_steps is None)
    assert all("optim.lr_decay_steps" in advice for advice in wrong.values())


def test_the_table_names_real_keys_only() -> None:
    sections = {key.rsplit(".", 1)[0] for key in EVERY_KEY}
    assert [key for key in table() if key not in EVERY_KEY and key not in sections] == []
    assert all(dataclasses.is_dataclass(stage.schema) for stage in STAGES.values())


def test_the_recipe_has_the_table() -> None:
    recipe = RECIPES.read_text("utf-8").partition("## Resume")[2].partition("\n## ")[0]
    for key, (change, _) in table().items():
        (line,) = [line for line in recipe.splitlines() if line.startswith(f"| `{change}` |")]
        shown = f"`{key}.*`" if key in ("launcher", "parallel") else f"`{key}`"
        assert shown in line or key in ("run.dir", "dry_run", "debug"), f"{key} is not in the row of {change}"
