"""Export our tensors to a Hugging Face folder: weights, config, tokenizer, chat template, model card."""

import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_align.config.sections import ModelSection, Template
from offline_align.convert import names
from offline_align.convert.architecture import huggingface_config
from offline_align.convert.card import model_card
from offline_align.convert.chat_template import chat_template
from offline_align.convert.files import INDEX, SINGLE
from offline_align.convert.names import Entry, Join, Kind
from offline_align.convert.provenance import UNKNOWN, Provenance
from offline_align.convert.recipe import recipe
from offline_align.convert.same_ids import same_ids
from offline_align.convert.tensors import split
from offline_align.convert.tokenizer_files import Written, is_replaced, write_tokenizer
from offline_align.convert.weights import parse_size, write_weights
from offline_align.data.chat import uses_date
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.lineage.files import fsync_path
from offline_align.model.description import ModelDescription

logger = logging.getLogger(__name__)

_WORK = ".export-"


def export_huggingface(
    state: Iterable[tuple[str, Tensor]],
    description: ModelDescription,
    tokenizer: Tokenizer,
    target: Path,
    max_shard_size: str = "5GB",
    known: Provenance = UNKNOWN,
    for_people: bool = True,
    shards_of: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor],
) -> list[Path]:
    """Write a folder that `transformers` and vLLM can load, and return its files.

    `state` yields tensors under our names, whole or as `huggingface_tensors` takes them. `known` goes
    into the model card. A folder that is not `for_people` gets no model card, and its ids are not
    compared with those of `transformers`. Raises ConfigError for a model that no family can represent and for missing
    or unknown tensors, and StorageError if writing fails.
    """
    max_shard_bytes = parse_size(max_shard_size)
    tensors = huggingface_tensors(state, description.model, description.kind, shards_of)
    first = next(tensors)
    dtype = str(first[1].dtype).removeprefix("torch.")
    with _atomic_folder(target) as work:
        write_weights(itertools.chain([first], tensors), work, max_shard_bytes)
        written = _write_tokenizer(description, tokenizer, work)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": written.pad_id}
        _write_json(work / "config.json", _config(description, dtype) | ids)
        _write_json(work / "generation_config.json", ids | {"do_sample": False})
        if description.reading is not None and description.reading.pad_id is not None:
            _keep_padding(work, description.reading.pad_id, tokenizer)
        if for_people:
            _write_card(description, tokenizer, work, known, written.fast)
        names_written = sorted(path.name for path in work.iterdir())
    return [target / name for name in names_written]


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a work folder inside `target`; its files are moved to `target` once all are on disk."""
    work: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        for leftover in target.glob(f"{_WORK}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=target))
        yield work
        files = sorted(work.iterdir())
        for file in files:
            fsync_path(file)
        for name in _weights_in(target) - {file.name for file in files}:
            (target / name).unlink()
        for file in files:
            file.replace(target / file.name)
        fsync_path(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _weights_in(folder: Path) -> set[str]:
    """Return the names of weight files in `folder`; a reader could load stale ones by mistake."""
    return {path.name for pattern in (SINGLE, INDEX, "model-*.safetensors") for path in folder.glob(pattern)}


def huggingface_tensors(
    state: Iterable[tuple[str, Tensor]],
    model: ModelSection,
    kind: Kind,
    shards_of: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield `state` under Hugging Face names; raises ConfigError for missing or unknown tensors.

    `state` has whole tensors. If it has those of one tensor parallel rank, `shards_of` must return the
    shards of all ranks; it is not called for tensors that all ranks have whole.
    """
    table = {entry.ours: entry for entry in names.entries(names.family_of(model), model, kind)}
    for name, tensor in state:
        if name.endswith("_extra_state"):
            continue
        entry = table.pop(name, None)
        if entry is None:
            raise ConfigError(f"init.from: tensor {name} of the checkpoint is not part of the model it describes")
        shards = [tensor] if entry.tp_axis is None else shards_of(tensor)
        yield from zip((part.name for part in entry.parts), _parts(entry, shards, model), strict=True)
    if table:
        raise ConfigError(f"init.from: the checkpoint has no tensor {', '.join(table)}")


