"""The body that the five training commands share: rows in, a checkpointed model out.

A command differs in its rows and its objective alone, which it hands over as a `Recipe`.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from offline_align import lineage
from offline_align.config.runs import TrainRun
from offline_align.config.sections import Precision
from offline_align.data.jsonl import is_empty
from offline_align.data.records import (
    BadRows,
    LabelledSample,
    PreferencePair,
    Sample,
    input_paths,
    read_rows,
    reject_rows,
)
from offline_align.data.template import Renderer
from offline_align.methods import TrainingRow
from offline_align.model.description import Condition, ModelDescription
from offline_align.stages import common
from offline_align.stages.continuation import RunKey
from offline_align.stages.origin import Origin, load_origin, resolve

logger = logging.getLogger(__name__)

# Share of the tokens from which on the hint pays for its line.
_WORTH_GROUPING = 0.1


@dataclass(frozen=True)
class Rows:
    """Training rows of one file set, and what is to be said of them in the manifest."""

    rows: list[TrainingRow] | list[PreferencePair]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What makes one training command different from another."""

    method: str
    kind: Literal["policy", "reward_model"]
    read: Callable[[list[Path], BadRows, Renderer], Rows]
    """Rows for training."""
    read_validation: Callable[[list[Path], BadRows, Renderer], Rows]
    objective: Callable[[], Any]
    """Builds the objective; called once torch is there."""
    condition: Condition | None = None


