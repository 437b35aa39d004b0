"""The scale of an earlier labelled set, which `label.statistics` names, and the reward model behind it."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.label.statistics import RewardStats, Scale
from offline_align.lineage import ParentRecord, read_manifest

# A model is a checkpoint in a run folder, or a folder of weights.
_WEIGHTS = ("checkpoint", "huggingface", "convert")


def read_scale(path: Path) -> Scale:
    """Return the scale of the rewards that a `reward_stats.json` describes.

    If that set was normalised on the scale of a still earlier one, this is the earlier scale, so a
    chain of runs has one scale. Raises DataError for other content and for a standard deviation of 0,
    StorageError for an unreadable file.
    """
    try:
        scale = RewardStats.from_json(json.loads(path.read_text(encoding="utf-8"))).scale
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: does not hold the statistics of rewards (mean, std, count, quantiles); give label.statistics "
            "the run folder of `label`, or the reward_stats.json in it"
        ) from error
    if not (math.isfinite(scale.mean) and math.isfinite(scale.std) and scale.std > 0):
        raise DataError(
            f"{path}: std: {scale.std:g}: rewards cannot be divided by it; give label.statistics a set with "
            "different, finite rewards"
        )
    return scale


def check_reward_model(path: Path, given: str, named: str, models: Iterable[ParentRecord]) -> None:
    """Raise ConfigError if the statistics in `path` are known to be those of another reward model.

    `models` describes the model that labels now. A model counts as the same after `convert`. `given`
    and `named` are the values of `label.statistics` and `init.from`. A file without the manifest of
    its run is accepted, because its model is unknown.
    """
    manifest = read_manifest(path.parent)
    if manifest is None:
        return
    made_by = _contents(path.parent, [one for one in manifest.parents if one.part or one.stage in _WEIGHTS])
    own = _contents(Path(), models)
    if made_by & own:
        return
    whose = "rewards of another reward model than" if made_by else f"scores that `{manifest.stage}` found, not those of"
    raise ConfigError(
        f"label.statistics={given}: has {whose} init.from={named}, and these have another unit; label both sets with "
        "one reward model, or leave label.statistics unset"
    )


def _contents(run_dir: Path, records: Iterable[ParentRecord]) -> set[str]:
    """Return the content hashes of models, and of those that `convert` made them of."""
    found = set()
    for record in records:
        found.add(record.content_sha256)
        manifest = read_manifest(run_dir / record.path) if record.stage == "convert" else None
        found |= {parent.content_sha256 for parent in manifest.parents} if manifest else set()
    return found
