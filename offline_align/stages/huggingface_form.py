"""Checkpoints in Hugging Face format: `convert` writes them, `generate` runs them."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from offline_align.convert.export import export_huggingface
from offline_align.convert.files import weight_files
from offline_align.convert.provenance import provenance
from offline_align.convert.source import Form, ModelSource
from offline_align.distributed.setup import Ranks
from offline_align.errors import ConfigError, StorageError
from offline_align.stages.registry import title
from offline_align.train import checkpoint, safe_unpickling


def build(source: ModelSource, ranks: Ranks, bf16: bool) -> Any:
    """Return the model of `source` with its weights, whole on each rank. All ranks must call it."""
    from offline_align.config.sections import Backend, ParallelSection
    from offline_align.model.build import build_model

    # The name tables describe this backend, even if Transformer Engine is installed.
    section = replace(source.model, backend=Backend.torch)
    model = build_model(source.kind, section, ParallelSection(), ranks.device, bf16)
    source.load_into(model, ranks)
    return model


def write(
    source: ModelSource,
    target: Path,
    ranks: Ranks,
    max_shard_size: str = "5GB",
    evaluation: Path | None = None,
    dtype: str | None = None,
    for_people: bool = True,
) -> list[Path]:
    """Write the checkpoint of `source` into `target` and return its files. All ranks must call it.

    Weights are written as `dtype`, or in the precision that they were saved in if it is None. The
    table of an `evaluation` run goes into the model card. See `export_huggingface` for `for_people`.
    Raises StorageError for a damaged checkpoint or a failed write, ConfigError for an evaluation of
    other models.
    """
    assert source.folder is not None
    model = build(source, ranks, _saved_in_bf16(source.folder, ranks))
    if not ranks.is_main:
        return []
    state = ((name, _cast(name, parameter.detach(), dtype)) for name, parameter in model.named_parameters())
    known = replace(provenance(source.folder, evaluation), method=title(source.description.method))
    return export_huggingface(state, source.description, source.tokenizer, target, max_shard_size, known, for_people)


def write_live(module: Any, source: ModelSource, target: Path, ranks: Ranks) -> None:
    """Write the weights of a built module, in its layout, to a folder for an engine. All ranks must call it."""
    from offline_align.convert.live import all_shards, live_tensors, own_tensors

    if ranks.is_main:
        described = source.description, source.tokenizer
        export_huggingface(own_tensors(module), *described, target, for_people=False, shards_of=all_shards)
        return
    for _ in live_tensors(module, source.model, source.description.kind):
        pass  # rank 0 gathers these shards


def _cast(name: str, weight: Any, dtype: str | None) -> Any:
    """Return a weight as `dtype`. The scalar head of a reward model is fp32 at every precision.

    Raises ConfigError for a weight that `dtype` cannot hold.
    """
    import torch

    if dtype is None or name.startswith("reward_head."):
        return weight
    cast = weight.to(getattr(torch, dtype))
    if not cast.isfinite().all():
        raise ConfigError(f"convert.dtype={dtype}: {name} has values beyond its range; use bfloat16 or float32")
    return cast


def saved_dtype(source: ModelSource, ranks: Ranks) -> str:
    """Return the precision in which a checkpoint was saved. All ranks must call it."""
    assert source.folder is not None
    return "bfloat16" if _saved_in_bf16(source.folder, ranks) else "float32"


def _saved_in_bf16(folder: Path, ranks: Ranks) -> bool:
    import torch

    checkpoint.verify(folder, ranks)
    saved = safe_unpickling.tensors_metadata(folder)
    return bool(saved["embedding.word_embeddings.weight"].dtype == torch.bfloat16)


def cached(source: ModelSource, cache: Path, ranks: Ranks, module: Any = None) -> Path:
    """Return a Hugging Face folder with the policy of `source`: its own, or one in `cache`.

    With a `module` that has its weights, in any layout, these are written, and no further model is built.
    A cached folder is named after the content of the checkpoint, appears whole or not at all, and is
    used again. All ranks must call it.
    """
    assert source.folder is not None
    if source.form is Form.huggingface:
        weight_files(source.folder)  # refuses pickles and an index that points outside the folder
        return source.folder
    folder = cache / checkpoint.digest(source.folder)[:16]
    if ranks.broadcast(folder.is_dir()):
        return folder
    attempt = cache / ranks.broadcast(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    if module is None:
        write(source, attempt, ranks, for_people=False)
    else:
        write_live(module, source, attempt, ranks)
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
