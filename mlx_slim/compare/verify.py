"""Count every published number again from the lowest level that is stored.

Invariant: every published number is compared with one computed again from log-likelihoods,
generated texts, nats and training events (``recount.py``); score × n is a whole number, and the
pages show these numbers. Try it: ``mlx-slim report DIR --verify``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mlx_slim.compare import store
from mlx_slim.compare.recount import Ledger, differing_texts, recount
from mlx_slim.compare.report import MatrixReport, build, pages
from mlx_slim.errors import SlimError
from mlx_slim.reading import library_errors, read_object, short


@dataclass(frozen=True)
class Verified:
    """Counts of cells, answers and numbers that agree; and (cell, why) of missing cells."""

    cells: int
    questions: int
    numbers: int
    missing: list[tuple[str, str]]


def verify(folder: Path) -> Verified:
    """Compare everything published with what the stored answers give; write nothing.

    Raises:
        SlimError: If a number differs (``details`` has a line each), or nothing was published.
    """
    stored = store.load(folder)
    if stored.record.requests is None:  # version 0.1
        raise SlimError(
            f"{folder} was made by an older version and lacks the requests, which are needed to "
            "verify its numbers",
            f"complete it with: mlx-slim compare MATRIX -o {folder} --resume",
        )
    ledger, record = count_again(stored)
    ledger.problems += differing_texts(folder, pages(stored, record))
    if ledger.problems:
        raise SlimError(
            f"{folder}: {len(ledger.problems)} numbers do not match the stored answers",
            "a file was changed after the report: mlx-slim report DIR writes the pages again; to "
            "score or train a cell again, remove its folder in cells/ and run mlx-slim compare "
            "--resume",
            details=ledger.problems[:20],
        )
    questions = sum(answers.n for cell in stored.cells for answers in cell.answers.values())
    return Verified(len(stored.cells), questions, ledger.numbers, stored.failed)


def count_again(stored: store.StoredMatrix) -> tuple[Ledger, MatrixReport]:
    """Return the comparison of all numbers, and the report as it should be.

    Raises:
        SlimError: If nothing was published.
    """
    claimed = read_object(stored.folder / "results.json")
    ledger = Ledger()
    with library_errors(f"{short(stored.folder)}: a record in it is damaged", store.AGAIN):
        recount(stored, ledger)
    record = build(stored)
    ledger.compare("results.json", claimed, json.loads(json.dumps(record.as_json())))
    for row in record.rows:
        for task, score in row.scores.items():
            ledger.problems += whole(f"{row.name} {task}", score.value, score.k, score.n)
    return ledger, record


def whole(what: str, value: float, k: int, n: int) -> list[str]:
    """Return a line if a score over n questions is no k-th of them (GRIM)."""
    if abs(value * n - round(value * n)) > 1e-6 or round(value * n) != k:
        return [f"{what}: {value!r} × {n} = {value * n!r}, not {k}"]
    return []
