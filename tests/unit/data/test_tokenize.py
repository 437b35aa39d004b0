"""Tokenised rows: content, length policy, and the cache, also when it is damaged or shared."""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_align.config.sections import DataSection, OnBadRow, Template, TooLong
from offline_align.data import tokenize
from offline_align.data.records import BadRows, Message, PreferencePair, Sample, TrainingRow, read_rows
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedRows, tokenize_pairs, tokenize_samples
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import DataError, StorageError
from offline_align.label.rows import single_answers
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.support import real_data_dir


def training_row(i: int, prompt: str = "Hello", response: str = "Fine", **more: str) -> TrainingRow:
    sample = Sample(f"row-{i}", (Message("user", prompt),), response, {"prompt": prompt, "response": response})
    return TrainingRow(sample, weight=i / 8, condition=more.get("condition", ""))


def preference_pair(i: int, prompt: str, chosen: str, rejected: str, margin: float | None = None) -> PreferencePair:
    return PreferencePair(f"pair-{i}", (Message("user", prompt),), chosen, rejected, margin, {})


def row_of(rows: TokenizedRows, i: int) -> list[int]:
    ids: list[int] = rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist()
    return ids


def split(rows: TokenizedRows, i: int) -> tuple[list[int], list[int]]:
    ids, start = row_of(rows, i), int(rows.target_start[i])
    return ids[:start], ids[start:]


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer(load_tokenizer(write_sentencepiece(tmp_path / "sp")), Template.paper)


@pytest.fixture
def chat(tmp_path: Path) -> Renderer:
    return Renderer(load_tokenizer(write_hugging_face(tmp_path / "hf")), Template.chat)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["renderer", "chat"])
def test_rows_are_context_and_target(kind: str, cache: Path, request: pytest.FixtureRequest) -> None:
    renderer: Renderer = request.getfixturevalue(kind)
    rows = [training_row(i, f"Question {i}" * i, f"Answer {i}", condition=f"<rm_score>{i}.0") for i in range(9)]
    made = tokenize_samples(rows, renderer, DataSection(), cache)
    assert len(made) == len(rows) == len(made.offsets) - 1
    for i, row in enumerate(rows):
        context, target = split(made, i)
        assert context == renderer.context(row.sample.prompt, row.condition)
        assert target == renderer.target(row.sample.prompt, row.sample.response)
        prompt = made.ids[made.offsets[i] : made.offsets[i] + made.prompt_length[i]].tolist()
        assert prompt == renderer.context(row.sample.prompt)
    assert made.row_ids == [row.sample.id for row in rows]
    assert made.weight.tolist() == [i / 8 for i in range(9)]
    assert (made.dropped, made.truncated) == ({}, 0)


def test_types_and_memory_map(renderer: Renderer, cache: Path) -> None:
    made = tokenize_samples([training_row(1)], renderer, DataSection(), cache)
    columns = (made.ids, made.offsets, made.target_start, made.weight)
    assert [column.dtype for column in columns] == [np.int32, np.int64, np.int32, np.float32]
    assert not made.ids.flags.owndata
    assert not made.ids.flags.writeable
    assert made.offsets[0] == 0
    assert made.offsets[-1] == len(made.ids)


def test_pairs(renderer: Renderer, cache: Path) -> None:
    pairs = [preference_pair(i, f"Q{i}", "good " * i + "a", "bad", 0.5 * i if i % 2 else None) for i in range(6)]
    made = tokenize_pairs(pairs, renderer, DataSection(), cache)
    assert made.row_ids == made.chosen.row_ids == made.rejected.row_ids == [pair.id for pair in pairs]
    for i, pair in enumerate(pairs):
        context = renderer.context(pair.prompt)
        assert split(made.chosen, i) == (context, renderer.target(pair.prompt, pair.chosen))
        assert split(made.rejected, i) == (context, renderer.target(pair.prompt, pair.rejected))
    assert np.isnan(made.margin).tolist() == [True, False] * 3
    assert made.margin[1::2].tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("kind", ["renderer", "chat"])
