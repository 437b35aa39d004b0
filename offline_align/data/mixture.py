"""Mixing sources in training (`data.weights`): which rows an epoch draws, and in which order.

An epoch has exact numbers of rows of each source. A source is drawn from without replacement until all
its rows have been drawn, then from the beginning in another order; so at any time its rows have been
drawn equally often, up to one. The sources are spread evenly over the epoch, so each step has nearly
their shares. Like the order of rows without weights, this is a pure function of seed and epoch.
"""

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from offline_align.errors import ConfigError, DataError
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.data.collate import Indices


class Mixture:
    """The rows of a run by source, and how many of each an epoch has."""

    def __init__(self, sources: Sequence[str], weights: Mapping[str, float]) -> None:
        """Take the source of each row, and the shares of sources in any unit; other sources take no part."""
        names = [name for name in dict.fromkeys(sources) if name in weights]
        numbers = {name: number for number, name in enumerate(names)}
        of_row = np.fromiter((numbers.get(name, -1) for name in sources), np.int64, len(sources))
        self.rows: dict[str, Indices] = {name: np.flatnonzero(of_row == number) for name, number in numbers.items()}
        """The rows of each source, in the order of the files."""
        total = sum(len(rows) for rows in self.rows.values())
        self.drawn = dict(zip(names, whole_parts([weights[name] for name in names], total), strict=True))
        """Number of rows that an epoch draws from each source."""

    @property
    def epoch_rows(self) -> int:
        """Number of rows of an epoch, which is that of the sources together."""
        return sum(self.drawn.values())

    def order(self, seed: int, epoch: int) -> "Indices":
        """Return the rows of `epoch`, in order: [epoch_rows]."""
        return _epoch(self, seed, epoch)[0]

    def passes(self, seed: int, epoch: int) -> "Indices":
        """Return for each row of `epoch`, in order, how often its source had been drawn before: [epoch_rows]."""
        return _epoch(self, seed, epoch)[1]

    def fingerprint(self) -> int:
        """Return a checksum of everything that determines the order of rows, except for the seed."""
        checksum = zlib.crc32(repr(list(self.drawn.values())).encode())
        for rows in self.rows.values():
            checksum = zlib.crc32(rows, checksum)
        return checksum


def whole_parts(shares: Sequence[float], total: int) -> list[int]:
    """Return `total` divided into whole numbers in the ratio of `shares`, by largest remainder."""
    # As they are written, because 0.7 as a binary number is a little less.
    written = [Fraction(repr(share)) for share in shares]
    exact = [share / sum(written) * total for share in written]
    parts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: parts[place] - exact[place])
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts


@lru_cache(maxsize=2)
def _epoch(mixture: Mixture, seed: int, epoch: int) -> "tuple[Indices, Indices]":
    rows, passes, places = [], [], []
    for number, (name, own) in enumerate(mixture.rows.items()):
        drawn = mixture.drawn[name]
        one, before = _drawn(own, epoch * drawn, drawn, [seed, number])
        rows.append(one)
        passes.append(before)
        places.append((np.arange(drawn) + 0.5) / max(drawn, 1))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(rows)[order], np.concatenate(passes)[order]


def _drawn(rows: "Indices", first: int, count: int, seed: list[int]) -> "tuple[Indices, Indices]":
    """Return the draws `first` to `first + count` from `rows`, and how often all rows were drawn before each."""
    passes = np.arange(first, first + count) // len(rows)
    begin, end = first // len(rows), -(-(first + count) // len(rows))
    orders = [np.random.Generator(np.random.PCG64([*seed, n])).permutation(rows) for n in range(begin, end)]
    at = first - begin * len(rows)
    return np.concatenate([rows[:0], *orders])[at : at + count], passes


def check_weights(weights: Mapping[str, float], sources: Collection[str]) -> None:
    """Raise ConfigError for the names in `data.weights` that are not among all `sources`."""
    known = ", ".join(sources)
    unknown = [
        f"data.weights.{name}: no such source; the sources are {known}" for name in weights if name not in sources
    ]
    if unknown:
        raise ConfigError(unknown)


def check_drawn(mixture: Mixture, weights: Mapping[str, float]) -> None:
    """Raise DataError for a source without a row to train on, ConfigError for a share below one row."""
    for name, share in weights.items():
        if name not in mixture.rows:
            raise DataError(f"data.weights.{name}={share}: none of the rows of this source is left to train on")
        if not mixture.drawn[name]:
            size = counted(mixture.epoch_rows, "row")
            raise ConfigError(f"data.weights.{name}={share}: is less than one row of an epoch of {size}; raise it")
