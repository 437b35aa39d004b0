"""Find answers of `generate` runs to show side by side in a report without a judge."""

import logging
from collections.abc import Sequence
from pathlib import Path

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import AlignError
from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.comparison import Comparison, load_comparison
from offline_align.wording import counted

log = logging.getLogger(__name__)


def samples_of_runs(runs: Sequence[Ancestor]) -> Comparison | None:
    """Return the answers of the largest group of runs with the same prompt files, if any.

    Logs a warning about runs that are left out because they answer other prompts or cannot be read.
    """
    groups: dict[tuple[str, ...], list[Path]] = {}
    for run in runs:
        file = run.run_dir / "generations.jsonl"
        if run.stage == "generate" and file.is_file():
            groups.setdefault(tuple(record.sha256 for record in run.manifest.inputs), []).append(file)
    if not groups:
        return None
    files = max(groups.values(), key=len)
    others = sum(map(len, groups.values())) - len(files)
    if others:
        log.warning("not shown: %s that answer other prompts; name only those to see them", counted(others, "run"))
    try:
        return load_comparison(files, BadRows(OnBadRow.skip, None))
    except AlignError as error:
        log.warning("%s; the page has no samples", error)
        return None
