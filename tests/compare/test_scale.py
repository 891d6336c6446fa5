"""A large matrix: 200 cells of 14,042 questions in under a gigabyte; the time is printed.

The full size runs with ``MLX_SLIM_SCALE=1`` (it writes 600 MB first); otherwise a hundredth of it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from mlx_slim.artifacts import hash_file, read_json, write_json
from tests.support.matrix import write_matrix

FULL = os.environ.get("MLX_SLIM_SCALE") == "1"
CELLS, QUESTIONS = (200, 14_042) if FULL else (20, 1_000)
MEASURE = """
import re, resource, sys, time
import mlx_slim
from pathlib import Path
from mlx_slim.compare.report import report
began = time.monotonic()
done = report(Path(sys.argv[1]))
if sys.platform == "darwin":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:  # Linux hands the parent's ru_maxrss on to what it starts
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(time.monotonic() - began, peak,
      done.page.stat().st_size, len(done.results["rows"]))
"""


def _fill(folder: Path, questions: int) -> None:
    """Give every cell answers of its own to ``questions`` questions of 57 subjects."""
    kinds = []
    for right in (0, 1):
        rows = (
            {
                "doc_id": i,
                "loglikelihoods": [-40.25, -41.5, -39.125, -42.75],
                "greedy": [False] * 4,
                "prediction": i % 4 if right else (i + 1) % 4,
                "target": i % 4,
                "acc": right,
                "subject": f"subject_{i % 57}",
            }
            for i in range(questions)
        )
        kinds.append([json.dumps(row) + "\n" for row in rows])
    for number, cell in enumerate(sorted(folder.glob("cells/*"))):
        draw = random.Random(number)
        marks = [int(draw.random() < 0.4) for _ in range(questions)]
        out = cell / "eval" / "mmlu"
        path = out / "samples_mmlu.jsonl"
        path.write_text("".join(kinds[right][i] for i, right in enumerate(marks)))
        section = read_json(out / "results.json")
        k = sum(marks)
        task = section["tasks"]["mmlu"]
        task |= {"n": questions, "limit": None, "samples_sha256": hash_file(path)}
        task["metrics"] = {"acc": {"value": k / questions, "stderr": 0.004, "k": k}}
        write_json(out / "results.json", section)


def test_many_cells_and_questions_make_a_report_in_bounded_memory(tmp_path: Path) -> None:
    methods = ("base", "full", "lora", "qlora", "dora")
    folder = write_matrix(
        tmp_path / "m", models=CELLS // 20, seeds=5, methods=methods[1:], questions={"mmlu": 4}
    )
    bases = write_matrix(
        tmp_path / "b", models=CELLS // 20, methods=("base",), questions={"mmlu": 4}
    )
    record = read_json(folder / "matrix.json")
    names = [path.name for path in sorted(bases.glob("cells/*"))]
    for name in names:
        (bases / "cells" / name).rename(folder / "cells" / name)
    first = [name for name in record["cells"] if name.endswith("full-s4")]
    others = [name for name in record["cells"] if name not in first]
    write_json(folder / "matrix.json", {**record, "cells": [*names, *others], "refused": []})
    _fill(folder, QUESTIONS)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, memory, size, rows = map(float, done.stdout.split()[-4:])
    print(f"{rows:.0f} cells x {QUESTIONS}: {seconds:.1f} s, {memory / 1e6:.0f} MB, {size:.0f} B")
    assert rows == CELLS
    assert memory < 1e9
    assert size < 20e6