def test_long_prompts_are_cut_from_the_left(kind: str, cache: Path, request: pytest.FixtureRequest) -> None:
    renderer: Renderer = request.getfixturevalue(kind)
    long, short = "lost and found again " * 30, "Hello"
    rows = [training_row(i, prompt, "Fine", condition="<rm_score>5.0") for i, prompt in enumerate([long, short])]
    made = tokenize_samples(rows, renderer, DataSection(max_length=48), cache)
    assert made.truncated == 1
    assert made.dropped == {}
    context, target = split(made, 0)
    whole = renderer.context(rows[0].sample.prompt, "<rm_score>5.0")
    start = renderer.start_ids
    assert len(context) + len(target) == 48
    assert context[: len(start)] == start
    assert context[len(start) :] == whole[len(start) + len(whole) - len(context) :]
    assert target == renderer.target(rows[0].sample.prompt, "Fine")
    assert split(made, 1)[0] == renderer.context(rows[1].sample.prompt, "<rm_score>5.0")


def test_long_prompts_are_dropped_on_request(renderer: Renderer, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "offline_align")
    rows = [training_row(0, "word " * 90), training_row(1)]
    made = tokenize_samples(rows, renderer, DataSection(max_length=32, too_long=TooLong.drop), cache)
    tokenize_samples(rows[1:], renderer, DataSection(max_length=32), cache)
    assert caplog.messages == [
        "2 rows: 1 left out (1 too_long); see data.max_length=32",
        "1 row: it fits into data.max_length=32",
    ]
    assert made.row_ids == ["row-1"]
    assert made.dropped == {"too_long": 1}
    assert made.weight.tolist() == [1 / 8]


def test_a_row_of_exactly_the_limit_is_left_alone(renderer: Renderer, cache: Path) -> None:
    row = training_row(0, "some words", "and more")
    size = len(renderer.context(row.sample.prompt)) + len(renderer.target(row.sample.prompt, "and more"))
    made = tokenize_samples([row], renderer, DataSection(max_length=size), cache)
    assert (len(made.ids), made.truncated) == (size, 0)
    made = tokenize_samples([row], renderer, DataSection(max_length=size - 1), cache)
    assert (len(made.ids), made.truncated) == (size - 1, 1)


@pytest.mark.parametrize("too_long", list(TooLong))
def test_long_responses_are_dropped_never_cut(too_long: TooLong, renderer: Renderer, cache: Path) -> None:
    rows = [training_row(0, "Hello", "word " * 90), training_row(1)]
    made = tokenize_samples(rows, renderer, DataSection(max_length=32, too_long=too_long), cache)
    assert made.row_ids == ["row-1"]
    assert made.dropped == {"response_too_long": 1}


def test_the_generation_prompt_is_never_cut(renderer: Renderer, cache: Path) -> None:
    condition = "<rm_score>5.0"
    row = training_row(0, "Hello " * 9, "Fine", condition=condition)
    target = renderer.target(row.sample.prompt, "Fine")
    least = renderer.tail_tokens(condition) + len(target)
    data = DataSection(max_length=least)
    made = tokenize_samples([row, training_row(1, "", "x")], renderer, data, cache)
    context, _ = split(made, 0)
    assert renderer.tokenizer.decode(context).strip().endswith(condition)
    with pytest.raises(DataError, match="none of 1 row is left: 1 response_too_long; see data.max_length"):
        tokenize_samples([row], renderer, replace(data, max_length=least - 1), cache)


def test_a_pair_is_cut_and_dropped_as_a_whole(renderer: Renderer, cache: Path) -> None:
    pairs = [
        preference_pair(0, "word " * 60, "short", "a somewhat longer answer"),
        preference_pair(1, "Hello", "fine", "word " * 60),
        preference_pair(2, "Hello", "fine", "no"),
    ]
    made = tokenize_pairs(pairs, renderer, DataSection(max_length=40), cache)
    assert made.row_ids == ["pair-0", "pair-2"]
    assert made.dropped == {"response_too_long": 1}
    assert split(made.chosen, 0)[0] == split(made.rejected, 0)[0]
    assert len(row_of(made.rejected, 0)) == 40
    assert made.chosen.truncated == 1


