"""Data sets of the hub as the input of any stage: each is read once, into a file of rows of ours in the run's cache.

From there on they are files like all others, with a content hash and a place in the manifest.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from offline_align.config.runs import GenerateRun, PrepareRun, Run
from offline_align.data.adapters.convert import convert
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.jsonl import HUB_PREFIX, BadRows, write_jsonl
from offline_align.data.sources import Source, read_source
from offline_align.errors import ConfigError
from offline_align.stages import common

logger = logging.getLogger(__name__)
_LONGEST_WAIT_SECONDS = 3600


def with_files[R: Run](config: R) -> R:
    """Return the configuration with a file in the place of each `hf:` name of its data.

    Raises ConfigError where a data set cannot be loaded, DataError for rows that are none of ours.
    """
    # Not every stage has data, and which keys depends on the stage.
    whole: Any = config
    data = getattr(whole, "data", None)
    if data is None or isinstance(config, PrepareRun):  # which reads them itself
        return config
    values = {key: getattr(data, key, None) for key in common.DATA_KEYS}
    changed = {key: _filed(whole, f"data.{key}", value) for key, value in values.items() if _names_a_set(value)}
    found: R = replace(whole, data=replace(data, **changed)) if changed else config
    return found


def _names_a_set(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and name.startswith(HUB_PREFIX) for name in names)


def _filed(config: Any, key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_filed(config, key, name) for name in value]
    return str(_file_of(config, key, value)) if _names_a_set(value) else value


def _file_of(config: Any, key: str, name: str) -> Path:
    """Return the file of a data set, which rank 0 makes; the others wait for it, as there are no groups yet."""
    if config.data.cache_dir is None and config.run.dir in (MISSING, None):  # as `plan` may leave it
        raise ConfigError(f"{key}={name}: give run.dir or data.cache_dir, into which it can be read")
    readable = re.sub(r"[^\w.]+", "-", name.removeprefix(HUB_PREFIX))[-60:].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    path = common.cache_dir(config) / "hub" / f"{readable}-{digest}.jsonl"
    if os.environ.get("RANK", "0") == "0":
        if not path.exists():
            _make(path, config, key, name)
        return path
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"{key}={name}: rank 0 has not read it; is {path} on storage that all nodes share?")
        time.sleep(0.2)
    return path


def _make(path: Path, config: Any, key: str, name: str) -> None:
    bad_rows = BadRows(config.data.on_bad_row, path.with_suffix(".quarantine.jsonl"))
    counts = InputCounts(name)
    try:
        count = write_jsonl(path, _rows(config, bad_rows, counts))
    except ConfigError as error:
        # The reader knows it as an input of `prepare`.
        raise ConfigError(str(error).replace("data.input=", f"{key}=", 1)) from error
    bad_rows.report(logger)
    counts.say(logger)
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
    logger.info("%s=%s: %d rows into %s%s", key, name, count, path, f"; dropped: {dropped}" if dropped else "")


def _rows(config: Run, bad_rows: BadRows, counts: InputCounts) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set in our form; prompts to be answered have no other and stay as they are."""
    name = counts.name
    lines = read_source(Source(name, None), bad_rows, None)
    if isinstance(config, GenerateRun):
        # Where one row has an id, `datasets` gives all others an empty one.
        return (line.value | {"id": line.value.get("id") or f"{name}:{line.number}"} for line in lines)
    return (converted.row for converted in convert(lines, None, bad_rows, counts))
