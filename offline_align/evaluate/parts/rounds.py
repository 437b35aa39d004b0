"""What did each round bring? Policies that were trained on labelled answers of the one before.

Shapes: P judged prompts, S samples of each, M methods.
"""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.figures import draw_rounds
from offline_align.evaluate.parts.label_set import LabelSet, read_label_set
from offline_align.evaluate.parts.optimisation import answer_words, kl_of
from offline_align.evaluate.resampling import estimate, mean_estimates, ratio
from offline_align.evaluate.results import Compared, choose_baseline
from offline_align.evaluate.rounds import Round, Series, find_series
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "In each round a policy answers prompts, the reward model labels the answers, and the next policy is trained on "
    "them; round 0 is the first policy. Rewards are on the scale of the first round's labels if their reward model is "
    "the judge. Gains are over the round before, on the same prompts. KL is the divergence from the first policy in "
    "nats per answer. Beyond is the share of answers with a reward above the highest of the first round's labels, "
    "where the reward model has seen no answer of the first policy."
)
TRUTH_NOTE = (
    " True quality is known for the demo corpus, from 0 to 10. Order right is the share of pairs of one policy's "
    "answers to a prompt that the judge puts in the order of their true quality; a tie counts half."
)
_PANELS = {
    "reward": "reward",
    "true_quality": "true quality",
    "kl": "KL from the first policy",
    "words": "words",
    "order_right": "share of pairs the judge orders right",
    "beyond": "share beyond the first labels",
}
MUCH = 0.05


def rounds_section(
    compared: Compared,
    settings: EvaluateSection,
    seed: int,
    judge_content: str | None,
    divergence: Divergence | None = None,
) -> Section | None:
    """Return the numbers of every round, or None if no policy learned from another one's answers.

    `judge_content` is the content hash of the judging reward model.
    """
    judged: NDArray[np.bool_] = np.isfinite(compared.judgement.scores.mean(axis=1)).all(axis=1)
    series = find_series(compared.comparison.columns) if judged.any() else []
    if not series:
        return None
    found = {}
    for one in series:
        labels = read_label_set(one.first_labels) if one.first_labels else None
        same = labels if labels is not None and labels.is_scored_by(judge_content) else None
        found[one.name] = _Measures(compared, settings, seed, judged, same, divergence).of(one)
    content = {"series": found}
    lines = [line for name, about in found.items() for line in _findings(name, about)]
    has_truth = compared.quality is not None
    note = NOTE + TRUTH_NOTE * has_truth
    tables = [_table(name, about) for name, about in found.items()]
    return Section("rounds", "What did each round bring?", note, lines, content, tables, [_drawing(found)])


class _Measures:
    """Measures the rounds of a series on the `judged` prompts."""

    def __init__(
        self,
        compared: Compared,
        settings: EvaluateSection,
        seed: int,
        judged: NDArray[np.bool_],
        labels: LabelSet | None,
        divergence: Divergence | None,
    ) -> None:
        self.comparison = compared.comparison
        self.settings, self.seed, self.judged = settings, seed, judged
        self.labels, self.divergence = labels, divergence
        scores = compared.judgement.scores[judged]
        self.rewards = labels.normalised(scores) if labels else scores
        self.quality = None if compared.quality is None else compared.quality[judged]

    def of(self, series: Series) -> dict[str, Any]:
        """Return the numbers of a series; unknown quantities are missing."""
        labels, rounds = self.labels, series.rounds
        columns = [one.column for one in rounds]
        quantities: dict[str, Floats] = {
            "reward": self.rewards.mean(axis=1)[:, columns],
            "words": answer_words(self.comparison)[self.judged][:, columns],
        }
        if self.quality is not None:
            quantities["true_quality"] = self.quality.mean(axis=1)[:, columns]
        if labels is not None:
            quantities["beyond"] = (self.rewards > labels.highest).mean(axis=1)[:, columns]
        measured = {name: self._estimates(values) for name, values in quantities.items()}
        gains = {
            f"{name}_gain": self._estimates(np.diff(quantities[name], axis=1))
            for name in ("reward", "true_quality")
            if name in quantities
        }
        described: dict[str, dict[str, Any]] = {}
        for k, one in enumerate(rounds):
            about: dict[str, Any] = {"method": self.comparison.methods[one.column]}
            about |= {name: values[k] for name, values in measured.items()}
            about |= {name: values[k - 1] for name, values in gains.items()} if k else {}
            described[str(one.number)] = about | self._kl(one, rounds[0]) | self._order(one)
        return {
            "unit": "normalised reward" if labels else "judge's score",
            "first_labels": series.first_labels.title if series.first_labels else None,
            "highest_label": labels.highest if labels else None,
            "rounds": described,
        }

    def _estimates(self, values: Floats) -> list[dict[str, float]]:
        made = mean_estimates(values, self.settings.bootstrap_samples, self.settings.confidence, self.seed)
        return [asdict(one) for one in made]

    def _kl(self, one: Round, first: Round) -> dict[str, Any]:
        """Return the divergence from the first policy; empty if it is not the one that was measured."""
        baseline = choose_baseline(self.comparison.columns, self.settings.baseline)
        if self.divergence is None or first.number or self.comparison.methods[first.column] != baseline:
            return {}
        if one is first:
            return {"kl": {"mean": 0.0, "low": 0.0, "high": 0.0}, "kl_is_unbiased": True}
        found = kl_of(self.divergence, one.column, self.judged, self.settings, self.seed)
        return {name: found[name] for name in ("kl", "kl_is_unbiased") if name in found}

    def _order(self, one: Round) -> dict[str, Any]:
        """Return the share of pairs of samples in the right order; empty if there are no such pairs."""
        if self.quality is None:
            return {}
        counts = right_orders(self.rewards[:, :, one.column], self.quality[:, :, one.column])
        if not counts[:, 1].any():
            return {}
        share = estimate(counts, ratio, self.settings.bootstrap_samples, self.settings.confidence, self.seed)
        return {"order_right": asdict(share)}


