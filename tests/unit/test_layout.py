"""The architecture: which room may import which, what is light to import, where stage names may occur."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "offline_align"

# A room may import rooms of its own line and of the lines below it.
LINES = [
    {"config"},
    {"data"},
    {"methods"},
    {"objectives", "model"},
    {"train", "label", "generate", "evaluate", "convert", "launch", "launch_slurm"},
    {"stages"},
]
SERVE_ALL = {"distributed", "errors", "estimate", "lineage", "progress", "tensorboard_writer"}
HEIGHT = {room: height for height, rooms in enumerate(LINES) for room in rooms}
# What serves all may itself import no more than this.
SERVED_BY = SERVE_ALL | {"config"}
# It starts the program and stands above the rooms.
ENTRANCES = {"__main__"}

STAGE_NAMES = re.compile(r"\b(sft|fa|rwr|ca|reward|label)\b", re.IGNORECASE)


def room_of(module: str) -> str:
    """offline_align.data.records -> data."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports when it runs, inside functions too."""
    tree = ast.parse(source)
    for_types_only = {id(n) for block in ast.walk(tree) if _is_type_checking(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types_only:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "offline_align")
        elif isinstance(node, ast.ImportFrom) and node.module == "offline_align":
            yield from (f"offline_align.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offline_align."):
            yield str(node.module)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def may_import(room: str, other: str) -> bool:
    if room == other or room in ENTRANCES:
        return True
    if room in SERVE_ALL:
        return other in SERVED_BY
    return other in SERVE_ALL or (other in HEIGHT and HEIGHT[other] <= HEIGHT[room])


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_room_has_a_place() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    rooms |= {p.stem for p in PACKAGE.glob("*.py")}
    assert rooms <= HEIGHT.keys() | SERVE_ALL | ENTRANCES | {"__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of_file(path)
    wrong = [m for m in imports(path.read_text("utf-8")) if not may_import(room, room_of(m))]
    assert wrong == [], f"{path.relative_to(PACKAGE)} is in `{room}`"


def test_rooms_of_one_line_do_not_need_each_other_both_ways() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        room = room_of_file(path)
        graph.setdefault(room, set()).update(map(room_of, imports(path.read_text("utf-8"))))
    graph = {room: others - {room} for room, others in graph.items() if room not in SERVE_ALL}
    try:
        TopologicalSorter({r: o - SERVE_ALL for r, o in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"rooms import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("data", "methods", False),
        ("methods", "data", True),
        ("config", "errors", True),
        ("errors", "data", False),
        ("train", "stages", False),
        ("stages", "train", True),
        ("evaluate", "label", True),
        ("lineage", "model", False),
    ],
)
def test_the_rule_itself(room: str, other: str, allowed: bool) -> None:
    assert may_import(room, other) is allowed


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import offline_align.errors\nfrom offline_align import lineage\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from offline_align.train import step\n"
        "def f():\n    from offline_align.data.records import Sample\n"
    )
    assert sorted(imports(source)) == [
        "offline_align.data.records",
        "offline_align.errors",
        "offline_align.lineage",
    ]


@pytest.mark.parametrize("path", sorted((PACKAGE / "train").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_trainer_knows_no_stage(path: Path) -> None:
    lines = enumerate(path.read_text("utf-8").splitlines(), start=1)
    found = [f"{path.name}:{n}: {line.strip()}" for n, line in lines if STAGE_NAMES.search(line)]
    assert found == []


@pytest.mark.parametrize("line", ["if stage == 'sft':", "# only for RWR", "label = 1"])
def test_stage_names_are_recognised(line: str) -> None:
    assert STAGE_NAMES.search(line)


@pytest.mark.parametrize(
    "module",
    [
        "offline_align.config.compose",
        "offline_align.config.runs",
        "offline_align.data.records",
        "offline_align.errors",
        "offline_align.lineage",
        "offline_align.methods",
        "offline_align.stages.verify",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "matplotlib", "megatron", "sentencepiece"}
    assert heavy & set(done.stdout.split()) == set()