def _parts(entry: Entry, shards: list[Tensor], model: ModelSection) -> list[Tensor]:
    """Return the whole Hugging Face parts of the shards of all tensor parallel ranks."""
    assert model.vocab_size is not None
    if entry.join in (Join.copy, Join.vocabulary):
        shards = [_concatenated(shards, entry.tp_axis)]
    groups = model.query_groups // len(shards)
    # Each shard of a joined tensor holds a piece of every part.
    pieces = [split(entry.join, shard, groups, model.head_width, model.vocab_size) for shard in shards]
    return [_concatenated(part, entry.tp_axis) for part in zip(*pieces, strict=True)]


def _concatenated(tensors: Sequence[Tensor], axis: int | None) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=axis or 0)


def _write_tokenizer(description: ModelDescription, tokenizer: Tokenizer, target: Path) -> Written:
    template = _chat_template(description, tokenizer)
    renderer = description.renderer(tokenizer)
    last = frozenset({tokenizer.eos_id, *_last_of_row(renderer)})
    length = description.model.max_position_embeddings
    return write_tokenizer(tokenizer, target, template, length, description.kind, last)


def _last_of_row(renderer: Renderer) -> list[int]:
    """Return the last id of a row, if the template can write rows; for generation it need not."""
    try:
        return renderer.target((Message("user", "a"),), "b")[-1:]
    except (ConfigError, DataError):
        return []


def _chat_template(description: ModelDescription, tokenizer: Tokenizer) -> str:
    ours = description.kind == "reward_model" and description.reading is None
    ends_rows = ours and description.template is Template.chat and not description.renderer(tokenizer).ends_rows
    return chat_template(tokenizer, description.template, _condition(description), description.template_date, ends_rows)


def _condition(description: ModelDescription) -> str:
    return description.condition.text if description.condition else ""


def _write_card(
    description: ModelDescription, tokenizer: Tokenizer, target: Path, known: Provenance, fast: bool
) -> None:
    """Write the model card, with notes on how `transformers` encodes differently."""
    condition = _condition(description)
    notes = []
    code = recipe(description, tokenizer) if fast else ""
    if not fast:
        notes.append(
            "No `tokenizer.json` can reproduce the ids of this SentencePiece model: encode with `tokenizer.model`."
        )
    if fast and is_replaced(target, tokenizer):
        logger.warning("transformers 5 changes this tokenizer.json when it loads it; see README.md of the folder")
        notes.append(
            "`AutoTokenizer` of transformers 5 uses the tokenizer class of the model's family instead of this "
            "`tokenizer.json`: load it with `PreTrainedTokenizerFast.from_pretrained`."
        )
    found = same_ids(target, description, description.renderer(tokenizer), condition, fast)
    logger.log(logging.WARNING if found.different else logging.INFO, "convert: %s", found.in_words())
    if found.different and not code:
        notes.append(f"A check at the export found: {found.in_words()}.")
    if uses_date(_chat_template(description, tokenizer)):
        notes.append("The chat template writes the current date; this model has no fixed date.")
    card = model_card(description, notes, known, code)
    (target / "README.md").write_text(card, encoding="utf-8")


def _config(description: ModelDescription, dtype: str) -> dict[str, Any]:
    condition = description.condition
    ours: dict[str, Any] = {
        "method": description.method,
        "template": description.template.value,
        "encoding": description.encoding.value,
        "condition": None if condition is None else asdict(condition),
    }
    if description.template_date is not None:
        ours["template_date"] = description.template_date
    if description.reading is not None:
        ours["reading"] = asdict(description.reading)
    return huggingface_config(description.model, description.kind, dtype) | {"offline_align": ours}


def _keep_padding(folder: Path, pad_id: int, tokenizer: Tokenizer) -> None:
    """Write the padding token of a third-party reward model into all files; no score is read at padding."""
    for name, key, value in (
        ("config.json", "pad_token_id", pad_id),
        ("generation_config.json", "pad_token_id", pad_id),
        ("tokenizer_config.json", "pad_token", tokenizer.shown([pad_id])),
    ):
        _write_json(folder / name, json.loads((folder / name).read_text(encoding="utf-8")) | {key: value})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
