"""Compose the command line into one frozen configuration and report all mistakes at once.

Hydra composes the YAML groups under `configs/` and parses the overrides. It creates no folders and
sets up no logging. Each value is then checked against the dataclass schema by itself, so that one
wrong key does not hide the next one.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from offline_align.config.foreign_names import FOREIGN, Answer, normal
from offline_align.config.runs import Run
from offline_align.config.sections import ConditionalMethodSection
from offline_align.config.words import parse, split_dashed, split_flags, with_home
from offline_align.distributed.launched import launched
from offline_align.errors import ConfigError

# `from` is a Python keyword, so the field for the key `init.from` has a trailing underscore.
_ALIASES = {"init.from": "init.from_"}
_OPEN_MAPPINGS = (
    *("model.overrides.", "model.rope_scaling.", "launcher.environment.", "launcher.sbatch."),
    *("prepare.columns.", "prepare.score_column.", "data.weights."),
)
# Keys that name files or folders. `~` is expanded in all of them, since a shell expands it only at
# the start of a word.
_PATHS = {
    "run.dir",
    "init.from",
    "model.tokenizer",
    "data.train",
    "data.valid",
    "data.input",
    "data.ptx",
    "method.reward_model",
    "method.critic",
    "data.cache_dir",
    "judge.model",
    "judge.second_model",
    "judge.calibration",
    "evaluate.runs",
    "convert.evaluation",
    "launcher.container_image",
    "launcher.container_mounts",
    "launcher.python",
}
MISSING = "???"


@dataclass
class Composed:
    """A configuration, the dotted keys that the user set, and the problems found so far."""

    config: Run
    explicit: frozenset[str]
    problems: list[str] = field(default_factory=list)
    refused: frozenset[str] = frozenset()
    """Keys that were given with a value that cannot be used."""


@dataclass(frozen=True)
class _Value:
    key: str
    value: Any
    origin: str
    explicit: bool
    add: bool = False


def configs_dir() -> Path:
    """Return the folder of YAML groups: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def compose(stage: str, schema: type[Run], words: list[str], needs_run_dir: bool = True) -> Composed:
    """Return the configuration of `stage` for command-line words such as `optim.lr=1e-5`.

    `--config-dir DIR` adds the user's own groups (`model=mine` is `DIR/model/mine.yaml`).
    `--config FILE` reads values from a YAML file, for example the `config.yaml` of an earlier run.
    The command line overrides the file, and the file overrides the groups. Problems are collected,
    not raised.
    """
    problems: list[str] = []
    words, folder, file = split_flags(words, problems)
    words, dashed = split_dashed(words)
    searched = [folder, configs_dir()] if folder else [configs_dir()]
    overrides, unreadable = parse(words, problems)
    groups = [o for o in overrides if _is_group(o.key_or_group, searched)]
    chosen = [w for o in groups if (w := _group_choice(o, searched, problems))]
    tree = _compose_groups(stage, chosen, folder, problems)
    config = OmegaConf.structured(schema)
    _thaw(config)
    others = _keys_of_choices(chosen) - dict(_schema_keys(config)).keys()
    values = [_Value(k, v, "configs/", explicit=False) for k, v in _leaves(tree) if k not in others]
    if file is not None:
        values += _file_values(file, problems)
    values += [
        _Value(o.key_or_group, o.value(), "command line", explicit=True, add=o.is_add())
        for o in overrides
        if o not in groups
    ]
    own = [k.removesuffix("_") for k, _ in _schema_keys(config)]
    problems += [_undashed(word, name, value, own, stage) for word, name, value in dashed]
    accepted = [v for v in values if _assign(config, v, problems, stage)]
    refused = unreadable | {v.key for v in values if v not in accepted}
    # Do not report a key as unset if it was given under another name.
    refused |= {_our_key(name, own) for name in (*refused, *(name for _, name, _ in dashed))}
    if "run.dir" not in refused and _lacks_run_dir(config, needs_run_dir):
        problems.append("run.dir is not set: give the folder of the run, as run.dir=runs/NAME")
    explicit = frozenset(v.key for v in accepted if v.explicit) | {o.key_or_group for o in groups}
    return Composed(_settled(_build(schema, config)), explicit, problems, frozenset(refused))


