"""`ppo`: a policy learns from the scores of its own answers, with a critic (Eq. 3 of the paper)."""

import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offline_align.config.runs import PolicyOptimizationRun
from offline_align.config.sections import Device, ModelSection, Precision, TooLong
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.records import BadRows, Prompt, Sample, TrainingRow, input_paths, read_rows, reject_rows
from offline_align.errors import ConfigError, DataError
from offline_align.label.statistics import RewardStats
from offline_align.lineage import effort
from offline_align.progress import announced
from offline_align.stages.job import Job
from offline_align.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offline_align.data.bins import SampleSource
    from offline_align.distributed.setup import Ranks
    from offline_align.generate.requests import Request, Workload
    from offline_align.model.heads import Policy, RewardModel
    from offline_align.objectives import Objective
    from offline_align.online.frozen import FrozenWeights
    from offline_align.online.learner import Learner
    from offline_align.online.trainer import PolicyOptimization

logger = logging.getLogger(__name__)

CRITIC = "critic"
"""The folder in the run folder that has the critic's checkpoints."""
STATISTICS = "reward_stats.json"


def run(job: Job[PolicyOptimizationRun]) -> int:
    """Train a policy and its critic, or print the dry run; return the exit code."""
    if job.config.dry_run:
        from offline_align.stages.dry_run_ppo import print_dry_run

        print_dry_run(job)
        return 0
    return job.on_ranks(lambda ranks: _train(job, ranks))


def problems(job: Job[PolicyOptimizationRun]) -> list[str]:
    """Return the problems of the reward model, the critic, and of keys that this stage does not use."""
    from offline_align.generate.engines import choose_engine, rollout_problems

    config = job.config
    engine = choose_engine(config.generate.engine, config.run.device)
    found = list(rollout_problems(config.generate, engine, config.run.device is Device.cpu))
    if config.data.valid is not None:
        found.append(f"data.valid={config.data.valid}: ppo has no validation; leave it unset")
    if (config.method.ptx_coefficient > 0) != (config.data.ptx is not None):
        weight = f"method.ptx_coefficient={config.method.ptx_coefficient:g}"
        found.append(f"{weight}, data.ptx={config.data.ptx}: give both, or neither")
    if config.method.reward_model is None:
        return [*found, "method.reward_model is not set: give a reward model, trained by `reward`"]
    if config.init.from_ is None:
        return found
    try:
        models_of(job)
    except ConfigError as error:
        return found + error.problems
    return found


@dataclass(frozen=True)
class Models:
    """The models of a run before they are built."""

    policy: ModelSource
    reward_model: ModelSource
    critic: ModelSource


def models_of(job: Job[PolicyOptimizationRun]) -> Models:
    """Return the models. Raises ConfigError if they cannot work together."""
    method, policy = job.config.method, job.source
    assert method.reward_model is not None
    reward_model = _opened(method.reward_model, "method.reward_model", policy)
    critic = reward_model if method.critic is None else _opened(method.critic, "method.critic", policy)
    if critic.model != reward_model.model:
        raise ConfigError(
            f"method.critic={method.critic}: has another architecture than method.reward_model, whose weights take its "
            "place to score answers; give a reward model of the same size, or leave it unset"
        )
    return Models(policy, reward_model, critic)


def _opened(folder: str, key: str, policy: ModelSource) -> ModelSource:
    found = open_model(folder, key)
    if found.kind != "reward_model":
        raise ConfigError(f"{key}={folder}: is a policy; give a reward model, trained by `reward`")
    if found.tokenizer.content_hash != policy.tokenizer.content_hash:
        raise ConfigError(
            f"{key}={folder}: has another tokenizer than init.from; the critic reads the tokens of the policy, so "
            "give a reward model that was trained from the same base"
        )
    return found


