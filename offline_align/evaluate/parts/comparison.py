"""All parts of a comparison's report, in the order in which they are read."""

from dataclasses import dataclass

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.parts.certificate import certificate_section
from offline_align.evaluate.parts.cost import cost_section
from offline_align.evaluate.parts.drift import drift_section
from offline_align.evaluate.parts.following import following_section
from offline_align.evaluate.parts.optimisation import optimisation_section
from offline_align.evaluate.parts.seeds import seeds_section
from offline_align.evaluate.parts.significance import significance_section
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Section
from offline_align.evaluate.statistics import Floats


@dataclass(frozen=True, slots=True)
class Context:
    """What the parts need beside answers and scores."""

    settings: EvaluateSection
    seed: int
    judge_content: str | None
    """Content hash of the reward model that judges; None for other judges."""
    second_scores: Floats | None
    """Scores of `judge.second_model`, in the shape of the judge's."""
    second_model: str | None
    divergence: Divergence | None = None
    """Distance of the policies from the baseline's, where it was measured."""


def comparison_sections(compared: Compared, context: Context) -> list[Section]:
    """Return the parts that have something to say."""
    settings, seed = context.settings, context.seed
    found = [
        seeds_section(compared, settings),
        significance_section(compared, settings),
        following_section(compared, settings, seed, context.judge_content),
        optimisation_section(compared, settings, seed, context.second_scores, context.second_model, context.divergence),
        drift_section(compared, context.judge_content),
        certificate_section(compared.comparison),
        cost_section(compared.comparison, settings),
    ]
    return [section for section in found if section is not None]
