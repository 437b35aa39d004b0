"""Does a conditional policy follow its target? Target rewards against achieved rewards.

Shapes: P judged prompts, T targets in ascending order. Every statistic of the curve is a mean over
prompts, so one paired bootstrap gives all intervals.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from offline_align.config.sections import EvaluateSection
from offline_align.data.condition import Condition
from offline_align.evaluate.ancestry import find_ancestors
from offline_align.evaluate.comparison import Comparison, generation_manifest, policy_of, prompt_text
from offline_align.evaluate.figures import draw_following
from offline_align.evaluate.parts.label_set import LabelSet, find_label_set
from offline_align.evaluate.resampling import Estimate, mean_estimates
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "The same prompts with different target rewards. A policy that follows its target exactly has slope 1. Rank "
    "correlation and order are computed for each prompt, then averaged. For targets outside the labelled rewards the "
    "policy has to extrapolate. A quantile stands for the mean reward of its training rows. A bound asks for at least "
    "this reward, so following it means no slope of 1. The default target is the one in the policy's model.json."
)
RARE = 0.01
"""A target counts as rare if at most this share of the labelled rewards lies beyond it."""
EXAMPLES = 2
EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class _Policy:
    """One policy with several targets: its columns of the comparison, by ascending target."""

    name: str
    columns: list[int]
    asked: list[float]
    """Targets as `generate` was given them: rewards, bounds, or numbers of quantiles."""
    targets: Floats
    """The rewards that they stand for."""
    condition: Condition | None
    """The condition that the policy stores; None if no manifest has it."""
    stored_target: float | None
    label_set: LabelSet | None

    @property
    def kind(self) -> str:
        """The kind of the condition: `value`, `quantile` or `at_least`."""
        return str(getattr(self.condition, "kind", "value"))


def following_section(
    compared: Compared, settings: EvaluateSection, seed: int, judge_content: str | None
) -> Section | None:
    """Return the curve of every policy with several targets, or None if there is no such policy.

    `judge_content` is the content hash of the judging reward model. If the same model labelled the
    training rows, achieved rewards are normalised like the labels.
    """
    comparison = compared.comparison
    found = _policies(comparison)
    if not found:
        return None
    scores = compared.judgement.scores.mean(axis=1)
    judged = np.flatnonzero(np.isfinite(scores).all(axis=1))
    section = Section("following", "Does the policy follow its target?", NOTE, [], {"policies": {}})
    for number, policy in enumerate(found, start=1):
        labels = policy.label_set
        same_scale = labels is not None and labels.is_scored_by(judge_content)
        own = scores[judged][:, policy.columns]
        achieved = labels.normalised(own) if labels and same_scale else own
        content = _curve(policy, achieved, same_scale, settings, seed)
        if labels and same_scale and policy.kind == "at_least":
            each = labels.normalised(compared.judgement.scores[judged][:, :, policy.columns])
            _add_reached(content, each)
        section.content["policies"][policy.name] = content
        section.findings.extend(_findings(policy.name, content))
        section.tables.append(_table(policy.name, content))
        section.tables.extend(_examples(comparison, policy, achieved, judged))
        picture = draw_following(f"Following {number}", content["targets"], same_scale, _range(labels))
        note = "shaded: 98% of the labelled rewards" * (labels is not None)
        section.drawings.append(Drawing(f"{policy.name}: target and achieved reward", note, picture))
    return section


def _policies(comparison: Comparison) -> list[_Policy]:
    """Return the policies with at least two targets, identified by their content."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for k, column in enumerate(comparison.columns):
        if column.target is not None:
            groups.setdefault(policy_of(column.path), []).append(k)
    return [_policy(comparison, columns) for columns in groups.values() if len(columns) > 1]


