"""`generate`: a policy answers prompts on all ranks, by default greedily as in the paper."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from offline_align.config.runs import GenerateRun
from offline_align.config.sections import ConditionalMethodSection
from offline_align.config.sections import Engine as EngineName
from offline_align.convert.source import ModelSource
from offline_align.data.condition import Condition, ValueCondition
from offline_align.data.fate import write_left_out
from offline_align.data.journal import Journal
from offline_align.data.records import Prompt, read_rows, reject_rows
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.generate.answer_journal import Place, merge, missing, read_answers
from offline_align.generate.requests import Completion, Engine, Workload, build_requests
from offline_align.lineage import effort
from offline_align.stages.job import Job
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)


def run(job: Job[GenerateRun]) -> int:
    """Write `generations.jsonl` with `generate.n` answers to every prompt; return the exit code.

    An interrupted run continues with the missing answers. Raises ConfigError before anything is
    started, StoppedEarly if a signal or `trainer.max_time` ended it.
    """
    from offline_align.generate.engines import choose_engine

    config, source = job.config, job.source
    conditions = requested_conditions(source, config.method.target_reward)
    engine = choose_engine(config.generate.engine, config.run.device)
    parallel = config.parallel
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
    }
    problems = [
        f"parallel.{name}={size}: generate keeps the whole policy on each rank and divides the prompts; use 1"
        for name, size in sizes.items()
        if size > 1
    ]
    if problems:
        raise ConfigError(problems)
    if config.dry_run:
        from offline_align.stages.dry_run import print_generate_dry_run

        print_generate_dry_run(job, [asked_text(condition) for condition in conditions], engine)
        return 0
    return job.on_ranks(lambda ranks: _generate(job, conditions, engine, ranks))


def asked_text(condition: Condition | None) -> str:
    """Return the text of a condition, empty for None."""
    return condition.text if condition else ""


def requested_conditions(source: ModelSource, target_reward: float | Sequence[float] | None) -> list[Condition | None]:
    """Return the conditions for every prompt: one for each target, None for no condition.

    Raises ConfigError naming `method.target_reward`, also if two targets give the same text.
    """
    targets = target_reward if isinstance(target_reward, Sequence) else [target_reward]
    conditions = [requested_condition(source, target) for target in targets]
    texts = [asked_text(condition) for condition in conditions]
    for k, text in enumerate(texts):
        first = texts.index(text)
        if first < k:
            raise ConfigError(
                f"method.target_reward={targets[k]}: gives the same text {text!r} as {targets[first]}; leave one out"
            )
    return conditions


def requested_condition(source: ModelSource, target_reward: float | None) -> Condition | None:
    """Return the condition for a Conditional Alignment policy, None for any other policy.

    Raises ConfigError naming `method.target_reward` if the target is unknown, one that the policy cannot
    be asked for, or given for a policy that was not trained with rewards.
    """
    trained = source.description.condition
    if trained is None and source.description.method == "ca" and target_reward is not None:
        usual = ConditionalMethodSection()
        trained = ValueCondition(usual.reward_format, usual.reward_limit, target_reward)
    if trained is None and source.description.method == "ca":
        raise ConfigError("method.target_reward is not set, and this policy of `ca` stores none; give a reward")
    if trained is None:
        if target_reward is not None:
            raise ConfigError(
                f"method.target_reward={target_reward}: init.from was not trained by `ca` and knows no "
                "rewards; leave it unset"
            )
        return None
    return trained.asking(trained.target if target_reward is None else target_reward)


def _generate(job: Job[GenerateRun], conditions: list[Condition | None], engine: EngineName, ranks: "Ranks") -> None:
    from offline_align.data.shown import show_prompt

    config, source = job.config, job.source
    job.start_folder(source.model, ranks)
    bad_rows = job.bad_rows(ranks.is_main)
    files = job.inputs
    prompts = ranks.main_first(lambda: list(read_rows(files, Prompt, bad_rows)))
    texts = [asked_text(condition) for condition in conditions]
    renderer = source.renderer()
    with effort.part("data"):
        work = build_requests(
            prompts,
            renderer,
            texts,
            config.data,
            config.generate,
            on_refused=lambda refused: reject_rows(files, Prompt, refused, bad_rows),
        )
    first = work.requests[0]
    condition = renderer.condition_tokens(texts[first.variant])
    shown = show_prompt(prompts[first.row].id, first.context, condition, renderer)
    logger.info("first prompt, as the model sees it:\n%s", shown)
    journal = Journal(job.run_dir, job.key.continuation, ranks.dp_rank)
    _answer_missing(job, engine, work, journal, ranks, renderer.end_ids)

    def finish() -> None:
        output = job.run_dir / "generations.jsonl"
        rows = merge(output, prompts, work.requests, read_answers(journal, work.requests), texts)
        job.finish(
            [output, write_left_out(job.run_dir, work.left_out)],
            _facts(source, conditions, work) | {"bad_rows": dict(bad_rows.counts)},
        )
        journal.remove()
        logger.info("generate: %s: %s", counted(rows, "answer"), output)

    ranks.from_main(finish)


@effort.part("answers")
def _answer_missing(
    job: Job[GenerateRun],
    engine: EngineName,
    work: Workload,
    journal: Journal,
    ranks: "Ranks",
    end_ids: frozenset[int],
) -> None:
    """Generate the answers that the journal lacks, each rank its share.

    Raises StoppedEarly on all ranks if one was asked to stop.
    """
    from offline_align.distributed.stopping import stop_requests
    from offline_align.generate.runner import answer_all, share

    def look() -> dict[Place, Completion]:
        journal.forget_stop()
        return read_answers(journal, work.requests)

    done = ranks.from_main(look)
    if not missing(work.requests, done):
        return
    loaded = _load_engine(job, engine, ranks, end_ids)
    own = share(work.requests, loaded.batch_size, done, ranks.dp_rank, ranks.dp_size)
    with stop_requests(job.config.trainer.max_time, "the answers of this batch") as stop:
        finished = ranks.gather(answer_all(loaded, own, journal, stop, ranks.is_main))
    if not all(finished):
        answered = len(read_answers(journal, work.requests))
        raise StoppedEarly(
            f"stopped after {answered:,} of {counted(len(work.requests), 'answer')}, which are saved: "
            "run the same command to continue"
        )


@effort.part("load")
def _load_engine(job: Job[GenerateRun], engine: EngineName, ranks: "Ranks", end_ids: frozenset[int]) -> Engine:
    from offline_align.distributed.setup import uses_bf16
    from offline_align.generate.engines import load_engine
    from offline_align.stages.huggingface_form import cached

    config, source = job.config, job.source
    folder = cached(source, job.run_dir / "huggingface", ranks)
    return load_engine(
        engine,
        folder,
        source.tokenizer,
        config.generate,
        seed=config.run.seed,
        device=ranks.device,
        bf16=uses_bf16(config.trainer.precision, ranks.device),
        max_length=config.data.max_length,
        end_ids=end_ids,
    )


def _facts(source: ModelSource, conditions: list[Condition | None], work: Workload) -> dict[str, Any]:
    """Return the facts about the answers for the manifest."""
    condition = conditions[0] if len(conditions) == 1 else None
    stored = source.description.condition
    return {
        "method": source.description.method,
        "condition": None if condition is None else asdict(condition),
        "target_reward": None if condition is None else condition.target,
        # The target of each condition that occurs in the rows.
        "targets": {one.text: one.target for one in conditions if one is not None},
        "stored_condition": None if stored is None else asdict(stored),
        "answers": len(work.requests),
        "truncated": work.truncated,
        "dropped": work.dropped,
    }
