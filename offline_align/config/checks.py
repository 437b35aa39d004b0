"""Checks of single settings and of combinations, all before a device or a process group is touched.

Each function returns a list of problems, one line each, with key, value and fix. An empty list means
that there is no problem.
"""

import importlib.util
import math
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from offline_align.config import sections as s
from offline_align.config.durations import parse_duration
from offline_align.config.runs import PlanMethodSection, Run, section
from offline_align.errors import ConfigError
from offline_align.wording import counted

_SLURM_TIME = re.compile(r"(\d+-)?\d{1,3}:\d{2}:\d{2}|(\d+[dhm])+")


def problems(config: Run, model: s.ModelSection | None, world: int) -> list[str]:
    """Return the problems of `config` for `world` ranks; `model` is None if it is not known."""
    found: list[str] = []
    for part in vars(config).values():
        for kind, check in _SECTION_CHECKS.items():
            if isinstance(part, kind):
                found += check(part)
    parallel = section(config, s.ParallelSection)
    if parallel is not None:
        found += _layout(parallel, world)
        found += _batch(section(config, s.TrainerSection), parallel, world)
    found += _transformer_engine(config) + _precision_aware(config) + _rollouts(config)
    if model is not None:
        found += _model(model) or (_model_layout(model, parallel) if parallel else [])
        data = section(config, s.DataSection)
        if data is not None and data.max_length > model.max_position_embeddings:
            found.append(
                f"data.max_length={data.max_length}: the model has {model.max_position_embeddings} positions; "
                f"use data.max_length={model.max_position_embeddings} or less"
            )
    return found


def _transformer_engine(config: Run) -> list[str]:
    """Return the settings that need Transformer Engine but cannot have it; none in a dry run."""
    model, optim = section(config, s.ModelSection), section(config, s.OptimSection)
    trainer = section(config, s.ComputeSection)
    asked = {
        "model.backend=transformer_engine": model is not None and model.backend is s.Backend.transformer_engine,
        "trainer.precision=fp8": trainer is not None and trainer.precision is s.Precision.fp8,
        "optim.use_precision_aware_optimizer=True": optim is not None and optim.use_precision_aware_optimizer,
    }
    wanted = [words for words, is_asked in asked.items() if is_asked]
    if config.dry_run or not wanted:
        return []
    if config.run.device is s.Device.cpu:
        return [f"{words}: needs a CUDA device; leave it unset on the CPU" for words in wanted]
    if importlib.util.find_spec("transformer_engine") is None:
        return [f"{words}: Transformer Engine is not installed; install it, or leave this unset" for words in wanted]
    if asked["trainer.precision=fp8"] and not isinstance(trainer, s.TrainerSection):
        return ["trainer.precision=fp8: supports only training; use bf16"]
    return []


def _precision_aware(config: Run) -> list[str]:
    optim, parallel = section(config, s.OptimSection), section(config, s.ParallelSection)
    if not (optim and parallel and optim.use_precision_aware_optimizer) or parallel.use_distributed_optimizer:
        return []
    return [
        "parallel.use_distributed_optimizer=False: optim.use_precision_aware_optimizer=True needs the distributed "
        "optimizer; leave one of them unset"
    ]


def _positive(section: Any, prefix: str, *names: str) -> list[str]:
    values = {n: getattr(section, n) for n in names}
    return [f"{prefix}.{n}={v}: must be 1 or more" for n, v in values.items() if v is not None and v < 1]


def _finite(section: Any, prefix: str, *names: str) -> list[str]:
    values = {n: getattr(section, n) for n in names}
    return [
        f"{prefix}.{n}={v}: must be a finite number"
        for n, v in values.items()
        if v is not None and not math.isfinite(v)
    ]


def _run(run: s.RunSection) -> list[str]:
    found = [] if 0 <= run.seed < 2**31 else [f"run.seed={run.seed}: must be between 0 and 2147483647"]
    if Path(run.dir).is_file():
        found.append(f"run.dir={run.dir}: is a file; give a folder")
    return found


def _data(data: s.DataSection) -> list[str]:
    short = data.max_length < 2
    found = [f"data.max_length={data.max_length}: a row needs at least 2 tokens; use 2 or more"] if short else []
    if data.dry_run_rows is not None and data.dry_run_rows < 0:
        found.append(f"data.dry_run_rows={data.dry_run_rows}: must be 0 or more, or null for all rows")
    return found + template_date(data.template_date)


