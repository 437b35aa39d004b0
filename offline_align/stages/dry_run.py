"""The output of `dry_run=true`: device, rows, steps, memory, the launch command and the first row."""

import shlex
import sys
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from offline_align.config.compose import world_size
from offline_align.config.runs import GenerateRun, LabelRun, ModelRun, TrainRun
from offline_align.config.sections import ModelSection, Precision
from offline_align.data.fate import reasons
from offline_align.estimate.sizes import (
    MemoryEstimate,
    ModelSizes,
    ParallelSizes,
    checkpoint_host_bytes,
    model_sizes,
    scoring_memory,
    training_memory,
)
from offline_align.estimate.step_time import CPU_SHARE
from offline_align.launch import torchrun_command
from offline_align.stages.job import Job
from offline_align.stages.layout_advice import layout_advice, scoring_rate
from offline_align.stages.output import show
from offline_align.stages.planned_device import PlannedDevice, planned_device
from offline_align.stages.planned_rows import PlannedRows, label_rows, prompt_rows, readable_paths, training_rows
from offline_align.stages.training import one_step
from offline_align.wording import counted

_GIB = 2**30


def print_training_dry_run(job: Job[TrainRun]) -> None:
    """Print the dry run of a training stage.

    Raises DataError or ConfigError after the plan if the rows that it reads would end the run.
    """
    stage, config, model = job.stage, job.config, _model(job)
    assert stage.recipe is not None
    sizes = model_sizes(model, model.vocab_size or 0, scalar_head=stage.recipe.makes == "reward_model")
    ranks, device, trainer = ranks_of(config), planned_device(config), config.trainer
    bf16 = trainer.precision.in_bf16(device.on_cuda)
    first = _read_rows(job, ranks, "data.train")
    train = first if isinstance(first, PlannedRows) else None
    read = first, _read_rows(job, ranks, "data.valid", train.fitted if train else None)
    table = new_table(f"{stage.name}: {config.run.dir}")
    _add_model(table, sizes, model)
    add_template(table, job)
    add_device(table, device, trainer.precision, ranks)
    for key, rows in zip(("data.train", "data.valid"), read, strict=True):
        _add_rows(table, key, rows, config.data.max_length)
    _add_steps(table, config, ranks, train)
    capacity = trainer.micro_batch_size * config.data.max_length
    largest = train.step.largest_bin if train and train.step and train.whole else capacity
    lean = config.optim.use_precision_aware_optimizer
    memory = training_memory(sizes, config.parallel, ranks, largest, bf16, trainer.recompute.value, lean)
    _add_memory(table, memory, device)
    host = checkpoint_host_bytes(sizes, ranks, bf16) * config.launcher.nproc_per_node
    if device.on_cuda:
        table.add_row("host memory", f"about {host / _GIB:,.3g} GiB on each node while a checkpoint is saved")
    if bf16 and device.node is not None:
        for title, text in layout_advice(config, model, sizes, device.node):
            table.add_row(title, text)
    if device.product_flops is not None:
        _add_cpu_rate(table, sizes, device.product_flops, config, train)
    finish(table, stage.name, config, train.first if train else "")
    for rows in read:
        _check(rows)


def print_label_dry_run(job: Job[LabelRun]) -> None:
    """Print the dry run of `label`; raises as `print_training_dry_run`."""
    config, model = job.config, _model(job)
    sizes = model_sizes(model, model.vocab_size or 0, scalar_head=True)
    ranks, device = ranks_of(config), planned_device(config)
    paths = readable_paths(config, "data.input")
    rows = paths if isinstance(paths, str) else label_rows(job, paths)
    table = new_table(f"label: {config.run.dir}")
    _add_model(table, sizes, model)
    add_template(table, job)
    add_device(table, device, config.trainer.precision, ranks)
    _add_rows(table, "data.input", rows, config.data.max_length)
    capacity = config.trainer.micro_batch_size * config.data.max_length
    table.add_row("batch", f"packed bins of up to {capacity:,} tokens, forward only")
    bf16 = config.trainer.precision.in_bf16(device.on_cuda)
    _add_memory(table, scoring_memory(sizes, config.parallel, ranks, capacity, bf16), device)
    if bf16 and device.node is not None:
        table.add_row("rate", scoring_rate(device.node, sizes, config.data.max_length))
    finish(table, "label", config, rows.first if isinstance(rows, PlannedRows) else "")
    _check(rows)


