"""A checkpoint of ours in Hugging Face form: what `convert` writes, and what `generate` runs."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from offline_align.convert.export import export_huggingface
from offline_align.convert.files import weight_files
from offline_align.convert.provenance import provenance
from offline_align.distributed.setup import Ranks
from offline_align.errors import StorageError
from offline_align.model.description import ModelDescription
from offline_align.stages.origin import Origin, load_origin
from offline_align.train import checkpoint, reading


def describe(origin: Origin) -> ModelDescription:
    """Return the description that goes with the weights of `origin`."""
    return ModelDescription(
        kind="policy" if origin.kind == "policy" else "reward_model",
        model=origin.model,
        template=origin.template,
        tokenizer_hash=origin.tokenizer.content_hash,
        condition=origin.condition,
        method=origin.method,
        template_date=origin.template_date,
        reading=origin.reading,
    )


def build(origin: Origin, ranks: Ranks, bf16: bool) -> Any:
    """Return the model of `origin` with its weights, whole on this rank. All ranks call it together."""
    from offline_align.config.sections import Backend, ParallelSection
    from offline_align.model.build import build_model

    # Its names are those of the tables, wherever Transformer Engine is installed too.
    section = replace(origin.model, backend=Backend.torch)
    model = build_model(origin.kind, section, ParallelSection(), ranks.device, bf16)
    load_origin(model, origin, ranks)
    return model


def write(
    origin: Origin, target: Path, ranks: Ranks, max_shard_size: str = "5GB", evaluation: Path | None = None
) -> list[Path]:
    """Write the checkpoint of `origin` into `target` and return its files. All ranks call it together.

    Weights keep the precision that they were saved in; the table of an `evaluation` run goes into the model card.
    Raises StorageError for a damaged checkpoint or a failed write, ConfigError for an evaluation of other models.
    """
    assert origin.checkpoint is not None
    model = build(origin, ranks, _saved_in_bf16(origin.checkpoint, ranks))
    if not ranks.is_main:
        return []
    state = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    known = provenance(origin.checkpoint, evaluation)
    return export_huggingface(state, describe(origin), origin.tokenizer, target, max_shard_size, known)


def _saved_in_bf16(folder: Path, ranks: Ranks) -> bool:
    import torch

    checkpoint.verify(folder, ranks)
    saved = reading.tensors_metadata(folder)
    return bool(saved["embedding.word_embeddings.weight"].dtype == torch.bfloat16)


def cached(origin: Origin, cache: Path, ranks: Ranks) -> Path:
    """Return a Hugging Face folder with the policy of `origin`: its own, or one below `cache`.

    The folder is named after the content of the checkpoint and appears whole or not at all; one that is
    there is used again. All ranks call it together.
    """
    if origin.huggingface is not None:
        weight_files(origin.huggingface)  # refuses pickles, and an index that leads out of the folder
        return origin.huggingface
    assert origin.checkpoint is not None
    folder = cache / checkpoint.digest(origin.checkpoint)[:16]
    if ranks.broadcast(folder.is_dir()):
        return folder
    attempt = cache / ranks.broadcast(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    write(origin, attempt, ranks)
    if ranks.is_main:
        try:
            for leftover in cache.glob(f".{folder.name}.tmp-*"):
                if leftover != attempt:
                    shutil.rmtree(leftover, ignore_errors=True)
            attempt.rename(folder)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error
    ranks.barrier()
    return folder
