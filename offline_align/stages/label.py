"""`label`: a reward model scores SFT rows and both answers of pairs (the paper's step 3)."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_align import lineage
from offline_align.config.runs import LabelRun
from offline_align.data.bins import shares_prompts
from offline_align.data.fate import write_left_out
from offline_align.data.journal import Journal
from offline_align.data.records import (
    BadRows,
    PreferencePair,
    Sample,
    input_paths,
    read_rows_and_pairs,
    write_jsonl,
)
from offline_align.data.score_journal import read_scores
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.label.certificate import FILE_NAME, certify, choose_rows, in_words
from offline_align.label.earlier import check_reward_model, read_scale
from offline_align.label.results import BEST, best_answers, write_results
from offline_align.label.rows import check_answers, leave_out_unscorable, single_answers
from offline_align.label.statistics import Scale
from offline_align.lineage import effort
from offline_align.lineage.manifest import describe_parent
from offline_align.stages.job import Job
from offline_align.stages.row_choice import RowChoice, say_sources
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.data.bins import SampleSource
    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)


def run(job: Job[LabelRun]) -> int:
    """Score every row and write `labelled.jsonl`, its statistics and the histogram of Figure 3."""
    if job.config.dry_run:
        from offline_align.stages.dry_run import print_label_dry_run

        print_label_dry_run(job)
        return 0
    return job.on_ranks(lambda ranks: _label(job, ranks))


def problems(job: Job[LabelRun]) -> list[str]:
    """Return the problem of `label.statistics`, if it has one; raises DataError if it has no scale of rewards."""
    named = _statistics_file(job.config)
    if named is None or not named.is_file():
        return []
    read_scale(named)
    try:
        models = job.models
    except ConfigError:
        return []  # reported as a problem of `init.from`
    try:
        # A model in a finished run has its hash in the manifest; others are hashed when the run begins.
        known = [model for model in models if any((run / lineage.MANIFEST).is_file() for run in model.parents[:2])]
        if known:
            _check_scale(job, [describe_parent(model) for model in known])
    except ConfigError as error:
        return error.problems
    return []


def _statistics_file(config: LabelRun) -> Path | None:
    named = config.named_files()["label.statistics"]
    return None if named is None else Path(named)


def _check_scale(job: Job[LabelRun], models: Iterable[lineage.ParentRecord]) -> None:
    named = _statistics_file(job.config)
    if named is not None:
        check_reward_model(named, str(job.config.label.statistics), str(job.config.init.from_), models)


def _given_scale(job: Job[LabelRun]) -> Scale | None:
    """Return the scale that `label.statistics` names, or None; on one rank, because it hashes what the run reads.

    Raises ConfigError if it is that of another reward model.
    """
    _check_scale(job, job.hashed.parents.values())
    named = _statistics_file(job.config)
    return None if named is None else read_scale(named)


def _label(job: Job[LabelRun], ranks: "Ranks") -> None:
    from offline_align.label.scoring import tokenized

    renderer = job.source.renderer()
    scale = ranks.from_main(lambda: _given_scale(job))
    job.start_folder(ranks=ranks)
    bad_rows = job.bad_rows(ranks.is_main)
    choice = RowChoice(job.config.data, job.config.run.seed)
    rows, left_out = ranks.main_first(lambda: _rows(job, renderer, bad_rows, choice))
    if ranks.is_main:
        say_sources("data.input", choice, choice.counts)
    samples = list(single_answers(rows))
    config = job.config
    shares = shares_prompts(config.trainer, config.parallel)
    with effort.part("data"):
        source = ranks.main_first(
            lambda: tokenized(samples, renderer, config.data, job.cache_dir, shares, announced=True)
        )
        ranks.require_same(source.fingerprint(), "data.input")
    # The name of the journal is a hash of settings, model and tokens, so a later attempt never uses
    # scores of another model, of other data, or of the same data with other tokens.
    scored = lineage.text_sha256(f"{job.key.continuation} {source.fingerprint()}")
    journal = Journal(job.run_dir, scored, ranks.dp_rank)
    _score_missing(job, source, journal, ranks)
    again = _score_again(job, samples, renderer, ranks)
    facts: dict[str, Any] = {"sources": choice.counts, "dropped": dict(Counter(left_out.values()))}
    facts |= {"bad_rows": dict(bad_rows.counts)}
    facts |= job.source.description.text_form

    def write() -> None:
        # These rows have no line in `labelled.jsonl`, so they are named.
        named = write_left_out(job.run_dir, left_out)
        _write_results(job, rows, samples, journal, again, scale, facts, [named])

    ranks.from_main(write)


@effort.part("data")
def _rows(
    job: Job[LabelRun], renderer: Renderer, bad_rows: BadRows, choice: RowChoice
) -> tuple[list[Sample | PreferencePair], dict[str, str]]:
    """Return the chosen rows that can be scored, and the reason for each that does not fit, by its id.

    Raises DataError for a bad row unless `data.on_bad_row` is `skip`.
    """
    files = input_paths(job.config.data.input, "data.input")
    rows = choice.of(list(read_rows_and_pairs(files, Sample, bad_rows)))
    if job.config.label.best_of is not None:
        check_answers(rows, job.config.label.best_of, files)
    return leave_out_unscorable(rows, files, renderer, job.config.data, job.cache_dir, bad_rows)


@effort.part("scoring")
def _score_missing(job: Job[LabelRun], source: "SampleSource", journal: Journal, ranks: "Ranks") -> None:
    """Score the rows that the journal lacks.

    Raises StoppedEarly, with all scores on disk, if a rank was asked to stop.
    """
    from offline_align.distributed.setup import uses_bf16
    from offline_align.label.scoring import load_reward_model, scores_of
    from offline_align.model.passes import Compute, complete_journal

    config = job.config

    def build() -> tuple[Compute, bool]:
        bf16 = uses_bf16(config.trainer.precision, ranks.device)
        return scores_of(load_reward_model(job.source, config.parallel, ranks, bf16))

    complete_journal(
        journal,
        source,
        1,
        config.trainer.micro_batch_size * config.data.max_length,
        build,
        ranks,
        title="labelling",
        max_time=config.trainer.max_time,
        flush_rows=config.label.flush_rows,
    )


@effort.part("scoring")
def _score_again(job: Job[LabelRun], samples: list[Sample], renderer: Renderer, ranks: "Ranks") -> dict[int, float]:
    """Return new scores of the rows of the certificate, with each row alone in its bin, in reverse order."""
    from offline_align.distributed.setup import uses_bf16
    from offline_align.label.scoring import load_reward_model, score_all, tokenized

    config = job.config
    rows = choose_rows(len(samples), config.label.certificate_fraction, config.run.seed)
    if not rows:
        return {}
    model = load_reward_model(job.source, config.parallel, ranks, uses_bf16(config.trainer.precision, ranks.device))
    chosen = [samples[row] for row in rows]
    source = ranks.main_first(lambda: tokenized(chosen, renderer, config.data, job.cache_dir))
    bins = [[place] for place in reversed(range(len(rows)))]
    merged = score_all(model, source, bins, ranks)
    return {rows[place]: merged[place] for place in sorted(merged)}


def _write_results(
    job: Job[LabelRun],
    rows: list[Sample | PreferencePair],
    samples: list[Sample],
    journal: Journal,
    again: dict[int, float],
    scale: Scale | None,
    facts: dict[str, Any],
    more_outputs: list[Path],
) -> None:
    run_dir = job.run_dir
    scores = read_scores(journal, len(samples))
    missing = [s.id for i, s in enumerate(samples) if i not in scores]
    if missing:
        raise StorageError(
            f"{journal.folder}: lacks {counted(len(missing), 'score')}, first of row {missing[0]}: "
            "run the same command again"
        )
    raw = [scores[i][0] for i in range(len(samples))]
    _check_finite(samples, raw)
    columns = [_columns(sample) for sample in samples]
    stats, outputs = write_results(run_dir, columns, raw, job.config.label.histogram_bins, scale)
    outputs += more_outputs
    if again:
        certificate = certify([raw[row] for row in again], list(again.values()), stats)
        outputs.append(run_dir / FILE_NAME)
        lineage.write_atomically(outputs[-1], (json.dumps(certificate, indent=2) + "\n").encode())
        facts = facts | {"certificate": certificate}
        logger.info("label: %s", in_words(certificate))
    if job.config.label.best_of is not None:
        outputs.append(run_dir / BEST)
        write_jsonl(outputs[-1], best_answers(samples, raw, job.config.label.best_of))
        facts = facts | {"method": _name_of_best(job, samples)}
    pairs = sum(isinstance(r, PreferencePair) for r in rows)
    extra = {"rows": len(samples), "pairs": pairs, **facts, "statistics": stats.as_json()}
    job.finish(outputs, extra)
    journal.remove()
    earlier = f", normalised with {scale.mean:.3f} +- {scale.std:.3f}" if scale else ""
    found = f"rewards {stats.mean:.3f} +- {stats.std:.3f}{earlier}"
    logger.info("label: %s, %s: %s", counted(len(samples), "row"), found, run_dir)


def _name_of_best(job: Job[LabelRun], samples: list[Sample]) -> str:
    """Return the name of best-of-n in reports, with the policy's method if its run is known."""
    answers = max(Counter((row.columns.get("id"), row.columns.get("condition")) for row in samples).values())
    manifest = lineage.read_manifest(input_paths(job.config.data.input, "data.input")[0].parent)
    policy = str(manifest.extra.get("method") or "") if manifest is not None else ""
    return f"{policy} best of {answers}".strip()


def _check_finite(samples: list[Sample], raw: list[float]) -> None:
    bad = [s.id for s, x in zip(samples, raw, strict=True) if not math.isfinite(x)]
    if bad:
        such = counted(len(bad), "such row")
        raise DataError(f"row {bad[0]}: its score is not finite ({such}): train the reward model again")


def _columns(sample: Sample) -> dict[str, Any]:
    """Return the columns of a sample with its own id and a source; the id of a pair becomes `source_id`."""
    known = sample.columns.get("source_id")
    source_id = known if isinstance(known, str) and known.strip() else sample.columns.get("id") or sample.id
    source = {"source": sample.file} if sample.columns.get("source") in (None, "") else {}
    return sample.columns | source | {"id": sample.id, "source_id": source_id}
