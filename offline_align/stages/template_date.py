"""The day that a chat template writes as today's: fixed when a run begins, and kept for ever after."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from offline_align import lineage
from offline_align.config.runs import EvaluateRun, ModelRun, Run
from offline_align.config.sections import DataSection, JudgeKind
from offline_align.convert.describe import describe, tokenizer_of
from offline_align.data.template import writes_date
from offline_align.errors import ConfigError
from offline_align.model.description import find_model
from offline_align.stages import common
from offline_align.stages.origin import resolve


def with_template_date(config: Run, explicit: frozenset[str]) -> Run:
    """Return `config` with `data.template_date`, if its template writes a date and neither user nor model fix one.

    It is the day that `config.yaml` of the run folder has from an earlier attempt, else today.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, DataSection) or data.template_date is not None or not _writes_any(config, explicit):
        return config
    day = _recorded(Path(config.run.dir)) or datetime.now().date().isoformat()
    changed: Any = config
    return replace(changed, data=replace(data, template_date=day))  # type: ignore[no-any-return]


def _writes_any(config: Run, explicit: frozenset[str]) -> bool:
    """Return whether a template of the run writes a date that no model has recorded."""
    try:
        if isinstance(config, ModelRun):
            origin = resolve(config, explicit)
            return origin.template_date is None and writes_date(origin.tokenizer, origin.template)
        return isinstance(config, EvaluateRun) and any(_judges(config))
    except ConfigError:  # files that jobs before this one will write
        return False


def _judges(config: EvaluateRun) -> Iterator[bool]:
    """Yield the same of each reward model that judges."""
    if not common.needs_judge(config):
        return
    first = config.judge.model if config.judge.kind is JudgeKind.reward_model else None
    for key, named in (("judge.model", first), ("judge.second_model", config.judge.second_model)):
        if named is not None:
            folder = find_model(named, key)
            found = describe(folder, config.data.template)
            yield found.template_date is None and writes_date(tokenizer_of(folder), found.template)


def _recorded(run_dir: Path) -> str | None:
    """Return the day of an earlier attempt."""
    try:
        found = yaml.safe_load((run_dir / lineage.CONFIG).read_text(encoding="utf-8"))
        return date.fromisoformat(found["data"]["template_date"]).isoformat()
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None
