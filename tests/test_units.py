"""Sizes and times as text, and read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim import units
from mlx_slim.units import (
    human_bytes,
    human_duration,
    human_seconds,
    parse_size,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (0.4, "0 B"),
        (-0.4, "0 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (1024, "1.02 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (999_950, "1.00 MB"),
        (999_400_000, "999 MB"),
        (999_500_000, "1.00 GB"),
        (999_999_999, "1.00 GB"),
        (15_800_000_000, "15.8 GB"),
        (999_500_000_000, "1.00 TB"),
        (2.5e15, "2.50 PB"),
        (-1_500_000, "-1.50 MB"),
        (-999_600, "-1.00 MB"),
        (1.2345e21, "1,230 EB"),
        (10**400, f"{10**382:,} EB"),
        (np.int64(1_500), "1.50 kB"),
        (np.float32(0.5e9), "500 MB"),
    ],
)
def test_sizes_have_three_figures_and_the_unit_of_what_is_written(size: Any, text: str) -> None:
    assert human_bytes(size) == text


def test_no_size_is_written_with_an_exponent_and_each_reads_back() -> None:
    for power in range(13):
        for digits in (1, 9.949, 9.951, 9.9949, 9.9951, 99.949, 99.951, 5.555):
            size = round(digits * 10**power)
            text = human_bytes(size)
            assert re.fullmatch(r"\d{1,3}(\.\d{1,2})? [kMGT]?B", text), text
            assert len(re.sub(r"\D", "", text)) == 3 or size < 100
            assert parse_size(text) == pytest.approx(size, rel=0.00501)


@pytest.mark.parametrize(
    ("seconds", "short", "clock"),
    [
        (-1, "0 s", "0:00"),
        (0, "0 s", "0:00"),
        (0.0123, "0.012 s", "0:00"),
        (0.00996, "0.010 s", "0:00"),
        (0.42, "0.42 s", "0:00"),
        (0.996, "1.0 s", "0:01"),
        (9.94, "9.9 s", "0:10"),
        (9.96, "10 s", "0:10"),
        (59.6, "60 s", "1:00"),
        (89.4, "89 s", "1:29"),
        (89.6, "2 min", "1:30"),
        (90, "2 min", "1:30"),
        (3569, "59 min", "59:29"),
        (3569.6, "1 h 00 min", "59:30"),
        (3599.6, "1 h 00 min", "1:00:00"),
        (12_000, "3 h 20 min", "3:20:00"),
        (172_769, "47 h 59 min", "47:59:29"),
        (172_771, "2.0 days", "47:59:31"),
        (1e9, "11,574.1 days", "277777:46:40"),
    ],
)
def test_times_carry_over_at_their_borders(seconds: float, short: str, clock: str) -> None:
    assert (human_duration(seconds), human_seconds(seconds)) == (short, clock)


def test_nothing_else_rounds_a_size() -> None:
    """Another rounding beside ``units`` would drift: 1e9 and 1e6 stand for other things."""
    package = Path(units.__file__).parent
    pattern = re.compile(
        r"/ ?(1e9|1e6|1000\*\*|1024|2 ?\*\* ?[23]0|1 ?<< ?[23]0)[^}\n]*}? ?[kMG]i?B"
    )
    for file in [*package.rglob("*.py"), *package.rglob("*.j2")]:
        if file != Path(units.__file__):
            assert not pattern.search(file.read_text(encoding="utf-8")), file