def _train(job: Job[PolicyOptimizationRun], ranks: "Ranks") -> None:
    from offline_align.data.shown import show_prompt
    from offline_align.distributed.stopping import stop_requests

    config = job.config
    models = models_of(job)
    job.start_folder(job.source.model, ranks)
    bad_rows = job.bad_rows(ranks.is_main)
    with effort.part("data"):
        prompts, work, repeated = ranks.main_first(lambda: read_prompts(job, bad_rows))
        texts = ranks.main_first(lambda: _texts(job, bad_rows)) if config.data.ptx is not None else None
        if texts is not None:
            ranks.require_same(texts.fingerprint(), "data.ptx")
    answered = [prompts[request.row] for request in work.requests]
    ranks.require_same(tuple(tuple(request.context) for request in work.requests), "data.train")
    statistics = ranks.from_main(lambda: reward_statistics(job))
    if ranks.is_main:
        renderer = job.source.renderer()
        first = work.requests[0]
        shown = show_prompt(answered[0].id, first.context, 0, renderer)
        logger.info("first prompt, as the model sees it:\n%s", shown)
        if repeated:
            logger.info("data.train: %s again and left out", counted(repeated, "prompt occurs", "prompts occur"))
    with announced("building the models", enabled=ranks.is_main):
        trainer = _assemble(job, models, answered, work.requests, texts, statistics, ranks)
    with stop_requests(config.trainer.max_time) as stop:
        state = trainer.fit(stop)
    if ranks.is_main:
        folders = ["metrics.jsonl", "checkpoints", f"{CRITIC}/checkpoints", "rollouts"]
        facts = {
            "method": job.stage.name,
            "condition": None,
            "data": {"prompts": len(answered), "repeated": repeated, "dropped": work.dropped},
            "iterations": state.step,
            "steps": state.step,
            "answers": state.consumed_samples,
            "statistics": statistics.as_json() if statistics else None,
        }
        job.finish([job.run_dir / name for name in folders], facts)
        trainer.forget_journals()
        logger.info("ppo: done after %s, %s: %s", counted(state.step, "iteration"), effort.in_words(), job.run_dir)
    ranks.barrier()


def read_prompts(job: Job[PolicyOptimizationRun], bad_rows: BadRows) -> "tuple[list[Prompt], Workload, int]":
    """Return the different prompts of `data.train`, their requests, and how many rows repeat a prompt."""
    from offline_align.generate.requests import build_requests

    config = job.config
    paths = input_paths(config.data.train, "data.train")
    rows = list(read_rows(paths, Prompt, bad_rows))
    different = list({row.prompt: row for row in reversed(rows)}.values())[::-1]
    work = build_requests(
        different,
        job.source.renderer(),
        [""],
        config.data,
        config.generate,
        on_refused=lambda refused: reject_rows(paths, Prompt, refused, bad_rows),
    )
    return different, work, len(rows) - len(different)


def _texts(job: Job[PolicyOptimizationRun], bad_rows: BadRows) -> "SampleSource":
    """Return the rows of `data.ptx`, tokenised."""
    from offline_align.data.bins import SampleSource
    from offline_align.data.tokenize import tokenize_samples

    paths = input_paths(job.config.data.ptx, "data.ptx")
    rows = [TrainingRow(row) for row in read_rows(paths, Sample, bad_rows)]
    tokens = tokenize_samples(
        rows,
        job.source.renderer(),
        job.config.data,
        job.cache_dir,
        lambda refused: reject_rows(paths, Sample, refused, bad_rows),
    )
    return SampleSource(tokens)


