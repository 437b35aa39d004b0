"""The schema as text: the `--help` of a stage and the configuration reference in the documentation.

Both are generated from the docstrings and defaults of the dataclasses, so they always agree with the
code.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, reduce
from types import NoneType, UnionType
from typing import Any, cast, get_args

from offline_align.config.compose import MISSING, compose, configs_dir
from offline_align.config.runs import Run, TrainRun


@dataclass(frozen=True)
class Key:
    """One setting as the user sees it."""

    name: str
    kind: str
    default: str
    text: str


# The keys that people set, in the order in which `--help` shows them. Each stage shows those that it has.
_COMMON = (
    "init.from",
    "data.train",
    "data.valid",
    "data.input",
    "data.max_length",
    "data.template",
    "data.on_bad_row",
    "data.sample",
    "prepare.columns",
    "prepare.score_column",
    "prepare.valid_fraction",
    "prepare.max_rows",
    "tokenizer.train",
    "judge.model",
    "judge.base_url",
    "method.threshold",
    "method.best_of",
    "method.condition",
    "method.target_reward",
    "method.beta",
    "generate.max_new_tokens",
    "generate.temperature",
    "generate.n",
    "generate.engine",
    "evaluate.baseline",
    "evaluate.runs",
    "convert.to",
    "convert.dtype",
    "convert.check",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.global_batch_size",
    "trainer.micro_batch_size",
    "trainer.precision",
    "trainer.eval_interval",
    "trainer.save_interval",
    "trainer.max_time",
    "optim.lr",
    "optim.lr_warmup_steps",
    "launcher.nproc_per_node",
    "launcher.nodes",
    "run.device",
    "run.seed",
    "dry_run",
)
_KEY_WIDTH = 36
"""Columns of a key with its default; a longer one has its text on the next line."""


def stage_help(stage: str, schema: type[Run], summary: str, required: Sequence[str] = (), whole: bool = True) -> str:
    """Return what `offline-align <stage> --help=all` prints, or `--help` if `whole` is false.

    The `required` keys come first. The short help has the keys that people set, each with the first
    sentence of its text.
    """
    known = {key.name: key for key in schema_keys(schema)}
    shown = list(known) if whole else [name for name in _COMMON if name in known]
    others = [known[name] for name in shown if name not in required]
    defaults = _defaults_of_stage(stage, schema)
    lines = [f"offline-align {stage} [group=choice ...] [key=value ...]", "", summary]
    lines += _section_of_help("Required", [known[name] for name in required], whole, {})
    lines += _section_of_help("Optional (default)" if whole else "Often set (default)", others, whole, defaults)
    groups = [f"  {name}={'|'.join(choices)}" for name, choices in stage_groups(stage).items()]
    lines += ["", "Groups: several keys at once", *groups] if groups else []
    flags = "--config FILE reads values from a YAML file. --config-dir DIR adds your own groups."
    more = [] if whole else [f"offline-align {stage} --help=all shows all {len(known)} keys."]
    return "\n".join([*lines, "", *more, flags])


def _section_of_help(title: str, keys: Sequence[Key], whole: bool, defaults: Mapping[str, str]) -> list[str]:
    lines = ["", title] if keys else []
    for key in keys:
        default = "" if title == "Required" else f" ({defaults.get(key.name, key.default)})"
        text = key.text if whole or title == "Required" else _in_short_text(key)
        lines += _two_columns(f"  {key.name}{default}", text)
    return lines


def _in_short_text(key: Key) -> str:
    """Return the first sentence of a key's text and, if it is unset, what that means."""
    first, *more = re.split(r"(?<=\.) (?=[A-Z`])", key.text)
    return " ".join([first, *(text for text in more if key.default == "unset" and text.startswith("If unset"))])


def _two_columns(left: str, text: str) -> list[str]:
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    indent = " " * _KEY_WIDTH
    wrapped = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(left) < _KEY_WIDTH - 1 and wrapped:
        wrapped[0] = left.ljust(_KEY_WIDTH) + wrapped[0].lstrip()
        return wrapped
    return [left, *wrapped]


def _defaults_of_stage(stage: str, schema: type[Run]) -> dict[str, str]:
    """Return the defaults that the groups of a stage set, such as the learning rate of `reward`."""
    config: Any = compose(stage, schema, [], needs_run_dir=False).config
    found: dict[str, str] = {}
    for key in schema_keys(schema):
        value: Any = reduce(getattr, (key.name.replace("init.from", "init.from_")).split("."), config)
        if isinstance(value, bool | int | float | str) and not isinstance(value, Enum) and value != MISSING:
            found[key.name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


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
