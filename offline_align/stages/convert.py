"""`convert`: convert a model between Hugging Face format and a checkpoint of this toolkit."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_align import lineage
from offline_align.config.compose import world_size
from offline_align.config.runs import ConvertRun
from offline_align.config.sections import ConvertDtype, ConvertTo
from offline_align.convert.source import Form, ModelSource
from offline_align.convert.weights import parse_size
from offline_align.errors import ConfigError
from offline_align.stages.job import Job

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)


def run(job: Job[ConvertRun]) -> int:
    """Write the other form of `init.from` into `run.dir`; return the exit code.

    Raises ConfigError if the model has that form already.
    """
    config = job.config
    _check(config, job.source)
    if config.dry_run:
        logger.info("convert: %s to %s form in %s", config.init.from_, config.convert.to.value, config.run.dir)
        return 0
    return job.on_ranks(lambda ranks: _convert(job, ranks))


def _convert(job: Job[ConvertRun], ranks: "Ranks") -> None:
    config, source = job.config, job.source
    job.start_folder(source.model, ranks)
    to_megatron = config.convert.to is ConvertTo.megatron
    dtype = _dtype(config, source, ranks)
    outputs = (
        _to_megatron(source, job.run_dir, ranks, dtype)
        if to_megatron
        else _to_huggingface(config, source, ranks, dtype)
    )
    checked = _check_numbers(config, source, ranks) if config.convert.check else {}
    if ranks.is_main:
        job.finish(
            outputs,
            {
                "to": config.convert.to.value,
                "dtype": dtype,
                "kind": source.kind,
                "method": source.description.method,
                **checked,
            },
        )
        logger.info("convert: done: %s", job.run_dir)
    ranks.barrier()


def _dtype(config: ConvertRun, source: ModelSource, ranks: "Ranks") -> str:
    """Return the precision to write. All ranks must call it."""
    from offline_align.stages.huggingface_form import saved_dtype

    origin = source.description.source_dtype
    asked = config.convert.dtype
    if source.form is Form.huggingface:
        found = asked.value if asked is not ConvertDtype.auto else origin
        # A checkpoint of ours is in bf16 or fp32, and fp32 holds every other value.
        return "bfloat16" if found == "bfloat16" else "float32"
    saved = saved_dtype(source, ranks)
    dtype = (origin or saved) if asked is ConvertDtype.auto else asked.value
    if ranks.is_main and dtype != saved:
        why = "the precision of the model that training started from" if asked is ConvertDtype.auto else "as asked"
        logger.info("convert: %s, %s; the checkpoint has %s, which convert.dtype=%s keeps", dtype, why, saved, saved)
    return dtype


def _check_numbers(config: ConvertRun, source: ModelSource, ranks: "Ranks") -> dict[str, Any]:
    """Compare our numbers with those of `transformers`; return the result for the manifest."""
    from offline_align.convert.check import compare

    folder = source.folder if source.form is Form.huggingface else None
    found = compare(folder or Path(config.run.dir), source.renderer(), ranks.device)
    logger.info("convert: %s", found.in_words())
    return {"check": found.as_json()}


def _check(config: ConvertRun, source: ModelSource) -> None:
    problems = []
    if config.convert.evaluation is not None and config.convert.to is ConvertTo.megatron:
        problems.append("convert.evaluation: goes into the model card of convert.to=huggingface; leave it unset")
    wanted = config.convert.to
    has = ConvertTo.megatron if source.form is Form.checkpoint else ConvertTo.huggingface
    if wanted is has:
        other = next(form for form in ConvertTo if form is not has)
        problems.append(
            f"convert.to={wanted.value}: init.from={config.init.from_} has that form already; "
            f"use convert.to={other.value}"
        )
    if wanted is ConvertTo.megatron and config.convert.dtype is ConvertDtype.float16:
        problems.append("convert.dtype=float16: a checkpoint of this toolkit has bfloat16 or float32; use one of them")
    ranks = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    if ranks > 1:
        problems.append(
            f"launcher.nproc_per_node: {ranks} ranks; convert runs on one, and its output loads at any "
            "layout; use launcher.nproc_per_node=1"
        )
    try:
        parse_size(config.convert.max_shard_size)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def _to_huggingface(config: ConvertRun, source: ModelSource, ranks: "Ranks", dtype: str) -> list[Path]:
    from offline_align.stages import huggingface_form

    run_dir = Path(config.run.dir)
    evaluation = Path(config.convert.evaluation) if config.convert.evaluation is not None else None
    written = huggingface_form.write(source, run_dir, ranks, config.convert.max_shard_size, evaluation, dtype)
    own = {lineage.MANIFEST, lineage.CONFIG}
    return [path for path in written if path.name not in own]


def _to_megatron(source: ModelSource, run_dir: Path, ranks: "Ranks", dtype: str) -> list[Path]:
    """Save a checkpoint of step 0 as `dtype`, `bfloat16` or `float32`."""
    from offline_align.stages import huggingface_form
    from offline_align.train import checkpoint
    from offline_align.train.saving import Saver

    model = huggingface_form.build(source, ranks, dtype == "bfloat16")
    Saver(run_dir, model, None, source.description, source.tokenizer, ranks).save(checkpoint.TrainState())
    return [run_dir / checkpoint.FOLDER]