def _sampled(data: s.SampledDataSection) -> list[str]:
    blank = data.source_column is not None and not data.source_column.strip()
    found = ["data.source_column: must not be empty; null takes the names of the files"] if blank else []
    return _positive(data, "data", "sample") + found


def _mixed(data: s.TrainDataSection) -> list[str]:
    return [
        f"data.weights.{name}={share}: must be a finite number above 0; leave a source out to train without it"
        for name, share in data.weights.items()
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf
    ]


def template_date(given: str | None) -> list[str]:
    """Return what is wrong with `data.template_date`."""
    try:
        if given is None or date.fromisoformat(given).isoformat() == given:
            return []
    except ValueError:
        pass
    return [f"data.template_date={given}: is not a day; write one as 2026-01-31"]


def _limit(trainer: s.LimitSection) -> list[str]:
    try:
        seconds = None if trainer.max_time is None else parse_duration(trainer.max_time)
    except ConfigError as error:
        return error.problems
    return [f"trainer.max_time={trainer.max_time}: must be above 0"] if seconds == 0 else []


def _compute(trainer: s.ComputeSection) -> list[str]:
    return _positive(trainer, "trainer", "micro_batch_size")


def _trainer(trainer: s.TrainerSection) -> list[str]:
    steps = trainer.profile_steps
    ordered = len(steps) == 2 and 1 <= steps[0] <= steps[1]
    found = [] if ordered or not steps else [f"trainer.profile_steps={steps}: give the first and last step, as [5,7]"]
    return found + _positive(
        trainer,
        "trainer",
        "global_batch_size",
        "max_epochs",
        "max_steps",
        "log_interval",
        "eval_interval",
        "save_interval",
        "keep_checkpoints",
    )


def _optim(optim: s.OptimSection) -> list[str]:
    found = _finite(optim, "optim", "lr", "min_lr", "weight_decay", "adam_eps", "clip_grad")
    found += [f"optim.{n}={v}: must be above 0" for n in ("lr", "adam_eps") if (v := getattr(optim, n)) <= 0]
    for name in ("min_lr", "weight_decay", "clip_grad", "lr_warmup_steps"):
        if getattr(optim, name) < 0:
            found.append(f"optim.{name}={getattr(optim, name)}: must be 0 or more")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optim, name) < 1:
            found.append(f"optim.{name}={getattr(optim, name)}: must be at least 0 and below 1")
    if optim.min_lr > optim.lr:
        found.append(f"optim.min_lr={optim.min_lr}: must not exceed optim.lr={optim.lr}")
    return found + _positive(optim, "optim", "lr_decay_steps")


def _filtering(method: s.FilteringMethodSection) -> list[str]:
    return _finite(method, "method", "threshold") + _positive(method, "method", "best_of")


def _weighted(method: s.RewardWeightedMethodSection) -> list[str]:
    good = math.isfinite(method.beta) and method.beta > 0
    return [] if good else [f"method.beta={method.beta}: must be a finite number above 0"]


def _conditional(method: s.ConditionalMethodSection) -> list[str]:
    found = _finite(method, "method", "target_reward", "reward_limit") + _positive(method, "method", "bounds")
    few, target = method.quantiles < 2, method.target_reward
    if few:
        found.append(f"method.quantiles={method.quantiles}: must be 2 or more")
    numbers = range(1, method.quantiles + 1)
    if method.condition is s.ConditionKind.quantile and not few and target is not None and target not in numbers:
        found.append(
            f"method.target_reward={target:g}: with method.condition=quantile, it is the number of a quantile, "
            f"from 1 (lowest rewards) to method.quantiles={method.quantiles} (highest)"
        )
    return found + _without_effect(method)


def _without_effect(method: s.ConditionalMethodSection) -> list[str]:
    """Return the settings that only another kind of condition, or only weights, would use."""
    usual, kinds = s.ConditionalMethodSection(), s.ConditionKind
    needs = {
        "quantiles": ("method.condition=quantile", method.condition is kinds.quantile),
        "quantile_format": ("method.condition=quantile", method.condition is kinds.quantile),
        "bounds": ("method.condition=at_least", method.condition is kinds.at_least),
        # `plan` shows the weights of `rwr` too.
        "beta": ("method.weight_by_reward=true", method.weight_by_reward or isinstance(method, PlanMethodSection)),
    }
    return [
        f"method.{name}={value}: has an effect only with {needed}; leave it unset"
        for name, (needed, is_used) in needs.items()
        if not is_used and (value := getattr(method, name)) != getattr(usual, name)
    ]


