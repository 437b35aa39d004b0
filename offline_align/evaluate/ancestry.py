"""Find the ancestors of runs, their training curves and their reward histograms."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offline_align.errors import StorageError
from offline_align.lineage import Manifest, read_manifest

METRICS = "metrics.jsonl"
HISTOGRAM = "reward_histogram.png"
QUANTITIES = ("loss", "accuracy")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One run of a lineage; `depth` is the length of the longest path to a run without parents."""

    run_dir: Path
    stage: str
    method: str
    parents: tuple[Path, ...]
    depth: int
    manifest: Manifest

    @property
    def title(self) -> str:
        """The name of the run folder, without its parents."""
        return self.run_dir.name


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity of a training run by optimizer step, on training and validation rows."""

    run: str
    quantity: str
    training: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]

    @property
    def name(self) -> str:
        """The title of its panel in the figure."""
        return f"{self.run}: {self.quantity}"


def find_ancestors(run_dirs: Iterable[Path]) -> list[Ancestor]:
    """Return the runs in these folders and all their ancestors, roots first.

    Runs with a missing or damaged manifest are left out; `verify` reports them.
    """
    manifests: dict[Path, Manifest] = {}
    waiting = [path.resolve() for path in run_dirs]
    while waiting:
        run_dir = waiting.pop(0)
        manifest = None if run_dir in manifests else _manifest(run_dir)
        if manifest is not None:
            manifests[run_dir] = manifest
            waiting += _parents(run_dir, manifest)
    depths: dict[Path, int] = {}
    for run_dir in manifests:
        _measure(run_dir, manifests, depths, ())
    found = [_ancestor(run_dir, manifest, manifests, depths[run_dir]) for run_dir, manifest in manifests.items()]
    return sorted(found, key=lambda run: (run.depth, run.stage, run.title))


def read_curves(run: Ancestor) -> list[Curve]:
    """Return the curves that a run logged; none if it did not train."""
    rows = list(_metrics(run.run_dir / METRICS))
    curves = [Curve(run.title, name, _series(rows, name), _series(rows, f"valid_{name}")) for name in QUANTITIES]
    return [curve for curve in curves if curve.training]


def find_histograms(runs: Sequence[Ancestor]) -> list[Path]:
    """Return the reward histograms of the `label` runs."""
    paths = [run.run_dir / HISTOGRAM for run in runs if run.stage == "label"]
    return [path for path in paths if path.is_file()]


def _manifest(run_dir: Path) -> Manifest | None:
    try:
        return read_manifest(run_dir)
    except StorageError as error:
        log.warning("%s; left out of the report's lineage", error)
        return None


def _parents(run_dir: Path, manifest: Manifest) -> list[Path]:
    return [(run_dir / parent.path).resolve() for parent in manifest.parents]


def _measure(run_dir: Path, manifests: dict[Path, Manifest], depths: dict[Path, int], path: tuple[Path, ...]) -> int:
    if run_dir not in depths:
        known = [p for p in _parents(run_dir, manifests[run_dir]) if p in manifests and p not in (*path, run_dir)]
        depths[run_dir] = 1 + max((_measure(p, manifests, depths, (*path, run_dir)) for p in known), default=-1)
    return depths[run_dir]


def _ancestor(run_dir: Path, manifest: Manifest, manifests: dict[Path, Manifest], depth: int) -> Ancestor:
    parents = tuple(dict.fromkeys(p for p in _parents(run_dir, manifest) if p in manifests))
    return Ancestor(run_dir, manifest.stage, str(manifest.extra.get("method") or ""), parents, depth, manifest)


def _metrics(path: Path) -> Iterable[dict[str, object]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            # Skip a line that a crash left incomplete.
            continue
        if isinstance(row, dict):
            yield row


def _series(rows: Sequence[dict[str, object]], name: str) -> tuple[tuple[int, float], ...]:
    points = ((row.get("step"), row.get(name)) for row in rows)
    return tuple((s, float(v)) for s, v in points if isinstance(s, int) and isinstance(v, int | float))
