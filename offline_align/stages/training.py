"""The body of all training stages: read and tokenise rows, train, write checkpoints.

The stages differ only in their rows and objective, which the `Recipe` in the registry states.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offline_align import lineage
from offline_align.config.runs import TrainRun, section
from offline_align.config.sections import MethodSection, Precision
from offline_align.data.condition import Condition
from offline_align.data.jsonl import is_empty
from offline_align.data.records import BadRows, PreferencePair, input_paths, read_rows, reject_rows
from offline_align.data.template import Renderer
from offline_align.lineage import effort
from offline_align.progress import announced
from offline_align.stages.job import Job
from offline_align.stages.recipe import PairRecipe, Recipe, RowRecipe
from offline_align.stages.reward_scale import other_scale, scale_facts
from offline_align.stages.row_choice import RowChoice, row_choice, say_sources
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.data import bins
    from offline_align.data.loader import Loader
    from offline_align.distributed.setup import Ranks
    from offline_align.train.checkpoint import TrainState
    from offline_align.train.trainer import Trainer

logger = logging.getLogger(__name__)

# If at least this share of the tokens belongs to repeated prompts, a hint is logged.
_GROUPING_HINT_SHARE = 0.1


def run(job: Job[TrainRun]) -> int:
    """Train, or print the dry run; return the exit code."""
    if job.config.dry_run:
        from offline_align.stages.dry_run import print_training_dry_run

        print_training_dry_run(job)
        return 0
    return job.on_ranks(lambda ranks: _train(job, ranks))


def _train(job: Job[TrainRun], ranks: "Ranks") -> None:
    from offline_align.data.shown import first_row
    from offline_align.distributed.stopping import stop_requests

    config = job.config
    job.start_folder(job.source.model if config.init.from_ else None, ranks)
    renderer = training_renderer(job)
    bad_rows = job.bad_rows(ranks.is_main)
    recipe = recipe_of(job)
    train = _read(job, "train", recipe.train, renderer, ranks, bad_rows)
    assert train is not None
    held_out = _read(job, "valid", recipe.valid, renderer, ranks, bad_rows, train.fitted)
    data, condition = train.source, recipe.condition(train.fitted) if recipe.condition else None
    short = one_step(config, data.epoch_rows)
    if ranks.is_main:
        logger.info("first row, as the model sees it:\n%s", first_row(data, renderer))
        _warn(short)
        _warn(other_scale(train.facts, held_out.facts if held_out else {}))
    if ranks.is_main and data.share_prompts and not config.data.group_by_prompt:
        _log_grouping_gain(data.repeated_share())
    with announced("building the model", enabled=ranks.is_main):
        trainer = _assemble(job, data, held_out.source if held_out else None, condition, ranks)
    with stop_requests(config.trainer.max_time) as stop:
        state = trainer.fit(stop)
    if ranks.is_main:
        done = _facts(job, train.facts, condition, state) | {"speed": trainer.speed.summary()}
        job.finish([job.run_dir / "metrics.jsonl", job.run_dir / "checkpoints"], done)
        logger.info(
            "%s: done after %s, %s: %s", job.stage.name, counted(state.step, "step"), effort.in_words(), job.run_dir
        )
        _warn(short)
    ranks.barrier()


def recipe_of(job: Job[TrainRun]) -> Recipe:
    """Return the rows and the objective of a training stage."""
    assert job.stage.recipe is not None
    return job.stage.recipe


def training_renderer(job: Job[TrainRun]) -> Renderer:
    """Return what turns the rows of a training into ids."""
    # A third-party reward model that is trained further reads rows as ours do, not as in transformers.
    description = replace(job.source.description, kind=recipe_of(job).makes, reading=None)
    return description.renderer(job.source.tokenizer)


def one_step(config: TrainRun, rows: int) -> str | None:
    """Return a warning if the batch is so large that all epochs over `rows` rows are one step, else None."""
    trainer = config.trainer
    if trainer.max_steps is not None or rows * trainer.max_epochs > trainer.global_batch_size:
        return None
    return (
        f"the run has only 1 step: trainer.global_batch_size={trainer.global_batch_size} takes all {rows} rows of "
        f"trainer.max_epochs={trainer.max_epochs} at once; use a smaller batch, or more epochs"
    )


def _warn(problem: str | None) -> None:
    if problem is not None:
        logger.warning("%s", problem)


def _log_grouping_gain(share: float) -> None:
    if share >= _GROUPING_HINT_SHARE:
        fix = "data.group_by_prompt=true puts all rows of a prompt into one step, which computes it once"
        logger.info("data.train: %.0f %% of the tokens belong to prompts that occur again; %s", 100 * share, fix)


@dataclass(frozen=True)
class ReadRows:
    """The tokenised rows of a key."""

    source: "bins.RowSource"
    facts: dict[str, Any]
    """Entries for the manifest."""
    fitted: Any
    """What decides what a row becomes, as `RowRecipe.fit` returned it or `finalize` replaced it."""


@effort.part("data")
def _read(
    job: Job[TrainRun],
    which: Literal["train", "valid"],
    rows: RowRecipe | PairRecipe,
    renderer: Renderer,
    ranks: "Ranks",
    bad_rows: BadRows,
    fitted: Any = None,
) -> ReadRows | None:
    """Return the rows of `data.train` or `data.valid`; None if the key is not set or its file is empty.

    `fitted` is that of the training rows, for validation rows.
    """
    key = f"data.{which}"
    named = job.config.named_files()[key]
    if named is None:
        return None
    paths = input_paths(named, key)
    if which == "valid" and is_empty(paths):  # `prepare` writes an empty file if it has few rows
        logger.warning("data.valid=%s: has no rows; the run goes without validation", named)
        return None
    choice = row_choice(job.config, which)
    read = ranks.main_first(lambda: tokenized(job, paths, rows, renderer, bad_rows, job.cache_dir, choice, fitted))
    mixture = read.source.mixture.fingerprint() if read.source.mixture else None
    ranks.require_same((read.source.fingerprint(), mixture), key)
    if ranks.is_main:
        say_sources(key, choice, read.facts["sources"])
    return read


def tokenized(
    job: Job[TrainRun],
    paths: list[Path],
    rows: RowRecipe | PairRecipe,
    renderer: Renderer,
    bad_rows: BadRows,
    cache_dir: Path,
    choice: RowChoice,
    fitted: Any = None,
) -> ReadRows:
    """Return the tokenised rows of `paths` that `choice` chooses.

    `fitted` is that of the training rows; None if these are the training rows. Raises DataError and
    ConfigError for rows or settings that leave nothing to train on.
    """
    before = Counter(bad_rows.counts)
    if isinstance(rows, PairRecipe):
        read = _pairs(job, paths, rows, renderer, bad_rows, cache_dir, choice)
    else:
        read = _samples(job, paths, rows, renderer, bad_rows, cache_dir, choice, fitted)
    bad = dict(Counter(bad_rows.counts) - before)
    return replace(read, facts={**read.facts, "rows": len(read.source), "bad_rows": bad})


def _samples(
    job: Job[TrainRun],
    paths: list[Path],
    rows: RowRecipe,
    renderer: Renderer,
    bad_rows: BadRows,
    cache_dir: Path,
    choice: RowChoice,
    fitted: Any,
) -> ReadRows:
    from offline_align.data.bins import MOST_KEYS_IN_TRAINING, SampleSource, shares_prompts
    from offline_align.data.tokenize import tokenize_samples

    config = job.config
    read = choice.of(list(read_rows(paths, rows.form, bad_rows, choice.every_line)))
    if fitted is None:
        fitted = rows.fit(read, section(config, MethodSection), config.run.seed)
    made = rows.make(read, fitted, renderer)
    tokenized = tokenize_samples(
        made.rows,
        renderer,
        config.data,
        cache_dir,
        lambda refused: reject_rows(paths, rows.form, refused, bad_rows),
    )
    final = made.finalize(tokenized.places)
    weighed = tokenized.weighed(final.weights)
    source = SampleSource(weighed, shares_prompts(config.trainer, config.parallel), MOST_KEYS_IN_TRAINING)
    counts = choice.mix(source, (made.rows[place].sample.id for place in tokenized.places))
    facts = {**final.facts, **scale_facts(read), "sources": counts, "dropped": tokenized.dropped}
    return ReadRows(source, facts, fitted if final.fitted is None else final.fitted)


def _pairs(
    job: Job[TrainRun],
    paths: list[Path],
    rows: PairRecipe,
    renderer: Renderer,
    bad_rows: BadRows,
    cache_dir: Path,
    choice: RowChoice,
) -> ReadRows:
    from offline_align.data.bins import MOST_KEYS_IN_TRAINING, PairSource, shares_prompts
    from offline_align.data.tokenize import tokenize_pairs

    config = job.config
    settings = section(config, MethodSection)
    made = rows.make(rows.read(paths, bad_rows, choice.every_line), settings)
    # A sample of the answers would split most pairs, so pairs are chosen.
    pairs = choice.of(made.pairs)
    made_of = {pair.id: pair.made_of or (pair.id,) for pair in pairs}

    def reject(refused: dict[str, str]) -> None:
        reasons = {row: reason for pair, reason in refused.items() for row in made_of[pair]}
        reject_rows(paths, rows.also or PreferencePair, reasons, bad_rows, and_pairs=True)

    tokenized = tokenize_pairs(pairs, renderer, config.data, cache_dir, reject)
    shares = shares_prompts(config.trainer, config.parallel)
    with_targets = recipe_of(job).makes == "policy"
    source = PairSource(tokenized, shares, MOST_KEYS_IN_TRAINING, with_targets=with_targets)
    counts = choice.mix(source, tokenized.row_ids)
    return ReadRows(source, {**made.facts, "sources": counts, "dropped": tokenized.dropped}, settings)


@effort.part("load")
def _assemble(
    job: Job[TrainRun],
    data: "bins.RowSource",
    valid: "bins.RowSource | None",
    condition: Condition | None,
    ranks: "Ranks",
) -> "Trainer":
    """Build the trainer, with the initial weights unless the run is continued.

    `condition` is stored with the policy.
    """
    from offline_align.distributed.setup import uses_bf16
    from offline_align.estimate.sizes import model_sizes
    from offline_align.model.build import build_model
    from offline_align.train import checkpoint
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.speed import SpeedMeter
    from offline_align.train.trainer import Trainer

    config, source, recipe = job.config, job.source, recipe_of(job)
    bf16 = uses_bf16(config.trainer.precision, ranks.device)
    fp8 = config.trainer.precision is Precision.fp8
    module = build_model(recipe.makes, source.model, config.parallel, ranks.device, bf16, config.trainer.recompute, fp8)

    def load() -> None:
        fresh = ("reward_head.",) if recipe.makes == "reward_model" and source.kind == "policy" else ()
        source.load_into(module, ranks, fresh)

    is_new = ranks.broadcast(checkpoint.newest(job.run_dir) is None)
    if is_new:
        load()
    if recipe.needs_reference:
        # A continued run needs the weights of the start again if the file of the reference is gone.
        data, valid = _with_reference(job, data, valid, module, (lambda: None) if is_new else load, bf16, ranks)
    on_cuda = ranks.device.type == "cuda"
    model = wrap_model(module, config.parallel, on_cuda)
    assert source.model.vocab_size is not None
    sizes = model_sizes(source.model, source.model.vocab_size, scalar_head=recipe.makes == "reward_model")
    return Trainer(
        run_dir=job.run_dir,
        trainer=config.trainer,
        optim=config.optim,
        ranks=ranks,
        module=module,
        model=model,
        optimizer=build_optimizer(model, config.optim, config.parallel, bf16, on_cuda),
        objective=recipe.objective(section(config, MethodSection)),
        data=loader(config, data, ranks, config.trainer.max_steps),
        validation=loader(config, valid, ranks, None) if valid is not None else None,
        description=replace(
            source.description,
            kind=recipe.makes,
            condition=condition,
            method=job.stage.name,
            reading=None,
        ),
        tokenizer=source.tokenizer,
        speed=SpeedMeter(sizes, config.parallel.sequence_parallel, ranks.device, ranks.world_size),
        settings=job.key.continuation,
    )


@effort.part("reference")
def _with_reference(
    job: Job[TrainRun],
    data: "bins.RowSource",
    valid: "bins.RowSource | None",
    module: Any,
    load: Callable[[], None],
    bf16: bool,
    ranks: "Ranks",
) -> "tuple[bins.PairSource, bins.PairSource | None]":
    """Return the pairs with the likelihoods of their answers at the start of the run.

    `load` loads the weights of the start into `module`, if it does not have them yet.
    """
    from offline_align.data.bins import PairSource
    from offline_align.train.reference import Reference

    config = job.config
    reference = Reference(
        run_dir=job.run_dir,
        cache_dir=job.cache_dir,
        weights=ranks.from_main(lambda: _start_hash(job, bf16)),
        capacity=config.trainer.micro_batch_size * config.data.max_length,
        max_time=config.trainer.max_time,
    )

    @cache
    def model() -> Any:
        load()
        return module

    assert isinstance(data, PairSource)
    if not isinstance(valid, PairSource):
        return reference.of(data, model, ranks), None
    return reference.of(data, model, ranks), reference.of(valid, model, ranks)


def _start_hash(job: Job[TrainRun], bf16: bool) -> str:
    """Return a hash of the weights at the start of the run and the precision of the forward pass."""
    config = job.config
    weights = [parent.content_sha256 for parent in job.hashed.parents.values()]
    random = [asdict(job.source.model), config.run.seed] if job.source.folder is None else None
    precision = "fp8" if config.trainer.precision is Precision.fp8 else "bf16" if bf16 else "fp32"
    return lineage.text_sha256(lineage.canonical_json([weights, random, precision]))


def loader(config: TrainRun, source: "bins.RowSource", ranks: "Ranks", max_steps: int | None) -> "Loader":
    """Return the steps of a run over `source`: `max_steps`, or all epochs if it is None."""
    from offline_align.data.loader import Loader
    from offline_align.data.pack import padding_multiple

    batch = config.trainer.global_batch_size
    total = max_steps * batch if max_steps else source.epoch_rows * config.trainer.max_epochs
    return Loader(
        source=source,
        global_batch_size=batch,
        total_samples=total,
        capacity=config.trainer.micro_batch_size * config.data.max_length,
        seed=config.run.seed,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        pad_to_multiple=padding_multiple(
            ranks.tp_size, ranks.cp_size, config.parallel.sequence_parallel, config.trainer.precision is Precision.fp8
        ),
        cp_rank=ranks.cp_rank,
        cp_size=ranks.cp_size,
        by_prompt=config.data.group_by_prompt,
    )


def _facts(
    job: Job[TrainRun], data: dict[str, Any], condition: Condition | None, state: "TrainState"
) -> dict[str, Any]:
    """Return the facts about the training for the manifest."""
    return {
        "method": job.stage.name,
        "condition": asdict(condition) if condition else None,
        "data": data,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "best_step": state.best_step,
        "best_validation_loss": state.best_value,
    }
