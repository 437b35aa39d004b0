"""`generate`: a policy answers prompts, greedily by default (the paper's evaluation), on all ranks."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_align import lineage
from offline_align.config.runs import GenerateRun
from offline_align.config.sections import ConditionalMethodSection
from offline_align.config.sections import Engine as EngineName
from offline_align.convert.chat_template import condition_text
from offline_align.data.journal import Journal
from offline_align.data.records import Prompt, read_rows, reject_rows
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.generate.journal import Place, merge, missing, read_answers
from offline_align.generate.requests import Completion, Engine, Workload, build_requests
from offline_align.model.description import Condition
from offline_align.stages import common
from offline_align.stages.continuation import RunKey
from offline_align.stages.origin import Origin, resolve

logger = logging.getLogger(__name__)


def run(config: GenerateRun, explicit: frozenset[str]) -> int:
    """Write `generations.jsonl`, an answer (or `generate.n`) to every prompt; returns the exit code.

    A run that was interrupted goes on where it was. Raises ConfigError before anything is started,
    StoppedEarly where a signal or `trainer.max_time` ended it.
    """
    from offline_align.generate.engines import choose_engine

    origin = resolve(config, explicit)
    conditions = requested_conditions(origin, config.method.target_reward)
    engine = choose_engine(config.generate.engine, config.run.device)
    sizes = {n: getattr(config.parallel, n) for n in ("tensor_model_parallel_size", "context_parallel_size")}
    problems = [
        f"parallel.{name}={size}: generate keeps the whole policy on each rank and divides the prompts; use 1"
        for name, size in sizes.items()
        if size > 1
    ]
    if problems:
        raise ConfigError(problems)
    if config.dry_run:
        from offline_align.stages.generate_plan import print_generate_plan

        print_generate_plan(config, origin, ", ".join(map(condition_text, conditions)), engine)
        return 0
    return common.run_on_ranks(
        "generate", config, lambda ranks, key: _generate(config, origin, conditions, engine, ranks, key)
    )


def requested_conditions(origin: Origin, target_reward: float | Sequence[float] | None) -> list[Condition | None]:
    """Return the conditions that every prompt is asked under: one for each target reward, None for no condition.

    Raises ConfigError naming `method.target_reward`, also where two targets are the same text.
    """
    targets = target_reward if isinstance(target_reward, Sequence) else [target_reward]
    conditions = [requested_condition(origin, target) for target in targets]
    texts = [condition_text(condition) for condition in conditions]
    for k, text in enumerate(texts):
        first = texts.index(text)
        if first < k:
            raise ConfigError(
                f"method.target_reward={targets[k]}: asks for {text!r} as {targets[first]} does; leave one out"
            )
    return conditions


def requested_condition(origin: Origin, target_reward: float | None) -> Condition | None:
    """Return the condition of a Conditional Alignment policy with the reward that is asked for, else None.

    Raises ConfigError naming `method.target_reward` where it is unknown, out of range, or given for a policy
    that was not trained with rewards.
    """
    trained = origin.condition
    if trained is None and origin.method == "ca" and target_reward is not None:
        usual = ConditionalMethodSection()
        trained = Condition(usual.reward_format, usual.reward_limit, target_reward)
    if trained is None and origin.method == "ca":
        raise ConfigError("method.target_reward is not set, and this policy of `ca` stores none; give a reward")
    if trained is None:
        if target_reward is not None:
            raise ConfigError(
                f"method.target_reward={target_reward}: init.from was not trained by `ca` and knows no "
                "rewards; leave it unset"
            )
        return None
    target = trained.target_reward if target_reward is None else target_reward
    if not abs(target) <= trained.reward_limit:
        raise ConfigError(
            f"method.target_reward={target}: the policy was trained with rewards clipped to plus or minus "
            f"{trained.reward_limit}; ask for one within them"
        )
    return Condition(trained.reward_format, trained.reward_limit, target)


def _generate(
    config: GenerateRun,
    origin: Origin,
    conditions: list[Condition | None],
    engine: EngineName,
    ranks: Any,
    key: RunKey,
) -> None:
    run_dir = Path(config.run.dir)
    if ranks.is_main:
        common.start_folder(config, origin.model)
    ranks.barrier()
    bad_rows = common.bad_rows(config, ranks.is_main)
    files = common.input_files(config)
    prompts = ranks.main_first(lambda: list(read_rows(files, Prompt, bad_rows)))
    texts = [condition_text(condition) for condition in conditions]
    renderer = origin.renderer()
    work = build_requests(
        prompts,
        renderer,
        texts,
        config.data,
        config.generate,
        on_refused=lambda refused: reject_rows(files, Prompt, refused, bad_rows),
    )
    logger.info("first prompt, as the model sees it: %r", origin.tokenizer.shown(work.requests[0].context))
    journal = Journal(run_dir, key.continuation, ranks.dp_rank)
    with journal.timed(ranks.is_main):
        _answer_missing(config, origin, engine, work, journal, ranks, renderer.end_ids)

    def finish() -> None:
        output = run_dir / "generations.jsonl"
        rows = merge(output, prompts, work.requests, read_answers(journal, work.requests), texts)
        facts = {"bad_rows": dict(bad_rows.counts), **common.effort(journal, ranks)}
        _finish(config, origin, conditions, work, facts, key)
        journal.remove()
        logger.info("generate: %d answers: %s", rows, output)

    ranks.from_main(finish)


def _answer_missing(
    config: GenerateRun,
    origin: Origin,
    engine: EngineName,
    work: Workload,
    journal: Journal,
    ranks: Any,
    end_ids: frozenset[int],
) -> None:
    """Answer what the journal lacks, each rank its share; raises StoppedEarly, on all ranks, on request."""
    from offline_align.distributed.stopping import stop_requests
    from offline_align.generate.runner import answer_all, share

    def look() -> dict[Place, Completion]:
        journal.forget_stop()
        return read_answers(journal, work.requests)

    done = ranks.from_main(look)
    if not missing(work.requests, done):
        return
    loaded = _load_engine(config, origin, engine, ranks, end_ids)
    own = share(work.requests, loaded.batch_size, done, ranks.dp_rank, ranks.dp_size)
    with stop_requests(config.trainer.max_time) as stop:
        finished = ranks.gather(answer_all(loaded, own, journal, stop, ranks.is_main))
    if not all(finished):
        answered = len(read_answers(journal, work.requests))
        raise StoppedEarly(f"stopped after {answered} of {len(work.requests)} answers, saved: run it again")


def _load_engine(
    config: GenerateRun, origin: Origin, engine: EngineName, ranks: Any, end_ids: frozenset[int]
) -> Engine:
    from offline_align.distributed.setup import uses_bf16
    from offline_align.generate.engines import load_engine
    from offline_align.stages.huggingface_form import cached

    folder = cached(origin, Path(config.run.dir) / "huggingface", ranks)
    return load_engine(
        engine,
        folder,
        origin.tokenizer,
        config.generate,
        seed=config.run.seed,
        device=ranks.device,
        bf16=uses_bf16(config.trainer.precision, ranks.device),
        max_length=config.data.max_length,
        end_ids=end_ids,
    )


def _finish(
    config: GenerateRun,
    origin: Origin,
    conditions: list[Condition | None],
    work: Workload,
    facts: dict[str, Any],
    key: RunKey,
) -> None:
    from dataclasses import asdict

    run_dir = Path(config.run.dir)
    condition = conditions[0] if len(conditions) == 1 else None
    outputs = [run_dir / "generations.jsonl", run_dir / "quarantine.jsonl"]
    extra = {
        "method": origin.method,
        "condition": None if condition is None else asdict(condition),
        "target_reward": None if condition is None else condition.target_reward,
        # Which target each condition of the rows stands for.
        "targets": {condition_text(one): one.target_reward for one in conditions if one is not None},
        "answers": len(work.requests),
        "truncated": work.truncated,
        "dropped": work.dropped,
        **facts,
    }
    lineage.write_manifest(
        run_dir,
        "generate",
        key.finished,
        common.input_files(config),
        common.parent_models(config),
        [path for path in outputs if path.exists()],
        extra | key.facts,
    )
