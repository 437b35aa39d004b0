"""Check an export: run a Hugging Face folder in `transformers` and in our model, in fp32, and compare."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_align.config.sections import Backend, ParallelSection
from offline_align.convert.architecture import Architecture, read_architecture
from offline_align.convert.load import load_huggingface
from offline_align.data.batch import PackedBatch
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.errors import AlignError, ConfigError, DataError

TOLERANCE = 1e-4
"""Largest difference that passes, relative to the largest value; fp32 rounds to 6e-8 in each layer."""

_DIALOGUES = (
    ((Message("user", "What is the capital of France?"),), "Paris."),
    (
        (Message("user", "Hi, who are you?\n"), Message("assistant", "A model."), Message("user", "2 + 2 = ?")),
        "Four, or 4 in digits: 2 + 2 = 4.",
    ),
)
_VOCABULARY_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between the two models."""

    what: str
    """`logits` or `scores`."""
    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value in `transformers`."""
    tokens: int
    """Tokens that were compared."""

    @property
    def passes(self) -> bool:
        """Whether the two are equal up to rounding; values that are not finite fail."""
        return isfinite(self.largest) and self.largest <= TOLERANCE * max(1.0, self.scale)

    def in_words(self) -> str:
        """Return one line for the log."""
        return (
            f"our {self.what} and those of transformers differ by at most {self.largest:.2g} "
            f"on {self.tokens} tokens (largest {self.scale:.3g})"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the difference for a manifest."""
        return asdict(self)


def compare(folder: Path, renderer: Renderer, device: torch.device) -> Difference:
    """Return the difference in logits (policy) or scores (reward model) on a few dialogues.

    One more row has ids from the whole vocabulary. For a folder that we wrote, scores are also
    compared in padded batches, because padding determines where `transformers` reads them. Needs a
    session of one rank, and memory for each model in fp32, one after the other. Raises AlignError
    if the difference exceeds rounding.
    """
    found = read_architecture(folder)
    assert found.model.vocab_size is not None
    rows = [_row(renderer, prompt, answer) for prompt, answer in _DIALOGUES]
    last = min(found.model.vocab_size, renderer.tokenizer.vocab_size) - 1
    spread = [k * last // (_VOCABULARY_TOKENS - 1) for k in range(_VOCABULARY_TOKENS)]
    eos = renderer.tokenizer.eos_id
    # A third-party reward model may pad with end of sequence: transformers reads such a row one token earlier.
    ends_at_eos = renderer.reading is None or renderer.reading.pad_id != eos
    rows.append([token for token in spread if token != eos] + [eos] * ends_at_eos)
    theirs = _transformers_outputs(found, folder, rows, device)
    ours = _our_outputs(found, folder, rows, device)
    difference = Difference(
        what="logits" if found.kind == "policy" else "scores",
        largest=float((ours - theirs).abs().max()),
        scale=float(theirs.abs().max()),
        tokens=sum(map(len, rows)),
    )
    if not difference.passes:
        raise AlignError(f"{folder}: {difference.in_words()}: do not use this folder, and report its config.json")
    return difference


def _row(renderer: Renderer, prompt: Sequence[Message], answer: str) -> list[int]:
    """Return the ids of a dialogue, or of its plain text if the chat template has no row for it."""
    try:
        context, target = renderer.row(prompt, answer)
        return context + target
    except (ConfigError, DataError):
        text = "".join(message.content for message in prompt) + answer
        return [*renderer.tokenizer.encode(text), renderer.tokenizer.eos_id]


@torch.inference_mode()
def _transformers_outputs(
    found: Architecture, folder: Path, rows: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Return [1, T, V] logits of all tokens or [1, S] scores, computed row by row without padding.

    For a reward model that we exported, return [3, S]: also the scores of left-padded and
    right-padded batches.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    classes = {
        "policy": transformers.AutoModelForCausalLM,
        "reward_model": transformers.AutoModelForSequenceClassification,
    }
    model = classes[found.kind].from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model = model.to(device).eval()
    together = _padded_scores(model, folder, rows) if found.kind == "reward_model" and found.extra else []
    # Without a padding id, the score is read at the last token, even if that is the padding token.
    model.config.pad_token_id = None
    logits = [model(torch.tensor([row], device=device)).logits[0] for row in rows]
    return torch.stack([torch.cat(logits), *together])


def _padded_scores(model: Any, folder: Path, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the [S] scores of one batch of all rows, padded left and right by the folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    batches = [
        tokenizer.pad({"input_ids": list(rows)}, padding_side=side, return_tensors="pt") for side in ("left", "right")
    ]
    return [model(**batch.to(model.device)).logits[:, 0] for batch in batches]


@torch.inference_mode()
def _our_outputs(found: Architecture, folder: Path, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the same for our model, also row by row: matrix products of equal shapes round equally."""
    from offline_align.model.build import build_model
    from offline_align.model.heads import Policy

    section = replace(found.model, backend=Backend.torch)
    model = build_model(found.kind, section, ParallelSection(), device, bf16=False).eval()
    parameters = dict(model.named_parameters())
    for name, tensor in load_huggingface(folder):
        if name in parameters:
            parameters[name].copy_(tensor)
    batches = [packed([row]).to(device) for row in rows]
    if isinstance(model, Policy):
        return torch.cat([model.logits(batch)[:, : found.model.vocab_size] for batch in batches])
    return torch.cat([model(batch) for batch in batches])


def packed(rows: Sequence[Sequence[int]]) -> PackedBatch:
    """Return a bin of rows of token ids, without targets."""
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=torch.tensor([[token for row in rows for token in row]]),
        positions=torch.cat([torch.arange(len(row)) for row in rows])[None],
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=max(map(len, rows)),
        target_index=none,
        target_ids=none,
        target_weights=torch.zeros(0),
        target_counts=torch.zeros(len(rows), dtype=torch.int64),
        last_index=ends[1:] - 1,
        margins=torch.zeros(0),
        row_ids=(),
        num_padding=0,
    )
