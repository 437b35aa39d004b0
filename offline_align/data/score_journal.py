"""The scores of rows in a journal, written to disk as they are computed."""

from types import TracebackType

from offline_align.data.journal import Journal

Scores = list[float]
"""The scores of one row: one for a sample, two for the answers of a pair."""


def read_scores(journal: Journal, rows: int, width: int = 1) -> dict[int, Scores]:
    """Return the scores that earlier attempts wrote, by row index below `rows`.

    Each row has `width` scores. Raises StorageError.
    """
    found: dict[int, Scores] = {}
    for entry in journal.read():
        row, score = entry.get("row"), entry.get("score")
        scores = [value for value in (score if isinstance(score, list) else [score]) if isinstance(value, float)]
        if isinstance(row, int) and 0 <= row < rows and len(scores) == width:
            found[row] = scores
    return found


class ScoreWriter:
    """Appends the scores of one rank; writes them to disk every `flush_rows` rows and at the end."""

    def __init__(self, journal: Journal, flush_rows: int, enabled: bool = True) -> None:
        self.journal, self.flush_rows, self.enabled = journal, flush_rows, enabled
        self._waiting: list[tuple[int, Scores]] = []

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def add(self, row: int, scores: Scores) -> None:
        """Add the scores of a row; raises StorageError."""
        self._waiting.append((row, scores))
        if len(self._waiting) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write all pending scores to disk; raises StorageError if that fails."""
        waiting, self._waiting = self._waiting, []
        if self.enabled and waiting:
            # A single score is written as a number.
            self.journal.append({"row": row, "score": s[0] if len(s) == 1 else s} for row, s in waiting)
