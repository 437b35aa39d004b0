"""Hub data sets as the input of any stage: each is read once, into a file in the run's cache.

From then on they are files like all others, with a content hash and an entry in the manifest.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_align.config.runs import section
from offline_align.config.sections import DataSection, PrepareSection, Rated
from offline_align.data.adapters.convert import Converted, convert
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.jsonl import HUB_PREFIX, BadRows, write_jsonl
from offline_align.data.preparation import with_source
from offline_align.data.sources import Source, read_source
from offline_align.errors import ConfigError, DataError
from offline_align.progress import announced
from offline_align.stages.job import Job
from offline_align.stages.recipe import samples
from offline_align.stages.registry import Reads
from offline_align.wording import counted

logger = logging.getLogger(__name__)
_LONGEST_WAIT_SECONDS = 3600


def fetch_data_sets(job: Job[Any]) -> None:
    """Replace each `hf:` name in the data of a job with the path of its file.

    Raises ConfigError if a data set cannot be loaded, DataError for rows in an unknown form.
    """
    data = section(job.config, DataSection)
    if data is None or job.stage.reads is Reads.raw_rows:  # `prepare` reads them itself
        return
    values = {key.partition("data.")[2]: value for key, value in job.config.named_files().items()}
    changed = {k: _with_files(job, f"data.{k}", v) for k, v in values.items() if k and _names_hub_data(v)}
    if changed:
        job.change_data(keep_source=True, **changed)


def _names_hub_data(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and name.startswith(HUB_PREFIX) for name in names)


def _with_files(job: Job[Any], key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_with_files(job, key, name) for name in value]
    return str(_file_of(job, key, value)) if _names_hub_data(value) else value


def _file_of(job: Job[Any], key: str, name: str) -> Path:
    """Return the file of a data set; rank 0 writes it, and the others poll, before groups exist."""
    if job.config.data.cache_dir is None and not job.has_run_dir:
        raise ConfigError(f"{key}={name}: give run.dir or data.cache_dir, into which it can be read")
    readable = re.sub(r"[^\w.]+", "-", name.removeprefix(HUB_PREFIX))[-60:].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    path = job.cache_dir / "hub" / f"{readable}-{digest}.jsonl"
    if os.environ.get("RANK", "0") == "0":
        if not path.exists():
            _make(path, job, key, name)
        return path
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"{key}={name}: rank 0 has not read it; is {path} on storage that all nodes share?")
        time.sleep(0.2)
    return path


def _make(path: Path, job: Job[Any], key: str, name: str) -> None:
    bad_rows = BadRows(job.config.data.on_bad_row, path.with_suffix(".quarantine.jsonl"))
    counts = InputCounts(name)
    try:
        with announced(f"reading {name} from the Hub"):
            count = write_jsonl(path, _rows(job, bad_rows, counts))
    except ConfigError as error:
        # The reader names the key of `prepare`.
        raise ConfigError(str(error).replace("data.input=", f"{key}=", 1)) from error
    bad_rows.report(logger)
    counts.say(logger)
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
    logger.info(
        "%s=%s: %s into %s%s", key, name, counted(count, "row"), path, f"; dropped: {dropped}" if dropped else ""
    )


def _rows(job: Job[Any], bad_rows: BadRows, counts: InputCounts) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set in our form. Prompts for `generate` stay unchanged."""
    name = counts.name
    lines = read_source(Source(name, None), bad_rows, None)
    if job.stage.reads is Reads.prompts:
        # If one row has an id, `datasets` gives all others an empty one.
        return (line.value | {"id": line.value.get("id") or f"{name}:{line.number}"} for line in lines)
    recipe = job.stage.recipe
    learns_all = recipe is not None and recipe.train is samples
    settings = PrepareSection(rated=None if learns_all else Rated.ignore)
    return (with_source(_unrated(c, name), counts) for c in convert(lines, settings, bad_rows, counts))


def _unrated(converted: Converted, name: str) -> dict[str, Any]:
    if converted.is_labelled:
        raise DataError(f"{name}: its answers are rated, so not all are to be learned; read it with `prepare`")
    return converted.row
