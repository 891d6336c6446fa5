"""A whole matrix over a tiny model, run in this process."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mlx_slim.cluster.jobs import Ended, Job
from mlx_slim.compare import cell as cells
from mlx_slim.compare import runner
from mlx_slim.compare.jobs import MatrixRun
from mlx_slim.compare.matrix import Cell, load_matrix
from mlx_slim.errors import SlimError
from mlx_slim.run_dir import RunDir
from tests.support.pools import HerePool
from tests.support.runs import Recorder, write_rows

TASK = """
about: a toy
kind: multiple_choice
data: {path: toy.jsonl}
fields: {question: text, choices: texts, answer: integer}
prompt: "{{ question }}"
choices: "{{ choices }}"
target: "{{ answer }}"
"""


def write_files(folder: Path, model: Path) -> Path:
    """Write training rows, a task, held-out text, and a matrix over a model."""
    write_rows(folder / "rows.jsonl", 24)
    (folder / "toytask.yaml").write_text(TASK)
    rows = [
        {"question": f"Number {i} is", "choices": ["odd", "even", "prime"], "answer": i % 3}
        for i in range(12)
    ]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    write_yaml(folder, model)
    return folder


def write_yaml(folder: Path, model: Path, **changes: Any) -> Path:
    matrix = {
        "title": "toy",
        "recipe": {
            "data": {"path": "rows.jsonl", "validation": 4},
            "quantize": {"group_size": 32},
            "train": {"steps": 2, "batch_tokens": 256, "max_length": 128},
        },
        "models": {
            "toy": {"source": str(model)},
            "gone": {"source": "./gone", "methods": ["base"]},
        },
        "methods": {
            "base": {"kind": "base"},
            "base-4bit": {"kind": "quantized"},
            "lora": {"recipe": {"method": "lora"}, "learning_rates": [1e-4, 1e-2]},
            "qlora": {"recipe": {"method": "qlora"}},
            "qlora-fused": {"kind": "fused", "of": "qlora"},
        },
        "tasks": [{"task": "./toytask.yaml", "limit": 10}],
        "sweep": {"steps": 2},
        "forgetting": {"path": "text.txt"},
        **changes,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(matrix, sort_keys=False))
    return path


def run_all(
    files: Path, *, resume: bool = False, overrides: Any = (), only: Any = None
) -> runner.MatrixOutcome:
    """Run the matrix in this process."""
    layout = load_matrix(str(files / "toy.yaml"), overrides)
    out = files / "out"
    todo, _ = runner.prepare(layout, out, resume)

    def launch(name: str) -> Ended:
        cell = next(cell for cell in todo if cell.name == name)
        if only is not None and name not in only:
            return Ended(name, -signal.SIGKILL)
        try:
            cells.CellRun(MatrixRun(layout, out, Recorder()), cell).run()
        except SlimError as error:
            return Ended(name, error.exit_code, error.message)
        return Ended(name, 0)

    with RunDir(out, runner.MATRIX).claim(resume=True):
        return run_cells(todo, out, launch)


def run_cells(todo: list[Cell], out: Path, launch: Callable[[str], Ended]) -> runner.MatrixOutcome:
    """Run cells by calls of ``launch`` with their names."""
    pool = HerePool(launch)
    return runner.run(todo, out, pool, lambda c: Job(c.name, ()), lambda number, cell: None)
