"""What the first step of an attempt will take: a word before it ends, because it may take minutes."""

import logging
import time
from collections.abc import Sequence

from offline_align.wording import counted, duration

logger = logging.getLogger(__name__)
_WORTH_SAYING_SECONDS = 5.0


class FirstStep:
    """Says what the first step computes, and how long it takes once its first bin is done.

    `sizes` are the tokens of this rank's bins. A bin counts as done when the next one begins, so a
    device that computes beside Python (`asynchronous`) gets no estimate.
    """

    def __init__(self, step: int, total: int, rows: int, sizes: Sequence[int], asynchronous: bool) -> None:
        self._sizes, self._asynchronous = sizes, asynchronous
        self._started = time.monotonic()
        text = "training: step %d of %s begins: %s in %s of %s on this rank"
        bins, tokens = counted(len(sizes), "bin"), counted(sum(sizes), "token")
        logger.info(text, step, f"{total:,}", counted(rows, "row"), bins, tokens)

    def __call__(self, number: int) -> None:
        """Report that the bin `number`, from 0, begins."""
        if number == 0:
            self._started = time.monotonic()
        elif number == 1 and not self._asynchronous:
            seconds = (time.monotonic() - self._started) * sum(self._sizes) / max(self._sizes[0], 1)
            if seconds >= _WORTH_SAYING_SECONDS:
                logger.info("training: this step will take about %s", duration(seconds))
