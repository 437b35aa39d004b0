"""Load a Hugging Face folder into our tensors, one at a time and only the slice that a rank needs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from offline_align.config.sections import ModelSection
from offline_align.convert import names
from offline_align.convert.architecture import Architecture, read_architecture
from offline_align.convert.files import open_tensors
from offline_align.convert.names import Entry, Join, Part
from offline_align.convert.tensors import join, pad_rows
from offline_align.errors import AlignError, ConfigError

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

# Old Llama checkpoints contain the rotary frequencies, which config.json determines.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_into(
    module: torch.nn.Module,
    folder: Path,
    ranks: "Ranks",
    make_vocab_size_divisible_by: int = ModelSection.make_vocab_size_divisible_by,
    fresh_prefixes: tuple[str, ...] = (),
) -> None:
    """Load the weights of a Hugging Face folder into a built model.

    Parameters whose names start with one of `fresh_prefixes` keep their values if the folder has no
    weights for them. Raises AlignError if other weights are missing, and as `load_huggingface`.
    """
    from offline_align.model.backend import torch_name

    parameters = {torch_name(name): parameter for name, parameter in module.named_parameters()}
    missing = {n for n in parameters if not n.startswith(fresh_prefixes or ("\0",))}
    with torch.no_grad():
        for name, shard in load_huggingface(folder, ranks.tp_rank, ranks.tp_size, make_vocab_size_divisible_by):
            if name in parameters:
                parameters[name].copy_(shard)
                missing.discard(name)
    if missing:
        raise AlignError(f"init.from={folder}: no weights for {', '.join(sorted(missing)[:3])}")


def load_huggingface(
    folder: Path,
    tp_rank: int = 0,
    tp_size: int = 1,
    make_vocab_size_divisible_by: int = ModelSection.make_vocab_size_divisible_by,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (our tensor name, shard of `tp_rank`) for every tensor, in the dtype of the file.

    Everything is checked before the first tensor is read. Raises ConfigError for an unknown
    architecture, missing or unexpected tensors, wrong shapes, or a tensor parallel size that does
    not divide the model; StorageError for a damaged file.
    """
    architecture = read_architecture(folder)
    model = replace(architecture.model, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    table = list(names.entries(architecture.family, model, architecture.kind))
    _check_tensor_parallel(model, tp_size)
    with open_tensors(folder) as slices:
        _check_tensors(folder, architecture, slices)
        for entry in table:
            yield entry.ours, _shard(entry, model, slices, tp_rank, tp_size)


def _check_tensor_parallel(model: ModelSection, tp_size: int) -> None:
    shared = {
        "query groups": model.query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "padded vocabulary": model.padded_vocab_size,
    }
    uneven = [f"{name} {size}" for name, size in shared.items() if size % tp_size]
    if uneven:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={tp_size} does not divide {', '.join(uneven)} of the model"
        )


def _check_tensors(folder: Path, architecture: Architecture, slices: dict[str, Any]) -> None:
    expected = names.part_shapes(architecture.family, architecture.model, architecture.kind)
    tied = architecture.model.share_embeddings_and_output_weights or architecture.kind == "reward_model"
    ignored = {"lm_head.weight"} if tied else set()
    problems = [f"tensor {name} is missing" for name in expected if name not in slices]
    problems += [
        f"tensor {name} is not part of {architecture.family.model_type}"
        for name in slices
        if name not in expected and name not in ignored and not _IGNORED.fullmatch(name)
    ]
    problems += [
        f"tensor {name} has shape {slices[name].get_shape()}, config.json says {shape}"
        for name, shape in expected.items()
        if name in slices and slices[name].get_shape() != shape
    ]
    if problems:
        raise ConfigError([f"init.from: {folder}: {problem}" for problem in problems])


def _shard(entry: Entry, model: ModelSection, slices: dict[str, Any], tp_rank: int, tp_size: int) -> Tensor:
    if entry.join is Join.vocabulary:
        return _vocabulary_shard(entry.parts[0], model, slices, tp_rank, tp_size)
    parts = [_part(slices[part.name], entry.tp_axis, tp_rank, tp_size) for part in entry.parts]
    return join(entry.join, parts, model.query_groups // tp_size)


def _part(tensor: Any, axis: int | None, tp_rank: int, tp_size: int) -> Tensor:
    """Read piece `tp_rank` of `tp_size` equal pieces of a file's tensor along `axis`."""
    if axis is None or tp_size == 1:
        return cast(Tensor, tensor[:])
    width = tensor.get_shape()[axis] // tp_size
    piece = slice(tp_rank * width, (tp_rank + 1) * width)
    return cast(Tensor, tensor[piece] if axis == 0 else tensor[:, piece])


def _vocabulary_shard(part: Part, model: ModelSection, slices: dict[str, Any], tp_rank: int, tp_size: int) -> Tensor:
    """Read this rank's rows of the padded vocabulary; rows beyond the file's tensor are zero."""
    rows = model.padded_vocab_size // tp_size
    tensor = slices[part.name]
    vocab_size = tensor.get_shape()[0]
    start = min(tp_rank * rows, vocab_size)
    stop = min(start + rows, vocab_size)
    return pad_rows(tensor[start:stop], rows)
