"""Scores of a matrix beside those of the pruning papers, in their protocol.

Invariant: only cells that answered all seven tasks of the suite ``pruning-7`` without examples are
shown; each task has the papers' metric, and the mean is over the seven. Drops are from the
unpruned model of the same source: the papers used an older harness and another model, so that
levels do not compare. Try it: ``mlx-slim report DIR`` of a matrix over those tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_slim.compare.store import StoredCell, StoredMatrix

METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
# LLM-Pruner (arXiv 2305.11627), percent, in the order of METRICS.
_DENSE = "LLaMA-7B"
PAPERS: dict[str, tuple[float, ...]] = {
    _DENSE: (73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.40),
    "LLaMA-7B, LLM-Pruner 20% (5.47 B), tuned on Alpaca 50k": (
        64.62, 77.20, 68.80, 63.14, 64.31, 36.77, 39.80,
    ),
}  # fmt: skip
# Only its mean is published.
_LAMINI = ("LLaMA-7B, LLM-Pruner 20%, tuned on LaMini 2.59 M", 0.6236)


@dataclass(frozen=True)
class ProtocolRow:
    """The seven scores of a model, ours or a paper's.

    Attributes:
        name: The cell, or the paper's model.
        published: Whether the row is a paper's.
        scores: Task -> fraction; none where only the mean is published.
        mean: Over the tasks, a fraction.
        drop: From the mean of the unpruned model, a fraction; None for that model, and where it
            was not scored.
        n: Task -> questions; none of a paper's row.
    """

    name: str
    published: bool
    scores: dict[str, float]
    mean: float
    drop: float | None
    n: dict[str, int]


def protocol(stored: StoredMatrix) -> list[ProtocolRow]:
    """Return the papers' rows, then ours; none where no cell answered all seven tasks."""
    scores = {cell.name: answered for cell in stored.cells if (answered := _scores(cell))}
    if not scores:
        return []
    bases = {
        cell.model: _mean(scores[cell.name])
        for cell in stored.cells
        if cell.kind == "base" and cell.name in scores
    }
    dense = sum(PAPERS[_DENSE]) / len(METRICS) / 100
    rows = []
    for name, values in PAPERS.items():
        fractions = {task: value / 100 for task, value in zip(METRICS, values, strict=True)}
        drop = None if name == _DENSE else dense - _mean(fractions)
        rows.append(ProtocolRow(name, True, fractions, _mean(fractions), drop, {}))
    rows.append(ProtocolRow(_LAMINI[0], True, {}, _LAMINI[1], dense - _LAMINI[1], {}))
    for cell in stored.cells:
        if cell.name in scores:
            ours = _mean(scores[cell.name])
            base = None if cell.kind == "base" else bases.get(cell.model)
            drop = None if base is None else base - ours
            n = {task: cell.answers[task].n for task in METRICS}
            rows.append(ProtocolRow(cell.name, False, scores[cell.name], ours, drop, n))
    return rows


def _scores(cell: StoredCell) -> dict[str, float]:
    """Return task -> score in the papers' metric; none if a task is missing or has examples."""
    scores = {}
    for task, metric in METRICS.items():
        answers = cell.answers.get(task)
        if (
            answers is None
            or answers.section.questions.num_fewshot
            or metric not in answers.right_N
        ):
            return {}
        scores[task] = float(answers.right_N[metric].mean())
    return scores


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)
