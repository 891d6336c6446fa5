"""Rows of the training benchmark: the same number for both sides, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.bench.train import _rows
from mlx_slim.errors import SlimError


def write(path: Path, count: int) -> str:
    lines = [{"instruction": f"Add {i} and 1", "input": "", "output": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_first_rows_that_fit_become_chats_and_their_tokens_are_counted(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    rows, model = write(tmp_path / "rows.jsonl", 9), str(tiny("llama"))
    out = tmp_path / "chats.jsonl"
    four, five = (_rows(rows, model, count, 512, out) for count in (4, 5))
    chats = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(chats) == 5 and 0 < four < five
    assert [chat["messages"][-1]["content"] for chat in chats] == ["0", "1", "2", "3", "4"]


def test_too_few_rows_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", 3)
    with pytest.raises(SlimError, match="has 3 usable rows, the benchmark needs 12"):
        _rows(rows, str(tiny("llama")), 12, 512, tmp_path / "out.jsonl")


def test_a_system_message_of_so_many_tokens_stands_before_every_row(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    rows, model = write(tmp_path / "rows.jsonl", 9), str(tiny("llama"))
    out = tmp_path / "chats.jsonl"
    plain = _rows(rows, model, 5, 512, out)
    longer = _rows(rows, model, 5, 512, out, 60)
    systems = [json.loads(line)["messages"][0] for line in out.read_text().splitlines()]
    assert all(turn == systems[0] and turn["role"] == "system" for turn in systems)
    assert len(systems[0]["content"]) == 60  # bytes are tokens here
    assert longer >= plain + 5 * 60
    with pytest.raises(SlimError, match="tokens, --system-tokens is 4000"):
        _rows(rows, model, 5, 512, out, 4000)
