"""Numbers with their units, as text for readers."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things, as ``1 round`` or ``1,000 rounds``; ``plural`` where it is irregular."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(value: float | None) -> str:
    """A share in percent with one decimal, as ``71.3%``; a dash for ``None``."""
    return "–" if value is None else f"{value:.1%}"


def share(value: float | None) -> str:
    """A share with three decimals and no leading zero, as ``.713``; a dash for ``None``."""
    return "–" if value is None else f"{value:.3f}".removeprefix("0")


def seconds_text(value: float | None) -> str:
    """A time in seconds, as ``5.2 s`` or ``1 min 23 s``; a dash for ``None``."""
    if value is None:
        return "–"
    minutes, seconds = divmod(value, 60)
    return f"{int(minutes)} min {seconds:02.0f} s" if minutes else f"{seconds:.1f} s"


def about_minutes(seconds: float) -> str:
    """A time that is not known exactly, in whole minutes or hours."""
    if seconds < 45:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes >= 90:
        return f"about {seconds / 3600:.1f} hours"
    return f"about {counted(minutes, 'minute')}"


def joules_text(value: float | None) -> str:
    """An energy in joules; a dash for ``None``."""
    if value is None:
        return "–"
    return f"{value:.1f} J" if value < 1000 else f"{value / 1000:.1f} kJ"


def bytes_text(value: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