def right_orders(rewards: Floats, quality: Floats) -> Floats:
    """Return, for each prompt, the pairs in the right order and all pairs of different quality [P, 2].

    `rewards` and `quality` are [P, S]. Equal rewards count half.
    """
    first, second = np.triu_indices(rewards.shape[1], k=1)
    truth = np.sign(quality[:, first] - quality[:, second])
    judged = np.sign(rewards[:, first] - rewards[:, second])
    right = np.where(truth == 0, 0, (1 + truth * judged) / 2)
    result: Floats = np.stack([right.sum(axis=1), (truth != 0).sum(axis=1)], axis=1)
    return result


def _findings(name: str, found: Mapping[str, Any]) -> list[str]:
    rounds = found["rounds"]
    numbers = list(rounds)
    first, last = rounds[numbers[0]], rounds[numbers[-1]]
    lines = [f"{name}, from round {numbers[0]} to {numbers[-1]}: {_course(first, last, found['unit'])}."]
    for before, number in pairwise(numbers):
        lines += _doubts(name, before, number, rounds[number])
    beyond = last.get("beyond")
    if beyond is not None and beyond["mean"] >= MUCH:
        lines.append(
            f"{name}: in round {numbers[-1]}, {beyond['mean']:.0%} of the answers score above every labelled answer of "
            "the first round, so the reward model extrapolates."
        )
    if not all(one.get("kl_is_unbiased", True) for one in rounds.values()):
        lines.append(f"{name}: not all answers were sampled at temperature 1, so KL is only a mean log-ratio.")
    return lines


def _course(first: Mapping[str, Any], last: Mapping[str, Any], unit: str) -> str:
    """Return how the quantities went from the first to the last compared round."""
    names = {"reward": unit, "true_quality": "true quality"}
    went = [
        f"{words} {first[key]['mean']:.2f} to {last[key]['mean']:.2f}" for key, words in names.items() if key in first
    ]
    if "order_right" in first and "order_right" in last:
        went.append(f"pairs in the right order {first['order_right']['mean']:.0%} to {last['order_right']['mean']:.0%}")
    went.append(f"length {first['words']['mean']:.1f} to {last['words']['mean']:.1f} words")
    kl = f"; KL from the first policy {last['kl']['mean']:.2f} nats per answer" if "kl" in last else ""
    return f"{', '.join(went)}{kl}"


def _doubts(name: str, before: str, number: str, found: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one round: no gain, a loss, or a gain that the truth contradicts."""
    gain, true = found["reward_gain"], found.get("true_quality_gain")
    if gain["low"] > 0:
        if true is None or true["high"] >= 0:
            return []
        return [
            f"{name}: round {number} has a higher reward than round {before} but a lower true quality "
            f"({_signed(true)}): the policy exploits errors of the reward model."
        ]
    how = "lowers the reward" if gain["high"] < 0 else "does not raise the reward significantly"
    return [f"{name}: round {number} {how} ({_signed(gain)} over round {before})."]


def _drawing(found: Mapping[str, Any]) -> Drawing:
    panels = {}
    for key, title in _PANELS.items():
        lines = {
            name: [(int(number), one[key]) for number, one in about["rounds"].items() if key in one]
            for name, about in found.items()
        }
        if any(lines.values()):
            panels[title] = lines
    return Drawing("Rounds", "shaded: confidence intervals", draw_rounds("Rounds", panels))


def _table(name: str, found: Mapping[str, Any]) -> Table:
    names = {"reward": found["unit"], "reward_gain": "gain", "true_quality": "true quality"}
    names |= {"true_quality_gain": "gain in quality", "kl": "KL", "words": "words"}
    names |= {"order_right": "order right", "beyond": "beyond"}
    rounds = found["rounds"]
    used = [key for key in names if any(key in one for one in rounds.values())]
    rows = [[number, one["method"], *(_cell(key, one.get(key)) for key in used)] for number, one in rounds.items()]
    return Table(f"{name}: rounds", ["round", "answers", *(names[key] for key in used)], rows)


def _cell(key: str, one: Mapping[str, float] | None) -> str:
    if one is None:
        return ""
    if key in ("order_right", "beyond"):
        return f"{one['mean']:.0%} [{100 * one['low']:.0f}, {100 * one['high']:.0f}]"
    return _signed(one) if key.endswith("_gain") else f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _signed(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
