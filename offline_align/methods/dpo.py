"""Direct Preference Optimization: the pairs that it trains on.

Preference pairs are used as they are. Labelled rows are grouped by prompt, and pairs of their answers
are made, so that `generate` with several answers, `label` and `dpo` train on the policy's own answers.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from offline_align.config.sections import PairsMethodSection, PairsOf
from offline_align.data.records import LabelledSample, Message, PreferencePair
from offline_align.errors import DataError
from offline_align.methods import MethodPairs, checked


def training_pairs(rows: Sequence[PreferencePair | LabelledSample], settings: PairsMethodSection) -> MethodPairs:
    """Return all given pairs, then the pairs made of the labelled rows.

    Raises DataError if there is no pair, or if a reward is not finite.
    """
    given = [row for row in rows if isinstance(row, PreferencePair)]
    labelled = [row for row in rows if isinstance(row, LabelledSample)]
    made = pairs(labelled, settings.pairs, settings.min_gap) if labelled else []
    if not given and not made:
        raise DataError(
            f"no two of the {len(labelled)} labelled answers make a pair: a pair needs two answers to one prompt "
            f"with different rewards, at least method.min_gap={settings.min_gap:g} apart"
        )
    facts = {"pairs_given": len(given), "pairs_made": len(made), "labelled_rows": len(labelled)}
    return MethodPairs([*given, *made], facts)


def pairs(rows: Iterable[LabelledSample], which: PairsOf, min_gap: float) -> list[PreferencePair]:
    """Return the pairs of different answers to the same prompt, ordered by the first row of each prompt.

    The higher normalised reward is chosen; rewards must differ, by at least `min_gap`. The margin of a
    pair is the difference. Raises DataError if a reward is not finite.
    """
    return [pair for answers in by_prompt(checked(rows)) for pair in _of_prompt(answers, which, min_gap)]


def by_prompt(rows: Iterable[LabelledSample]) -> list[list[LabelledSample]]:
    """Return the rows of each prompt together, in the order of the first row of each."""
    groups: defaultdict[tuple[Message, ...], list[LabelledSample]] = defaultdict(list)
    for row in rows:
        groups[row.prompt].append(row)
    return list(groups.values())


def _of_prompt(answers: list[LabelledSample], which: PairsOf, min_gap: float) -> Iterator[PreferencePair]:
    # Sorting is stable, so of equal rewards the row that comes first in the files counts as higher.
    ranked = sorted(answers, key=lambda row: -row.reward)
    some = [(ranked[0], ranked[-1])] if which is PairsOf.best_worst else combinations(ranked, 2)
    for chosen, rejected in some:
        gap = chosen.reward - rejected.reward
        if gap > 0 and gap >= min_gap and chosen.response != rejected.response:
            row_id = f"{chosen.id} > {rejected.id}"
            texts = chosen.response, rejected.response
            made_of = (chosen.id, rejected.id)
            yield PreferencePair(row_id, chosen.prompt, *texts, gap, chosen.columns, made_of=made_of, file=chosen.file)
