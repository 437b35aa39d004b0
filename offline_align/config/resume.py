"""Which settings may change when an unfinished run is continued: one table over all keys.

allow   The setting decides where, when or how fast something is computed, but not the result. It is
        part of no content key.
warn    The setting affects only the remaining steps or what is monitored. The change is logged and
        recorded with the run.
refuse  All other settings: rows, tokenizer, template, model, seed and batch size determined the
        steps that are done.

A setting that the table does not name is refused, which is the safe default for a new key.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Change(StrEnum):
    """How to treat a changed setting."""

    allow = "allow"
    warn = "warn"
    refuse = "refuse"


# Sections or keys, each with the reason.
_WHY: dict[Change, dict[str, str]] = {
    Change.allow: {
        "run.dir": "location of the run",
        "run.device": "device of the tensors",
        "dry_run": "prints only",
        "debug": "tracebacks only",
        "launcher": "who starts the ranks, and how many",
        "parallel": "results do not depend on the layout",
        "data.cache_dir": "location of the token cache",
        "data.dry_run_rows": "prints only",
        "trainer.max_time": "when to stop, to continue later",
        "trainer.micro_batch_size": "results do not depend on it",
        "trainer.share_prompts": "results do not depend on it",
        "trainer.recompute": "trades time for memory",
        "trainer.log_interval": "how often metrics are written",
        "trainer.keep_checkpoints": "how many checkpoints are kept",
        "trainer.async_save": "whether training waits for a save",
        "trainer.profile_steps": "which steps are traced",
        "trainer.wandb_project": "where metrics are sent as well",
        "label.flush_rows": "how often the journal is written",
        "label.statistics": "its file is an input",
        "generate.batch_size": "how many prompts form a batch",
        "judge.concurrent_requests": "how many requests run at a time",
        "judge.retries": "how the client handles failed requests",
        "judge.timeout_seconds": "how the client handles failed requests",
        "evaluate.runs": "the runs are parents",
        "convert.check": "compares and writes nothing",
        "convert.evaluation": "its report is an input",
    },
    Change.warn: {
        "method.critic_lr": "learning rate of the remaining steps",
        "method.max_kl": "when a run that goes wrong ends",
        "trainer.max_steps": "the run becomes longer or shorter; the order of the rows stays",
        "trainer.max_epochs": "the run becomes longer or shorter; the order of the rows stays",
        "trainer.eval_interval": "how often the model is validated",
        "trainer.save_interval": "how often checkpoints are saved",
        "optim.lr": "learning rate of the remaining steps",
        "optim.min_lr": "learning rate of the remaining steps",
        "optim.lr_decay_style": "learning rate of the remaining steps",
        "optim.lr_decay_steps": "learning rate of the remaining steps",
        "optim.lr_warmup_steps": "learning rate of the remaining steps",
        "optim.clip_grad": "maximum gradient norm of the remaining steps",
        "label.histogram_bins": "a figure that is drawn at the end",
    },
}
FREE_MODEL_KEYS = ("model.tokenizer", "model.backend", "model.overrides")
"""These keys decide how a model is run here, not what it is."""
_LENGTH = {"trainer.max_steps", "trainer.max_epochs"}


def table() -> dict[str, tuple[Change, str]]:
    """Return every key or section that may change, with its class and the reason."""
    return {key: (change, why) for change, keys in _WHY.items() for key, why in keys.items()}


def change_class(key: str) -> Change:
    """Return the class of the dotted `key`, which is its own or that of its section."""
    parts = key.split(".")
    names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return next((change for change, keys in _WHY.items() if names & keys.keys()), Change.refuse)


def is_of_weights(key: str) -> bool:
    """Return whether loaded weights decide this key, and not its value in the configuration."""
    return key.startswith("model.") and not key.startswith(FREE_MODEL_KEYS)


def refused(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Return the changed keys with which the run cannot continue, each with advice or "".

    `before` and `after` hold the values by dotted key.
    """
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    found = {key: "" for key in changed if change_class(key) is Change.refuse}
    decays = after.get("optim.lr_decay_style", "constant") != "constant" and after.get("optim.lr_decay_steps") is None
    if changed & _LENGTH and decays:
        advice = (
            "the learning rate decays over the length of the run: set optim.lr_decay_steps, "
            "or optim.lr_decay_style=constant"
        )
        found |= dict.fromkeys(changed & _LENGTH, advice)
    return found