def _policy(comparison: Comparison, columns: list[int]) -> _Policy:
    ordered = sorted(columns, key=lambda k: comparison.columns[k].target or 0.0)
    asked = [float(comparison.columns[k].target or 0.0) for k in ordered]
    path = comparison.columns[ordered[0]].path
    condition, stored_target = _stored(path)
    targets = np.array([t if condition is None else condition.reward_of(t) for t in asked], dtype=np.float64)
    manifest = generation_manifest(path)
    name = comparison.columns[ordered[0]].name.rsplit("(", 1)[0] if manifest else str(path)
    return _Policy(name, ordered, asked, targets, condition, stored_target, find_label_set([path]))


def _stored(path: Path) -> tuple[Condition | None, float | None]:
    """Return the condition that the policy stores and its target; None for what is not known.

    Answers of earlier versions do not record it, so then it is that of the last training behind them.
    """
    manifest = generation_manifest(path)
    earlier = [run.manifest.extra.get("condition") for run in find_ancestors([path.parent]) if run.stage != "generate"]
    given = [found for found in earlier if isinstance(found, dict)]
    own = manifest.extra.get("stored_condition") if manifest else None
    values = own if isinstance(own, dict) else given[-1] if given else {}
    try:
        condition = Condition.from_values(values)
    except ValueError:
        condition = None
    target = values.get("target_reward") if condition is None else condition.target
    return condition, float(target) if isinstance(target, int | float) else None


def _curve(policy: _Policy, achieved: Floats, same_scale: bool, settings: EvaluateSection, seed: int) -> dict[str, Any]:
    """Return the numbers of one policy; `achieved` [P, T]."""
    targets, asked, labels = policy.targets, policy.asked, policy.label_set
    columns = [*achieved.T, slopes(achieved, targets), rank_correlations(achieved), orders(achieved)]
    estimates = mean_estimates(np.stack(columns, axis=1), settings.bootstrap_samples, settings.confidence, seed)
    *rewards, slope, correlation, order = estimates
    means = achieved.mean(axis=0)
    return {
        "condition": policy.kind,
        "unit": "normalised reward" if same_scale else "judge's score",
        "stored_target": policy.stored_target,
        "label_set": str(labels.run_dir.name) if labels else None,
        "labelled_rewards": {"lowest": labels.lowest, "highest": labels.highest} if labels else None,
        "targets": [
            {"target": one, "reward": float(t), "achieved": asdict(reward), **_support(float(t), labels)}
            for one, t, reward in zip(asked, targets, rewards, strict=True)
        ],
        "slope": asdict(slope),
        "rank_correlation": asdict(correlation),
        "order": asdict(order),
        "falls": [[asked[k], asked[k + 1]] for k in np.flatnonzero(np.diff(means) < 0)],
    }


def _add_reached(content: dict[str, Any], achieved: Floats) -> None:
    """Add the share of the answers that reach each bound; `achieved` [P, samples, T]."""
    for k, one in enumerate(content["targets"]):
        one["reached"] = float((achieved[:, :, k] >= one["reward"]).mean())


def slopes(achieved: Floats, targets: Floats) -> Floats:
    """Return the least-squares slope of every prompt [P]; their mean is the mean curve's slope."""
    centred = targets - targets.mean()
    result: Floats = achieved @ centred / (centred @ centred)
    return result


