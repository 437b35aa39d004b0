"""Find the policies that were made in rounds: each trained on labelled answers of the one before.

A round is recognised by its manifests, not by names of folders: the training run read the rows of a
`label` run, that run read the answers of a `generate` run, and that run used the earlier policy.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offline_align.errors import StorageError
from offline_align.evaluate.ancestry import Ancestor, find_ancestors
from offline_align.evaluate.comparison import Column, generation_manifest
from offline_align.lineage import Manifest, read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """One compared policy; `column` is the index of its answers in the comparison."""

    number: int
    """0 is the policy that the first round started from."""
    column: int


@dataclass(frozen=True, slots=True)
class Series:
    """Rounds that follow each other, those that are compared, in order."""

    name: str
    rounds: tuple[Round, ...]
    first_labels: Ancestor | None
    """The run that labelled the answers of the first policy."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A policy in a series, and the run that labelled the answers it was trained on, if there is one."""

    policy: Path
    labels: Path | None = None


def find_series(columns: Sequence[Column]) -> list[Series]:
    """Return every series of which at least two policies are compared.

    A policy that is compared at several target rewards counts with the highest one.
    """
    policies = [_policy(column) for column in columns]
    known: dict[Path, list[_Step]] = {}
    chains = {policy: _chain(policy, known) for policy in dict.fromkeys(policies) if policy is not None}
    earlier = {step.policy for chain in chains.values() for step in chain[:-1]}
    found = []
    for policy, chain in chains.items():
        if policy in earlier:
            continue
        places = {k: _columns_of(step.policy, policies, columns) for k, step in enumerate(chain)}
        rounds = tuple(Round(number, column) for number, column in places.items() if column is not None)
        if len(rounds) > 1:
            labels = chain[1].labels
            found.append(Series(_method(policy), rounds, _ancestor(labels) if labels else None))
    shared = Counter(series.name for series in found)
    return [replace(s, name=columns[s.rounds[-1].column].name) if shared[s.name] > 1 else s for s in found]


def _columns_of(policy: Path, policies: Sequence[Path | None], columns: Sequence[Column]) -> int | None:
    own = [k for k, one in enumerate(policies) if one == policy]
    return max(own, key=lambda k: columns[k].target or 0.0, default=None)


def _policy(column: Column) -> Path | None:
    """Return the run folder, or the folder of weights, that wrote the answers of a column."""
    manifest = generation_manifest(column.path)
    return _model(column.path.parent, manifest) if manifest else None


def _model(run_dir: Path, manifest: Manifest) -> Path | None:
    """Return the folder of the one model that a run used, or None."""
    weights = [p for p in manifest.parents if p.part or p.stage in ("checkpoint", "huggingface", "convert")]
    return (run_dir / weights[0].path).resolve() if len(weights) == 1 else None


def _chain(policy: Path, known: dict[Path, list[_Step]]) -> list[_Step]:
    """Return the policies behind `policy`, the first one first; `known` has the chains found so far."""
    if policy not in known:
        known[policy] = []  # ends a circle of forged manifests
        before = ((_chain(earlier, known), labels) for labels, earlier in _taught_by(policy))
        longest, labels = max(before, key=lambda found: len(found[0]), default=([], None))
        known[policy] = [*longest, _Step(policy, labels)]
    return known[policy]


def _taught_by(policy: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each label run whose rows a policy was trained on, with the policy that wrote the answers."""
    for label, label_manifest in _parents(policy, "label"):
        for generated, manifest in _parents(label, "generate", label_manifest):
            earlier = _model(generated, manifest)
            if earlier is not None:
                yield label, earlier


def _parents(run_dir: Path, stage: str, manifest: Manifest | None = None) -> Iterator[tuple[Path, Manifest]]:
    manifest = manifest or _manifest(run_dir)
    for parent in manifest.parents if manifest else []:
        folder = (run_dir / parent.path).resolve()
        found = _manifest(folder) if parent.stage == stage else None
        if found is not None:
            yield folder, found


def _manifest(run_dir: Path) -> Manifest | None:
    try:
        return read_manifest(run_dir)
    except StorageError as error:
        log.warning("%s; left out of the rounds", error)
        return None


def _method(policy: Path) -> str:
    manifest = _manifest(policy)
    return manifest.stage if manifest else policy.name


def _ancestor(run_dir: Path) -> Ancestor | None:
    return next((run for run in find_ancestors([run_dir]) if run.run_dir == run_dir), None)