@pytest.mark.parametrize("too_long", TooLong)
def test_an_answer_is_cut_or_dropped_as_the_other_one_of_its_pair(
    too_long: TooLong, renderer: Renderer, cache: Path
) -> None:
    # The first would fit with its chosen answer alone; the last fits without truncation.
    texts = [("x " * 12, "fine", "a much longer answer, " * 3), ("x " * 60, "fine", "a longer one")]
    texts += [("Hi", "a", "b" * 99), ("Hi", "a", "b")]
    pairs = [preference_pair(i, *text) for i, text in enumerate(texts)]
    data = DataSection(max_length=64, too_long=too_long)
    single = [TrainingRow(sample) for sample in single_answers(pairs)]
    both, alone = tokenize_pairs(pairs, renderer, data, cache), tokenize_samples(single, renderer, data, cache)
    assert alone.row_ids == [f"{row_id}/{answer}" for row_id in both.row_ids for answer in ("chosen", "rejected")]
    for i in range(len(both)):
        assert row_of(alone, 2 * i) == row_of(both.chosen, i)
        assert row_of(alone, 2 * i + 1) == row_of(both.rejected, i)
    # The result for each row does not depend on the other rows.
    first = next(row for row in single if row.sample.id == alone.row_ids[0])
    assert row_of(tokenize_samples([first], renderer, data, cache), 0) == row_of(alone, 0)
    assert (len(both), alone.truncated) == ((3, 4) if too_long is TooLong.truncate_prompt else (1, 0))