def _pairs(method: s.PairsMethodSection) -> list[str]:
    good = math.isfinite(method.min_gap) and method.min_gap >= 0
    return [] if good else [f"method.min_gap={method.min_gap}: must be a finite number of at least 0"]


def _preference(method: s.PreferenceMethodSection) -> list[str]:
    found = []
    if not (math.isfinite(method.beta) and method.beta > 0):
        found.append(f"method.beta={method.beta}: must be a finite number above 0")
    if not 0 <= method.label_smoothing < 0.5:
        found.append(f"method.label_smoothing={method.label_smoothing}: must be at least 0 and below 0.5")
    elif method.label_smoothing and method.loss is not s.PreferenceLoss.sigmoid:
        found.append(f"method.label_smoothing={method.label_smoothing}: only method.loss=sigmoid has it; set it to 0")
    if not (math.isfinite(method.sft_coefficient) and method.sft_coefficient >= 0):
        found.append(f"method.sft_coefficient={method.sft_coefficient}: must be a finite number of at least 0")
    return found


def _policy_optimization(method: s.PolicyOptimizationMethodSection) -> list[str]:
    found = _positive(method, "method", "rollout_batch_size", "ppo_epochs")
    found += _unless(method, "above 0", lambda v: v > 0, "value_clip", "reward_clip", "critic_lr", "max_kl")
    at_least_0 = ("kl_coefficient", "ptx_coefficient", "critic_warmup_iterations")
    found += _unless(method, "of at least 0", lambda v: v >= 0, *at_least_0)
    found += _unless(method, "from 0 to 1", lambda v: 0 <= v <= 1, "gae_lambda", "gamma")
    found += _unless(method, "above 0 and below 1", lambda v: 0 < v < 1, "clip")
    found += _unless(method, "of at most 0", lambda v: v <= 0, "truncation_penalty")
    return found + _unless(method, "of at least 1", lambda v: v >= 1, "importance_cap")


def _unless(method: s.MethodSection, rule: str, is_good: Callable[[float], bool], *names: str) -> list[str]:
    values = {n: getattr(method, n) for n in names}
    return [
        f"method.{n}={v}: must be a finite number {rule}"
        for n, v in values.items()
        if v is not None and not (math.isfinite(v) and is_good(v))
    ]


def _rollouts(config: Run) -> list[str]:
    """Return the settings with which the answers of an iteration cannot be learned from."""
    method = section(config, s.PolicyOptimizationMethodSection)
    if method is None:
        return []
    found, trainer = [], section(config, s.TrainerSection)
    size = trainer.global_batch_size if trainer else 1
    if size > 0 and method.rollout_batch_size % size:
        found.append(
            f"method.rollout_batch_size={method.rollout_batch_size}: not a multiple of "
            f"trainer.global_batch_size={size}; make it one, so that all mini-batches have the same size"
        )
    return found


def _generate(generate: s.GenerateSection) -> list[str]:
    found = _positive(generate, "generate", "max_new_tokens", "n", "batch_size")
    if not (math.isfinite(generate.temperature) and generate.temperature >= 0):
        found.append(f"generate.temperature={generate.temperature}: must be 0 (greedy) or more")
    if not 0 < generate.top_p <= 1:
        found.append(f"generate.top_p={generate.top_p}: must be above 0 and at most 1")
    if generate.n > 1 and generate.temperature == 0:
        found.append(f"generate.n={generate.n}: greedy answers are all the same; set generate.temperature above 0")
    return found


def _target(method: s.GenerateMethodSection) -> list[str]:
    given = method.target_reward
    targets = [given] if not isinstance(given, list | tuple) else list(given)
    good = [isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) for t in targets]
    if given is None or (targets and all(good)):
        return []
    return [f"method.target_reward={given}: must be a finite number or a list of them"]


