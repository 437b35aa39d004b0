"""The plan of all methods as tables."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from offline_align.config.sections import ConditionKind
from offline_align.methods.planner import ConditionalPlan, Plan, PreferencePlan, WeightedPlan
from offline_align.wording import counted

BAR_WIDTH = 40
BARS = 15
"""Largest number of lines in the histogram of conditions."""


def tables(plan: Plan, warnings: list[str], sources: str = "") -> list[RenderableType]:
    """Return the tables and texts to print, from top to bottom; `sources` says where the rows come from."""
    note = "" if plan.unit == "tokens" else " (no tokenizer is known; set model.tokenizer for tokens)"
    head = Text(
        f"{counted(plan.rows, 'row')}, {plan.size:,} {plan.unit}, {plan.response_size:,} of them in responses{note}"
    )
    named = [Text(f"sources: {sources}")] if sources else []
    parts: list[RenderableType] = [head, *named, _methods(plan), _betas(plan), _histogram(plan.conditional)]
    return parts + [Text(f"warning: {line}", style="yellow") for line in [*_cautions(plan), *warnings]]


def _methods(plan: Plan) -> Table:
    fa, rwr, ca = plan.filtering, plan.weighted, plan.conditional
    table = Table("method", "what it does", "rows", plan.unit, "cost of an epoch", "prompts once")
    for column in table.columns[2:]:
        column.justify = "right"
    once = _share(1 - plan.repeated / plan.size)
    table.add_row("sft", "learns every row", f"{plan.rows:,}", f"{plan.size:,}", "100.0 %", once)
    table.add_row(
        "fa",
        f"keeps rewards above {fa.threshold:g}",
        f"{fa.rows:,} ({fa.rows_share:.1%})",
        f"{fa.size:,}",
        _share(fa.cost),
        _share(fa.cost - fa.repeated / plan.size),
    )
    table.add_row("rwr", _weights(rwr), f"{plan.rows:,}", f"{plan.size:,}", _share(rwr.cost), once)
    size = f"{plan.size + ca.extra_size:,}"
    ca_once = _share(ca.cost - ca.repeated / plan.size)
    table.add_row("ca", _conditions(ca), f"{ca.rows:,}", size, _share(ca.cost), ca_once)
    dpo = plan.preference
    # The two answers of a pair always share their prompt.
    pairs = counted(dpo.pairs, "pair")
    table.add_row("dpo", _pairs(dpo, plan.unit), pairs, f"{dpo.size:,}", _share(dpo.cost), _share(dpo.cost))
    return table


def _pairs(dpo: PreferencePlan, unit: str) -> str:
    if not dpo.pairs:
        return f"has no pair: {counted(dpo.single_answers, 'prompt')} with one answer"
    gaps = f"gaps {dpo.min_gap:.2f} to {dpo.max_gap:.2f}, mean {dpo.mean_gap:.2f}"
    lengths = f"{dpo.mean_chosen:.0f} against {dpo.mean_rejected:.0f} {unit}"
    return f"pairs of {counted(dpo.prompts, 'prompt')}, {gaps}; {lengths}"


def _weights(rwr: WeightedPlan) -> str:
    return (
        f"weighs {rwr.min_weight:.3g} to {rwr.max_weight:.3g} (beta {rwr.beta:g}), "
        f"worth {rwr.effective_sample_size:,.0f} equal rows"
    )


def _conditions(ca: ConditionalPlan) -> Text:
    ends = list(ca.conditions)
    kind = {ConditionKind.value: "conditions", ConditionKind.quantile: "quantiles", ConditionKind.at_least: "bounds"}
    text = f"writes {len(ends)} {kind[ca.kind]}, {ends[0]} to {ends[-1]}; asks for {ca.target_condition}"
    return Text(f"{text}; {_weights(ca.weights)}" if ca.weights else text)


def _share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def _betas(plan: Plan) -> Table:
    table = Table("beta", "least", "greatest weight", "effective rows", "share", "weight of the top 1 %")
    for column in table.columns:
        column.justify = "right"
    for row in plan.betas:
        numbers = (f"{row.min_weight:.3g}", f"{row.max_weight:.3g}", f"{row.effective_sample_size:,.0f}")
        style = "bold" if row.beta == plan.weighted.beta else ""
        table.add_row(f"{row.beta:g}", *numbers, _share(row.effective_share), _share(row.top_mass), style=style)
    return table


def _histogram(ca: ConditionalPlan) -> Table:
    """Return a bar for each condition; if there are many, neighbours share a bar."""
    table = Table("conditions", "rows", "", show_edge=False)
    items = list(ca.conditions.items())
    step = -(-len(items) // BARS)
    groups = [items[i : i + step] for i in range(0, len(items), step)]
    counts = [sum(count for _, count in group) for group in groups]
    for group, count in zip(groups, counts, strict=True):
        name = group[0][0] if len(group) == 1 else f"{group[0][0]} to {group[-1][0]}"
        name += _rewards_of(ca, len(table.rows)) if ca.cut_points and step == 1 else ""
        table.add_row(Text(name), f"{count:,}", "█" * max(1, round(BAR_WIDTH * count / max(counts))))
    return table


def _rewards_of(ca: ConditionalPlan, quantile: int) -> str:
    """Return the range of rewards of a quantile, counted from 0."""
    ends = [ca.min_reward, *ca.cut_points, ca.max_reward]
    return f"  ({'above ' * (quantile > 0)}{ends[quantile]:.2f} to {ends[quantile + 1]:.2f})"


def _cautions(plan: Plan) -> list[str]:
    fa, ca = plan.filtering, plan.conditional
    bounds = ca.kind is ConditionKind.at_least
    lines = []
    if not fa.rows:
        lines.append(f"fa keeps nothing above {fa.threshold:g}: the highest reward is {ca.max_reward:.4g}")
    if not ca.target_in_range:
        lines.append(
            f"ca asks for {ca.target_condition}, outside the {'bounds' if bounds else 'rewards'} of the data "
            f"({ca.min_number:.2f} to {ca.max_number:.2f}): the model has to extrapolate (the paper does, with 5.0)"
        )
    if ca.clipped_rows:
        lines.append(f"ca writes {counted(ca.clipped_rows, 'row')} with the limit instead of their reward")
    return lines
