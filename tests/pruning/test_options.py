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
    problems = conflicts(options, "depth", "block-influence")
    assert [message for message, _ in problems] == [
        "no size is set", "--no-heads, --no-uniform: only for width pruning",
    ]  # fmt: skip
    error = one_error(problems)
    assert error.message == "2 problems" and len(error.details) == 2
    assert conflicts(PruneOptions(ratio=0.5), "width", "taylor") == []


def test_calibration_rows_follow_from_the_method() -> None:
    options = PruneOptions(samples=3)
    assert rows_of(options, "taylor") == (3, 64)
    assert rows_of(PruneOptions(), "activation") == (32, 256)
    assert rows_of(options, "l2") == (0, 0)


def test_options_of_the_residual_stream() -> None:
    assert method_of(PruneOptions(hidden_size=512)) == ("width", "activation")
    assert method_of(PruneOptions(hidden=True, method="l2")) == ("width", "l2")
    assert method_of(PruneOptions(intermediate_size=512)) == ("width", "taylor")
    sizes = PruneOptions(hidden_size=512, kv_heads=2)
    assert conflicts(sizes, "width", "activation") == []
    assert sizes.named_sizes == {"heads": 2, "hidden": 512}
    for options, method, message in (
        (PruneOptions(hidden=True, ratio=0.2), "taylor",
         "--method taylor does not score channels of the residual stream: it differentiates one "
         "block at a time"),
        (PruneOptions(hidden_size=512, ratio=0.2), "activation",
         "--ratio and --hidden-size exclude each other"),
        (PruneOptions(hidden_size=512, mlp=True), "activation",
         "--mlp: --hidden-size say what is pruned"),
        (PruneOptions(hidden=True, ratio=0.2, uniform=False), "activation",
         "--hidden: one width of all layers"),
    ):  # fmt: skip
        assert [text for text, _ in conflicts(options, "width", method)] == [message]
    (problem,) = conflicts(PruneOptions(axis="depth", ratio=0.2, hidden=True), "depth", "angular")
    assert problem[0] == "--hidden: only for width pruning"