def print_generate_dry_run(job: Job[GenerateRun], conditions: list[str], engine: str) -> None:
    """Print the dry run of `generate`, without loading weights; raises as `print_training_dry_run`."""
    config, source, settings = job.config, job.source, job.config.generate
    device = planned_device(config)
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    sizes = model_sizes(source.model, source.model.vocab_size or 0)
    paths = readable_paths(config, "data.input")
    rows = paths if isinstance(paths, str) else prompt_rows(job, paths, conditions)
    sampling = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    method = source.description.method or "none"
    table = new_table(f"generate: {config.run.dir}")
    table.add_row("policy", f"{config.init.from_}, {sizes.parameters:,} parameters, method {method}")
    add_template(table, job)
    table.add_row("device", f"{device.text}, {_precision(config.trainer.precision, device)}")
    table.add_row("ranks", f"{world}, each with the whole policy and a share of the prompts")
    _add_rows(table, "data.input", rows, config.data.max_length)
    table.add_row("engine", f"{engine}, {settings.batch_size} prompts at once")
    table.add_row("answers", f"{settings.n} to each prompt, at most {settings.max_new_tokens} tokens, {sampling}")
    table.add_row("condition", ", ".join(filter(None, conditions)) or "none")
    finish(table, "generate", config, rows.first if isinstance(rows, PlannedRows) else "")
    _check(rows)


def _read_rows(
    job: Job[TrainRun], ranks: ParallelSizes, key: Literal["data.train", "data.valid"], fitted: Any = None
) -> PlannedRows | str:
    """Return the rows of a key, or why they are not read; `fitted` is that of the training rows."""
    paths = readable_paths(job.config, key)
    if isinstance(paths, str):
        return paths
    if job.config.init.from_ is None and job.config.model.tokenizer is None:
        return "model.tokenizer is not set"
    return training_rows(job, "train" if key == "data.train" else "valid", paths, ranks.data, fitted)


def _check(rows: PlannedRows | str) -> None:
    """Raise what would end the run, if anything would."""
    if isinstance(rows, PlannedRows):
        rows.bad.check()
        if rows.error is not None:
            raise rows.error


def _model[R: ModelRun](job: Job[R]) -> ModelSection:
    config = job.config
    if config.init.from_ is None and config.model.vocab_size is not None:
        return config.model
    return job.source.model


def ranks_of(config: ModelRun) -> ParallelSizes:
    """Return the parallel sizes of the ranks that the launcher would start."""
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    parallel = config.parallel
    return ParallelSizes(world, parallel.tensor_model_parallel_size, parallel.context_parallel_size)


def new_table(title: str) -> Table:
    """Return a table of names and texts."""
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


def add_template(table: Table, job: Job[Any]) -> None:
    """Add the template and the reason for it, if the run has a model."""
    if job.template is not None:
        table.add_row("template", job.template.in_words())


def add_device(table: Table, device: PlannedDevice, precision: Precision, ranks: ParallelSizes) -> None:
    """Add the device, its precision and the ranks."""
    table.add_row("device", f"{device.text}, {_precision(precision, device)}")
    parts = f"tensor {ranks.tensor} x context {ranks.context} x data {ranks.data}"
    table.add_row("ranks", f"{ranks.world} = {parts}")


def _precision(precision: Precision, device: PlannedDevice) -> str:
    if precision is Precision.fp8:
        return "fp8"
    return "bf16" if precision.in_bf16(device.on_cuda) else "fp32"


def _add_rows(table: Table, key: str, rows: PlannedRows | str, max_length: int) -> None:
    """Add what was found in the rows of `key`: counts, lengths, and what is left out or refused."""
    if isinstance(rows, str):
        if key != "data.valid":
            table.add_row("rows", f"not read: {rows}; the plan assumes full rows")
        return
    sample = "all read" if rows.whole else f"{rows.read:,} of them read (data.dry_run_rows=null reads all)"
    table.add_row("rows", f"{key}: {rows.lines:,}, {sample}")
    for title, text in (("sources", rows.sources), ("epoch", rows.epoch), ("warning", rows.without_share)):
        if text:
            table.add_row(title, escape(text))
    left_out = f"; left out: {escape(reasons(rows.dropped))}" if rows.dropped else ""
    mean = f", {rows.tokens / rows.kept:,.0f} tokens each" if rows.kept else ""
    table.add_row(
        "used", f"{rows.kept:,}{mean}; {counted(rows.truncated, 'prompt')} truncated to {max_length:,} tokens{left_out}"
    )
    if rows.bad.counts:
        fate = "would end the run with exit code 65" if rows.bad.messages else "would be skipped"
        table.add_row("bad rows", f"{rows.bad.counts.total():,} {fate}: {escape(reasons(rows.bad.counts))}")


