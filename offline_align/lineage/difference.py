"""Name the settings and inputs in which a command differs from the finished run in its folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from offline_align.config.resume import Change, change_class, is_of_weights
from offline_align.lineage.key import RunSettings, flat, later_keys
from offline_align.lineage.manifest import CONFIG, Manifest

_MOST = 6


def differences(run_dir: Path, manifest: Manifest, config: dict[str, Any], settings: RunSettings) -> str:
    """Return what differs as text, such as `optim.lr=2e-05 (that run: 1e-05)`; "" if nothing is found.

    `config` is the configuration of this command, whose content hashes are in `settings`. A file or
    model under another name is named only if its content differs too.
    """
    found = [*_settings(run_dir, config, _same_content(manifest, settings), later_keys(settings.stage))]
    if not found:
        found = [*_contents(manifest, settings, flat(config))]
    more = [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return ", ".join(found[:_MOST] + more)


def _settings(run_dir: Path, config: dict[str, Any], same_content: bool, later: dict[str, Any]) -> Iterator[str]:
    before, now = _recorded(run_dir), flat(json.loads(json.dumps(config, default=str)))
    if not before:
        return
    loaded = before.get("init.from") is not None and now.get("init.from") is not None
    for key in [*now, *sorted(before.keys() - now.keys())]:
        old, new = before.get(key), now.get(key)
        # `config.yaml` has the architecture of loaded weights, and no tokenizer beside theirs.
        of_weights = loaded and (is_of_weights(key) or (key == "model.tokenizer" and old is None))
        renamed = same_content and _names_files(key)
        if old is None and key in later and new == later[key]:
            continue
        if old != new and change_class(key) is not Change.allow and not of_weights and not renamed:
            yield f"{key}={_shown(new)} (that run: {_shown(old)})"


def _recorded(run_dir: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flat(found) if isinstance(found, dict) else {}


def _same_content(manifest: Manifest, settings: RunSettings) -> bool:
    parents = {parent.content_sha256 for parent in manifest.parents}
    return [file.sha256 for file in manifest.inputs] == settings.inputs and parents >= set(settings.parents)


def _contents(manifest: Manifest, settings: RunSettings, now: dict[str, Any]) -> Iterator[str]:
    if [file.sha256 for file in manifest.inputs] != settings.inputs:
        named = [f"{key}={_shown(value)}" for key, value in now.items() if _names_data(key) and value is not None]
        yield f"{' or '.join(named) or 'a file of data'} (other content than that run read)"
    if not {parent.content_sha256 for parent in manifest.parents} >= set(settings.parents):
        named = [f"{key}={value}" for key, value in now.items() if _names_model(key) and value is not None]
        yield f"{' or '.join(named) or 'a model'} (other weights than that run read)"


def _names_files(key: str) -> bool:
    return _names_data(key) or _names_model(key)


def _names_data(key: str) -> bool:
    return key in ("data.train", "data.valid", "data.input", "judge.calibration")


def _names_model(key: str) -> bool:
    return key in ("init.from", "judge.model", "judge.second_model")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