def _evaluate(evaluate: s.EvaluateSection) -> list[str]:
    found = _positive(evaluate, "evaluate", "bootstrap_samples")
    if not 0 < evaluate.confidence < 1:
        found.append(f"evaluate.confidence={evaluate.confidence}: must be between 0 and 1, such as 0.95")
    if evaluate.ppo_hours is not None and not (math.isfinite(evaluate.ppo_hours) and evaluate.ppo_hours > 0):
        found.append(f"evaluate.ppo_hours={evaluate.ppo_hours}: must be a finite number above 0")
    return found


def _judge(judge: s.JudgeSection) -> list[str]:
    found = _positive(judge, "judge", "concurrent_requests")
    if judge.retries < 0:
        found.append(f"judge.retries={judge.retries}: must be 0 or more")
    if not (math.isfinite(judge.timeout_seconds) and judge.timeout_seconds > 0):
        found.append(f"judge.timeout_seconds={judge.timeout_seconds}: must be above 0")
    if judge.calibration is not None and judge.kind is s.JudgeKind.human:
        found.append(
            f"judge.calibration={judge.calibration}: compares a judge with people, but with judge=human people "
            "are the judge; choose another judge, or leave it unset"
        )
    return found


def _prepare(prepare: s.PrepareSection) -> list[str]:
    found = _positive(prepare, "prepare", "max_rows", "demo_sft_rows", "demo_preference_rows", "demo_prompt_rows")
    if not 0 <= prepare.valid_fraction < 1:
        found.append(f"prepare.valid_fraction={prepare.valid_fraction}: must be at least 0 and below 1")
    found += [
        f"prepare.columns.{ours}={theirs}: must be the name of a column"
        for ours, theirs in prepare.columns.items()
        if not isinstance(theirs, str) or not theirs.strip()
    ]
    if prepare.text_prompt is not None and not prepare.text_prompt.strip():
        found.append("prepare.text_prompt: must not be empty; leave it unset to refuse plain texts")
    return found + _score_column(prepare)


def _score_column(prepare: s.PrepareSection) -> list[str]:
    given = prepare.score_column
    if isinstance(given, dict):
        numbers = [isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w) for w in given.values()]
        fits = bool(given) and all(numbers)
    else:
        fits = given is None or (isinstance(given, str) and bool(given.strip()))
    if not fits:
        return [f"prepare.score_column={given}: must be a column, or a mapping of columns to finite weights"]
    if given is not None and prepare.rated is s.Rated.ignore:
        return [f"prepare.rated=ignore: contradicts prepare.score_column={given}; leave one of them unset"]
    return []


def _label(label: s.LabelSection) -> list[str]:
    found = _positive(label, "label", "flush_rows", "histogram_bins", "best_of")
    if not 0 <= label.certificate_fraction <= 1:
        found.append(f"label.certificate_fraction={label.certificate_fraction}: must be from 0 to 1")
    return found


def _launcher(launcher: s.LauncherSection) -> list[str]:
    found = _positive(launcher, "launcher", "nproc_per_node", "nodes", "cpus_per_task", "attempts")
    for name in ("gpus_per_node", "signal_margin_seconds"):
        if (value := getattr(launcher, name)) is not None and value < 0:
            found.append(f"launcher.{name}={value}: must be 0 or more")
    if launcher.time is not None and not _SLURM_TIME.fullmatch(launcher.time):
        found.append(f"launcher.time={launcher.time}: write 3h50m, 03:50:00 or 1-00:00:00")
    if launcher.dependency is not None and not re.fullmatch(r"\d+(:\d+)*", launcher.dependency):
        found.append(f"launcher.dependency={launcher.dependency}: write job ids as 12:13")
    found += [
        f"launcher.sbatch.{name}: not the name of an option of sbatch; write for example launcher.sbatch.qos=high"
        for name in launcher.sbatch
        if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name))
    ]
    found += [
        f"launcher.environment.{name}: not a valid name of an environment variable; use letters, digits and _"
        for name in launcher.environment
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name))
    ]
    return found + _one_line_each(launcher)


def _one_line_each(launcher: s.LauncherSection) -> list[str]:
    """Return the values that would break a line of the batch script."""
    return [
        f"launcher.{name}: must not contain line breaks or other control characters"
        for name, value in vars(launcher).items()
        for text in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value])
        if isinstance(text, str) and not text.isprintable()
    ]


