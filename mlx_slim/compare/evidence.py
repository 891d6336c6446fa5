"""Evidence reported with the scores: published figures, curves, flips, failures, settings.

Invariant: nothing here is chosen by its outcome: flips are the first of each kind in row order,
every cell's curve is shown, and published figures are compared with ours only where task,
shots and metric agree (a subset of the rows is labelled as one). Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.artifacts import read_records
from mlx_slim.cluster.machines import kind_of
from mlx_slim.compare.questions import StoredQuestion
from mlx_slim.compare.report_records import (
    Extraction,
    Flip,
    PublishedScore,
    RecipeSettings,
    ReportTask,
    Row,
)
from mlx_slim.compare.store import StoredCell, StoredMatrix
from mlx_slim.evaluation.tasks.metrics import Record
from mlx_slim.reading import JsonObject, field, read_object, short

FLIPS = 2  # of each direction, cell and task
TEXT = 1_200  # characters of a prompt or answer that are shown
CURVE_POINTS = 400

# Published scores in percent: source -> (task, shots, metric) -> value. Open LLM Leaderboard v1,
# the model cards, and the 0-shot figures of the TinyLlama and SmolLM2 reports.
PUBLISHED: dict[str, dict[tuple[str, int, str], float]] = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        ("arc_challenge", 25, "acc_norm"): 33.87,
        ("hellaswag", 10, "acc_norm"): 60.31,
        ("mmlu", 5, "acc"): 26.04,
        ("gsm8k", 5, "strict_match"): 1.44,
        ("hellaswag", 0, "acc_norm"): 59.20,
        ("openbookqa", 0, "acc_norm"): 36.0,
        ("arc_challenge", 0, "acc_norm"): 30.12,
        ("arc_easy", 0, "acc_norm"): 55.25,
    },
    "microsoft/phi-2": {
        ("arc_challenge", 25, "acc_norm"): 61.09,
        ("hellaswag", 10, "acc_norm"): 75.11,
        ("mmlu", 5, "acc"): 58.11,
        ("gsm8k", 5, "strict_match"): 54.81,
    },
    "mistralai/Mistral-7B-v0.1": {
        ("arc_challenge", 25, "acc_norm"): 59.98,
        ("hellaswag", 10, "acc_norm"): 83.31,
        ("mmlu", 5, "acc"): 64.16,
        ("gsm8k", 5, "strict_match"): 37.83,
    },
    "meta-llama/Llama-2-7b-hf": {
        ("arc_challenge", 25, "acc_norm"): 53.07,
        ("hellaswag", 10, "acc_norm"): 78.59,
        ("mmlu", 5, "acc"): 46.87,
        ("gsm8k", 5, "strict_match"): 14.48,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        ("hellaswag", 0, "acc_norm"): 42.99,
        ("arc_challenge", 0, "acc_norm"): 27.73,
    },
}
ROWS = {"hellaswag": 10_042, "mmlu": 14_042, "gsm8k": 1_319, "arc_easy": 2_376}
ROWS |= {"arc_challenge": 1_172, "openbookqa": 500}


def published(stored: StoredMatrix, rows: list[Row]) -> list[PublishedScore]:
    """Return our base scores beside published ones of the same task, shots and metric."""
    comparisons = []
    for row in rows:
        if row.kind != "base":
            continue
        model = stored.record.models[row.model]
        figures = PUBLISHED.get(model.hub_id or model.source, {})
        cell = next(cell for cell in stored.cells if cell.name == row.name)
        for (task, shots, metric), value in figures.items():
            answers = cell.answers.get(task)
            if answers is None or answers.section.questions.num_fewshot != shots:
                continue
            right_N = answers.right_N.get(metric)
            if right_N is None:
                continue
            ours, n = float(right_N.mean()), len(right_N)
            error = (ours * (1 - ours) / max(1, n - 1)) ** 0.5
            comparisons.append(
                PublishedScore(
                    model=row.model,
                    task=task,
                    num_fewshot=shots,
                    metric=metric,
                    published=value / 100,
                    ours=ours,
                    stderr=error,
                    n=n,
                    all_rows=n == ROWS[task],
                    rows=ROWS[task],
                    within=abs(ours - value / 100) <= 1.96 * error,
                )
            )
    return comparisons


@dataclass(frozen=True)
class LossCurves:
    """Loss of a cell in training, nats a token: (step, loss) of steps and of validations."""

    cell: str
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def curves(cell: StoredCell) -> LossCurves | None:
    """Return the training and validation loss of a cell; None where nothing was trained."""
    file = cell.folder / "run" / "metrics.jsonl"
    if not file.is_file():
        return None
    series: dict[str, list[tuple[int, float]]] = {"step": [], "validation": []}
    for number, record in enumerate(read_records(file), 1):
        place = f"{short(file)}, line {number}"
        if (event := field(record, place, "event", str)) in series:
            series[event].append((field(record, place, "step", int), record["loss"]))
    train, validation = series.values()
    every = max(1, len(train) // CURVE_POINTS)
    return LossCurves(cell.name, train[::every], validation)


def extraction(stored: StoredMatrix) -> list[Extraction]:
    """Return, for generated answers, in how many no number could be read, and how they ended."""
    return [
        Extraction(cell.name, task, answers.n, answers.unextracted, answers.stopped)
        for cell in stored.cells
        for task, answers in cell.answers.items()
        if answers.unextracted
    ]


# ------------------------------------------------------------------------------------- flips


def flips(stored: StoredMatrix, tasks: list[ReportTask]) -> list[Flip]:
    """Return questions to read: the first that each cell gained and lost against its base."""
    changed: list[Flip] = []
    for task in tasks:
        questions = _Questions(stored.folder / "questions" / f"{task.task}.jsonl")
        for cell in stored.cells:
            base = next(
                (c for c in stored.cells if c.model == cell.model and c.kind == "base"), None
            )
            if base is None or base is cell or cell.kind == "fused":
                continue
            changed += _flips(base, cell, task, questions)
    return changed


class _Questions:
    """The questions of a task by position; empty if they were not stored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, indices: set[int]) -> dict[int, StoredQuestion]:
        """Return the questions at the positions ``indices``."""
        if not indices or not self.path.is_file():
            return {}
        rows = enumerate(islice(read_records(self.path), max(indices) + 1))
        return {i: StoredQuestion.read(row) for i, row in rows if i in indices}


