"""Kill `label` and `generate` repeatedly, on changing numbers of ranks: the output is the same to the byte.

A kill counts if it leaves results in the journal and work to do. `FAULTS=all` needs fifty such kills
of each kind, otherwise two.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.faults.forks import Forks
from tests.training import WORDS, pairs, samples, train, write_jsonl

ALL = os.environ.get("FAULTS") == "all"
KILLS = 50 if ALL else 2
ROWS = 400 if ALL else 120
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
Words = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    rows = [row | {"response": f"{row['response']} {i}"} for i, row in enumerate(samples(ROWS))]
    policy = train("sft", folder / "policy", write_jsonl(folder / "rows.jsonl", rows), "trainer.max_steps=3")
    start = [f"init.from={policy}", "data.max_length=128", "run.device=cpu", "trainer.max_steps=3"]
    train("reward", folder / "reward", write_jsonl(folder / "pairs.jsonl", pairs()), *start, model=[])
    assert run(["convert", f"init.from={policy}", f"run.dir={folder / 'hf'}", "run.device=cpu"]) == 0
    asked = [{"id": f"q{i}", "prompt": f"Name {WORDS[i % 12]} {i}"} for i in range(ROWS // 2)]
    write_jsonl(folder / "prompts.jsonl", asked)
    return folder


@pytest.fixture(scope="module")
def forks(given: Path) -> Iterator[Forks]:
    with Forks(given) as made:
        yield made


@pytest.fixture
def label(given: Path) -> Words:
    both = f"data.input=[{given / 'rows.jsonl'},{given / 'pairs.jsonl'}]"
    more = [f"init.from={given / 'reward'}", both, "data.max_length=64", "label.flush_rows=2", "run.device=cpu"]
    return lambda name: ["label", f"run.dir={given / name}", *more]


@pytest.fixture
def generate(given: Path) -> Words:
    more = [f"init.from={given / 'hf'}", f"data.input={given / 'prompts.jsonl'}", "run.device=cpu"]
    small = ["data.max_length=64", "generate.max_new_tokens=8", "generate.batch_size=3", "generate.temperature=1.0"]
    return lambda name: ["generate", f"run.dir={given / name}", *more, *small]


def killed_to_the_end(
    forks: Forks, words: list[str], output: Path, expected: bytes, seconds: float, seed: int, worlds: list[int]
) -> tuple[int, int]:
    """Kill a command at random moments until it is done; return all kills, and those that left results behind."""
    draw = random.Random(seed)
    useful = 0
    for attempt in range(400):
        world = worlds[attempt % len(worlds)]
        # Kill later and later, so that the command finishes in the end. Kill one rank or all.
        after = seconds * (1 + world / 4) * draw.uniform(0.2, 0.9 + attempt / 20)
        victims = [draw.randrange(world)] if draw.random() < 0.5 else None
        ended = forks.run(words, world=world, signal_after_seconds=after, victims=victims)
        assert "Traceback" not in ended.said
        if output.exists():
            assert output.read_bytes() == expected, "appeared, but not whole"
        if not any(ended.codes):
            return attempt, useful
        useful += any(path.stat().st_size for path in output.parent.glob("journal/*/part_*.jsonl"))
        if draw.random() < 0.2:
            _damage(output.parent, draw)
    raise AssertionError("the command never finished")


def _damage(run_dir: Path, draw: random.Random) -> None:
    """Damage a journal as a bad disk may do: flip a bit and cut the end."""
    parts = [path for path in sorted(run_dir.glob("journal/*/part_*.jsonl")) if path.stat().st_size > 20]
    if parts:
        path = draw.choice(parts)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(content[: draw.randrange(len(content) // 2, len(content))]))


@pytest.mark.parametrize("command", ["label", "generate"])
@pytest.mark.parametrize("worlds", [[1, 2, 4], *([[1], [2]] if ALL else [])], ids=str)
def test_after_random_kills_each_row_is_there_once(
    request: pytest.FixtureRequest, given: Path, forks: Forks, command: str, worlds: list[int]
) -> None:
    words: Words = request.getfixturevalue(command)
    name = {"label": "labelled.jsonl", "generate": "generations.jsonl"}[command]
    whole = f"{command} whole {len(worlds)}"
    straight = forks.run(words(whole), world=worlds[0])
    assert not any(straight.codes), straight.said
    expected = (given / whole / name).read_bytes()
    assert len({json.loads(line)["id"] for line in expected.splitlines()}) == expected.count(b"\n")
    kills = useful = runs = 0
    while useful < KILLS:
        run_dir = given / f"{command} killed {len(worlds)}"
        shutil.rmtree(run_dir, ignore_errors=True)
        seed = 1000 * len(worlds) + runs
        got = killed_to_the_end(forks, words(str(run_dir)), run_dir / name, expected, straight.seconds, seed, worlds)
        kills, useful, runs = kills + got[0], useful + got[1], runs + 1
        assert (run_dir / name).read_bytes() == expected
        assert not any(forks.run(words(str(run_dir))).codes)
        assert not (run_dir / "journal").exists()
    print(f"{command}, ranks {worlds}: {runs} runs, {kills} kills, {useful} with results in the journal")


@pytest.mark.parametrize("command", ["label", "generate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, *([signal.SIGINT, signal.SIGUSR1] if ALL else [])])
def test_a_signal_at_any_moment_ends_with_75(
    request: pytest.FixtureRequest, given: Path, forks: Forks, command: str, number: signal.Signals
) -> None:
    words: Words = request.getfixturevalue(command)
    draw = random.Random(number)
    seconds = forks.run(words(f"{command} straight {number.name}")).seconds
    codes = []
    for attempt in range(20 if ALL else 2):
        after = draw.uniform(0.3, 0.9) * seconds
        run_dir = given / f"{command} {number.name} {attempt}"
        ended = forks.run(words(str(run_dir)), signal_after_seconds=after, signal_number=number)
        assert ended.code in (0, 75), (after, ended)
        assert "Traceback" not in ended.said
        codes.append(ended.code)
    assert 75 in codes


@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 1), (2, 2), *([(4, 2)] if ALL else [])])
def test_a_signal_to_one_rank_stops_all_after_the_same_bin(
    given: Path, forks: Forks, label: Words, world: int, tensor_parallel: int
) -> None:
    """The journal has all results so far, and the next attempt writes the file of an uninterrupted run."""
    layout = [f"parallel.tensor_model_parallel_size={tensor_parallel}"]
    straight, cut = (given / f"label {name} {world} {tensor_parallel}" for name in ("straight", "cut"))
    assert not any(forks.run([*label(str(straight)), *layout], world=world).codes)
    words = [*label(str(cut)), *layout]
    ended = forks.run(words, world=world, sabotage=("at", ["bin", 3, [signal.SIGTERM], world - 1]))
    assert ended.codes == [75] * world, ended
    (done,) = map(int, re.findall(r"stopped after (\d+) of", ended.said))
    written = [line for path in cut.glob("journal/*/part_*.jsonl") for line in path.read_bytes().splitlines()]
    assert 0 < done == len(written) < ROWS
    assert not any(forks.run(words, world=world).codes)
    assert (cut / "labelled.jsonl").read_bytes() == (straight / "labelled.jsonl").read_bytes()
