"""The table of Macs."""

from __future__ import annotations

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.planner.macs import (
    CHIPS,
    SIZES,
    as_records,
    chip_with,
    find_mac,
    macs,
    markdown,
    smallest_that_fits,
    working_set,
)


def test_working_sets_are_those_that_metal_reports() -> None:
    # MiB, as programs log them on such machines
    assert working_set(16) // 2**20 == 10922
    assert working_set(32) // 2**20 == 21845
    assert working_set(64) // 2**20 == 49152
    assert working_set(96) // 2**20 == 73728
    assert smallest_that_fits(1) == 8
    assert smallest_that_fits(10**12) is None
    limits = [working_set(size) for size in SIZES]
    assert limits == sorted(limits)


def test_macs_by_name() -> None:
    mac = find_mac("M2 16GB")
    assert (mac.name, mac.memory_gb, mac.chip.bandwidth) == ("m2-16gb", 16, 100)
    assert mac.working_set_bytes == working_set(16)
    assert find_mac("m4-max-128gb").chip.bandwidth == 546
    assert len({mac.name for mac in macs()}) == len(macs())
    assert markdown().count("\n") == len(macs()) + 1
    with pytest.raises(SlimError, match="no Mac 'm2-17gb'") as caught:
        find_mac("m2-17gb")
    assert "did you mean 'm2-" in caught.value.hint
    with pytest.raises(SlimError) as caught:
        find_mac("quantum")
    assert "--macs" in caught.value.hint
    with pytest.raises(SlimError) as caught:
        find_mac("M2")
    assert caught.value.hint == "with its memory: m2-8gb, m2-16gb, m2-24gb"


def test_memory_tells_which_gpu_a_max_has() -> None:
    """Apple's specifications: 30 cores at 300 GB/s in 36 and 96 GB, 40 at 400 in the others."""
    small, large = find_mac("m3-max-36gb").chip, find_mac("m3-max-48gb").chip
    assert (small.bandwidth, small.cores) == (300, (30, 30))
    assert (large.bandwidth, large.cores) == (400, (40, 40))
    assert small.tflops == pytest.approx(0.75 * large.tflops)
    assert find_mac("m4-max-36gb").chip.bandwidth == 410
    assert chip_with("m3-max", 17) == CHIPS["m3-max"] and chip_with("m1-max", 64).cores == (24, 32)
    assert [one["mac"] for one in as_records()] == [mac.name for mac in macs()]