def _flips(
    base: StoredCell, cell: StoredCell, task: ReportTask, questions: _Questions
) -> list[Flip]:
    name, metric = task.task, task.metric
    a, b = base.answers.get(name), cell.answers.get(name)
    if a is None or b is None or not np.array_equal(a.doc_ids_N, b.doc_ids_N):
        return []
    before_N, after_N = a.right_N[metric].astype(int), b.right_N[metric].astype(int)
    chosen = {
        "gained": np.flatnonzero(after_N > before_N)[:FLIPS].tolist(),
        "lost": np.flatnonzero(after_N < before_N)[:FLIPS].tolist(),
    }
    selected = {index for indices in chosen.values() for index in indices}
    shown = questions.at(selected)
    ours, theirs = (_records(answers.samples, selected) for answers in (a, b))
    return [
        Flip(
            cell=cell.name,
            base=base.name,
            task=name,
            direction=direction,
            doc_id=ours[index]["doc_id"],
            prompt=_cut(shown[index].prompt, end=True) if index in shown else None,
            target=_shown(ours[index]["target"], shown.get(index)),
            before=_answer(ours[index], shown.get(index), metric),
            after=_answer(theirs[index], shown.get(index), metric),
        )
        for direction, indices in chosen.items()
        for index in indices
    ]


