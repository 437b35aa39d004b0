"""Which settings may change when an unfinished run is continued: one table over all keys.

allow   decides where, when and how fast something is computed, but not what: outside every content key
warn    steers the steps that are still to come, or what is watched; the steps done stay as they are. The change is
        said, and recorded with the run
refuse  everything else: rows, tokenizer, template, model, seed and batch decide what the steps done were made of

A setting that is not named is refused, so a new key is safe until somebody has thought about it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Change(StrEnum):
    """What becomes of a changed setting."""

    allow = "allow"
    warn = "warn"
    refuse = "refuse"


# A section or a key, and why.
_WHY: dict[Change, dict[str, str]] = {
    Change.allow: {
        "run.dir": "where the run lives",
        "run.device": "where tensors live",
        "dry_run": "prints only",
        "debug": "tracebacks only",
        "launcher": "who starts the ranks, and how many",
        "parallel": "results do not depend on the layout",
        "data.cache_dir": "where tokens are kept",
        "trainer.max_time": "when to stop and go on later",
        "trainer.micro_batch_size": "results do not depend on it",
        "trainer.share_prompts": "results do not depend on it",
        "trainer.recompute": "memory for time",
        "trainer.log_interval": "how often metrics are written",
        "trainer.keep_checkpoints": "how many are kept",
        "trainer.async_save": "whether training waits for a save",
        "trainer.profile_steps": "what is traced",
        "trainer.wandb_project": "who else gets the metrics",
        "label.flush_rows": "how often the journal is written",
        "generate.batch_size": "how many prompts go together",
        "judge.concurrent_requests": "how many at a time",
        "judge.retries": "how patient the client is",
        "judge.timeout_seconds": "how patient the client is",
        "evaluate.runs": "the runs are parents",
        "convert.check": "compares, and writes nothing",
        "convert.evaluation": "its report is an input",
    },
    Change.warn: {
        "trainer.max_steps": "the run becomes longer or shorter; rows come in the same order",
        "trainer.max_epochs": "the run becomes longer or shorter; rows come in the same order",
        "trainer.eval_interval": "how often the validation set is looked at",
        "trainer.save_interval": "how often checkpoints are saved",
        "optim.lr": "rate of the steps to come",
        "optim.min_lr": "rate of the steps to come",
        "optim.lr_decay_style": "rate of the steps to come",
        "optim.lr_decay_steps": "rate of the steps to come",
        "optim.lr_warmup_steps": "rate of the steps to come",
        "optim.clip_grad": "largest gradient of the steps to come",
        "label.histogram_bins": "a figure that is drawn at the end",
    },
}
_LENGTH = {"trainer.max_steps", "trainer.max_epochs"}


def table() -> dict[str, tuple[Change, str]]:
    """Return every key or section that may change, what becomes of the change, and why."""
    return {key: (change, why) for change, keys in _WHY.items() for key, why in keys.items()}


def change_class(key: str) -> Change:
    """Return what becomes of a change of the dotted `key`: that of the key itself, or of its section."""
    parts = key.split(".")
    names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return next((change for change, keys in _WHY.items() if names & keys.keys()), Change.refuse)


def refused(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Return the changed keys that cannot be continued with, and what to do; all values by dotted keys."""
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    found = {key: "" for key in changed if change_class(key) is Change.refuse}
    decays = after.get("optim.lr_decay_style", "constant") != "constant" and after.get("optim.lr_decay_steps") is None
    if changed & _LENGTH and decays:
        advice = (
            "the learning rate decays over the length of the run: give optim.lr_decay_steps, "
            "or optim.lr_decay_style=constant"
        )
        found |= dict.fromkeys(changed & _LENGTH, advice)
    return found
