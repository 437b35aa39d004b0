"""Numbers in messages: counts with the right plural, and durations, sizes and rates with their units."""


def counted(number: int, unit: str, units: str | None = None) -> str:
    """Return a number with its unit: `1 row`, `12 rows`; `units` is the plural if it is not `unit` + s."""
    return f"{number:,} {unit if number == 1 else units or f'{unit}s'}"


def duration(seconds: float) -> str:
    """Return a duration with two units at most: `0.4 s`, `38 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def size(number: int) -> str:
    """Return a number of bytes in decimal units: `512 B`, `4.1 kB`, `1.2 GB`."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 9.95 or units[0] == "B" else f"{value:.1f} {units[0]}"


def pace(per_second: float, units: str) -> str:
    """Return a rate that never rounds to zero: `41 rows/s`, `2.5 steps/s`, or `3.2 s a step`.

    `units` is the plural, `unit` + s.
    """
    if per_second >= 1:
        return f"{per_second:,.0f} {units}/s" if per_second >= 9.95 else f"{per_second:.1f} {units}/s"
    unit = units.removesuffix("s")
    article = "an" if unit[0] in "aeio" else "a"
    return f"{duration(1 / per_second)} {article} {unit}" if per_second > 0 else f"no {units} yet"
