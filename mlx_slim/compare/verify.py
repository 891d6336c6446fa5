"""Count every published number again from the per-question files.

Invariant: nothing is taken from ``results.json`` but the claim; a score is right when the stored
answers give it, digit by digit, and score × n is a whole number. Try it:
``mlx-slim report DIR --verify``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import hash_file, read_json, read_records
from mlx_slim.compare import store
from mlx_slim.compare.report import build
from mlx_slim.errors import SlimError
from mlx_slim.evaluate.metrics import summarize
from mlx_slim.evaluate.spec import find_task

_NEAR = 1e-9


@dataclass(frozen=True)
class Verified:
    """What was counted: cells, answers, and numbers that agree."""

    cells: int
    questions: int
    numbers: int


def verify(folder: Path) -> Verified:
    """Compare ``results.json`` with what the stored answers give.

    Raises:
        SlimError: If a number differs (``details`` has a line each), or nothing was published.
    """
    stored = store.load(folder)
    claimed = read_json(folder / "results.json")
    problems: list[str] = []
    questions = 0
    for cell in stored.cells:
        for task, answers in cell.answers.items():
            questions += answers.n
            problems += _of_evaluation(cell.name, task, answers)
    again = json.loads(json.dumps(build(stored)))
    numbers = _compare("results.json", claimed, again, problems)
    for row in claimed["rows"]:
        for task, score in row["scores"].items():
            problems += whole(f"{row['name']} {task}", score["value"], score["k"], score["n"])
    if problems:
        raise SlimError(
            f"{folder}: {len(problems)} numbers are not what the stored answers give",
            "a file was changed after the report: mlx-slim report DIR makes it again",
            details=problems[:20],
        )
    return Verified(len(stored.cells), questions, numbers)


def whole(what: str, value: float, k: int, n: int) -> list[str]:
    """Return a line if a score over n questions is no k-th of them (GRIM)."""
    if abs(value * n - round(value * n)) > 1e-6 or round(value * n) != k:
        return [f"{what}: {value!r} × {n} = {value * n!r}, not {k}"]
    return []


def _of_evaluation(cell: str, task: str, answers: store.Answers) -> list[str]:
    """Check one evaluation's own results against its answers."""
    problems = []
    section = answers.section
    if section.get("samples_sha256") not in (None, hash_file(answers.samples)):
        problems.append(f"{cell} {task}: {answers.samples.name} is not the file that was scored")
    for metric, right_N in answers.right_N.items():
        said = section["metrics"].get(metric)
        if said is None:  # it is only what cells are paired by
            continue
        k = int(right_N.sum(dtype=int))
        if said.get("k") != k or not math.isclose(said["value"], k / answers.n, rel_tol=_NEAR):
            problems.append(
                f"{cell} {task} {metric}: {k}/{answers.n} counted, {said['value']!r} published"
            )
    if "macro" in section:  # pooled figures depend on the parts
        again = summarize(find_task(task), list(read_records(answers.samples)))
        published = {key: section.get(key) for key in again}
        _compare(f"{cell} {task}", published, json.loads(json.dumps(again)), problems)
    return problems


def _compare(path: str, claimed: Any, again: Any, problems: list[str]) -> int:
    """Compare two JSON values; return how many numbers agree."""
    if isinstance(claimed, dict) and isinstance(again, dict):
        problems += [f"{path}.{key}: missing" for key in claimed.keys() ^ again.keys()]
        shared = [key for key in claimed if key in again]
        return sum(_compare(f"{path}.{k}", claimed[k], again[k], problems) for k in shared)
    if isinstance(claimed, list) and isinstance(again, list):
        if len(claimed) != len(again):
            problems.append(f"{path}: {len(claimed)} published, {len(again)} found")
        pairs = enumerate(zip(claimed, again, strict=False))
        return sum(_compare(f"{path}[{i}]", a, b, problems) for i, (a, b) in pairs)
    if isinstance(claimed, (int, float)) and isinstance(again, (int, float)):
        if math.isclose(claimed, again, rel_tol=_NEAR):
            return 1
    elif claimed == again:
        return 0
    problems.append(f"{path}: {claimed!r} published, {again!r} found")
    return 0
