"""Find the policies that differ only in their training seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from offline_align.lineage import CONFIG, Manifest, read_manifest
from offline_align.lineage.files import canonical_json


@dataclass(frozen=True, slots=True)
class Training:
    """A training run: its stage and settings (without `run`) as JSON text, and its seed."""

    settings: str
    seed: int


def training_of(generation_file: Path, manifest: Manifest | None) -> Training | None:
    """Return the training run of the policy that wrote a generation file, or None if it is unknown.

    `manifest` belongs to the run that wrote the file.
    """
    folders = [generation_file.parent / parent.path for parent in manifest.parents if parent.part] if manifest else []
    if len(folders) != 1:
        return None
    try:
        config = yaml.safe_load((folders[0] / CONFIG).read_text(encoding="utf-8"))
        seed = int(config["run"]["seed"])
        stage = getattr(read_manifest(folders[0]), "stage", "")
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    others = {name: value for name, value in config.items() if name != "run"}
    return Training(canonical_json([stage, others]), seed)


def several_seeds(trainings: Sequence[Training | None], targets: Sequence[float | None]) -> list[Training | None]:
    """Return each training that is repeated with another seed at the same target, else None."""
    seeds: dict[tuple[str, float | None], set[int]] = {}
    for training, target in zip(trainings, targets, strict=True):
        if training is not None:
            seeds.setdefault((training.settings, target), set()).add(training.seed)
    return [
        training if training is not None and len(seeds[training.settings, target]) > 1 else None
        for training, target in zip(trainings, targets, strict=True)
    ]
