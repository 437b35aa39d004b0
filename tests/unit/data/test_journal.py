"""A journal returns every valid entry and nothing else, however its files were truncated or damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from offline_align.data.journal import Journal
from offline_align.errors import StorageError

KEY = "0123456789abcdef0123"
ENTRIES: list[dict[str, Any]] = [{"row": i, "score": i / 7, "text": f"é😀\n\u2028\ud83d {i}"} for i in range(6)]


def written(folder: Path, rank: int = 0) -> Journal:
    journal = Journal(folder, KEY, rank)
    journal.append(ENTRIES)
    return journal


def test_entries_of_all_ranks_are_read_back(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, KEY, 0), Journal(tmp_path, KEY, 1)
    first.append(ENTRIES[:2])
    second.append(ENTRIES[2:])
    assert first.read() == second.read() == ENTRIES


def test_a_line_truncated_anywhere_is_skipped_and_damages_no_other(tmp_path: Path) -> None:
    journal = written(tmp_path)
    whole = journal.path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        journal.path.write_bytes(whole[:-cut])
        # A line that lacks only its line end is still valid.
        assert journal.read() == ENTRIES[: 6 if cut == 1 else 5]
        journal.append(ENTRIES[5:])
        assert journal.read()[-1] == ENTRIES[5]
        assert [entry for entry in journal.read() if entry["row"] < 5] == ENTRIES[:5]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A changed digit would be a wrong reward that looks valid."""
    journal = written(tmp_path)
    whole = journal.path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        journal.path.write_bytes(damaged)
        found = journal.read()
        assert all(entry in ENTRIES for entry in found)
        assert len(found) >= 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\0" * len(content),
        lambda content: b"\xff\xfe" + content,
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.replace(b"\n", b""),
        lambda content: content + content,
        lambda content: b"\n\n" + content,
        lambda content: b"[1]\nnull\n3\n{}\n" + content,
        lambda content: b"[" * 100_000 + b"\n" + content,
        lambda content: b'{"row": 0, "score": 9.0}\n' + content,
        lambda content: b'{"row": 0, "score": 9.0, "crc32": "1"}\n' + content,
        lambda content: content[len(content) // 2 :],
        lambda content: Random(1).randbytes(4096),
    ],
)
def test_damage_by_hand_costs_entries_and_invents_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    journal = written(tmp_path)
    journal.path.write_bytes(damage(journal.path.read_bytes()))
    assert all(entry in ENTRIES for entry in journal.read())
    journal.append(ENTRIES)
    assert all(entry in journal.read() for entry in ENTRIES)


def test_other_settings_have_another_journal_and_its_lines_do_not_fit(tmp_path: Path) -> None:
    other = Journal(tmp_path, "f" * 20, 0)
    assert written(tmp_path).read() == ENTRIES
    assert other.read() == []
    other.append([{"row": 0, "score": 1.0}])
    other.path.write_bytes(Journal(tmp_path, KEY, 0).path.read_bytes())
    assert other.read() == []


def test_an_entry_is_one_json_object_a_line(tmp_path: Path) -> None:
    lines = written(tmp_path).path.read_text("ascii").splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(6))


def test_a_request_to_stop_reaches_other_ranks_and_is_forgotten(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, KEY, 0), Journal(tmp_path, KEY, 1)
    assert not second.stop_is_asked()
    first.ask_to_stop()
    assert second.stop_is_asked()
    second.forget_stop()
    assert not first.stop_is_asked()


def test_a_journal_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("in the way")
    journal = Journal(tmp_path, KEY, 0)
    with pytest.raises(StorageError, match=r"part_00000\.jsonl"):
        journal.append(ENTRIES)
    with pytest.raises(StorageError, match="stop"):
        journal.ask_to_stop()
    (tmp_path / "journal").unlink()
    journal.path.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"part_00000\.jsonl"):
        journal.read()
