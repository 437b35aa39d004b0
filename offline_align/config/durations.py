"""Time limits as a user writes them."""

import re

from offline_align.errors import ConfigError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str, key: str = "trainer.max_time") -> float:
    """Return the seconds in `3h50m`, `90s`, `HH:MM:SS` or a number, or raise ConfigError for `key`."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"\d+:\d{1,2}:\d{1,2}", text):
        hours, minutes, seconds = (int(p) for p in text.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    if re.fullmatch(r"(\d+[dhms])+", text):
        return float(sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([dhms])", text)))
    raise ConfigError(f"{key}={text}: not a duration; write 3h50m, 03:50:00 or seconds")