def read_samples(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> Rows:
    """Read SFT rows, all of weight 1."""
    return Rows([TrainingRow(s) for s in read_rows(paths, Sample, bad_rows)])


def read_pairs(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> Rows:
    """Read preference pairs."""
    return Rows(list(read_rows(paths, PreferencePair, bad_rows)))


def read_labelled(paths: list[Path], bad_rows: BadRows) -> list[LabelledSample]:
    """Read rows that `label` has scored."""
    return list(read_rows(paths, LabelledSample, bad_rows))


def run(stage: str, config: TrainRun, explicit: frozenset[str], recipe: Recipe) -> int:
    """Train, or print the plan with `dry_run=true`; returns the exit code."""
    if config.dry_run:
        from offline_align.stages.plan_text import print_training_plan

        print_training_plan(stage, config, explicit)
        return 0
    return common.run_on_ranks(stage, config, lambda ranks, key: _train(stage, config, explicit, recipe, ranks, key))


def _train(stage: str, config: TrainRun, explicit: frozenset[str], recipe: Recipe, ranks: Any, key: RunKey) -> None:
    from offline_align.distributed.stopping import stop_requests

    origin = resolve(config, explicit)
    run_dir = Path(config.run.dir)
    if ranks.is_main:
        common.start_folder(config, origin.model if config.init.from_ else None)
    ranks.barrier()
    # A reward model of others reads rows as ours do from here on.
    renderer = replace(origin, reading=None).renderer()
    bad_rows = common.bad_rows(config, ranks.is_main)
    data, facts = _source(config, "train", recipe.read, renderer, ranks, bad_rows)
    valid, _ = _source(config, "valid", recipe.read_validation, renderer, ranks, bad_rows)
    if ranks.is_main and data.share_prompts and not config.data.group_by_prompt:
        _say_what_grouping_saves(data.repeated_share())
    trainer = _assemble(config, recipe, origin, data, valid, ranks, key)
    with stop_requests(config.trainer.max_time) as stop:
        state = trainer.fit(stop)
    if ranks.is_main:
        common_outputs = [run_dir / "metrics.jsonl", run_dir / "checkpoints"]
        lineage.write_manifest(
            run_dir,
            stage,
            key.finished,
            common.input_files(config),
            common.parent_models(config),
            [p for p in [*common_outputs, run_dir / "quarantine.jsonl"] if p.exists()],
            _extra(recipe, facts, state, ranks) | key.facts | {"speed": trainer.speed.summary()},
        )
        logger.info("%s: done after %d steps, %.0f s: %s", stage, state.step, state.seconds, run_dir)
    ranks.barrier()


def _say_what_grouping_saves(share: float) -> None:
    if share >= _WORTH_GROUPING:
        fix = "data.group_by_prompt=true takes the rows of a prompt together and computes it once"
        logger.info("data.train: %.0f %% of the tokens are prompts that come again; %s", 100 * share, fix)


def _source(
    config: TrainRun, which: str, read: Any, renderer: Renderer, ranks: Any, bad_rows: BadRows
) -> tuple[Any, dict[str, Any]]:
    """Return the tokenised rows of `data.train` or `data.valid`, or None where there are none, and facts about them."""
    named = getattr(config.data, which)
    if named is None:
        return None, {}
    paths = input_paths(named, f"data.{which}")
    if which == "valid" and is_empty(paths):  # as `prepare` leaves it where rows are few
        logger.warning("data.valid=%s: has no row; there is no validation", named)
        return None, {}
    found: tuple[Any, dict[str, Any]] = ranks.main_first(lambda: _tokenized(config, paths, read, renderer, bad_rows))
    ranks.require_same(found[0].fingerprint(), f"data.{which}")
    return found


def _tokenized(
    config: TrainRun, paths: list[Path], read: Any, renderer: Renderer, bad_rows: BadRows
) -> tuple[Any, dict[str, Any]]:
    from offline_align.data.bins import MOST_KEYS_IN_TRAINING, PairSource, RowSource, SampleSource, shares_prompts
    from offline_align.data.tokenize import tokenize_pairs, tokenize_samples

    before = Counter(bad_rows.counts)
    rows = read(paths, bad_rows, renderer)
    cache = common.cache_dir(config)
    shares = shares_prompts(config.trainer, config.parallel)
    tokenized: Any
    source: RowSource
    first = next(iter(rows.rows), None)
    kind = type(first.sample if isinstance(first, TrainingRow) else first)

    def reject(refused: dict[str, str]) -> None:
        reject_rows(paths, kind, refused, bad_rows)

    if kind is PreferencePair:
        tokenized = tokenize_pairs(rows.rows, renderer, config.data, cache, reject)
        source = PairSource(tokenized, shares, MOST_KEYS_IN_TRAINING)
    else:
        tokenized = tokenize_samples(rows.rows, renderer, config.data, cache, reject)
        source = SampleSource(tokenized, shares, MOST_KEYS_IN_TRAINING)
    facts = {
        **rows.facts,
        "rows": len(source),
        "dropped": tokenized.dropped,
        "bad_rows": dict(Counter(bad_rows.counts) - before),
    }
    return source, facts


def _assemble(config: TrainRun, recipe: Recipe, origin: Origin, data: Any, valid: Any, ranks: Any, key: RunKey) -> Any:
    """Build model, optimizer and loaders, and load the initial weights unless the run is continued."""
    from offline_align.distributed.setup import uses_bf16
    from offline_align.distributed.sizes import model_sizes
    from offline_align.model.build import build_model
    from offline_align.train import checkpoint
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.speed import SpeedMeter
    from offline_align.train.trainer import Trainer

    bf16 = uses_bf16(config.trainer.precision, ranks.device)
    fp8 = config.trainer.precision is Precision.fp8
    module = build_model(recipe.kind, origin.model, config.parallel, ranks.device, bf16, config.trainer.recompute, fp8)
    if ranks.broadcast(checkpoint.newest(Path(config.run.dir)) is None):
        fresh = ("reward_head.",) if recipe.kind == "reward_model" and origin.kind == "policy" else ()
        load_origin(module, origin, ranks, fresh)
    on_cuda = ranks.device.type == "cuda"
    model = wrap_model(module, config.parallel, on_cuda)
    assert origin.model.vocab_size is not None
    sizes = model_sizes(origin.model, origin.model.vocab_size, scalar_head=recipe.kind == "reward_model")
    return Trainer(
        run_dir=Path(config.run.dir),
        trainer=config.trainer,
        optim=config.optim,
        ranks=ranks,
        module=module,
        model=model,
        optimizer=build_optimizer(model, config.optim, config.parallel, bf16, on_cuda),
        objective=recipe.objective(),
        data=_loader(config, data, ranks, config.trainer.max_steps),
        validation=_loader(config, valid, ranks, None) if valid is not None else None,
        description=ModelDescription(
            kind=recipe.kind,
            model=origin.model,
            template=origin.template,
            tokenizer_hash=origin.tokenizer.content_hash,
            condition=recipe.condition,
            method=recipe.method,
            template_date=origin.template_date,
        ),
        tokenizer=origin.tokenizer,
        speed=SpeedMeter(sizes, config.parallel.sequence_parallel, ranks.device, ranks.world_size),
        settings=key.continuation,
    )


def _loader(config: TrainRun, source: Any, ranks: Any, max_steps: int | None) -> Any:
    from offline_align.data.loader import Loader
    from offline_align.distributed.sizes import padding_multiple

    batch = config.trainer.global_batch_size
    total = max_steps * batch if max_steps else len(source) * config.trainer.max_epochs
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


def _extra(recipe: Recipe, facts: dict[str, Any], state: Any, ranks: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "method": recipe.method,
        "condition": asdict(recipe.condition) if recipe.condition else None,
        "data": facts,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "best_step": state.best_step,
        "best_validation_loss": state.best_value,
        "seconds": round(state.seconds, 3),
        "ranks": ranks.world_size,
        "device": ranks.device.type,
    }
