"""Read how other judges scored the same answers, from the reports of finished `evaluate` runs."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offline_align.errors import StorageError
from offline_align.evaluate.parts.study import Verdict
from offline_align.evaluate.results import Compared
from offline_align.evaluate.statistics import Floats
from offline_align.lineage import read_manifest
from offline_align.lineage.files import record_files

REPORT = "report.json"

log = logging.getLogger(__name__)


def other_verdicts(compared: Compared, run_dirs: Sequence[Path]) -> list[Verdict]:
    """Return the scores of the `evaluate` runs among `run_dirs` that judged the answers of `compared`.

    A run that judged other answers is logged and left out. Judges with the same name get that of
    their folder. Raises StorageError for a report that is missing or damaged.
    """
    mine = Counter(record.sha256 for record in record_files(compared.comparison.files))
    found = []
    for folder in run_dirs:
        manifest = read_manifest(folder)
        if manifest is None or manifest.stage != "evaluate":
            continue
        # A calibration file may be among the inputs too.
        if mine - Counter(record.sha256 for record in manifest.inputs):
            log.info("%s judged other answers, so its judge is not shown beside this one", folder)
            continue
        found.append((folder, *_scores(compared, folder)))
    names = Counter([compared.judgement.name, *(name for _, name, _ in found)])
    return [Verdict(name if names[name] == 1 else f"{name} ({folder.name})", scores) for folder, name, scores in found]


def _scores(compared: Compared, folder: Path) -> tuple[str, Floats]:
    """Return the judge's name and its scores [prompts, methods]."""
    path = folder / REPORT
    try:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["id"]: row["scores"] for row in report["rows"]}
        methods = compared.comparison.methods
        table = [[rows[prompt.id][method] for method in methods] for prompt in compared.comparison.prompts]
        return str(report["judge"]["name"]), np.array(table, dtype=np.float64)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{path}: cannot be read as a report: {error}; run this evaluate again") from error
