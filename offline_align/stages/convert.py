"""`convert`: Hugging Face form to ours and back, written into `run.dir`."""

import logging
from pathlib import Path
from typing import Any

from offline_align import lineage
from offline_align.config.compose import world_size
from offline_align.config.runs import ConvertRun
from offline_align.config.sections import ConvertTo
from offline_align.convert.weights import parse_size
from offline_align.errors import ConfigError
from offline_align.stages import common
from offline_align.stages.continuation import RunKey
from offline_align.stages.origin import Origin, resolve

logger = logging.getLogger(__name__)


def run(config: ConvertRun, explicit: frozenset[str]) -> int:
    """Write the other form of `init.from`; returns the exit code.

    Raises ConfigError where it has that form already.
    """
    origin = resolve(config, explicit)
    _check(config, origin)
    if config.dry_run:
        logger.info("convert: %s to %s form in %s", config.init.from_, config.convert.to.value, config.run.dir)
        return 0
    return common.run_on_ranks("convert", config, lambda ranks, key: _convert(config, origin, ranks, key))


def _convert(config: ConvertRun, origin: Origin, ranks: Any, key: RunKey) -> None:
    if ranks.is_main:
        common.start_folder(config, origin.model)
    ranks.barrier()
    run_dir = Path(config.run.dir)
    to_megatron = config.convert.to is ConvertTo.megatron
    outputs = _to_megatron(origin, run_dir, ranks) if to_megatron else _to_huggingface(config, origin, ranks)
    checked = _check_numbers(config, origin, ranks) if config.convert.check else {}
    if ranks.is_main:
        extra = {"to": config.convert.to.value, "kind": origin.kind, "method": origin.method, **checked}
        inputs, parents = common.input_files(config), common.parent_models(config)
        lineage.write_manifest(run_dir, "convert", key.finished, inputs, parents, outputs, extra)
        logger.info("convert: done: %s", run_dir)
    ranks.barrier()


def _check_numbers(config: ConvertRun, origin: Origin, ranks: Any) -> dict[str, Any]:
    """Compare ours with `transformers` on the Hugging Face side; return what the manifest says of it."""
    from offline_align.convert.check import compare

    folder = origin.huggingface or Path(config.run.dir)
    found = compare(folder, origin.renderer(), ranks.device)
    logger.info("convert: %s", found.in_words())
    return {"check": found.as_json()}


def _check(config: ConvertRun, origin: Origin) -> None:
    problems = []
    if config.convert.evaluation is not None and config.convert.to is ConvertTo.megatron:
        problems.append("convert.evaluation: goes into the model card of convert.to=huggingface; leave it unset")
    wanted = config.convert.to
    has = ConvertTo.megatron if origin.checkpoint is not None else ConvertTo.huggingface
    if wanted is has:
        other = next(form for form in ConvertTo if form is not has)
        problems.append(
            f"convert.to={wanted.value}: init.from={config.init.from_} has that form already; "
            f"use convert.to={other.value}"
        )
    ranks = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    if ranks > 1:
        problems.append(
            f"launcher.nproc_per_node: {ranks} ranks; convert runs on one, and what it writes loads at any "
            "layout; use launcher.nproc_per_node=1"
        )
    try:
        parse_size(config.convert.max_shard_size)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def _to_huggingface(config: ConvertRun, origin: Origin, ranks: Any) -> list[Path]:
    from offline_align.stages import huggingface_form

    run_dir = Path(config.run.dir)
    evaluation = Path(config.convert.evaluation) if config.convert.evaluation is not None else None
    written = huggingface_form.write(origin, run_dir, ranks, config.convert.max_shard_size, evaluation)
    own = {lineage.MANIFEST, lineage.CONFIG}
    return [path for path in written if path.name not in own]


def _to_megatron(origin: Origin, run_dir: Path, ranks: Any) -> list[Path]:
    """Save a checkpoint of step 0 in the precision of the safetensors files."""
    from offline_align.convert.files import open_tensors
    from offline_align.stages import huggingface_form
    from offline_align.train import checkpoint
    from offline_align.train.saving import Saver

    assert origin.huggingface is not None
    with open_tensors(origin.huggingface) as tensors:
        bf16 = tensors["model.embed_tokens.weight"].get_dtype() == "BF16"
    model = huggingface_form.build(origin, ranks, bf16)
    description = huggingface_form.describe(origin)
    Saver(run_dir, model, None, description, origin.tokenizer, ranks).save(checkpoint.TrainState())
    return [run_dir / checkpoint.FOLDER]
