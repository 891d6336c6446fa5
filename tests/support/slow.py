"""Which tests are slow, and which of them a run takes: ``make test SLOW=...``.

A test is slow that takes more than 3 CPU seconds; ``tests/slow.txt`` names their functions, and
``make test SLOW=all ARGS=--durations=0`` says what each takes. ``make test`` leaves them out and
says so; continuous integration takes one part of eight in turn, chosen by the commit. A test that
is named on the command line (``FILE::NAME``) is never left out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parents[1] / "slow.txt"


def functions() -> list[str]:
    """Return the lines of ``tests/slow.txt``: ``FILE::FUNCTION`` from the top folder."""
    return LIST.read_text(encoding="utf-8").split()


def choose(names: Iterable[str], selection: str) -> set[str]:
    """Return the slow functions that a run takes.

    Args:
        names: All slow functions.
        selection: ``none``, ``all``, or ``K/N``: part K of N (from 1), by a checksum of the name.

    Raises:
        pytest.UsageError: If ``selection`` is something else.
    """
    if selection in ("none", "all"):
        return set(names) if selection == "all" else set()
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", selection)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(
            f"slow tests: {selection!r}, expected none, all, or K/N with K from 1 to N"
        )
    part, count = int(match[1]), int(match[2])
    return {name for name in names if zlib.crc32(name.encode()) % count == part - 1}


def left_out(config: pytest.Config) -> set[str]:
    """Return the functions whose tests this run leaves out."""
    if any("::" in word for word in config.args):
        return set()
    names = set(functions())
    return names - choose(names, str(config.getoption("--slow")))


def split(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out of ``items`` the slow tests that this run leaves out."""
    names = left_out(config)
    dropped = [item for item in items if item.nodeid.split("[")[0] in names]
    if dropped:
        items[:] = [item for item in items if item.nodeid.split("[")[0] not in names]
        config.hook.pytest_deselected(items=dropped)
