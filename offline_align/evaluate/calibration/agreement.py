"""Measure a judge's agreement with people: accuracy, kappa, ties, position bias and length bias.

Shapes: N pairs. A margin is the judge's score of the first answer minus that of the second, NaN if
a score is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.calibration.pairs import JudgedPair
from offline_align.evaluate.resampling import Estimate, cluster_sums, estimate, kappa, ratio
from offline_align.evaluate.statistics import Floats

LENGTH_BINS = 4


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Margins [N] of a judge in both orders; positive if it prefers the pair's first answer."""

    pairs: Sequence[JudgedPair]
    forward: Floats
    backward: Floats
    """Margins with the second answer shown first."""

    @classmethod
    def from_scores(cls, pairs: Sequence[JudgedPair], scores: Sequence[float]) -> "Verdicts":
        """Return the verdicts from the scores of `both_orders(pairs)`."""
        table = np.array(scores, dtype=np.float64).reshape(len(pairs), 2, 2)
        return cls(pairs, table[:, 0, 0] - table[:, 0, 1], table[:, 1, 1] - table[:, 1, 0])

    @property
    def margins(self) -> Floats:
        """The mean over both orders [N], in which position bias cancels."""
        mean: Floats = (self.forward + self.backward) / 2
        return mean

    @property
    def people(self) -> Floats:
        """People's verdicts [N]: 1, 0 or -1."""
        return np.array([pair.verdict for pair in self.pairs], dtype=np.float64)

    @property
    def longer(self) -> Floats:
        """[N]: 1 if the first answer has more characters, -1 if fewer, 0 for equal length."""
        return np.sign(self.length_differences)

    @property
    def length_differences(self) -> Floats:
        """Characters of the first answer minus those of the second [N]."""
        return np.array([len(pair.answers[0]) - len(pair.answers[1]) for pair in self.pairs], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Measure:
    """Bootstrap estimates over prompts; every quantity uses the same resamples."""

    clusters: list[Any]
    settings: EvaluateSection
    seed: int

    @classmethod
    def over(cls, pairs: Sequence[JudgedPair], settings: EvaluateSection, seed: int) -> "Measure":
        """Return the measure that resamples whole prompts with all pairs of answers to them."""
        return cls([pair.prompt for pair in pairs], settings, seed)

    def share(self, hits: Floats, among: Floats) -> Estimate:
        """Return the mean of `hits` [N] over the pairs with `among` [N] equal to 1."""
        return self._of(np.stack([np.where(among > 0, hits, 0.0), among.astype(np.float64)], axis=1), ratio)

    def kappa(self, first: Floats, second: Floats, among: Floats) -> Estimate:
        """Return Cohen's kappa of two columns of verdicts in {-1, 0, 1} over `among`, all [N]."""
        table = np.zeros((len(first), 9))
        rows = np.flatnonzero(among)
        table[rows, (3 * (first[rows] + 1) + second[rows] + 1).astype(int)] = 1.0
        return self._of(table, kappa)

    def _of(self, values: Floats, statistic: Callable[[Floats], Floats]) -> Estimate:
        sums = cluster_sums(values, self.clusters)
        settings = self.settings
        return estimate(sums, statistic, settings.bootstrap_samples, settings.confidence, self.seed)


def agreement(verdicts: Verdicts, settings: EvaluateSection, seed: int) -> dict[str, Any]:
    """Return the agreement of a judge with people; estimates have mean, low and high.

    `accuracy` is over the pairs on which people prefer one answer; a tie of the judge counts half.
    `swapped_accuracy` is the same with people's verdicts swapped; the two add up to 1.
    """
    known = np.isfinite(verdicts.margins)
    people, judge = verdicts.people, np.sign(np.where(known, verdicts.margins, 0.0))
    decided = (known & (people != 0)).astype(np.float64)
    measure = Measure.over(verdicts.pairs, settings, seed)
    agree = (1 + judge * people) / 2
    longer = verdicts.longer
    rule = (1 + longer * people) / 2
    differs = decided * (longer != 0)
    found = {
        "accuracy": measure.share(agree, decided),
        "swapped_accuracy": measure.share(1 - agree, decided),
        "kappa": measure.kappa(judge, people, decided),
        "kappa_with_ties": measure.kappa(judge, people, known.astype(np.float64)),
        "judge_ties": measure.share((judge == 0).astype(np.float64), known.astype(np.float64)),
        "length_only_accuracy": measure.share(rule, decided),
        "gain_over_length": measure.share(agree - rule, decided),
        "judge_prefers_longer": measure.share((1 + longer * judge) / 2, differs),
        "people_prefer_longer": measure.share(rule, differs),
        **_place(verdicts, measure, known.astype(np.float64)),
    }
    return {
        "pairs": len(verdicts.pairs),
        "without_verdict": int((~known).sum()),
        "people_ties": int((people == 0).sum()),
        "decided_pairs": int(decided.sum()),
        **{name: as_numbers(value) for name, value in found.items()},
        "largest_order_difference": _largest_difference(verdicts),
        "people_with_each_other": people_with_each_other(verdicts.pairs),
        "by_source": _groups(verdicts, agree, rule, decided, measure),
        "by_length": _by_length(verdicts, agree, rule, decided, measure),
    }


def _place(verdicts: Verdicts, measure: Measure, known: Floats) -> dict[str, Estimate]:
    """Return how often both orders give the same verdict, and how often the first answer wins."""
    forward, backward = np.sign(verdicts.forward), np.sign(verdicts.backward)
    first = (2 + forward - backward) / 4
    return {
        "same_in_both_orders": measure.share((forward == backward).astype(np.float64), known),
        "first_shown_wins": measure.share(first, known),
    }


def _largest_difference(verdicts: Verdicts) -> float | None:
    """Return the largest difference of a margin between the orders; 0 for a symmetric judge."""
    changes = np.abs(verdicts.forward - verdicts.backward)
    known = changes[np.isfinite(changes)]
    return float(known.max()) if known.size else None


def _plain_share(hits: Floats, among: Floats) -> float:
    return float(hits[among > 0].mean())


def people_with_each_other(pairs: Sequence[JudgedPair]) -> dict[str, float | int] | None:
    """Return how often two people who both prefer one answer of a pair agree."""
    doubles = [(x, y) for pair in pairs for x, y in combinations(pair.verdicts, 2) if x and y]
    if not doubles:
        return None
    return {"doubles": len(doubles), "agreement": sum(x == y for x, y in doubles) / len(doubles)}


def _groups(verdicts: Verdicts, agree: Floats, rule: Floats, decided: Floats, measure: Measure) -> dict[str, Any]:
    sources = [pair.source for pair in verdicts.pairs]
    found = {}
    for source in dict.fromkeys(sources):
        chosen = decided * np.array([other == source for other in sources])
        if chosen.any():
            found[source] = {
                "pairs": int(chosen.sum()),
                **as_numbers(measure.share(agree, chosen)),
                "length_only": _plain_share(rule, chosen),
            }
    return found


def _by_length(
    verdicts: Verdicts, agree: Floats, rule: Floats, decided: Floats, measure: Measure
) -> list[dict[str, Any]]:
    """Return the accuracy by the extra length (in characters) of the answer that people prefer."""
    extra = verdicts.length_differences * verdicts.people
    if not decided.any():
        return []
    edges = np.unique(np.quantile(extra[decided > 0], np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    bins = np.digitize(extra, edges)
    rows = []
    for k in range(len(edges) + 1):
        chosen = decided * (bins == k)
        if chosen.any():
            values = extra[chosen > 0]
            rows.append(
                {
                    "from_characters": int(values.min()),
                    "to_characters": int(values.max()),
                    "pairs": int(chosen.sum()),
                    **as_numbers(measure.share(agree, chosen)),
                    "length_only": _plain_share(rule, chosen),
                }
            )
    return rows


def as_numbers(value: Estimate) -> dict[str, float | None]:
    """Return an estimate for `report.json`, with None in place of NaN."""
    return {name: number if np.isfinite(number) else None for name, number in asdict(value).items()}
