"""All problems of the demands are one error, before a model is read."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.slimming.options import SlimOptions, check


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("a",)}, "nothing is demanded"),
        ({"disk": 10}, "no task to keep"),
        ({"disk": 0, "tasks": ("a",)}, "--disk is 0, expected at least 1 byte"),
        ({"keep": 101.0, "tasks": ("a",)}, "--keep is 101"),
        ({"speed": float("nan"), "tasks": ("a",)}, "--speed is nan"),
        ({"keep": 95.0, "kv_bits": 4, "tasks": ("a",)}, "--kv-bits 4 counts in --memory only"),
        ({"keep": 95.0, "limit": 2, "tasks": ("a",)}, "--limit is 2"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimError, match=message):
        check(SlimOptions(**values))


def test_all_at_once() -> None:
    with pytest.raises(SlimError) as caught:
        check(SlimOptions(disk=0, keep=-1))
    assert caught.value.message == "3 problems"
    assert len(caught.value.details) == 3
