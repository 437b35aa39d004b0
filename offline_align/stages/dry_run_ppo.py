"""The output of `ppo dry_run=true`: models, prompts, the parts of an iteration, memory and the first prompt."""

from collections.abc import Sequence

from rich.table import Table

from offline_align.config.runs import PolicyOptimizationRun
from offline_align.data.records import input_paths
from offline_align.estimate.sizes import ModelSizes, ParallelSizes, model_sizes, training_memory
from offline_align.estimate.step_time import CPU_SHARE
from offline_align.stages import dry_run as plan
from offline_align.stages.job import Job
from offline_align.stages.planned_device import PlannedDevice, planned_device
from offline_align.stages.planned_rows import NotedRows
from offline_align.wording import counted

_GIB = 2**30


def print_dry_run(job: Job[PolicyOptimizationRun]) -> None:
    """Print the plan. Raises DataError for a row that would end the run."""
    from offline_align.data.shown import show_prompt
    from offline_align.stages.ppo import models_of, read_prompts

    config, device = job.config, planned_device(job.config)
    models, ranks = models_of(job), plan.ranks_of(config)
    method, trainer = config.method, config.trainer
    actor = model_sizes(models.policy.model, models.policy.model.vocab_size or 0)
    critic = model_sizes(models.critic.model, models.critic.model.vocab_size or 0, scalar_head=True)
    table = plan.new_table(f"ppo: {config.run.dir}")
    for name, sizes, where in (
        ("actor", actor, config.init.from_),
        ("critic", critic, method.critic or method.reward_model),
    ):
        table.add_row(name, f"{where}, {sizes.parameters:,} parameters")
    table.add_row("frozen", "the actor's start (reference) and the reward model, as copies in host memory")
    plan.add_template(table, job)
    plan.add_device(table, device, trainer.precision, ranks)
    bad = NotedRows(config.data.on_bad_row)
    prompts, work, repeated = read_prompts(job, bad)
    count = len(work.requests)
    left_out = f", {repeated:,} rows repeat a prompt, {sum(work.dropped.values()):,} do not fit"
    table.add_row(
        "prompts", f"{', '.join(map(str, input_paths(config.data.train, 'data.train')))}: {count:,}{left_out}"
    )
    size = method.rollout_batch_size
    iterations = trainer.max_steps or -(-count * trainer.max_epochs // size)
    updates = size // trainer.global_batch_size * method.ppo_epochs
    table.add_row(
        "iterations", f"{iterations:,}, each with {size:,} answers and {counted(updates, 'update')} of both models"
    )
    context = sum(len(request.context) for request in work.requests) / count
    longest = max(request.max_new_tokens for request in work.requests)
    tokens = size * (context + longest)
    table.add_row(
        "tokens",
        f"an iteration: at most {size * longest:,} sampled; four forward passes over at most {tokens:,.0f}, and "
        f"{counted(method.ppo_epochs, 'pass', 'passes')} of training of both models",
    )
    _add_memory(table, job, actor, critic, ranks, device)
    if device.product_flops is not None:
        seconds = _learning_seconds((actor, critic), tokens, context + longest, method.ppo_epochs, device.product_flops)
        table.add_row(
            "time",
            f"about {plan.in_words(seconds / ranks.world)} an iteration to score and learn, if all answers are full",
        )
    first = work.requests[0]
    shown = show_prompt(prompts[first.row].id, first.context, 0, job.source.renderer())
    plan.finish(table, "ppo", config, shown)
    bad.check()


def _add_memory(
    table: Table,
    job: Job[PolicyOptimizationRun],
    actor: ModelSizes,
    critic: ModelSizes,
    ranks: ParallelSizes,
    device: PlannedDevice,
) -> None:
    """Add the memory of a rank while answers are sampled, and while each model learns."""
    config, trainer = job.config, job.config.trainer
    bf16 = trainer.precision.in_bf16(device.on_cuda)
    capacity = trainer.micro_batch_size * config.data.max_length
    lean = config.optim.use_precision_aware_optimizer
    of_actor, of_critic = (
        training_memory(sizes, config.parallel, ranks, capacity, bf16, trainer.recompute.value, lean)
        for sizes in (actor, critic)
    )
    if not device.on_cuda:
        of_actor, of_critic = of_actor.on_cpu(), of_critic.on_cpu()
    held = sum(m.weights + m.gradients + m.optimizer for m in (of_actor, of_critic))
    element = 2 if bf16 else 4
    engine = actor.parameters * element
    cache = config.generate.batch_size * config.data.max_length * actor.layers * 2 * actor.kv_width * element
    # On the CPU, the engine's copy of the policy and both frozen copies are in the same memory.
    frozen = 0 if device.on_cuda else engine + (actor.parameters + critic.parameters) / ranks.tensor * element
    process = of_actor.process
    phases = {
        "generate": engine * device.on_cuda + cache,
        "learn, actor": max(of_actor.activations, of_actor.update),
        "learn, critic": max(of_critic.activations, of_critic.update),
    }
    base = held + frozen + process
    text = ", ".join(f"{name} {(base + more) / _GIB:.2f}" for name, more in phases.items())
    table.add_row("memory a rank", f"about {max(base + more for more in phases.values()) / _GIB:.2f} GiB: {text}")


def _learning_seconds(
    models: Sequence[ModelSizes], tokens: float, length: float, epochs: int, product_flops: float
) -> float:
    """Return the seconds of the forward passes and updates of an iteration, at the CPU's rate."""
    total = 0.0
    for sizes in models:
        flops = sizes.train_flops(int(tokens), int(tokens * length), int(tokens), int(tokens))
        # Two forward passes of each architecture, and a training pass an epoch.
        total += flops * (2 / 3 + epochs)
    return total / (CPU_SHARE * product_flops)