def _settled[R: Run](config: R) -> R:
    """Return the configuration with each unset value that other values of its section decide."""
    sections: dict[str, Any] = vars(config)
    settled: dict[str, Any] = {
        name: part.settled() for name, part in sections.items() if isinstance(part, ConditionalMethodSection)
    }
    return dataclasses.replace(config, **settled)


def _lacks_run_dir(config: DictConfig, needed: bool) -> bool:
    """Return whether `run.dir` is missing.

    An empty value, for example from an unset shell variable, would mean the current folder and
    counts as missing.
    """
    if OmegaConf.is_missing(config.run, "dir"):
        return needed
    return not config.run.dir.strip()


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values by the keys that a user types, for `config.yaml`."""
    return {f.name.rstrip("_"): _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _is_group(key: str, searched: list[Path]) -> bool:
    return "." not in key and any((folder / key).is_dir() for folder in searched)


def _group_choice(override: Override, searched: list[Path], problems: list[str]) -> str | None:
    group, choice = override.key_or_group, override.value()
    known = sorted({p.stem for folder in searched for p in (folder / group).glob("*.yaml")})
    if choice in known:
        return f"{group}={choice}"
    is_path = group == "model" and "/" in str(choice)
    advice = f"; weights are named by init.from={choice}" if is_path else _nearest(str(choice), known)
    problems.append(f"{group}={choice}: no such choice{advice}; there are {', '.join(known)}")
    return None


def _compose_groups(stage: str, chosen: list[str], folder: Path | None, problems: list[str]) -> dict[str, Any]:
    search = [f"hydra.searchpath=[file://{folder}]"] if folder else []
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        try:
            composed = hydra_compose(f"stage/{stage}", [*search, *chosen])
        except (HydraException, yaml.YAMLError):
            usable = _usable_groups(stage, chosen, search, problems)
            try:
                composed = hydra_compose(f"stage/{stage}", [*search, *usable])
            except (HydraException, yaml.YAMLError) as error:
                raise ConfigError([*problems, f"--config-dir={folder}: {str(error).partition(chr(10))[0]}"]) from error
    tree = OmegaConf.to_container(composed)
    assert isinstance(tree, dict)
    return {str(k): v for k, v in tree.items()}


def _keys_of_choices(chosen: list[str]) -> set[str]:
    """Return the keys that the chosen groups of the package set.

    A group such as `trainer=cpu` serves several stages, and each takes the keys that it has.
    """
    found: set[str] = set()
    for group, _, choice in (word.partition("=") for word in chosen):
        path = configs_dir() / group / f"{choice}.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            prefix = "" if text.startswith("# @package _global_") else f"{group}."
            found |= {key for key, _ in _leaves(yaml.safe_load(text), prefix)}
    return found


def _usable_groups(stage: str, chosen: list[str], search: list[str], problems: list[str]) -> list[str]:
    """Try the groups one by one, and report each that this stage does not have; return the others."""
    usable = []
    for word in chosen:
        try:
            hydra_compose(f"stage/{stage}", [*search, word])
            usable.append(word)
        except yaml.YAMLError as error:
            problems.append(f"{word}: not readable as YAML: {str(error).partition(chr(10))[0]}")
        except HydraException:
            problems.append(
                f"{word}: `{stage}` has no group {word.partition('=')[0]}; see offline-align {stage} --help"
            )
    return usable


def _file_values(file: Path, problems: list[str]) -> list[_Value]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # any error of the parser is a mistake in the user's file
        problems.append(f"--config={file}: not readable as YAML: {str(error).splitlines()[0]}")
        return []
    if not isinstance(tree, dict):
        problems.append(f"--config={file}: must hold a mapping of sections")
        return []
    return [_Value(k, v, str(file), explicit=v is not None) for k, v in _leaves({str(k): v for k, v in tree.items()})]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and f"{key}." not in _OPEN_MAPPINGS:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _thaw(node: DictConfig) -> None:
    """Make the schema of frozen dataclasses writable while it is composed."""
    node._set_flag("readonly", False)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            _thaw(child)


def _assign(config: DictConfig, item: _Value, problems: list[str], stage: str) -> bool:
    """Put one value into the schema. Add a problem and return False if it does not fit."""
    where = "" if item.origin == "command line" else f" (in {item.origin})"
    shown = f"{item.key}={'null' if item.value is None else item.value}"
    key = _ALIASES.get(item.key, item.key)
    is_open = key.startswith(_OPEN_MAPPINGS)
    known = dict(_schema_keys(config))
    if key not in known and not is_open:
        spelt = [k.removesuffix("_") for k in known]
        problems.append(f"{shown}{where}: unknown key{_advice(item.key, item.value, spelt, stage)}")
        return False
    if known.get(key) is bool and not isinstance(item.value, bool):
        problems.append(f"{shown}{where}: expected true or false")
        return False
    value = with_home(item.value) if item.key in _PATHS else item.value
    try:
        OmegaConf.update(config, key, value, merge=False, force_add=is_open)
    except OmegaConfBaseException as error:
        problems.append(f"{shown}{where}: {_reason(error)}")
        return False
    return True


def _schema_keys(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in config:
        child = config._get_node(name)
        key = prefix + str(name)
        if isinstance(child, DictConfig) and f"{key}." not in _OPEN_MAPPINGS:
            yield from _schema_keys(child, f"{key}.")
        else:
            yield key, child._metadata.ref_type  # type: ignore[union-attr]


def _reason(error: OmegaConfBaseException) -> str:
    text: str = str(error).partition("\n")[0]
    if "expected one of" in text:
        return f"expected one of {text[text.index('[') :]}"
    if "is not Optional" in text:
        return "null is not allowed; give a value"
    kind = {"Integer": "a whole number", "Float": "a number", "String": "a text"}
    return next((f"expected {v}" for k, v in kind.items() if text.endswith(k)), text)


def _advice(name: str, value: Any, known: list[str], stage: str) -> str:
    """Return what to write in place of an unknown key, also if other programs call it so; "" if nothing fits."""
    same = [key for key in known if normal(key) == normal(name)]
    answer = FOREIGN.get(normal(name))
    if same or answer is None:
        return f"; did you mean {same[0]}?" if same else _nearest(name, known)
    if answer.key not in known:
        return f"; it is {answer.key} here, which `{stage}` does not have"
    if answer.note:
        return f"; here it is {answer.key}: {answer.note}"
    return f"; write {answer.key}={'...' if value is None else value}"


def _our_key(name: str, known: list[str]) -> str:
    same = [key for key in known if normal(key) == normal(name)]
    return same[0] if same else FOREIGN.get(normal(name), Answer(name)).key


def _undashed(word: str, name: str, value: str | None, known: list[str], stage: str) -> str:
    """Return the problem of an argument such as `--learning-rate 1e-5`."""
    key = name.replace("-", "_")
    if key in known:
        return f"{word}: arguments have no dashes; write {key}={'...' if value is None else value}"
    return f"{word}: arguments are key=value, without dashes{_advice(key, value, known, stage)}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _build[T](cls: type[T], node: DictConfig) -> T:
    """Turn the checked tree into frozen dataclasses. A missing value stays `???`."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        child = node._get_node(f.name)
        if isinstance(child, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(child)):
            values[f.name] = _build(OmegaConf.get_type(child), child)  # type: ignore[arg-type]
        elif OmegaConf.is_missing(node, f.name):
            values[f.name] = MISSING
        else:
            value = node[f.name]
            values[f.name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return cls(**values)


def require(composed: Composed, more: list[str]) -> Run:
    """Return the configuration. Raises one ConfigError with all problems if there are any."""
    # Do not report a key as unset if it was given with an unusable value.
    more = [problem for problem in more if problem.partition(" is not set")[0] not in composed.refused]
    problems = composed.problems + more
    if problems:
        raise ConfigError(problems)
    return composed.config


def world_size(nproc_per_node: int, nodes: int) -> int:
    """Return the number of ranks of the running launcher, else that of the launcher section.

    Raises ConfigError if the rank variables in the environment contradict each other.
    """
    place = launched()
    return nproc_per_node * nodes if place is None else place.world_size
