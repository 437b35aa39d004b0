"""The output of `dry_run=true`: ranks, batches, parameters, memory and the launch command."""

import sys
from typing import Any

from rich.table import Table

from offline_align.config.compose import world_size
from offline_align.config.runs import GenerateRun, LabelRun, ModelRun, TrainRun
from offline_align.config.sections import Device, ModelSection
from offline_align.estimate.sizes import (
    MemoryEstimate,
    ModelSizes,
    ParallelSizes,
    checkpoint_host_bytes,
    model_sizes,
    scoring_memory,
    training_memory,
)
from offline_align.launch import torchrun_command
from offline_align.stages.job import Job
from offline_align.stages.layout_advice import layout_advice, scoring_rate
from offline_align.stages.output import show

_GIB = 2**30


def print_training_dry_run(job: Job[TrainRun]) -> None:
    """Print the dry run of a training stage."""
    stage, config, model = job.stage, job.config, _model(job)
    assert stage.recipe is not None
    sizes = model_sizes(model, model.vocab_size or 0, scalar_head=stage.recipe.makes == "reward_model")
    ranks = _ranks(config)
    trainer = config.trainer
    capacity = trainer.micro_batch_size * config.data.max_length
    on_cuda = config.run.device is not Device.cpu
    bf16 = trainer.precision.in_bf16(on_cuda)
    table = _table(f"{stage.name}: {config.run.dir}")
    _add_model(table, sizes, model)
    _add_template(table, job)
    _add_ranks(table, ranks)
    table.add_row("global batch", f"{trainer.global_batch_size} rows a step, packed")
    table.add_row("micro-batch", f"up to {capacity:,} tokens ({trainer.micro_batch_size} x {config.data.max_length:,})")
    per_step = trainer.global_batch_size * config.data.max_length
    share = -(-per_step // ranks.data // capacity)
    table.add_row("tokens a step", f"at most {per_step:,}; then {share} micro-batches on each data parallel rank")
    length = f"{trainer.max_steps} steps" if trainer.max_steps else f"{trainer.max_epochs} epochs"
    table.add_row("length", f"{length}, learning rate {config.optim.lr:g} ({config.optim.lr_decay_style})")
    lean = config.optim.use_precision_aware_optimizer
    memory = training_memory(sizes, config.parallel, ranks, capacity, bf16, trainer.recompute.value, lean)
    _add_memory(table, memory)
    host = checkpoint_host_bytes(sizes, ranks, bf16) * config.launcher.nproc_per_node
    table.add_row("host memory", f"about {host / _GIB:,.3g} GiB on each node while a checkpoint is saved")
    if bf16 and on_cuda:
        for title, text in layout_advice(config, model, sizes):
            table.add_row(title, text)
    _finish(table, stage.name, config)


def print_label_dry_run(job: Job[LabelRun]) -> None:
    """Print the dry run of `label`."""
    config, model = job.config, _model(job)
    sizes = model_sizes(model, model.vocab_size or 0, scalar_head=True)
    ranks = _ranks(config)
    table = _table(f"label: {config.run.dir}")
    _add_model(table, sizes, model)
    _add_template(table, job)
    _add_ranks(table, ranks)
    capacity = config.trainer.micro_batch_size * config.data.max_length
    table.add_row("batch", f"packed bins of up to {capacity:,} tokens, forward only")
    on_cuda = config.run.device is not Device.cpu
    bf16 = config.trainer.precision.in_bf16(on_cuda)
    _add_memory(table, scoring_memory(sizes, config.parallel, ranks, capacity, bf16))
    if bf16 and on_cuda:
        table.add_row("rate", scoring_rate(config.launcher.gpu, sizes, config.data.max_length))
    _finish(table, "label", config)


def print_generate_dry_run(job: Job[GenerateRun], condition: str, engine: str) -> None:
    """Print the dry run of `generate`, without loading or writing anything."""
    config, source, settings = job.config, job.source, job.config.generate
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    sizes = model_sizes(source.model, source.model.vocab_size or 0)
    sampling = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    method = source.description.method or "none"
    table = _table(f"generate: {config.run.dir}")
    table.add_row("policy", f"{config.init.from_}, {sizes.parameters:,} parameters, method {method}")
    _add_template(table, job)
    table.add_row("ranks", f"{world}, each with the whole policy and a share of the prompts")
    table.add_row("engine", f"{engine}, {settings.batch_size} prompts at once")
    table.add_row("answers", f"{settings.n} to each prompt, at most {settings.max_new_tokens} tokens, {sampling}")
    table.add_row("condition", condition or "none")
    _finish(table, "generate", config)


def _model[R: ModelRun](job: Job[R]) -> ModelSection:
    config = job.config
    if config.init.from_ is None and config.model.vocab_size is not None:
        return config.model
    return job.source.model


def _ranks(config: ModelRun) -> ParallelSizes:
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    parallel = config.parallel
    return ParallelSizes(world, parallel.tensor_model_parallel_size, parallel.context_parallel_size)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add_model(table: Table, sizes: ModelSizes, model: ModelSection) -> None:
    number = sizes.parameters
    short = f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
    table.add_row("parameters", f"{number:,} ({short})")
    shape = f"{sizes.layers} layers, hidden {sizes.hidden}, {model.num_attention_heads} heads, FFN {sizes.ffn}"
    table.add_row("model", f"{shape}, vocabulary {model.vocab_size} (padded to {sizes.padded_vocab})")


def _add_template(table: Table, job: Job[Any]) -> None:
    """Add the template and the reason for it, if the run has a model."""
    if job.template is not None:
        table.add_row("template", job.template.in_words())


def _add_ranks(table: Table, ranks: ParallelSizes) -> None:
    parts = f"tensor {ranks.tensor} x context {ranks.context} x data {ranks.data}"
    table.add_row("ranks", f"{ranks.world} = {parts}")


def _add_memory(table: Table, memory: MemoryEstimate) -> None:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    name, most = max(("activations", memory.activations), ("update", memory.update), key=lambda part: part[1])
    parts[name] = most
    text = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size)
    table.add_row("memory a rank", f"about {memory.total / _GIB:.2f} GiB: {text}")


def _finish(table: Table, stage: str, config: ModelRun) -> None:
    words = [w for w in sys.argv[2:] if not w.startswith(("dry_run=", "launcher."))]
    table.add_row("launch", " ".join(torchrun_command(config.launcher, stage, words)))
    show(table)
