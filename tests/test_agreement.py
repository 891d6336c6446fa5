"""Agreement among ranks: what differs, and what one rank alone pays (nothing)."""

from __future__ import annotations

import pytest

from mlx_slim.agreement import (
    differences,
    first,
    gather,
    named,
    on_every_rank,
    rank_memory,
    refuse_differences,
)
from mlx_slim.errors import SlimError


def test_what_differs_names_the_ranks_of_each_value() -> None:
    rows = [{"mlx": "1", "rows": "a"}, {"mlx": "2", "rows": "a"}, {"mlx": "1", "rows": "a", "x": 3}]
    assert differences(rows) == [
        ("mlx", "ranks 0, 2: 1; rank 1: 2"),
        ("x", "ranks 0, 1: null; rank 2: 3"),
    ]


def test_one_rank_agrees_with_itself() -> None:
    assert gather({"a": 1}) == [{"a": 1}] and first(4) == 4
    assert rank_memory(1000) == 1000
    refuse_differences({"mlx": "1"})
    assert on_every_rank(lambda: 5) == 5
    assert named("no such file") == "no such file"


def test_a_failure_of_one_rank_is_its_own() -> None:
    def fail() -> None:
        raise SlimError("no such file")

    with pytest.raises(SlimError, match=r"^no such file$"):
        on_every_rank(fail)
