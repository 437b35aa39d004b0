"""The template of a run: `data.template=auto` becomes `paper` or `chat` when the run begins, and stays that.

So `config.yaml` and the content key hold the template itself, and a run that is continued keeps it.
"""

from pathlib import Path
from typing import Any

import yaml

from offline_align import lineage
from offline_align.config.runs import ModelRun, section
from offline_align.config.sections import DataSection, Template
from offline_align.errors import ConfigError
from offline_align.stages.continuation import steps_done
from offline_align.stages.job import Job


def fix_template(job: Job[Any]) -> None:
    """Replace `data.template=auto` in the settings of a job.

    The template is that of an earlier attempt in the run folder, otherwise that of the model. A run
    of an earlier version has none in its settings; it stays unset there, with the meaning it had.
    `auto` stays if the model does not exist yet. Stages without a model of their own leave it unset
    too, since each reward model that they read has its template.
    """
    data = section(job.config, DataSection)
    if data is None:
        return
    given = data.template
    if given is Template.auto:
        given = (_begun_with(job.run_dir) if job.has_run_dir else given) if isinstance(job.config, ModelRun) else None
        job.change_data(template=given)
    if not isinstance(job.config, ModelRun):
        return
    try:
        job.template = job.source.choice
    except ConfigError:  # reported later with all other problems, or earlier jobs have yet to write the files
        return
    if given is Template.auto:
        job.change_data(template=job.source.description.template, keep_source=True)


def _begun_with(run_dir: Path) -> Template | None:
    """Return the template in the settings of an unfinished or finished run; `auto` if there is no such run."""
    if steps_done(run_dir) is None and not (run_dir / lineage.MANIFEST).is_file():
        return Template.auto
    try:
        found = yaml.safe_load((run_dir / lineage.CONFIG).read_text(encoding="utf-8"))
        value = found["data"]["template"]
        return None if value is None else Template(value)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return Template.auto
