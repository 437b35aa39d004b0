"""Content keys: identify the result of a stage before it is computed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offline_align.config.resume import Change, change_class
from offline_align.errors import ConfigError
from offline_align.lineage.files import canonical_json, file_size, real_path, text_sha256
from offline_align.lineage.manifest import CONFIG, Manifest, Sources, read_manifest

# These settings came after the first results. With these values they mean what was meant before, and are
# left out of the keys, which stay as they are.
_LATER_KEYS: dict[str, Any] = {
    "data.template_date": None,
    "data.sample": None,
    "data.sample_by": "source",
    "data.source_column": "source",
    "label.best_of": None,
    "method.condition": "value",
    "method.quantiles": 5,
    "method.quantile_format": "<rm_score>{quantile}",
    "method.bounds": 1,
    "method.weight_by_reward": False,
}
# Settings that came later to one stage only.
_LATER_KEYS_OF: dict[str, dict[str, Any]] = {"ca": {"method.beta": 5.0}}

CHANGES = "changed_settings"
"""Key in the manifest for the changed settings of a continued run."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that determines the result of a run; file names are replaced by content hashes."""

    stage: str
    config: dict[str, Any]
    inputs: list[str]
    parents: list[str]

    @property
    def key(self) -> str:
        """The content key: equal keys mean equal results."""
        return text_sha256(canonical_json(asdict(self)))

    @property
    def continuation(self) -> str:
        """Key of the settings that must not change when an unfinished run is continued.

        It marks the steps, scores and answers that are done so far.
        """
        fixed = {name: value for name, value in self.flat().items() if change_class(name) is Change.refuse}
        return text_sha256(canonical_json([self.stage, fixed]))

    def flat(self) -> dict[str, Any]:
        """Return the settings by dotted key, with the hashes of inputs and parents."""
        return flat(self.config) | {"inputs": self.inputs, "parents": self.parents}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, value in node.items() for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def run_settings(stage: str, config: dict[str, Any], sources: Sources) -> RunSettings:
    """Return everything that determines the result of a stage.

    That is the stage, the settings that change results, and the content of inputs and parents. A
    setting that names one of these files is replaced by its content hash, so data and runs can be
    moved or renamed.
    """
    digests = {record.path: record.sha256 for record in sources.files}
    for path, parent in sources.parents.items():
        digests |= {str(path.resolve()): parent.content_sha256, parent.path: parent.content_sha256}
    relevant = _relevant(config, digests, later_keys(stage))
    inputs = [record.sha256 for record in sources.files]
    return RunSettings(stage, relevant, inputs, [parent.content_sha256 for parent in sources.parents.values()])


def later_keys(stage: str) -> dict[str, Any]:
    """Return the settings of a stage that came after the first results, with the values that change nothing."""
    return _LATER_KEYS | _LATER_KEYS_OF.get(stage, {})


def finished_key(key: str, changes: Sequence[Any]) -> str:
    """Return the key of a finished run, which includes the settings that were changed on the way.

    Neither set of settings alone gives the result of such a run.
    """
    return text_sha256(canonical_json([key, list(changes)])) if changes else key


def completed(
    run_dir: Path, stage: str, key: str, differences: Callable[[Manifest], str] = lambda manifest: ""
) -> bool:
    """Return whether `run_dir` has the finished run with this key, and all outputs in full size.

    Contents are not hashed again; `verify` does that. `differences` returns what differs from a finished
    run with another key, as text. Raises ConfigError if the folder has a
    finished run of another stage, other settings or other inputs, and StorageError if its manifest
    is damaged.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return False
    if manifest.stage != stage:
        raise ConfigError(f"run.dir={run_dir}: holds a finished run of `{manifest.stage}`; choose another folder")
    if manifest.key != finished_key(key, manifest.extra.get(CHANGES, [])):
        named = differences(manifest) or f"its own are in {CONFIG}"
        raise ConfigError(
            f"run.dir={run_dir}: holds a finished `{stage}` run with other settings or inputs: {named}; "
            "choose another folder, or remove this one"
        )
    return not incomplete_outputs(run_dir, manifest)


def incomplete_outputs(run_dir: Path, manifest: Manifest | None) -> list[str]:
    """Return the outputs in a manifest that are missing or have another size."""
    outputs = manifest.outputs if manifest else ()
    return [record.path for record in outputs if file_size(run_dir / record.path) != record.bytes]


def _relevant(node: Any, digests: dict[str, str], later: dict[str, Any], key: str = "") -> Any:
    """Return the settings that change results, with known file names replaced by content hashes.

    Those that have their value in `later` are left out.
    """
    if isinstance(node, dict):
        dotted = {name: f"{key}.{name}".lstrip(".") for name in node}
        values = {
            n: _relevant(node[n], digests, later, dotted[n])
            for n in node
            if change_class(dotted[n]) is not Change.allow and not (dotted[n] in later and node[n] == later[dotted[n]])
        }
        return {name: value for name, value in values.items() if value != {}}
    if isinstance(node, list | tuple):
        return [_relevant(value, digests, later, key) for value in node]
    if isinstance(node, str) and node and "\0" not in node:
        path = Path(node)
        return digests.get(str(path.resolve()), digests.get(str(real_path(path)), node))
    return node