def _records(path: Path, indices: set[int]) -> dict[int, Record]:
    if not indices:
        return {}
    rows = enumerate(islice(read_records(path), max(indices) + 1))
    return {i: row for i, row in rows if i in indices}


def _answer(record: Record, question: StoredQuestion | None, metric: str) -> str:
    """Return what a model answered: its text, or the ending that is likeliest."""
    if "generation" in record:
        return _cut(record["generation"])
    if metric == "acc_norm" and question and question.lengths:
        scores = [
            score / max(1, length)
            for score, length in zip(record["loglikelihoods"], question.lengths, strict=True)
        ]
        return _shown(int(np.argmax(scores)), question)
    return _shown(record["prediction"], question)


def _shown(value: Any, question: StoredQuestion | None) -> str:
    """Return a choice's text for its number; of a list, each."""
    if isinstance(value, list):
        return _cut(" or ".join(_shown(one, question) for one in value))
    choices = question.choices if question else None
    if choices and isinstance(value, int) and 0 <= value < len(choices):
        return _cut(str(choices[value]).strip())
    return _cut(str(value))


def _cut(text: str, *, end: bool = False) -> str:
    if len(text) <= TEXT:
        return text
    return f"… {text[-TEXT:]}" if end else f"{text[:TEXT]} …"


# ------------------------------------------------------------------------------------- settings


def differences(stored: StoredMatrix) -> RecipeSettings:
    """Return what all tuned cells have in common and what differs, by recipe key."""
    flat = {cell.name: _flat(cell.record.recipe) for cell in stored.cells if cell.kind == "tuned"}
    if not flat:
        return RecipeSettings({}, {})
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    first = next(iter(flat.values()))
    same = {key for key in keys if all(v.get(key) == first.get(key) for v in flat.values())}
    return RecipeSettings(
        common={key: first.get(key) for key in keys if key in same},
        differing={
            key: {name: values.get(key) for name, values in flat.items()}
            for key in keys
            if key not in same
        },
    )


def _flat(values: JsonObject, prefix: str = "") -> JsonObject:
    flat: JsonObject = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in ("report_to", "report_answers"):
            flat[f"{prefix}{key}"] = value
    return flat


def machine_of(stored: StoredMatrix) -> JsonObject:
    """Return provenance: the matrix's, each cell made elsewhere, and the kinds that were mixed.

    Where every cell is of one other kind (jobs that divide the cores of a machine), it is theirs.
    """
    origins = [cell.record.provenance or stored.record.provenance for cell in stored.cells]
    alike = bool(origins) and all(one == origins[0] for one in origins)
    provenance = origins[0] if alike else stored.record.provenance
    others = [
        cell.name for cell in stored.cells if cell.record.provenance not in (None, provenance)
    ]
    kinds = machine_kinds(stored)
    mixed = {"kinds": [{"kind": kind, "cells": names} for kind, names in kinds.items()]}
    return {**provenance, "cells_made_elsewhere": others, **(mixed if len(kinds) > 1 else {})}


def machine_kinds(stored: StoredMatrix) -> dict[str, list[str]]:
    """Return kind of machine (chip, cores, memory, versions) -> cells made on it, most first."""
    kinds: dict[str, list[str]] = {}
    for cell in stored.cells:
        record = cell.record.provenance or stored.record.provenance
        kinds.setdefault(kind_of(record), []).append(cell.name)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def mixed_note(stored: StoredMatrix) -> list[str]:
    """Return a line where cells ran on several kinds of machine; none else."""
    kinds = machine_kinds(stored)
    if len(kinds) < 2:
        return []
    where = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in kinds.items())
    return [
        f"Cells ran on {len(kinds)} kinds of machine: last digits may differ, and times are "
        f"compared within a kind only. {where}."
    ]


def ledger(cell: StoredCell) -> JsonObject | None:
    """Return rows given, used, cut and dropped by a cell's training."""
    file = cell.folder / "run" / "data_ledger.json"
    return read_object(file, totals=dict)["totals"] if file.is_file() else None
