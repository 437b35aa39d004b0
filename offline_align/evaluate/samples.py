"""Answers of `generate` runs, to be read side by side where nobody judges them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import AlignError
from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.comparison import Comparison, load_comparison

log = logging.getLogger(__name__)


def samples_of_runs(runs: Sequence[Ancestor]) -> Comparison | None:
    """Return the answers of the runs that share most prompts files, or None where there are none to be read.

    What cannot be read or compared is left out, with a warning: the page shows what there is.
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
        log.warning("answers of %d runs to other prompts are not shown; name those runs alone to see them", others)
    try:
        return load_comparison(files, BadRows(OnBadRow.skip, None))
    except AlignError as error:
        log.warning("%s; the page has no samples", error)
        return None
