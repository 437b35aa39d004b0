"""Log-likelihoods of preference pairs under the weights at the start of a run, the reference of their loss.

They are computed once, before the first step, so training holds one model and makes no second forward
pass. The file is stored beside the tokens, by the content of pairs and weights, so runs with other
settings of the method use the same file.
"""

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.data.bins import PairSource
from offline_align.data.journal import Journal
from offline_align.data.score_journal import read_scores
from offline_align.distributed.setup import Ranks
from offline_align.errors import StorageError
from offline_align.lineage.files import canonical_json, text_sha256, write_atomically
from offline_align.model.passes import complete_journal
from offline_align.objectives.likelihoods import answer_likelihoods

if TYPE_CHECKING:
    from offline_align.model.heads import Policy

FORMAT_VERSION = 1
"""Part of every file name. Raise it when the likelihoods are computed differently."""
_FLUSH_ROWS = 256
_SIDES = 2

Likelihoods = npt.NDArray[np.float64]
"""[pairs, 2] log-likelihoods of the chosen and the rejected answer in nats."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Where the likelihoods are stored, and how to compute them."""

    run_dir: Path
    cache_dir: Path
    weights: str
    """A hash of the weights at the start of the run, and of the precision of the forward pass."""
    capacity: int
    """Most tokens of a bin."""
    max_time: str | None
    """Time limit of the command."""

    def of(self, pairs: PairSource, model: "Callable[[], Policy]", ranks: Ranks) -> PairSource:
        """Return `pairs` with their reference, which is computed if it is not stored yet.

        `model` returns the model with the weights of the start. All ranks must call this together.
        Raises StoppedEarly, with all finished work on disk, and StorageError.
        """
        path = self.path(pairs)
        if not ranks.from_main(lambda: _stored(path, len(pairs)) is not None):
            self._compute(path, pairs, model, ranks)
        found = _stored(path, len(pairs))
        if found is None:
            raise StorageError(f"{path}: cannot be read on rank {ranks.rank}; data.cache_dir must be shared storage")
        return pairs.with_reference(found)

    def path(self, pairs: PairSource) -> Path:
        """Return the file of the likelihoods of `pairs`."""
        key = text_sha256(canonical_json([FORMAT_VERSION, _content(pairs), self.weights]))
        return self.cache_dir / f"reference-{key[:32]}.npy"

    def _compute(self, path: Path, pairs: PairSource, model: "Callable[[], Policy]", ranks: Ranks) -> None:
        journal = Journal(self.run_dir, text_sha256(path.name), ranks.dp_rank)

        def build() -> tuple[Callable[[PackedBatch], Tensor], bool]:
            policy = model().eval()
            return lambda batch: answer_likelihoods(policy(batch), batch), policy.config.sequence_parallel

        complete_journal(
            journal,
            pairs,
            _SIDES,
            self.capacity,
            build,
            ranks,
            title="reference likelihoods",
            max_time=self.max_time,
            flush_rows=_FLUSH_ROWS,
        )
        ranks.from_main(lambda: _store(path, journal, len(pairs)))


def _content(pairs: PairSource) -> str:
    """Return a hash of the token ids of all pairs and of where their answers start."""
    digest = hashlib.blake2b(digest_size=16)
    for side in (pairs.pairs.chosen, pairs.pairs.rejected):
        for array in (side.ids, side.offsets, side.target_start):
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _stored(path: Path, pairs: int) -> Likelihoods | None:
    """Return the likelihoods in a file, or None if it does not exist or is damaged."""
    try:
        found: Likelihoods = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (pairs, _SIDES) and found.dtype == np.float64 else None


def _store(path: Path, journal: Journal, pairs: int) -> None:
    scores = read_scores(journal, pairs, _SIDES)
    if len(scores) < pairs:
        raise StorageError(f"{journal.folder}: lacks {pairs - len(scores)} likelihoods: run the same command again")
    buffer = io.BytesIO()
    np.save(buffer, np.array([scores[row] for row in range(pairs)], dtype=np.float64), allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    journal.remove()
    logger.info("reference: likelihoods of %d pairs under the start of the run: %s", pairs, path)
