"""A cell is what a command does, or the line that it prints."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.bench import model_cells
from mlx_slim.bench.model_cells import cells
from mlx_slim.bench.models import COLUMNS, NOT_SMALL, OK
from mlx_slim.errors import SlimError


def raising(error: Exception) -> Any:
    def check(case: Any) -> None:
        raise error

    return check


def test_each_column_has_its_check_in_the_order_of_the_table() -> None:
    assert tuple(model_cells._CHECKS) == COLUMNS


def test_what_works_is_ok_and_what_is_refused_is_the_message() -> None:
    row = dict(cells("olmo2", ["load", "eval", "shared prefixes", "prune depth"]))
    refused = row.pop("prune depth")
    assert row == {"load": OK, "eval": OK, "shared prefixes": OK}
    assert refused == "olmo2 models cannot be pruned"


def test_what_does_not_build_says_why_in_every_column() -> None:
    row = dict(cells("olmo", ["load", "fuse"]))
    assert set(row.values()) == {f"{NOT_SMALL}: ImportError: mlx_lm.models.olmo ends the process"}


def test_errors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_of(error: Exception) -> str:
        monkeypatch.setitem(model_cells._CHECKS, "load", raising(error))
        return dict(cells("llama", ["load"]))["load"]

    assert check_of(SlimError("a line", "a hint")) == "a line"
    assert check_of(KeyError("x")) == "internal error: KeyError: 'x'"


def test_a_number_that_differs_is_a_wrong_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cells, "load_model", lambda path: (_shifted,))
    monkeypatch.setattr(model_cells, "make_prompt_cache", lambda model: None)
    assert dict(cells("llama", ["load"]))["load"].startswith("wrong: our logits and mlx-lm's")


def _shifted(ids: mx.array, cache: Any = None) -> mx.array:
    return mx.ones((1, 40, 272))