def test_a_row_without_a_target_token_is_refused(tmp_path: Path, cache: Path) -> None:
    lossy = Renderer(load_tokenizer(write_sentencepiece(tmp_path, lossy=True)), Template.paper)
    made = tokenize_samples([training_row(0, "Hello", "\u200b"), training_row(1)], lossy, DataSection(), cache)
    assert made.row_ids == ["row-1"]
    assert made.dropped == {"no_target": 1}


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_cache_is_used_again(renderer: Renderer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [training_row(i) for i in range(4)]
    first = tokenize_samples(rows, renderer, DataSection(), cache)
    monkeypatch.setattr(tokenize, "_tokenize", None)
    other = [replace(row, weight=7.0, sample=replace(row.sample, id=f"new-{row.sample.id}")) for row in rows]
    second = tokenize_samples(other, renderer, DataSection(), cache)
    assert second.ids.tolist() == first.ids.tolist()
    assert second.weight.tolist() == [7.0] * 4
    assert second.row_ids[0] == "new-row-0"
    assert len(folders(cache)) == 1


def test_everything_that_changes_ids_changes_the_key(renderer: Renderer, chat: Renderer, cache: Path) -> None:
    rows = [training_row(0), training_row(1)]
    data = DataSection()
    tokenize_samples(rows, renderer, data, cache)
    tokenize_samples(rows, chat, data, cache)
    tokenize_samples(rows, Renderer(chat.tokenizer, Template.paper), data, cache)
    tokenize_samples(rows, renderer, replace(data, max_length=99), cache)
    tokenize_samples(rows, renderer, replace(data, too_long=TooLong.drop), cache)
    tokenize_samples(rows[:1], renderer, data, cache)
    tokenize_samples([training_row(0, condition="<rm_score>1.0"), rows[1]], renderer, data, cache)
    tokenize_samples([training_row(0, response="Fine!"), rows[1]], renderer, data, cache)
    assert len(folders(cache)) == 8


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "summary"])
def test_a_damaged_cache_is_made_anew(damage: str, renderer: Renderer, cache: Path) -> None:
    rows = [training_row(i, "Hello " * i) for i in range(5)]
    expected = tokenize_samples(rows, renderer, DataSection(), cache).ids.tolist()
    (folder,) = cache.iterdir()
    tokens = folder / "tokens.arrow"
    if damage == "gone":
        tokens.unlink()
    elif damage == "summary":
        (folder / "summary.json").write_text('{"byt')
    else:
        os.truncate(tokens, 0 if damage == "empty" else tokens.stat().st_size // 2)
    assert tokenize_samples(rows, renderer, DataSection(), cache).ids.tolist() == expected
    assert folders(cache) == [folder.name]


def test_a_failed_build_leaves_nothing(renderer: Renderer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"data.cache_dir: .*No space left"):
        tokenize_samples([training_row(0)], renderer, DataSection(), cache)
    assert folders(cache) == []


def test_an_unwritable_cache_is_a_storage_error(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data.cache_dir"):
        tokenize_samples([training_row(0)], renderer, DataSection(), tmp_path / "file")


def test_concurrent_builds_of_the_cache(renderer: Renderer, cache: Path) -> None:
    rows = [training_row(i, f"Question {i}") for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: tokenize_samples(rows, renderer, DataSection(), cache), range(4)))
    assert len({tuple(m.ids.tolist()) for m in made}) == 1
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("kind", ["renderer", "chat"])
def test_ids_do_not_depend_on_the_rows_that_are_encoded_together(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    renderer: Renderer = request.getfixturevalue(kind)
    rows = [training_row(i, f"Question {i}", "word " * (i % 60)) for i in range(1, 200)]
    data = DataSection(max_length=64)
    together = tokenize_samples(rows, renderer, data, cache / "together")
    monkeypatch.setattr(tokenize, "ROWS_PER_BATCH", 16)
    parts = tokenize_samples(rows, renderer, data, cache / "parts")
    assert together.dropped and together.truncated
    assert parts.ids.tolist() == together.ids.tolist()
    assert parts.offsets.tolist() == together.offsets.tolist()
    assert parts.target_start.tolist() == together.target_start.tolist()
    assert (parts.row_ids, parts.dropped) == (together.row_ids, together.dropped)


REFUSING = "{% if 'no' in messages[0].content %}{{ raise_exception('never') }}{% endif %}" + CHATML


@pytest.mark.parametrize("rows_per_batch", [1, 512])
def test_rows_that_the_template_refuses(
    rows_per_batch: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "ROWS_PER_BATCH", rows_per_batch)
    refusing = Renderer(load_tokenizer(write_hugging_face(tmp_path, chat_template=REFUSING)), Template.chat)
    rows = [training_row(0, "yes"), training_row(1, "no"), training_row(2, "well")]
    data = DataSection()
    with pytest.raises(DataError, match=r"row row-1: chat template: never; fix the row"):
        tokenize_samples(rows, refusing, data, cache)
    told: list[dict[str, str]] = []
    made = tokenize_samples(rows, refusing, data, cache, told.append)
    assert told == [{"row-1": "chat template: never"}]
    assert made.row_ids == ["row-0", "row-2"]
    assert made.dropped == {"chat_template": 1}


def test_nothing_to_tokenise_is_refused(renderer: Renderer, cache: Path) -> None:
    nothing: Sequence[TrainingRow] = []
    with pytest.raises(DataError, match=r"no row to tokenise"):
        tokenize_samples(nothing, renderer, DataSection(), cache)
    with pytest.raises(DataError, match=r"no row to tokenise"):
        tokenize_pairs([], renderer, DataSection(), cache)


def test_nothing_is_written_elsewhere(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    tokenize_samples([training_row(0)], renderer, DataSection(), tmp_path / "cache")
    assert list((tmp_path / "home").iterdir()) == []


def test_real_rows(tmp_path: Path, chat: Renderer, cache: Path) -> None:
    rows = list(read_rows([real_data_dir() / "preferences_valid.jsonl"], PreferencePair, BadRows(OnBadRow.fail, None)))
    made = tokenize_pairs(rows, chat, DataSection(max_length=1024), cache)
    assert len(made) + sum(made.dropped.values()) == len(rows)
    by_id = {row.id: row for row in rows}
    for side, text in ((made.chosen, "chosen"), (made.rejected, "rejected")):
        assert np.diff(side.offsets).max() <= 1024
        for i in range(len(made)):
            _, target = split(side, i)
            assert target[-1] == chat.tokenizer.eos_id
            assert chat.tokenizer.decode(target) == getattr(by_id[made.row_ids[i]], text).strip()


def test_long_tokenisation_reports_its_progress(
    renderer: Renderer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Simulate a clock that advances 20 seconds at every reading."""
    clock = itertools.count(step=20.0)
    monkeypatch.setattr("offline_align.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(tokenize, "ROWS_PER_BATCH", 2)
    caplog.set_level("INFO", "offline_align.progress")
    tokenize_samples([training_row(i) for i in range(5)], renderer, DataSection(), cache)
    first, second, end, _ = caplog.messages
    assert first.startswith("tokenising: 2 of 5 rows, 50 s a row, about ") and first.endswith(" left")
    assert second.startswith("tokenising: 4 of 5 rows, ")
    assert end.startswith("tokenising: all 5 rows, in ")
