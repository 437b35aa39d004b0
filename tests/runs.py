"""Helpers to make configurations and finished runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_align import lineage
from offline_align.config.compose import Composed
from offline_align.config.runs import Run
from offline_align.lineage import read_sources, run_settings
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES


def compose(stage: str, words: Sequence[str]) -> Composed:
    """Return the configuration of a stage for command-line words."""
    return STAGES[stage].compose(words)


def job(stage: str, words: Sequence[str]) -> Job[Any]:
    """Return the job of a stage for valid command-line words."""
    composed = compose(stage, words)
    assert composed.problems == []
    config: Run = composed.config
    return Job(STAGES[stage], config, composed.explicit)


def content_key(stage: str, config: dict[str, Any], inputs: Sequence[Path], parents: Sequence[Path]) -> str:
    """Return the content key of a stage's result for the given files and models."""
    return run_settings(stage, config, read_sources(inputs, parents)).key


def write_manifest(
    run_dir: Path,
    stage: str,
    key: str,
    inputs: Sequence[Path],
    parents: Sequence[Path],
    outputs: Sequence[Path],
    extra: dict[str, Any],
) -> Path:
    """Mark a run with these files and models as finished."""
    return lineage.write_manifest(run_dir, stage, key, read_sources(inputs, parents), outputs, extra)
