"""The sources of rows, and the part of the rows that `data.sample` chooses.

A source is a data set: the column `data.source_column` of a row, or the name of its file. The sample is
a set that depends on the content of rows and the seed only, not on ids or on the order of rows and
files: each row gets a keyed hash, and the smallest hashes are chosen. So a larger sample contains a
smaller one, and more data replace only as many rows as their share.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offline_align.config.sections import SampleBy, SampledDataSection
from offline_align.data.records import PreferencePair, Sample
from offline_align.wording import counted

PAIRS = "/pairs"
"""Ends the name of a source of pairs if SFT rows have a source of the same name."""
_SIDES = ("chosen", "rejected")
_MOST = 12
"""Most sources that a message names."""


@dataclass(frozen=True)
class Chosen[Row: Sample | PreferencePair]:
    """The rows that a stage uses, in the order of the files."""

    rows: list[Row]
    sources: list[str]
    """The source of each row."""
    counts: dict[str, dict[str, int]]
    """By source: the number of `rows` in the files, and of those that are `sampled`."""

    def sources_of(self, row_ids: Iterable[str]) -> list[str]:
        """Return the sources of the rows with these ids."""
        by_id = {row.id: name for row, name in zip(self.rows, self.sources, strict=True)}
        return [by_id[row_id] for row_id in row_ids]


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the counts of sources in a manifest: `300 of 1,000 rows: dolly 150, hh 150 of 850`."""
    found, used = (sum(count[key] for count in counts.values()) for key in ("rows", "sampled"))
    return f"{'' if used == found else f'{used:,} of '}{counted(found, 'row')}: {listed(counts)}"


def listed(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the numbers of rows by source: `dolly 150, hh 150 of 850`."""
    return _joined(
        f"{name} {count['sampled']:,}" + ("" if count["sampled"] == count["rows"] else f" of {count['rows']:,}")
        for name, count in counts.items()
    )


def epoch_in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the rows of an epoch: `an epoch of 1,000 rows: hh 700 (0.82x), dolly 300 (2x)`."""
    drawn = {name: count["epoch"] for name, count in counts.items() if count.get("epoch")}
    parts = (f"{name} {number:,} ({number / counts[name]['used']:.2g}x)" for name, number in drawn.items())
    return f"an epoch of {counted(sum(drawn.values()), 'row')}: {_joined(parts)}"


def _joined(parts: Iterable[str]) -> str:
    first = list(parts)
    more = [f"and {len(first) - _MOST} more"] if len(first) > _MOST else []
    return ", ".join([*first[:_MOST], *more])


def choose[Row: Sample | PreferencePair](rows: Sequence[Row], data: SampledDataSection, seed: int) -> Chosen[Row]:
    """Return the rows that `data.sample` chooses, or all rows, with their sources."""
    names = sources(rows, data.source_column)
    places: Sequence[int] = range(len(rows))
    if data.sample is not None and data.sample < len(rows):
        places = sampled(rows, names, data.sample, data.sample_by, seed)
    used = Counter(names[place] for place in places)
    counts = {name: {"rows": number, "sampled": used[name]} for name, number in Counter(names).items()}
    return Chosen([rows[place] for place in places], [names[place] for place in places], counts)


def sources(rows: Sequence[Sample | PreferencePair], column: str | None) -> list[str]:
    """Return the name of the source of each row.

    SFT rows and pairs are different sources, also the answers of pairs in labelled rows. If both have a
    source of the same name, that of the pairs ends with `PAIRS`.
    """
    names = [_named(row, column) or row.file for row in rows]
    of_pair = [is_of_pair(row) for row in rows]
    plain = {name for name, pair in zip(names, of_pair, strict=True) if not pair}
    return [name + PAIRS if pair and name in plain else name for name, pair in zip(names, of_pair, strict=True)]


def _named(row: Sample | PreferencePair, column: str | None) -> str:
    value = None if column is None else row.columns.get(column)
    return value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""


def is_of_pair(row: Sample | PreferencePair) -> bool:
    """Return whether the row is a pair, or the answer of one that `label` scored."""
    return isinstance(row, PreferencePair) or row.columns.get("answer") in _SIDES


def sampled(
    rows: Sequence[Sample | PreferencePair], names: Sequence[str], count: int, by: SampleBy, seed: int
) -> list[int]:
    """Return the places of `count` of the rows, in order; `names` are their sources."""
    hashes = _hashes(rows, names, seed)
    order = sorted(range(len(rows)), key=hashes.__getitem__)
    if by is SampleBy.source:
        # In rounds, each source gives its next row, and then SFT rows and pairs give theirs in turn. A source that
        # is used up misses its rounds, so the others share what it lacks.
        order = _in_rounds(order, names)
        order = _in_rounds(order, [is_of_pair(row) for row in rows])
    return sorted(order[:count])


def _in_rounds(order: Sequence[int], groups: Sequence[Hashable]) -> list[int]:
    """Return `order` with the first rows of all groups first, then the second ones, and so on."""
    seen: Counter[Hashable] = Counter()
    rounds = [0] * len(groups)
    for place in order:
        rounds[place] = seen[groups[place]]
        seen[groups[place]] += 1
    return sorted(order, key=rounds.__getitem__)


def _hashes(rows: Sequence[Sample | PreferencePair], names: Sequence[str], seed: int) -> list[bytes]:
    """Return the hash of each row: of the seed, its prompt and its answers.

    Of rows with equal texts, each has a hash of its own, whatever their order is.
    """
    found = [_hash(seed, *_texts(row)) for row in rows]
    equal: defaultdict[bytes, list[int]] = defaultdict(list)
    for place, digest in enumerate(found):
        equal[digest].append(place)
    for digest, places in equal.items():
        if len(places) > 1:
            ordered = sorted(places, key=lambda place: (names[place], _rest(rows[place])))
            for number, place in enumerate(ordered[1:], start=1):
                found[place] = _hash(seed, digest.hex(), str(number))
    return found


def _hash(seed: int, *texts: str) -> bytes:
    return hashlib.blake2b(json.dumps([seed, *texts]).encode(), digest_size=16).digest()


def _texts(row: Sample | PreferencePair) -> list[str]:
    answers = [row.chosen, row.rejected] if isinstance(row, PreferencePair) else [row.response]
    return [*(text for message in row.prompt for text in (message.role, message.content)), *answers]


def _rest(row: Sample | PreferencePair) -> str:
    """Return everything that can tell rows with equal texts apart, except for their places in files."""
    made_of = row.made_of if isinstance(row, PreferencePair) else ()
    return json.dumps([row.columns, made_of], sort_keys=True)
