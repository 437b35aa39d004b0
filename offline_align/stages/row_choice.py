"""The rows of a key that a stage uses: which are chosen (`data.sample`), and how they are mixed (`data.weights`)."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from offline_align.config.runs import TrainRun
from offline_align.config.sections import SampledDataSection, TrainDataSection
from offline_align.data.mixture import Mixture, check_drawn, check_weights
from offline_align.data.records import PreferencePair, Sample
from offline_align.data.sampling import Chosen, choose, epoch_in_words, in_words, listed

if TYPE_CHECKING:
    from offline_align.data.bins import RowSource

logger = logging.getLogger(__name__)


class RowChoice:
    """Chooses rows as `data` says; a dry run takes one of `every` so many."""

    def __init__(self, data: SampledDataSection, seed: int, every: int = 1) -> None:
        self._data, self._seed, self.every = data, seed, every
        self.weights: dict[str, float] = data.weights if isinstance(data, TrainDataSection) else {}
        self.by_source = data.sample is not None or bool(self.weights)
        """Whether the sources of all rows decide which of them are used."""
        self._chosen: Chosen[Any] = Chosen([], [], {})

    @property
    def every_line(self) -> int:
        """One of how many lines is to be read."""
        return 1 if self.by_source else self.every

    def most(self, rows: int) -> int:
        """Return how many of `rows` rows are used at most."""
        return rows if self._data.sample is None else min(self._data.sample, rows)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The rows that were read, and those of them that are `sampled`, by source."""
        return self._chosen.counts

    def in_words(self) -> str:
        """Return the counts as text, or "" if there is one source and no choice among its rows."""
        if len(self.counts) < 2 and not self.by_source:
            return ""
        return in_words(self.counts) + (" (of the rows read)" if self.every_line > 1 else "")

    def without_share(self) -> str:
        """Return a warning about the sources that take no part, or "" if there are none."""
        counts = {name: count for name, count in self.counts.items() if self.weights and name not in self.weights}
        return f"data.weights has no share for these sources, so they take no part: {listed(counts)}" if counts else ""

    def of[Row: Sample | PreferencePair](self, rows: Sequence[Row]) -> list[Row]:
        """Return those of the `rows` read that are used. Raises ConfigError for unknown sources."""
        chosen = choose(rows, self._data, self._seed)
        check_weights(self.weights, chosen.counts)
        self._chosen = chosen
        return chosen.rows[:: self.every // self.every_line]

    def mix(self, source: "RowSource", row_ids: Iterable[str]) -> dict[str, dict[str, int]]:
        """Mix the sources of the rows that are trained on, if they have weights; return all counts.

        `row_ids` are the ids of these rows. By source, the counts are `rows` in the files, those that
        are `sampled`, those that are `used` in training, and with weights the rows of an `epoch`; the
        last two are estimates in a dry run that does not take all rows. Raises DataError for a source
        without a row, ConfigError for a share below one row.
        """
        names = self._chosen.sources_of(row_ids)
        used = Counter(names)
        counts = {name: {**count, "used": used[name] * self.every} for name, count in self.counts.items()}
        if not self.weights:
            return counts
        mixture = Mixture(names, self.weights)
        if self.every == 1:
            check_drawn(mixture, self.weights)
        source.mixture = mixture if mixture.epoch_rows else None
        return {name: {**count, "epoch": mixture.drawn.get(name, 0) * self.every} for name, count in counts.items()}


def row_choice(config: TrainRun, which: Literal["train", "valid"], every: int = 1) -> RowChoice:
    """Return the choice of the rows of `data.train`, or of `data.valid`, which are neither sampled nor mixed."""
    data = config.data if which == "train" else replace(config.data, sample=None, weights={})
    return RowChoice(data, config.run.seed, every)


def say_sources(key: str, choice: RowChoice, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Log the counts of rows by source, if there is anything to say about them."""
    if words := choice.in_words():
        logger.info("%s: %s", key, words)
    if choice.weights:
        logger.info("data.weights: %s", epoch_in_words(counts))
    if problem := choice.without_share():
        logger.warning("%s", problem)
