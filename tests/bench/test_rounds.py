"""Medians over rounds, ratios of the sides, and a side that fails."""

from __future__ import annotations

import pytest

from mlx_slim.bench.rounds import record, run_side
from mlx_slim.errors import SlimError


def test_medians_and_ratios() -> None:
    rounds = [
        {
            "ours": {"tokens_per_second": 10.0 * n, "peak_memory_bytes": 100, "batching": "packed"},
            "mlx_lm": {"tokens_per_second": 5.0 * n, "peak_memory_bytes": 200},
        }
        for n in (1, 2, 9)
    ]
    result = record({"model": "m"}, "mlx_lm", rounds)
    assert result["ours"] == {"tokens_per_second": 20.0, "peak_memory_bytes": 100}
    assert result["mlx_lm"]["tokens_per_second"] == 10.0
    assert result["ratio"] == {"speed": 2.0, "peak_memory": 0.5}


def test_the_last_line_of_a_failed_side_is_quoted() -> None:
    with pytest.raises(SlimError, match="the side nobody of the benchmark failed: KeyError"):
        run_side("sides", "nobody", {})
