"""Verdicts survive crashes: damaged lines are skipped, intact ones are read back."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offline_align.errors import StorageError
from offline_align.evaluate.judges.verdict_cache import Verdict, VerdictCache, verdict_key


def verdict(key: str, scores: list[float] | None) -> Verdict:
    return Verdict(key, "p", scores, "reply\nwith lines\u2028", 1, 10, 5)


def test_verdicts_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "verdicts.jsonl"
    VerdictCache(path).add(verdict("k", [1.0, 2.0]))
    assert VerdictCache(path).get("k") == verdict("k", [1.0, 2.0])
    assert VerdictCache(path).get("other") is None


def test_unreadable_verdicts_are_kept_but_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictCache(path).add(verdict("k", None))
    assert VerdictCache(path).get("k") is None
    assert json.loads(path.read_text())["reply"] == "reply\nwith lines\u2028"


@pytest.mark.parametrize("torn", [1, 20, 60])
def test_a_torn_last_line_costs_that_verdict_only(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "verdicts.jsonl"
    cache = VerdictCache(path)
    cache.add(verdict("a", [1.0]))
    cache.add(verdict("b", [2.0]))
    path.write_bytes(path.read_bytes()[:-torn])
    again = VerdictCache(path)
    assert again.get("a") is not None
    # Without its line feed alone, the verdict is still complete.
    assert (again.get("b") is not None) is (torn == 1)
    again.add(verdict("c", [3.0]))
    last = VerdictCache(path)
    assert last.get("a") is not None
    assert last.get("c") is not None


def test_a_flipped_bit_costs_that_verdict_only(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictCache(path).add(verdict("a", [1.0]))
    first = path.read_bytes()
    VerdictCache(path).add(verdict("b", [2.0]))
    whole = path.read_bytes()
    for bit in range(8 * (len(first) - 1)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        again = VerdictCache(path)
        assert again.get("a") is None
        assert again.get("b") == verdict("b", [2.0])


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: cache.add(verdict(str(k), [float(k)])), range(100)))
    again = VerdictCache(tmp_path / "verdicts.jsonl")
    assert all(again.get(str(k)) is not None for k in range(100))


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"verdicts\.jsonl"):
        VerdictCache(tmp_path / "file" / "verdicts.jsonl").add(verdict("k", [1.0]))


def test_a_cache_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"verdicts\.jsonl: cannot be read"):
        VerdictCache(tmp_path / "verdicts.jsonl")


def test_damaged_verdicts_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "verdicts.jsonl"
    VerdictCache(path).add(verdict("a", [1.0]))
    path.write_text("damaged\n" + path.read_text())
    VerdictCache(path)
    assert "verdicts.jsonl:1: 1 damaged line skipped" in caplog.text


def test_the_key_depends_on_model_and_request() -> None:
    messages = [{"role": "user", "content": "a"}]
    keys = {verdict_key("m", messages), verdict_key("n", messages), verdict_key("m", [])}
    assert len(keys) == 3
