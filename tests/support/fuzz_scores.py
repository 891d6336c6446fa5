"""Targets of the fuzz tests that are scores: the folder of a matrix, and two results to compare."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.fuzz_run import Target
from tests.support.matrix import write_matrix

_TASKS = {"pubmedqa": 6, "gsm8k": 4}
_NAMES = ("pubmedqa", "gsm8k", "held_out")


def make_matrix(folder: Path) -> None:
    """Write a matrix of one cell, and its pages: two would be resampled for seconds."""
    from mlx_slim.compare.report import report

    write_matrix(folder / "toy", methods=("lora",), questions=_TASKS)
    report(folder / "toy")


def use_report(folder: Path, out: Path) -> None:
    """Make what the report says again, and count its numbers again; drawing takes too long."""
    from mlx_slim.compare import store
    from mlx_slim.compare.verify import count_again

    count_again(store.load(folder / "toy"))


def make_scores(folder: Path) -> None:
    """Write two models' results on a task of choices, one of texts, and a held-out text."""
    write_matrix(folder / "toy", methods=("base", "lora"), questions=_TASKS)
    for cell in ("toy0-base", "toy0-lora-s0"):
        (folder / "toy" / "cells" / cell / "eval").rename(folder / cell)
    shutil.rmtree(folder / "toy")


def use_scores(folder: Path, out: Path) -> None:
    """Compare the two on each."""
    from mlx_slim.evaluation.comparison import compare

    for name in _NAMES:
        compare(folder / "toy0-base" / name, folder / "toy0-lora-s0" / name, draws=50)


TARGETS = [
    Target(
        "report",
        make_matrix,
        (
            *("toy/matrix.json", "toy/cells/*/cell.json") * 3,
            *("toy/results.json", "toy/sweeps/*/sweep.json", "toy/questions/*"),
            *("toy/cells/*/run/*.json*", "toy/cells/*/eval/*/*.json*"),
        ),
        use_report,
        lambda source, out: ["report", str(source / "toy"), "--verify"],
    ),
    Target(
        "comparison",
        make_scores,
        ("*/*/results.json", "*/*/samples_*.jsonl"),
        use_scores,
        lambda source, out: [
            "eval",
            "--compare",
            *(str(source / cell / "gsm8k") for cell in ("toy0-base", "toy0-lora-s0")),
            *("-o", str(out)),
        ],
        weight=2,
    ),
]
