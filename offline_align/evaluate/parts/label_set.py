"""Find the labelled rows behind a policy: the scale and range of its training rewards."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offline_align.evaluate.ancestry import Ancestor, find_ancestors
from offline_align.evaluate.statistics import Floats
from offline_align.label.statistics import RewardStats


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A finished run that labelled rows: its statistics, and the content hash of its reward model.

    `prepare` labels rows with scores that are in the data, so there is no reward model.
    """

    run_dir: Path
    stats: RewardStats
    scored_by: str | None

    @property
    def levels(self) -> list[tuple[float, float]]:
        """The quantiles as (level, normalised reward), from the lowest to the highest reward."""
        raw = sorted((float(level), value) for level, value in self.stats.quantiles.items())
        return [(level, float(self.normalised(np.array(value)))) for level, value in raw]

    @property
    def lowest(self) -> float:
        """The lowest normalised reward of a row."""
        return self.levels[0][1]

    @property
    def highest(self) -> float:
        """The highest normalised reward of a row."""
        return self.levels[-1][1]

    def is_scored_by(self, content: str | None) -> bool:
        """Return whether the reward model with this content hash labelled the rows."""
        return content is not None and content == self.scored_by

    def normalised(self, raw: Floats) -> Floats:
        """Return raw rewards on the scale of the labels; zeros if all labels are equal."""
        scale = self.stats.scale
        return (raw - scale.mean) / scale.std if scale.std else np.zeros_like(raw)

    def reward_at(self, level: float) -> float:
        """Return the normalised reward at a quantile level, interpolated."""
        levels, rewards = zip(*self.levels, strict=True)
        return float(np.interp(level, levels, rewards))

    def share_below(self, reward: float) -> float:
        """Return the share of rows below a normalised reward, interpolated."""
        levels, rewards = zip(*self.levels, strict=True)
        return float(np.interp(reward, rewards, levels))


def find_label_set(generation_files: Iterable[Path]) -> LabelSet | None:
    """Return the last readable run in the lineage of these files that labelled training rows, or None.

    A run that wrote one of the files chose the best of several answers; no policy learned from them.
    """
    folders = [path.parent.resolve() for path in generation_files]
    runs = find_ancestors(folders)
    labels = (run for run in reversed(runs) if run.stage in ("label", "prepare") and run.run_dir not in folders)
    found = [label for run in labels if (label := read_label_set(run)) is not None]
    return found[0] if found else None


def read_label_set(run: Ancestor) -> LabelSet | None:
    """Return the labelled rows of a finished run, or None if their statistics cannot be read."""
    try:
        stats = RewardStats.from_json(json.loads((run.run_dir / "reward_stats.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # `verify` reports the damage; the report does without this label run.
        return None
    scorers = [parent.content_sha256 for parent in run.manifest.parents if parent.part or parent.stage == "checkpoint"]
    return LabelSet(run.run_dir, stats, scorers[0] if len(scorers) == 1 else None)
