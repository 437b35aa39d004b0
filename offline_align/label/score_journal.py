"""The journal of a labelling run: scores by row, written to disk as they are computed."""

from types import TracebackType

from offline_align.data.journal import Journal


def read_scores(journal: Journal, rows: int) -> dict[int, float]:
    """Return the scores that earlier attempts wrote, by row index below `rows`; raises StorageError."""
    found = {entry.get("row"): entry.get("score") for entry in journal.read()}
    return {
        row: score
        for row, score in found.items()
        if isinstance(row, int) and 0 <= row < rows and isinstance(score, float)
    }


class ScoreWriter:
    """Appends the scores of one rank; writes them to disk every `flush_rows` rows and at the end."""

    def __init__(self, journal: Journal, flush_rows: int, enabled: bool = True) -> None:
        self.journal, self.flush_rows, self.enabled = journal, flush_rows, enabled
        self._waiting: list[tuple[int, float]] = []

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def add(self, row: int, score: float) -> None:
        """Add the score of a row; raises StorageError."""
        self._waiting.append((row, score))
        if len(self._waiting) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write all pending scores to disk; raises StorageError if that fails."""
        waiting, self._waiting = self._waiting, []
        if self.enabled and waiting:
            self.journal.append({"row": row, "score": score} for row, score in waiting)
