"""Time limits as a user writes them."""

import pytest

from offline_align.config.durations import parse_duration
from offline_align.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("3h50m", 13800), ("01:30:00", 5400), ("1d", 86400), ("0.5", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "1:2", "-5", "h"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="trainer.max_time"):
        parse_duration(text)