def reward_statistics(job: Job[PolicyOptimizationRun]) -> RewardStats | None:
    """Return the statistics of the labelled rows that the prompts come from, or None if there are none.

    All methods then have rewards on one scale. Without them, scores are not normalised.
    """
    for path in input_paths(job.config.data.train, "data.train"):
        beside = path.parent / STATISTICS
        if beside.is_file():
            try:
                found = RewardStats.from_json(json.loads(beside.read_text(encoding="utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise DataError(f"{beside}: cannot be read: {error}; label the rows again") from error
            logger.info("rewards are normalised with %s: mean %.4g, std %.4g", beside, found.mean, found.std)
            return found
    logger.warning(
        "no %s beside data.train: scores of the reward model are not normalised; give a labelled.jsonl", STATISTICS
    )
    return None


@effort.part("load")
def _assemble(
    job: Job[PolicyOptimizationRun],
    models: Models,
    prompts: "Sequence[Prompt]",
    requests: "Sequence[Request]",
    texts: "SampleSource | None",
    statistics: RewardStats | None,
    ranks: "Ranks",
) -> "PolicyOptimization":
    import torch

    from offline_align.distributed.setup import uses_bf16
    from offline_align.generate.engines import choose_engine, load_engine
    from offline_align.objectives import ppo as objectives
    from offline_align.online.frozen import FrozenWeights
    from offline_align.online.roles import Forward, Sampler, Scorer, critic_objective
    from offline_align.online.trainer import PolicyOptimization
    from offline_align.stages.huggingface_form import cached

    config, method = job.config, job.config.method
    bf16 = uses_bf16(config.trainer.precision, ranks.device)
    policy: Policy = _built(job, models.policy, models.policy.model, ranks, bf16)
    policy.temperature = config.generate.temperature
    reference = FrozenWeights(policy)
    critic: RewardModel = _built(job, models.reward_model, models.reward_model.model, ranks, bf16)
    critic.reads_targets = True
    frozen = FrozenWeights(critic)
    if models.critic is not models.reward_model:
        models.critic.load_into(critic, ranks)
    actor = _learner(job, "actor", models.policy, policy, reference, objectives.actor(method), ranks, bf16)
    of_values = critic_objective(method, statistics)
    learner = _learner(job, CRITIC, models.critic, critic, frozen, of_values, ranks, bf16)
    # The engine is loaded last, because vLLM takes a share of the memory that is free. It has the start's weights, and
    # gets those of the actor before every rollout.
    folder = cached(models.policy, job.run_dir / "huggingface", ranks, policy)
    engine = load_engine(
        choose_engine(config.generate.engine, config.run.device),
        folder,
        models.policy.tokenizer,
        config.generate,
        seed=config.run.seed,
        device=ranks.device,
        bf16=bf16,
        max_length=config.data.max_length,
        end_ids=job.source.renderer().end_ids,
        token_details=True,
    )
    engine.release()
    trainer, size = config.trainer, method.rollout_batch_size
    iterations = trainer.max_steps or -(-len(prompts) * trainer.max_epochs // size)
    forward = Forward(
        trainer.micro_batch_size * config.data.max_length,
        trainer.global_batch_size,
        config.parallel.sequence_parallel,
        trainer.precision is Precision.fp8,
        statistics,
        ranks,
    )
    # No answer may be left out, so a prompt that the reward model encodes with more tokens is cut.
    scored = replace(config.data, too_long=TooLong.truncate_prompt)
    return PolicyOptimization(
        run_dir=job.run_dir,
        method=method,
        trainer=trainer,
        ranks=ranks,
        actor=actor,
        critic=learner,
        sampler=Sampler(engine, actor, models.policy.model, torch.bfloat16 if bf16 else torch.float32, ranks),
        scorer=Scorer(
            models.reward_model.renderer(), scored, config.parallel, trainer, statistics, ranks, job.cache_dir
        ),
        forward=forward,
        texts=forward.steps(texts, config.run.seed, iterations * size * method.ppo_epochs) if texts else None,
        prompts=prompts,
        requests=requests,
        seed=config.run.seed,
        iterations=iterations,
        settings=job.key.continuation,
    )


def _built(
    job: Job[PolicyOptimizationRun], source: ModelSource, model: ModelSection, ranks: "Ranks", bf16: bool
) -> Any:
    """Return the model of `source` with its weights."""
    from offline_align.model.build import build_model

    config = job.config
    fp8 = config.trainer.precision is Precision.fp8
    module = build_model(source.kind, model, config.parallel, ranks.device, bf16, config.trainer.recompute, fp8)
    source.load_into(module, ranks)
    return module


def _learner[M: "Policy | RewardModel"](
    job: Job[PolicyOptimizationRun],
    name: str,
    source: ModelSource,
    module: M,
    frozen: "FrozenWeights",
    objective: "Objective",
    ranks: "Ranks",
    bf16: bool,
) -> "Learner[M]":
    from offline_align.online.learner import Learner
    from offline_align.train.optim import build_optimizer, wrap_model

    config = job.config
    is_actor = name == "actor"
    optim = config.optim if is_actor else replace(config.optim, lr=config.method.critic_lr)
    on_cuda = ranks.device.type == "cuda"
    model = wrap_model(module, config.parallel, on_cuda)
    # The critic is saved first, so it keeps one more: the partner of the actor's oldest.
    keep = config.trainer.keep_checkpoints + (not is_actor)
    return Learner(
        name=name,
        run_dir=job.run_dir if is_actor else job.run_dir / name,
        module=module,
        model=model,
        optimizer=build_optimizer(model, optim, config.parallel, bf16, on_cuda),
        objective=objective,
        optim=optim,
        frozen=frozen,
        description=replace(source.description, method=job.stage.name if is_actor else source.description.method),
        tokenizer=source.tokenizer,
        ranks=ranks,
        keep=keep,
    )
