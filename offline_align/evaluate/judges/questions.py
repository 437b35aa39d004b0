"""Build the questions for a served judge: which answers one question contains, and in which order.

Forms: `set`, all answers to a prompt at once (the paper's Appendix A); `pair`, every pair of
answers; `single`, each answer alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np

from offline_align.config.sections import JudgeForm
from offline_align.data.records import Sample
from offline_align.evaluate.judges.verdict_cache import Verdict
from offline_align.evaluate.statistics import Floats


@dataclass(frozen=True, slots=True)
class Question:
    """A question about answers of set `number`; `shown` has their indices in display order."""

    number: int
    samples: tuple[Sample, ...]
    shown: tuple[int, ...]
    in_order: bool = False
    """Whether the set is shown in the given order."""


def ask(samples: Sequence[Sample], form: JudgeForm, seed: int, in_order_from: int | None = None) -> list[Question]:
    """Return the questions for `samples`; consecutive samples with the same `id` form a set.

    Over all sets, each answer takes each position equally often, as far as their number allows.
    Sets from sample `in_order_from` on are shown in the given order.
    """
    questions: list[Question] = []
    first = 0
    for number, (_, group) in enumerate(groupby(samples, key=lambda sample: sample.id)):
        members = tuple(group)
        fixed = in_order_from is not None and first >= in_order_from
        order = tuple(range(len(members))) if fixed else balanced_order(number, len(members), seed)
        questions += [Question(number, members, shown, fixed) for shown in _shown(order, form)]
        first += len(members)
    return questions


def balanced_order(number: int, count: int, seed: int) -> tuple[int, ...]:
    """Return the order of set `number`: random per `count` sets, rotated by one per set."""
    block, turn = divmod(number, count)
    order = list(range(count))
    random.Random(f"{seed}/{block}").shuffle(order)
    return tuple(order[turn:] + order[:turn])


def _shown(order: Sequence[int], form: JudgeForm) -> list[tuple[int, ...]]:
    if form is JudgeForm.single or len(order) == 1:
        return [(index,) for index in order]
    if form is JudgeForm.pair:
        return list(combinations(order, 2))
    return [tuple(order)]


def scores(questions: Sequence[Question], verdicts: Sequence[Verdict], form: JudgeForm) -> list[float]:
    """Return a score per sample: the judge's own, or for pairs the share of opponents it beats.

    A tie is half a win. If one verdict of a set is unreadable, all its answers get NaN.
    """
    found: list[float] = []
    pairs = zip(questions, verdicts, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0].number):
        asked = list(group)
        count = len(asked[0][0].samples)
        table = np.full((count, count), np.nan)
        for question, verdict in asked:
            _note(table, question.shown, verdict.scores, form)
        found += np.nanmean(table, axis=1).tolist() if _complete(asked) else [float("nan")] * count
    return found


def _complete(asked: Sequence[tuple[Question, Verdict]]) -> bool:
    return all(verdict.scores is not None for _, verdict in asked)


def _note(table: Floats, shown: Sequence[int], given: Sequence[float] | None, form: JudgeForm) -> None:
    """Enter a verdict in `table` [answers, answers]: scores on the diagonal, wins of pairs off it."""
    if given is None:
        return
    if form is JudgeForm.pair and len(shown) == 2:
        (a, b), (first, second) = shown, given
        table[a, b] = 0.5 + 0.5 * float(np.sign(first - second))
        table[b, a] = 1 - table[a, b]
        return
    for index, score in zip(shown, given, strict=True):
        table[index, index] = score


def unreadable_by_answer(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[int]:
    """Return the number of unreadable verdicts on the first, second, ... answer of a set.

    Sets shown in the given order are not counted.
    """
    asked = [(q, verdict) for q, verdict in zip(questions, verdicts, strict=True) if not q.in_order]
    counts = [0] * max((len(question.samples) for question, _ in asked), default=0)
    for question, verdict in asked:
        for index in question.shown if verdict.scores is None else ():
            counts[index] += 1
    return counts


def place_bias(verdicts: Sequence[Verdict]) -> list[dict[str, float | int]]:
    """Return each position's mean score minus the question's mean, with a 95% interval.

    Only questions of the most frequent size above one answer count. Answers change positions from
    set to set, so a difference from 0 is a bias of the judge.
    """
    given = [verdict.scores for verdict in verdicts if verdict.scores]
    sizes = [len(one) for one in given if len(one) > 1]
    if not sizes:
        return []
    size = max(set(sizes), key=sizes.count)
    table = np.array([one for one in given if len(one) == size])
    if len(table) < 2:
        return []
    above = table - table.mean(axis=1, keepdims=True)
    means, errors = above.mean(axis=0), 1.96 * above.std(axis=0, ddof=1) / np.sqrt(len(above))
    return [
        {"place": k + 1, "questions": len(above), "above_mean": m, "low": m - e, "high": m + e}
        for k, (m, e) in enumerate(zip(means.tolist(), errors.tolist(), strict=True))
    ]