def rank_correlations(achieved: Floats) -> Floats:
    """Return Spearman's correlation with the targets for every prompt [P]; 0 if all tie."""
    ranks = rankdata(achieved, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    targets = np.arange(achieved.shape[1]) - (achieved.shape[1] - 1) / 2
    scale = np.sqrt((ranks**2).sum(axis=1) * (targets @ targets))
    result: Floats = np.divide(ranks @ targets, scale, out=np.zeros(len(ranks)), where=scale > 0)
    return result


def orders(achieved: Floats) -> Floats:
    """Return the share of target pairs with scores in the same order [P]; a tie counts half."""
    low, high = np.triu_indices(achieved.shape[1], k=1)
    result: Floats = ((1 + np.sign(achieved[:, high] - achieved[:, low])) / 2).mean(axis=1)
    return result


def _support(target: float, labels: LabelSet | None) -> dict[str, Any]:
    """Return the share of rows below a target, and whether it is inside, rare or outside."""
    if labels is None:
        return {"rows_below": None, "support": "unknown"}
    below = labels.share_below(target)
    if not labels.lowest <= target <= labels.highest:
        return {"rows_below": below, "support": "outside"}
    low, high = labels.reward_at(RARE), labels.reward_at(1 - RARE)
    return {"rows_below": below, "support": "inside" if low <= target <= high else "rare"}


def _range(labels: LabelSet | None) -> tuple[float, float] | None:
    return None if labels is None else (labels.reward_at(RARE), labels.reward_at(1 - RARE))


def _findings(name: str, found: Mapping[str, Any]) -> list[str]:
    slope, order = found["slope"], found["order"]
    does = "follows" if slope["low"] > 0 else "may not follow"
    unit = "reward" if found["unit"] == "normalised reward" else "judge's score"
    step = {"value": "the target", "at_least": "the bound", "quantile": "the mean reward of the target's quantile"}
    lines = [
        f"{name} {does} its target: raising {step[found['condition']]} by 1 changes the {unit} by {_interval(slope)}; "
        f"{order['mean']:.0%} of the target pairs are in order."
    ]
    if found["falls"]:
        falls = ", ".join(f"from target {a:g} to {b:g}" for a, b in found["falls"])
        lines.append(f"{name}: the achieved reward falls {falls}.")
    for one in found["targets"]:
        if "reached" in one:
            lines.append(f"{name}: {one['reached']:.0%} of the answers reach the bound {one['target']:g}.")
    known = found["labelled_rewards"]
    for one in found["targets"]:
        if one["support"] == "outside":
            lines.append(
                f"{name}: target {one['target']:g} lies outside the labelled rewards "
                f"({known['lowest']:.2f} to {known['highest']:.2f}), so the policy has to extrapolate."
            )
    best = max(found["targets"], key=lambda one: one["achieved"]["mean"])
    stored = "" if found["stored_target"] is None else f"; the policy's default target is {found['stored_target']:g}"
    return [
        *lines,
        f"{name}: target {best['target']:g} gives the highest reward, {_interval(best['achieved'])}{stored}.",
    ]


def _table(name: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [_named(one, found), _interval(one["achieved"]), one["support"], _percent(one["rows_below"])]
        for one in found["targets"]
    ]
    rows += [
        ["slope", _interval(found["slope"]), "", ""],
        ["rank correlation", _interval(found["rank_correlation"]), "", ""],
        ["pairs in order", _interval(found["order"]), "", ""],
    ]
    return Table(f"{name}: targets", ["target", found["unit"], "labelled rewards", "rows below"], rows)


def _named(one: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    is_quantile = found["condition"] == "quantile"
    return f"{one['target']:g} (mean reward {one['reward']:.2f})" if is_quantile else f"{one['target']:g}"


def _examples(comparison: Comparison, policy: _Policy, achieved: Floats, judged: NDArray[np.intp]) -> list[Table]:
    """Return prompts with their answers at every target, like the paper's Table 1.

    The prompts have the middle slopes, so they are neither the best nor the worst examples.
    """
    order = np.argsort(slopes(achieved, policy.targets), kind="stable")
    middle = (len(order) - EXAMPLES) // 2 if len(order) > EXAMPLES else 0
    tables = []
    for row in order[middle : middle + EXAMPLES].tolist():
        place = int(judged[row])
        answers = [comparison.answers[place][0][k].response for k in policy.columns]
        rows = [
            [f"{target:g}", _clip(answer), f"{reward:.2f}"]
            for target, answer, reward in zip(policy.asked, answers, achieved[row], strict=True)
        ]
        title = f"One prompt with several targets: {_clip(prompt_text(comparison.prompts[place].prompt))}"
        tables.append(Table(title, ["target", "answer", "reward"], rows, prose=True))
    return tables


def _clip(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line[:EXAMPLE_CHARACTERS] + "…" * (len(one_line) > EXAMPLE_CHARACTERS)


def _interval(one: Mapping[str, float] | Estimate) -> str:
    values = asdict(one) if isinstance(one, Estimate) else one
    return f"{values['mean']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
