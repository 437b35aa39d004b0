"""Collect from the runs behind a model how it was trained, on which data, and how it compares."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from offline_align.errors import ConfigError, StorageError
from offline_align.lineage import CONFIG, MANIFEST, Manifest, read_manifest
from offline_align.lineage.effort import is_whole, rank_seconds
from offline_align.lineage.manifest import ParentRecord, describe_parent

REPORT = "report.json"
Rows = list[tuple[str, str]]

# Settings of a training run that the model card shows, in this order, if the run has them.
_SETTINGS = (
    "method",
    "optim.lr",
    "optim.lr_decay_style",
    "optim.lr_warmup_steps",
    "optim.weight_decay",
    "trainer.global_batch_size",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.precision",
    "data.sample",
    "data.weights",
    "data.max_length",
    "run.seed",
)


@dataclass(frozen=True, slots=True)
class SourceRun:
    """A finished run behind a model; `depth` is the number of steps from the model back to the run."""

    folder: Path
    manifest: Manifest
    depth: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The table of an `evaluate` run; `own` are the names under which it lists this model."""

    judge: str
    prompts: int
    header: list[str]
    rows: list[list[str]]
    own: frozenset[str]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Facts for a model card from the runs behind the model."""

    training: Rows
    reward_model: Rows
    runs: list[str]
    """Lines of a nested Markdown list, newest run first."""
    evaluation: Evaluation | None = None
    method: str = ""
    """The training method in words."""


UNKNOWN = Provenance([], [], [])


def provenance(model_folder: Path, evaluation: Path | None = None) -> Provenance:
    """Return the provenance of a checkpoint or Hugging Face folder; unknown parts are empty.

    `evaluation` is the folder of an `evaluate` run. Raises ConfigError, naming
    `convert.evaluation`, if it is not such a run or compares no answers of this model.
    """
    runs = list(_runs_behind(model_folder))
    compared = _evaluation(evaluation, model_folder) if evaluation is not None else None
    if not runs:
        return replace(UNKNOWN, evaluation=compared)
    return Provenance(_training(runs[0]), _reward_model(runs), [line for run in runs for line in _lines(run)], compared)


def _runs_behind(model_folder: Path) -> Iterator[SourceRun]:
    """Yield the runs behind a folder, depth first; parents that are no longer runs are skipped."""
    folder = model_folder.resolve()
    for run_dir in (folder, *folder.parents[:2]):
        found = list(_walk(run_dir, 0))
        if found:
            yield from found
            return


def _walk(run_dir: Path, depth: int) -> Iterator[SourceRun]:
    try:
        manifest = read_manifest(run_dir)
    except StorageError:
        return
    if manifest is None:
        return
    yield SourceRun(run_dir, manifest, depth)
    for parent in manifest.parents:
        yield from _walk((run_dir / parent.path).resolve(), depth + 1)


def _lines(run: SourceRun) -> Iterator[str]:
    indent, manifest = "  " * run.depth, run.manifest
    yield f"{indent}- `{manifest.stage}`, {manifest.created}, key `{manifest.key[:12]}`"
    for file in manifest.inputs:
        yield f"{indent}  - `{Path(file.path).name}`, SHA-256 `{file.sha256[:12]}`"
    for parent in manifest.parents:
        # Runs that still exist have their own lines.
        if not ((run.folder / parent.path).resolve() / MANIFEST).is_file():
            yield f"{indent}  - `{parent.stage}`, SHA-256 `{parent.manifest_sha256[:12]}`"


def _training(run: SourceRun) -> Rows:
    config, extra = _config(run.folder), run.manifest.extra
    found = [(key, value) for key in _SETTINGS for key, value in _leaves(key, _look_up(config, key))]
    facts = {
        "rows": extra.get("data", {}).get("rows"),
        "steps": extra.get("steps"),
        "skipped steps": extra.get("skipped_steps"),
        "best validation loss": extra.get("best_validation_loss"),
        "effective rows": extra.get("data", {}).get("effective_sample_size"),
    }
    found += [(name, _number(value)) for name, value in facts.items() if value is not None]
    used = rank_seconds(extra)
    if used is not None and "ranks" in extra:
        counted = "" if is_whole(extra) else ", steps only"
        text = f"{used / 3600:.3g} hours of {extra.get('device', 'device')}, {extra['ranks']} ranks{counted}"
        found.append(("cost", text))
    return found


def _reward_model(runs: list[SourceRun]) -> Rows:
    """Return the known facts about the reward model whose labels the policy was trained on."""
    found: Rows = []
    for run in runs[1:]:
        if run.manifest.stage == "label" or "statistics" in run.manifest.extra:
            statistics = run.manifest.extra.get("statistics", {})
            found.append(("labelled answers", _number(statistics.get("count"))))
            found.append(("raw rewards", f"{_number(statistics.get('mean'))} +- {_number(statistics.get('std'))}"))
        if run.manifest.stage == "reward":
            accuracy = _last_metric(run.folder, "valid_accuracy")
            found += [("accuracy on held-out pairs", _number(accuracy))] if accuracy is not None else []
            found.append(("steps", _number(run.manifest.extra.get("steps"))))
            break
    return found


def _config(run_dir: Path) -> Any:
    try:
        return yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _look_up(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _leaves(key: str, value: Any) -> Rows:
    if isinstance(value, dict):
        return [leaf for name in value for leaf in _leaves(f"{key}.{name}", value[name])]
    return [] if value is None else [(key, _number(value))]


def _last_metric(run_dir: Path, name: str) -> float | None:
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        values = [found[name] for line in lines if name in (found := json.loads(line))]
    except (OSError, ValueError, TypeError):
        return None
    return values[-1] if values else None


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _evaluation(folder: Path, model_folder: Path) -> Evaluation:
    manifest = read_manifest(folder)
    if manifest is None or manifest.stage != "evaluate":
        raise ConfigError(f"convert.evaluation={folder}: is not a finished run of `evaluate`; give its run folder")
    try:
        results = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        own = _own_names(folder, manifest, results["files"], describe_parent(model_folder))
        rows = [_row(results, method) for method in results["methods"]]
        judge, prompts = str(results["judge"]["name"]), int(results["judged_prompts"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"convert.evaluation={folder}: {REPORT} has no comparison of methods ({error!r})") from error
    if not own:
        raise ConfigError(f"convert.evaluation={folder}: compares no answers of init.from={model_folder}")
    header = ["method", f"score ({judge})", f"win rate vs {results['baseline']}", "rank score"]
    return Evaluation(judge, prompts, header, rows, own)


def _own_names(folder: Path, manifest: Manifest, files: dict[str, str], model: ParentRecord) -> frozenset[str]:
    """Return the names of the methods whose answers were generated by `model`."""
    generated = set()
    for parent in manifest.parents:
        run_dir = (folder.resolve() / parent.path).resolve()
        made = read_manifest(run_dir)
        if made and any(origin.content_sha256 == model.content_sha256 for origin in made.parents):
            generated.add(run_dir)
    return frozenset(name for name, path in files.items() if (folder / path).resolve().parent in generated)


def _row(results: dict[str, Any], method: str) -> list[str]:
    found = results["overall"][method]
    win = "baseline" if method == results["baseline"] else _estimate(found["win_rate"], 100, " %")
    return [method, _estimate(found["score"]), win, _estimate(found["rank_score"])]


def _estimate(value: dict[str, float], scale: float = 1, unit: str = "") -> str:
    mean, low, high = (scale * value[name] for name in ("mean", "low", "high"))
    return f"{mean:.3g}{unit} [{low:.3g}, {high:.3g}]"
