"""Mixed sources: exact shares of an epoch, every row of a source equally often, and no state."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from offline_align.data.bins import SampleSource
from offline_align.data.loader import Loader, order_by_prompt, rows_of_step
from offline_align.data.mixture import Mixture, check_drawn, check_weights, whole_parts
from offline_align.errors import ConfigError, DataError
from tests.unit.data.test_loader import answers, many

NAMES = ["a"] * 30 + ["b"] * 10 + ["other"] * 20 + ["a"] * 20
"""The sources of 80 rows."""
SHARES = {"b": 0.7, "a": 0.3}


@pytest.mark.parametrize(
    ("shares", "total", "parts"),
    [
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([2, 1], 100, [67, 33]),
        ([0.7, 0.2, 0.1], 5, [4, 1, 0]),
        ([], 0, []),
    ],
)
def test_whole_parts(shares: list[float], total: int, parts: list[int]) -> None:
    assert whole_parts(shares, total) == parts


def test_an_epoch_has_exactly_the_shares() -> None:
    mixture = Mixture(NAMES, SHARES)
    assert (mixture.epoch_rows, mixture.drawn) == (60, {"a": 18, "b": 42})
    for epoch in range(4):
        names = Counter(NAMES[row] for row in mixture.order(5, epoch))
        assert names == {"a": 18, "b": 42}, "rows of other sources take no part"


def test_at_any_time_the_rows_of_a_source_were_drawn_equally_often() -> None:
    mixture = Mixture(NAMES, SHARES)
    seen: Counter[int] = Counter()
    for row in (int(row) for epoch in range(5) for row in mixture.order(5, epoch)):
        seen[row] += 1
        for name, rows in mixture.rows.items():
            times = [seen[int(one)] for one in rows]
            assert max(times) - min(times) <= 1, name
    assert seen.total() == 300


def test_a_source_repeats_in_another_order() -> None:
    mixture = Mixture(["a"] * 12, {"a": 1})
    first, second, again = (mixture.order(5, 0), mixture.order(5, 1), Mixture(["a"] * 12, {"a": 3}).order(5, 0))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()
    assert first.tolist() == again.tolist()
    assert first.tolist() != mixture.order(6, 0).tolist()


@pytest.mark.parametrize("shares", [{"a": 1, "b": 1}, {"a": 5, "b": 2, "other": 3}, {"a": 0.97, "other": 0.03}])
def test_each_step_has_nearly_the_shares(shares: dict[str, float]) -> None:
    mixture = Mixture(NAMES, shares)
    names = [NAMES[row] for row in mixture.order(1, 0)]
    for size in (4, 8, 20):
        for first in range(0, len(names) - size + 1, size):
            part = Counter(names[first : first + size])
            assert all(abs(part[name] - size * share / sum(shares.values())) < 2.5 for name, share in shares.items())


def test_the_order_of_the_weights_does_not_matter() -> None:
    one, other = Mixture(NAMES, SHARES), Mixture(NAMES, dict(reversed(SHARES.items())))
    assert one.order(3, 2).tolist() == other.order(3, 2).tolist()
    assert one.fingerprint() == other.fingerprint() != Mixture(NAMES, {"a": 1, "b": 1}).fingerprint()
    assert one.fingerprint() != Mixture(NAMES[::-1], SHARES).fingerprint()


def mixed(source: SampleSource, names: list[str], shares: dict[str, float]) -> SampleSource:
    source.mixture = Mixture(names, shares)
    return source


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_a_run_goes_on_with_the_same_rows_at_any_number_of_ranks(before: int, after: int, by_prompt: bool) -> None:
    """The steps are those of one rank, for 120 samples: two epochs of 60 rows."""
    source = mixed(answers(80, 9, share=True), NAMES, SHARES)

    def ids(step: int, dp_size: int) -> list[str]:
        loaders = [Loader(source, 8, 120, 64, 9, rank, dp_size, by_prompt=by_prompt) for rank in range(dp_size)]
        return sorted(i for loader in loaders for b in loader.step(step).micro_batches for i in b.row_ids)

    straight = [ids(step, 1) for step in range(15)]
    for stop in (0, 7, 15):
        assert [ids(step, before) for step in range(stop)] + [ids(step, after) for step in range(stop, 15)] == straight
    drawn = Counter(NAMES[int(i[1:])] for step in straight for i in step)
    assert drawn == {"a": 36, "b": 84}


def test_samples_count_on_through_epochs_of_the_mixture() -> None:
    mixture = Mixture(NAMES, SHARES)
    seen = [row for step in range(18) for row in rows_of_step(step, 7, 80, 120, 3, mixture=mixture)]
    assert seen == [int(row) for epoch in range(2) for row in mixture.order(3, epoch)]


def test_rows_of_a_prompt_come_together_once_for_each_time_that_they_are_drawn() -> None:
    source = mixed(answers(40, 4, share=True), ["a"] * 8 + ["b"] * 32, {"a": 3, "b": 1})
    assert source.mixture is not None
    order = [int(row) for row in order_by_prompt(source, 3, 0)]
    assert sorted(order) == sorted(source.mixture.order(3, 0))
    before: Counter[int] = Counter()
    groups = []
    for row in order:
        groups.append((row % 4, before[row]))
        before[row] += 1
    assert max(before.values()) == 4, "30 draws from 8 rows"
    runs = 1 + sum(one != two for one, two in pairwise(groups))
    assert runs == len(set(groups)) == 16


def test_without_weights_an_epoch_has_every_row_once() -> None:
    source = many(10)
    assert source.mixture is None and source.epoch_rows == 10
    assert mixed(many(80), NAMES, SHARES).epoch_rows == 60


def test_mistakes_in_weights() -> None:
    with pytest.raises(ConfigError, match=r"data.weights.x: no such source; the sources are a, b, other"):
        check_weights({"a": 1, "x": 1}, dict.fromkeys(sorted(set(NAMES))))
    with pytest.raises(DataError, match=r"data.weights.b=1: none of the rows of this source is left"):
        check_drawn(Mixture(["a"] * 4, {"a": 1, "b": 1}), {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"data.weights.b=0.001: is less than one row of an epoch of 60 rows"):
        check_drawn(Mixture(NAMES, {"a": 1, "b": 0.001}), {"a": 1, "b": 0.001})


def test_a_share_below_one_row_draws_nothing() -> None:
    mixture = Mixture(NAMES, {"a": 1, "b": 0.001})
    assert mixture.drawn == {"a": 60, "b": 0}
    assert set(np.array(NAMES)[mixture.order(1, 0)]) == {"a"}
