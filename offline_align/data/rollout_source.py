"""The answers of an iteration as rows to pack: contexts, answers as targets, and numbers for each target."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from offline_align.data.batch import PackedBatch, RolloutTargets
from offline_align.data.bins import SampleSource
from offline_align.data.rollout import RolloutColumns, SampledAnswer, bounds
from offline_align.data.tokenize import TokenizedRows


class RolloutSource(SampleSource):
    """Rows of context and answer; all tokens of the answer are targets, also its end of sequence.

    With `columns`, bins have `PackedBatch.rollout`. Without, rows can be scored, but not learned from.
    Prompts are not shared, because each has one answer.
    """

    def __init__(self, answers: Sequence[SampledAnswer], columns: RolloutColumns | None = None) -> None:
        super().__init__(_rows(answers))
        self.columns = columns
        self._bounds = bounds(answers)
        if columns is not None:
            assert all(len(column) == self._bounds[-1] for column in vars(columns).values())

    def fingerprint(self) -> int:
        """Return a checksum of the rows, their order and their columns."""
        checksum = super().fingerprint()
        for column in vars(self.columns).values() if self.columns else ():
            checksum = zlib.crc32(np.ascontiguousarray(column), checksum)
        return checksum

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin of `rows` with all tokens of their answers as targets."""
        batch = super().collate(rows, pad_to_multiple)
        if self.columns is None:
            return batch
        parts = [np.arange(self._bounds[row], self._bounds[row + 1]) for row in rows]
        places: npt.NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *parts])
        columns = {name: torch.from_numpy(column[places]) for name, column in vars(self.columns).items()}
        return replace(batch, rollout=RolloutTargets(**columns))


def _rows(answers: Sequence[SampledAnswer]) -> TokenizedRows:
    ids = [part for answer in answers for part in (answer.context, answer.response)]
    lengths = [len(answer.context) + len(answer.response) for answer in answers]
    return TokenizedRows(
        ids=np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        target_start=np.array([len(answer.context) for answer in answers], dtype=np.int32),
        weight=np.ones(len(answers), dtype=np.float32),
        row_ids=[answer.row_id for answer in answers],
        dropped={},
        truncated=0,
        places=list(range(len(answers))),
    )