def _add_steps(table: Table, config: TrainRun, ranks: ParallelSizes, rows: PlannedRows | None) -> None:
    trainer = config.trainer
    batch, length = trainer.global_batch_size, config.data.max_length
    capacity = trainer.micro_batch_size * length
    table.add_row("global batch", f"{counted(batch, 'row')} a step, packed")
    table.add_row("micro-batch", f"up to {capacity:,} tokens ({trainer.micro_batch_size} x {length:,})")
    if rows is not None and rows.step is not None:
        step = rows.step
        bins = f"{step.bins:.3g} micro-batches on each data parallel rank, {step.padding:.1%} padding"
        table.add_row("tokens a step", f"about {step.tokens:,.0f}; {bins}")
    else:
        share = -(-batch * length // ranks.data // capacity)
        bins = f"{counted(share, 'micro-batch', 'micro-batches')} on each data parallel rank"
        table.add_row("tokens a step", f"at most {batch * length:,}; then {bins}")
    table.add_row(
        "length", f"{_length(config, rows)}, learning rate {config.optim.lr:g} ({config.optim.lr_decay_style})"
    )
    short = one_step(config, rows.estimated) if rows is not None and rows.kept else None
    if short is not None:
        table.add_row("warning", short)


def _length(config: TrainRun, rows: PlannedRows | None) -> str:
    trainer = config.trainer
    if rows is None or not rows.kept:
        return counted(trainer.max_steps, "step") if trainer.max_steps else counted(trainer.max_epochs, "epoch")
    about = "" if rows.whole else "about "
    epochs = (trainer.max_steps or 0) * trainer.global_batch_size / rows.estimated or trainer.max_epochs
    steps = counted(_steps(config, rows), "step")
    return (
        f"{about}{steps}, which is {epochs:.3g} epoch{'' if epochs == 1 else 's'} of {counted(rows.estimated, 'row')}"
    )


def _steps(config: TrainRun, rows: PlannedRows) -> int:
    trainer = config.trainer
    return trainer.max_steps or -(-rows.estimated * trainer.max_epochs // trainer.global_batch_size)


def _add_memory(table: Table, memory: MemoryEstimate, device: PlannedDevice) -> None:
    memory = memory if device.on_cuda else memory.on_cpu()
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    name, most = max(("activations", memory.activations), ("update", memory.update), key=lambda part: part[1])
    parts |= {name: most, "process": memory.process}
    text = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size)
    table.add_row("memory a rank", f"about {memory.total / _GIB:.2f} GiB: {text}")
    if not device.on_cuda and device.memory_bytes is not None and memory.total > device.memory_bytes:
        has = f"this machine has {device.memory_bytes / _GIB:.1f} GiB for a rank"
        table.add_row("warning", f"{has}: use a smaller trainer.micro_batch_size or data.max_length")


def _add_cpu_rate(
    table: Table, sizes: ModelSizes, product_flops: float, config: TrainRun, rows: PlannedRows | None
) -> None:
    """Add the rate of a step on this CPU, and the duration of the run if its rows are known."""
    length = config.data.max_length if rows is None or not rows.kept else max(1, rows.tokens // rows.kept)
    targets = 0 if sizes.scalar_head else length
    flops = sizes.train_flops(length, length**2, targets, length) / length
    rate = CPU_SHARE * product_flops / flops
    table.add_row("rate", f"about {rate:,.0f} tokens/s on each rank (from a matrix product timed now)")
    if rows is not None and rows.step is not None:
        seconds = rows.step.tokens / (rate * ranks_of(config).world)
        table.add_row("time", f"about {in_words(seconds)} a step, {in_words(seconds * _steps(config, rows))} in all")


def in_words(seconds: float) -> str:
    """Return a duration with two digits: `0.4 s`, `3.2 min`, `5.1 h`."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def finish(table: Table, stage: str, config: ModelRun, first: str = "") -> None:
    """Print the table with the launch command, and the `first` row or prompt if it is known."""
    words = [_quoted(w) for w in sys.argv[2:] if not w.startswith(("dry_run=", "launcher."))]
    table.add_row("launch", escape(" ".join(torchrun_command(config.launcher, stage, words))))
    show(table, *([Text(f"first row, as the model sees it:\n{first}")] if first else []))


def _quoted(word: str) -> str:
    """Return a word as one writes it in a shell. Lists of paths stay as they are, because they work without quotes."""
    plain = word.replace("[", "").replace("]", "")
    return word if shlex.quote(plain) == plain else shlex.quote(word)
