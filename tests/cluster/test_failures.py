"""What a failed job leaves for its coordinator."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.artifacts import read_json
from mlx_slim.cluster.failures import failure_in
from mlx_slim.errors import Interrupted, SlimError


def test_the_reason_is_one_line_and_an_interrupt_is_none(tmp_path: Path) -> None:
    file = tmp_path / "failed/a.json"

    def failed(error: Exception) -> object:
        with pytest.raises(type(error)), failure_in(file, cell="a"):
            raise error
        return read_json(file) if file.exists() else None

    assert failed(Interrupted("stopped")) is None
    assert failed(SlimError("too long", "cut it", details=["row 3"])) == {
        "cell": "a",
        "reason": "too long; row 3 (cut it)",
        "exit_code": 2,
    }
    internal = failed(ValueError("at\nhttps://hub/x?token=hf_abcdefghijklmnopqrstuvwxyz012345"))
    assert isinstance(internal, dict) and internal["exit_code"] == 1
    assert internal["reason"].startswith("internal error: ValueError: at https")
    assert "hf_abc" not in internal["reason"]
