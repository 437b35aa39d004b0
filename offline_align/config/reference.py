"""The schema as text: the `--help` of a stage and the configuration reference in the documentation.

Both are generated from the docstrings and defaults of the dataclasses, so they always agree with the
code.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, cast, get_args

from offline_align.config.compose import MISSING, configs_dir
from offline_align.config.runs import Run, TrainRun


@dataclass(frozen=True)
class Key:
    """One setting as the user sees it."""

    name: str
    kind: str
    default: str
    text: str


def stage_help(stage: str, schema: type[Run], summary: str) -> str:
    """Return what `offline-align <stage> --help` prints."""
    head = f"offline-align {stage} [group=choice ...] [key=value ...]\n\n{summary}\n"
    groups = [f"  {name}={'|'.join(choices)}" for name, choices in stage_groups(stage).items()]
    lines = [head, *(["Groups", *groups, ""] if groups else []), "Keys (default)"]
    for key in schema_keys(schema):
        lines.append(f"  {key.name} ({key.default})\n      {key.text}")
    return "\n".join(
        [*lines, "", "--config FILE reads values from a YAML file. --config-dir DIR adds your own groups."]
    )


def schema_keys(schema: type[Run]) -> list[Key]:
    """Return the keys of a command in the order of the schema."""
    return list(_keys(schema, ""))


def stage_groups(stage: str) -> dict[str, list[str]]:
    """Return the groups of `stage` for which the package has choices, with these choices."""
    text = (configs_dir() / "stage" / f"{stage}.yaml").read_text(encoding="utf-8")
    inherited = re.findall(r"^  - (\w+)$", text, re.MULTILINE)
    found = dict[str, list[str]]()
    for parent in inherited:
        if parent != "_self_":
            found |= stage_groups(parent)
    for group in re.findall(r"^  - /(\w+):", text, re.MULTILINE):
        if choices := sorted(p.stem for p in (configs_dir() / group).glob("*.yaml")):
            found[group] = choices
    return found


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    texts = _field_texts(cls)
    for field in dataclasses.fields(cls):
        nested: Any = field.default_factory
        if dataclasses.is_dataclass(nested):
            yield from _keys(cast(type, nested), f"{prefix}{field.name}.")
            continue
        name = f"{prefix}{field.name}".rstrip("_")
        kind = field.metadata.get("kind") or _kind(field.type)
        yield Key(name, kind, _default(field), texts.get(field.name, ""))


@cache
def _field_texts(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _kind(annotation: Any) -> str:
    """Return the type of a field in words, without None: the default says that it may be unset."""
    if annotation is Any:
        return "path or list"
    options = [a for a in get_args(annotation) if a is not NoneType]
    if len(options) == 1 and isinstance(annotation, UnionType):
        return _kind(options[0])
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " \\| ".join(m.value for m in annotation)
    return annotation.__name__ if annotation in (int, float, str, bool) else str(annotation).replace("typing.", "")


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default == MISSING:
        return "must be set"
    if field.default is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        return str(field.default_factory())
    value = field.default.value if isinstance(field.default, Enum) else field.default
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def reference_page(schemas: Mapping[str, type[Run]]) -> str:
    """Return the configuration reference in Markdown: the keys of all stages, by section."""
    stages_of: dict[Key, list[str]] = {}
    for stage, schema in schemas.items():
        for key in schema_keys(schema):
            stages_of.setdefault(key, []).append(stage)
    lines = [
        "# Configuration reference",
        "",
        "Generated from the schema by `make reference`. `offline-align <stage> --help` shows the keys of one stage.",
        "",
    ]
    for section in dict.fromkeys(_section(key) for key in stages_of):
        lines += [f"## {section}", "", "| key | type | default | stages | meaning |", "|---|---|---|---|---|"]
        lines += [_row(key, _in_short(on, schemas)) for key, on in stages_of.items() if _section(key) == section]
        lines.append("")
    return "\n".join(lines)


def _section(key: Key) -> str:
    return key.name.partition(".")[0] if "." in key.name else "every stage"


def _row(key: Key, stages: str) -> str:
    text = key.text.replace("|", "\\|")
    return f"| `{key.name}` | {key.kind} | `{key.default}` | {stages} | {text} |"


def _in_short(stages: list[str], schemas: Mapping[str, type[Run]]) -> str:
    """Return the names of stages, those of all training stages as one."""
    if len(stages) == len(schemas):
        return "all"
    training = {name for name, schema in schemas.items() if issubclass(schema, TrainRun)}
    if not training <= set(stages):
        return " ".join(stages)
    return " ".join(["training", *(name for name in stages if name not in training)])
