"""Estimate the KL divergence of each method's policy from the baseline's, on its own answers.

For answers y of policy p, the mean of log p(y) - log q(y) estimates KL(p || q) in nats per answer.
The estimate is unbiased if the answers were sampled with temperature 1 and top_p 1. Otherwise it is
only the mean log-ratio of these answers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from offline_align.config.runs import EvaluateRun
from offline_align.data.records import Sample
from offline_align.errors import AlignError
from offline_align.evaluate.comparison import Answer, Column, Comparison, generation_manifest
from offline_align.evaluate.results import choose_baseline
from offline_align.evaluate.statistics import Floats
from offline_align.lineage import CONFIG
from offline_align.lineage.manifest import describe_parent
from offline_align.model.description import ModelDescription
from offline_align.wording import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Log-ratios of each method's answers: its own policy against the baseline's."""

    nats: Floats
    """[prompts, samples, methods]; NaN if unknown."""
    tokens: Floats
    """[prompts, samples, methods]; tokens of the answers, 0 if the log-ratio is unknown."""
    sampled: tuple[bool, ...]
    """Whether each method sampled at temperature 1 and top_p 1, so the mean is unbiased."""


def measure_divergence(comparison: Comparison, config: EvaluateRun) -> Divergence | None:
    """Return log-ratios, or None if no policy can be compared with the baseline's.

    All ranks must call this together.
    """
    base = comparison.methods.index(choose_baseline(comparison.columns, config.evaluate.baseline))
    checkpoints = [policy_checkpoint(column) for column in comparison.columns]
    reference = checkpoints[base]
    if reference is None:
        log.warning("the checkpoint of %s is missing or has changed: no KL divergence", comparison.methods[base])
        return None
    known = [k for k, one in enumerate(checkpoints) if one is not None and _same_tokens(one, reference)]
    absent = [comparison.methods[k] for k in range(len(checkpoints)) if k not in known]
    if absent:
        log.warning("no KL divergence for %s: no checkpoint, or another tokenizer or template", ", ".join(absent))
    if known == [base]:
        return None
    nats, tokens = _log_ratios(comparison, {k: one for k in known if (one := checkpoints[k])}, base, config)
    return Divergence(nats, tokens, tuple(_sampled(column.path) for column in comparison.columns))


def policy_checkpoint(column: Column) -> Path | None:
    """Return the checkpoint that generated the answers, or None if it is missing or has changed."""
    manifest = generation_manifest(column.path)
    parents = manifest.parents if manifest else []
    models = [parent for parent in parents if parent.part or parent.stage == "checkpoint"]
    if len(models) != 1:
        return None
    folder = (column.path.parent / models[0].path / (models[0].part or "")).resolve()
    try:
        content = describe_parent(folder).content_sha256
        is_policy = ModelDescription.load(folder).kind == "policy"
    except (AlignError, OSError):
        return None
    return folder if is_policy and content == models[0].content_sha256 else None


def _same_tokens(policy: Path, reference: Path) -> bool:
    """Return whether both turn text into the same tokens and so have comparable likelihoods."""
    return ModelDescription.load(policy).text_form == ModelDescription.load(reference).text_form


def _sampled(generation_file: Path) -> bool:
    """Return whether answers were sampled with temperature 1 from the whole vocabulary."""
    try:
        config: Any = yaml.safe_load((generation_file.parent / CONFIG).read_text(encoding="utf-8"))
        return bool(config["generate"]["temperature"] == 1 and config["generate"]["top_p"] == 1)
    except (OSError, LookupError, TypeError, yaml.YAMLError):
        return False


def _log_ratios(
    comparison: Comparison, checkpoints: dict[int, Path], base: int, config: EvaluateRun
) -> tuple[Floats, Floats]:
    """Return log-ratios and tokens [prompts, samples, methods]. Loads each policy once."""
    from offline_align.evaluate.likelihood import Given, log_likelihoods

    samples = comparison.samples()
    methods, shape = len(comparison.methods), comparison.shape

    def given(k: int, asked: Sequence[Answer]) -> list[Given]:
        """Return the answers of column k with the conditions of `asked`."""
        rows: list[Sample] = samples[k::methods]
        return [
            Given(sample, one.condition or "", answer.finish_reason != "length")
            for sample, answer, one in zip(rows, comparison.of_method(k), asked, strict=True)
        ]

    def score(checkpoint: Path, columns: Sequence[int], asked: dict[int, list[Answer]]) -> dict[int, Any]:
        found = log_likelihoods(checkpoint, [one for k in columns for one in given(k, asked[k])], config)
        parts = [np.split(values, len(columns)) for values in (found.nats, found.tokens)]
        return {k: (parts[0][i], parts[1][i]) for i, k in enumerate(columns)}

    log.info("computing likelihoods of the answers of %s", counted(len(checkpoints), "method"))
    plain = score(checkpoints[base], list(checkpoints), dict.fromkeys(checkpoints, comparison.of_method(base)))
    own = {base: plain[base]}
    for policy in dict.fromkeys(checkpoints.values()):
        columns = [k for k, one in checkpoints.items() if one == policy and k != base]
        own |= score(policy, columns, {k: comparison.of_method(k) for k in columns}) if columns else {}
    nats, tokens = np.full(shape, np.nan), np.zeros(shape)
    for k in checkpoints:
        nats[:, :, k] = (own[k][0] - plain[k][0]).reshape(shape[:2])
        tokens[:, :, k] = np.where(np.isfinite(nats[:, :, k]), own[k][1].reshape(shape[:2]), 0)
    return nats, tokens
