"""The one list of the report's parts, in reading order.

Each part is a module of this package. It answers one question with a `Section`: the question as its
title, findings in sentences, numbers, tables and figures. To add a part, write its module and add a
line to `report_sections`; `report.json`, `report.md`, the page and TensorBoard then show it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.calibration.agreement import Verdicts
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.parts.calibration import calibration_section
from offline_align.evaluate.parts.certificate import certificate_section
from offline_align.evaluate.parts.cost import cost_section
from offline_align.evaluate.parts.drift import drift_section
from offline_align.evaluate.parts.following import following_section
from offline_align.evaluate.parts.optimisation import optimisation_section
from offline_align.evaluate.parts.rounds import rounds_section
from offline_align.evaluate.parts.runs import runs_section
from offline_align.evaluate.parts.seeds import seeds_section
from offline_align.evaluate.parts.served_judge import judge_section
from offline_align.evaluate.parts.significance import significance_section
from offline_align.evaluate.parts.study import Verdict, study_section
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Section
from offline_align.evaluate.statistics import Floats


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the parts are computed from; a field is None if the run has no such data."""

    settings: EvaluateSection
    seed: int
    compared: Compared | None = None
    judge: Mapping[str, Any] | None = None
    """The judge's description of itself."""
    judge_content: str | None = None
    """Content hash of the judging reward model; None for other judges."""
    second_scores: Floats | None = None
    """Scores of `judge.second_model`, in the shape of the judge's."""
    second_model: str | None = None
    divergence: Divergence | None = None
    """Divergence of each policy from the baseline's."""
    others: Sequence[Verdict] = ()
    """The verdicts of other judges on the same answers."""
    verdicts: Verdicts | None = None
    """The judge's margins beside human verdicts on the same pairs."""
    runs: Sequence[Ancestor] | None = None
    """Runs to list in a table, roots first."""


def report_sections(evidence: Evidence) -> list[Section]:
    """Return the section of every part that applies to the evidence."""
    settings, seed, compared = evidence.settings, evidence.seed, evidence.compared
    content, verdicts, judge = evidence.judge_content, evidence.verdicts, evidence.judge
    second, divergence = (evidence.second_scores, evidence.second_model), evidence.divergence
    methods: Sequence[str] = ()
    found: list[Section | None] = []
    if compared is not None:
        methods = compared.comparison.methods
        found += [
            study_section(compared, settings, seed, evidence.others),
            rounds_section(compared, settings, seed, content, divergence),
            seeds_section(compared, settings),
            significance_section(compared, settings),
            following_section(compared, settings, seed, content),
            optimisation_section(compared, settings, seed, *second, divergence),
            drift_section(compared, content),
            certificate_section(compared.comparison),
            cost_section(compared.comparison, settings),
        ]
    found += [
        calibration_section(verdicts, settings, seed) if verdicts is not None else None,
        judge_section(judge, methods) if judge is not None else None,
        runs_section(evidence.runs, settings) if evidence.runs is not None else None,
    ]
    return [section for section in found if section is not None]
