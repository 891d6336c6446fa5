"""Bytes and seconds as people write and read them.

Invariant: importing this imports no MLX. Try it: ``mlx-slim plan smollm2-lora --budget 16GB``.
"""

from __future__ import annotations

import re
from decimal import Decimal

from mlx_slim.errors import SlimError

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_UNITS = {"": 1, **{name.lower(): 1000**n for n, name in enumerate(_SIZES[:5])}}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str | int) -> int:
    """Return the bytes of ``16GB``, ``16GiB``, ``500MB`` or a number.

    Raises:
        SlimError: If ``text`` is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(text).lower())
    if not match or match[2] not in _UNITS:
        raise SlimError(f"{text!r} is not a memory size", "write it as 16GB or 16GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= size <= 2**60:
        raise SlimError(
            f"memory size {str(text)[:40]!r} is out of range", "give 1 byte to 1,000,000,000 GB"
        )
    return int(size)


def parse_duration(text: str) -> float:
    """Return the seconds of ``90m``, ``2h``, ``1h30m``, ``45 min`` or ``3600s``.

    Raises:
        SlimError: If ``text`` is no time, or none at all.
    """
    units = {"d": 86400, "h": 3600, "m": 60, "min": 60, "s": 1}
    pieces = re.findall(r"\s*(\d+(?:\.\d+)?)\s*(d|h|min|m|s)\s*", text.lower())
    whole = re.fullmatch(r"(?:\s*\d+(?:\.\d+)?\s*(?:d|h|min|m|s)\s*)+", text.lower())
    seconds = sum(float(number) * units[unit] for number, unit in pieces)
    if not whole or not 0 < seconds <= 1e8:
        raise SlimError(f"time {text[:40]!r} is not a duration", "write it as 90m, 2h or 1h30m")
    return seconds


def byte_unit(size: float) -> tuple[int, str]:
    """Return the decimal unit that so many bytes are written in, as bytes and by name.

    It is the unit of the size rounded to three figures: 999.5 MB are 1.00 GB.
    """
    exponent = int(f"{Decimal(str(size)):.2e}".partition("e")[2]) if size else 0
    place = min(max(exponent, 0) // 3, len(_SIZES) - 1)
    return 1000**place, _SIZES[place]


def human_bytes(size: float) -> str:
    """Return ``1.23 GB``: decimal units, three significant figures, below 1 kB whole bytes."""
    unit, name = byte_unit(size)
    if unit == 1:
        return f"{round(size)} B"
    rounded = Decimal(f"{Decimal(str(size)):.2e}") / unit
    return f"{rounded:,.{max(0, 2 - rounded.adjusted())}f} {name}"


def human_seconds(seconds: float) -> str:
    """Return a clock: ``0:42``, ``12:03`` or ``3:04:05`` (hours, minutes, seconds)."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def human_duration(seconds: float) -> str:
    """Return about how long: ``0.42 s``, ``40 s``, ``12 min``, ``3 h 20 min`` or ``2.5 days``."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        short = Decimal(f"{seconds:.1e}")
        return f"{short:.{max(0, 1 - short.adjusted())}f} s" if short else "0 s"
    if (whole := round(seconds)) < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:,.1f} days"