def _tokenizer(tokenizer: s.TokenizerSection) -> list[str]:
    low = tokenizer.vocab_size < 300
    return (
        [f"tokenizer.vocab_size={tokenizer.vocab_size}: byte fallback alone needs 260; use 300 or more"] if low else []
    )


_SECTION_CHECKS: dict[type, Any] = {
    s.RunSection: _run,
    s.DataSection: _data,
    s.SampledDataSection: _sampled,
    s.TrainDataSection: _mixed,
    s.LimitSection: _limit,
    s.ComputeSection: _compute,
    s.TrainerSection: _trainer,
    s.OptimSection: _optim,
    s.FilteringMethodSection: _filtering,
    s.PairsMethodSection: _pairs,
    s.PolicyOptimizationMethodSection: _policy_optimization,
    s.PreferenceMethodSection: _preference,
    s.RewardWeightedMethodSection: _weighted,
    s.ConditionalMethodSection: _conditional,
    s.GenerateSection: _generate,
    s.GenerateMethodSection: _target,
    s.EvaluateSection: _evaluate,
    s.JudgeSection: _judge,
    s.PrepareSection: _prepare,
    s.LabelSection: _label,
    s.LauncherSection: _launcher,
    s.TokenizerSection: _tokenizer,
}


def _layout(parallel: s.ParallelSection, world: int) -> list[str]:
    found = _positive(parallel, "parallel", "tensor_model_parallel_size", "context_parallel_size")
    if not (math.isfinite(parallel.silent_rank_seconds) and parallel.silent_rank_seconds >= 1):
        found.append(f"parallel.silent_rank_seconds={parallel.silent_rank_seconds}: must be 1 or more")
    if found:
        return found
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if world % (tensor * context):
        keys = f"parallel.tensor_model_parallel_size={tensor}"
        keys += f" and parallel.context_parallel_size={context}" if context > 1 else ""
        found.append(
            f"{keys}: {counted(world, 'rank')} cannot be divided into groups of "
            f"{tensor * context}; start a multiple of {tensor * context} ranks with launcher.nproc_per_node or torchrun"
        )
    if parallel.sequence_parallel and tensor == 1:
        found.append(
            "parallel.sequence_parallel=True: needs several tensor parallel ranks, but there is 1; "
            "set it to false or raise parallel.tensor_model_parallel_size"
        )
    return found


def _batch(trainer: s.TrainerSection | None, parallel: s.ParallelSection, world: int) -> list[str]:
    if trainer is None or trainer.micro_batch_size < 1:
        return []
    data_parallel = world // max(1, parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    share = trainer.micro_batch_size * max(data_parallel, 1)
    if trainer.global_batch_size % share == 0:
        return []
    return [
        f"trainer.global_batch_size={trainer.global_batch_size}: not a multiple of trainer.micro_batch_size="
        f"{trainer.micro_batch_size} times {data_parallel} data parallel ranks; use a multiple of {share}"
    ]


def _model(model: s.ModelSection) -> list[str]:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    unset = [n for n in names if not isinstance(getattr(model, n), int)]
    if unset:
        return [f"model.{n} is not set: choose model=<group> or set it" for n in unset]
    found = _positive(
        model, "model", *names, "num_query_groups", "kv_channels", "max_position_embeddings", "vocab_size"
    )
    found += _positive(model, "model", "make_vocab_size_divisible_by", "sliding_window")
    if found:
        return found
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        found.append(f"model.hidden_size={model.hidden_size}: not a multiple of model.num_attention_heads={heads}")
    if heads % groups:
        found.append(f"model.num_attention_heads={heads}: not a multiple of model.num_query_groups={groups}")
    return found


def _model_layout(model: s.ModelSection, parallel: s.ParallelSection) -> list[str]:
    """Return the sizes of the model that the tensor parallel size does not divide."""
    tensor = parallel.tensor_model_parallel_size
    widths = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    if model.vocab_size is not None:
        widths["model.make_vocab_size_divisible_by"] = model.padded_vocab_size
    return [
        f"parallel.tensor_model_parallel_size={tensor}: does not divide {name}={width}; use a divisor of {width}"
        for name, width in widths.items()
        if tensor > 0 and width % tensor
    ]
