"""The architecture: which parts may import which, which modules import quickly, where stages are named."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "offline_align"

# A part may import parts of its own layer and of the layers above it in this list.
LAYERS = [
    {"config"},
    {"data"},
    {"methods", "objectives", "model"},
    {"train", "label", "generate", "evaluate", "convert", "launch", "launch_slurm"},
    {"online"},
    {"stages"},
]
SERVE_ALL = {"distributed", "errors", "estimate", "lineage", "progress", "tensorboard_writer", "wording"}
# Parts of one layer that know nothing of each other.
APART = [{"methods", "model"}, {"methods", "objectives"}]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
# The parts that serve all may import only these.
SERVED_BY = SERVE_ALL | {"config"}
# Entry points, which may import every part.
ENTRANCES = {"__main__"}

STAGE_NAMES = re.compile(r"\b(sft|fa|rwr|ca|dpo|reward|label)\b", re.IGNORECASE)


def part_of(module: str) -> str:
    """Return the part of a module: `offline_align.data.records` gives `data`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports at run time, including inside functions."""
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


def may_import(part: str, other: str) -> bool:
    if part == other or part in ENTRANCES:
        return True
    if {part, other} in APART:
        return False
    if part in SERVE_ALL:
        return other in SERVED_BY
    return other in SERVE_ALL or (other in HEIGHT and HEIGHT[other] <= HEIGHT[part])


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_a_layer() -> None:
    parts = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    parts |= {p.stem for p in PACKAGE.glob("*.py")}
    assert parts <= HEIGHT.keys() | SERVE_ALL | ENTRANCES | {"__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of_file(path)
    wrong = [m for m in imports(path.read_text("utf-8")) if not may_import(part, part_of(m))]
    assert wrong == [], f"{path.relative_to(PACKAGE)} is in `{part}`"


def test_parts_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        part = part_of_file(path)
        graph.setdefault(part, set()).update(map(part_of, imports(path.read_text("utf-8"))))
    graph = {part: others - {part} for part, others in graph.items() if part not in SERVE_ALL}
    try:
        TopologicalSorter({r: o - SERVE_ALL for r, o in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"parts import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("part", "other", "allowed"),
    [
        ("data", "methods", False),
        ("methods", "data", True),
        ("model", "methods", False),
        ("model", "data", True),
        ("config", "errors", True),
        ("errors", "data", False),
        ("train", "stages", False),
        ("stages", "train", True),
        ("evaluate", "label", True),
        ("lineage", "model", False),
    ],
)
def test_the_rule_itself(part: str, other: str, allowed: bool) -> None:
    assert may_import(part, other) is allowed


def test_imports_are_found_at_all_levels() -> None:
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
def test_the_trainer_names_no_stage(path: Path) -> None:
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
