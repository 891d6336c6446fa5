"""Options of pruning: all that exclude each other are reported, at once."""

from __future__ import annotations

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.pruning.options import NAMED, PruneOptions, conflicts, method_of, one_error, rows_of


def test_axis_and_method_follow_from_each_other() -> None:
    assert method_of(PruneOptions()) == ("width", "taylor")
    assert method_of(PruneOptions(axis="depth")) == ("depth", "block-influence")
    assert method_of(PruneOptions(method="angular")) == ("depth", "angular")
    assert method_of(PruneOptions(layers="1")) == ("depth", NAMED)
    with pytest.raises(SlimError, match="no method 'angular' of axis width") as caught:
        method_of(PruneOptions(axis="width", method="angular"))
    assert caught.value.hint == "it is a method of --axis depth"


def test_all_conflicts_are_one_error() -> None:
    options = PruneOptions(axis="depth", heads=False, uniform=False)
    problems = conflicts(options, "depth")
    assert [message for message, _ in problems] == [
        "no size is set", "--no-heads, --no-uniform: only for width pruning",
    ]  # fmt: skip
    error = one_error(problems)
    assert error.message == "2 problems" and len(error.details) == 2
    assert conflicts(PruneOptions(ratio=0.5), "width") == []


def test_calibration_rows_follow_from_the_method() -> None:
    options = PruneOptions(samples=3)
    assert rows_of(options, "taylor") == (3, 64)
    assert rows_of(PruneOptions(), "activation") == (32, 256)
    assert rows_of(options, "l2") == (0, 0)
