"""What the end of a search says of the machines that scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_slim.slimming.conclusion import mixed_machines
from mlx_slim.slimming.run import read_report


def test_scores_of_another_kind_of_machine_are_noted(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "candidates", out / "candidates")
    rows = {row.candidate.key: row for row in read_report(finished).rows}
    search: Any = SimpleNamespace(rows=rows, folder=lambda one: out / "candidates" / one.key)
    assert mixed_machines(search) == []
    scored = [key for key, row in rows.items() if row.selection is not None]
    file = out / "candidates" / scored[0] / "size.json"
    values = json.loads(file.read_text())
    values["provenance"]["machine"] = "another chip"
    file.write_text(json.dumps(values))
    (note,) = mixed_machines(search)
    assert note.startswith("scores are of 2 kinds of machine")
    assert f"original, {scored[1]}" in note and f"{scored[0]}: another chip; Python" in note
