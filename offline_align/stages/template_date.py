"""The date that a chat template writes, fixed once for all attempts and ranks of a run."""

from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from offline_align import lineage
from offline_align.config.runs import EvaluateRun, ModelRun, section
from offline_align.config.sections import DataSection
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.template import writes_date
from offline_align.errors import ConfigError
from offline_align.stages.job import Job


def fix_template_date(job: Job[Any]) -> str | None:
    """Set `data.template_date` if a template writes a date that nobody has fixed.

    Returns the date, or None if it was not set here. It is the date in `config.yaml` of an earlier
    attempt, otherwise today.
    """
    data = section(job.config, DataSection)
    if data is None or data.template_date is not None or not _writes_any(job):
        return None
    day = _recorded(job.run_dir) or datetime.now().date().isoformat()
    job.change_data(template_date=day)
    return day


def _writes_any(job: Job[Any]) -> bool:
    """Return whether a template of the run writes a date that is not recorded with its model."""
    try:
        if isinstance(job.config, ModelRun):
            return _writes_unfixed(job.source)
        return isinstance(job.config, EvaluateRun) and any(map(_writes_unfixed, _judges(job.config)))
    except ConfigError:  # earlier jobs have yet to write the files
        return False


def _writes_unfixed(source: ModelSource) -> bool:
    return source.description.template_date is None and writes_date(source.tokenizer, source.description.template)


def _judges(config: EvaluateRun) -> Iterator[ModelSource]:
    for key, named in config.named_models().items():
        if named is not None:
            yield open_model(named, key, config.data.named_template)


def _recorded(run_dir: Path) -> str | None:
    """Return the date of an earlier attempt, or None."""
    try:
        found = yaml.safe_load((run_dir / lineage.CONFIG).read_text(encoding="utf-8"))
        return date.fromisoformat(found["data"]["template_date"]).isoformat()
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None
