"""From stored answers to the numbers of the report: scores, paired differences, seeds.

Invariant: a score is a whole number of questions over their count; every difference is paired on
the same questions, its p value exact (McNemar) and corrected (Holm) over all comparisons of one
model; the verdict is never "equal", but how small a difference could be detected.
Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

import numpy as np

from mlx_slim.compare.claims import MethodComparison
from mlx_slim.compare.records import as_json
from mlx_slim.compare.store import StoredCell, StoredMatrix
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import stats
from mlx_slim.evaluation.comparison import COMPARED_KEYS
from mlx_slim.evaluation.tasks.metrics import first_metric

RESAMPLED = 60  # pairs of cells up to which a bootstrap is drawn within subjects too


def tasks_of(stored: StoredMatrix) -> list[dict[str, Any]]:
    """Return the tasks in the order of the matrix: name, metric, n, shots."""
    by_name: dict[str, dict[str, Any]] = {}
    for cell in stored.cells:
        for name, answers in cell.answers.items():
            section = answers.section
            by_name.setdefault(
                name,
                {
                    "task": name,
                    "metric": first_metric(answers.right_N),
                    "chance": answers.chance,
                    **{key: section.get(key) for key in COMPARED_KEYS},
                },
            )
    order = stored.record.tasks
    return sorted(
        by_name.values(), key=lambda t: order.index(t["task"]) if t["task"] in order else 0
    )


def row_of(cell: StoredCell, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a cell's line of the matrix table."""
    record = as_json(cell.record)
    scores = {}
    for task in tasks:
        answers = cell.answers.get(task["task"])
        if answers is None:
            continue
        right_N = answers.right_N[task["metric"]]
        n, k = len(right_N), int(right_N.sum(dtype=np.int64))
        value = k / n
        scores[task["task"]] = {
            "k": k,
            "n": n,
            "value": value,
            "stderr": (value * (1 - value) / max(1, n - 1)) ** 0.5,
            "metrics": answers.section["metrics"],
            **{key: answers.section[key] for key in ("micro", "macro") if key in answers.section},
        }
    keys = ("name", "model", "method", "kind", "seed", "dtype", "learning_rate", "train", "disk")
    keys += ("parent", "pruned")
    return {
        **{key: record[key] for key in keys},
        "scores": scores,
        "mean": mean(s["value"] for s in scores.values()) if scores else None,
        "bits_per_byte": record["bits_per_byte"],
        "eval_peak_memory_bytes": record["eval_peak_memory_bytes"],
        "eval_seconds": record["eval_seconds"],
        "predicted": None,
        "fidelity": record["fidelity"],
        "intruders": record["intruders"],
    }


# ------------------------------------------------------------------------------- paired contrasts


def pairs(cells: list[StoredCell]) -> list[tuple[StoredCell, StoredCell, str]]:
    """Return (first, second, the question that their difference answers) of one model's cells."""
    base = next((cell for cell in cells if cell.kind == "base"), None)
    starts = {cell.name: cell.record.parent for cell in cells}
    of_name = {cell.name: cell for cell in cells}
    rounded = next(
        (cell for cell in cells if cell.kind == "quantized" and starts[cell.name] is None), None
    )
    compared: list[tuple[StoredCell, StoredCell, str]] = []
    if base is not None:
        compared += [(base, cell, "against the base") for cell in cells if cell is not base]
    tuned = [cell for cell in cells if cell.kind == "tuned"]
    ways = {cell.method: cell.record.recipe["method"] for cell in tuned}
    if rounded is not None:
        compared += [
            (rounded, cell, "what tuning adds to the 4-bit base")
            for cell in tuned
            if ways[cell.method] == "qlora" and starts[cell.name] is None
        ]
    for start in dict.fromkeys(starts[cell.name] for cell in tuned):
        members = [cell for cell in tuned if starts[cell.name] == start]
        names = [cell.method for cell in members]
        middle = next((name for name in names if ways[name] == "lora"), names[0])
        for cell in members:
            if cell.method != middle:
                compared += [
                    (other, cell, "between methods")
                    for other in members
                    if other.method == middle and other.seed == cell.seed
                ]
    for cell in cells:
        parent = of_name.get(starts[cell.name] or "")
        if parent is not None:
            compared.append((parent, cell, _STEPS[cell.kind]))
    return compared


# What the difference between a cell and the one that it starts from says, by the cell's kind.
_STEPS = {
    "fused": "what fusing costs",
    "quantized": "what rounding costs",
    "pruned": "what pruning costs",
    "tuned": "what tuning brings back",
}


def contrasts(
    stored: StoredMatrix, tasks: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return every paired comparison, and a line for each that could not be made.

    ``corrected`` adds what depends on how many there are: p_holm, detectable, verdict.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    by_model: dict[str, list[StoredCell]] = {}
    for cell in stored.cells:
        by_model.setdefault(cell.model, []).append(cell)
    by_pair = {model: pairs(cells) for model, cells in by_model.items()}
    resample = sum(map(len, by_pair.values())) <= RESAMPLED
    for model, pairs_of_model in by_pair.items():
        for first, second, why in pairs_of_model:
            for task in tasks:
                try:
                    row = contrast(first, second, task, resample=resample)
                except SlimError as error:
                    notes.append(error.message)
                    continue
                if row is not None:
                    rows.append({"model": model, "why": why, **row})
    return rows, notes


def corrected(rows: list[dict[str, Any]], pooled: list[MethodComparison]) -> None:
    """Fill in p values corrected by Holm over all comparisons of a model, and their verdicts.

    A claim of the headline that is one row of the table takes that row's p value; the others are
    members of the family.
    """
    for model in dict.fromkeys([*(row["model"] for row in rows), *(c.model for c in pooled)]):
        members = [row for row in rows if row["model"] == model]
        of_pair: dict[tuple[str, ...], dict[str, Any]] = {
            (row["first"], row["second"], row["task"]): row for row in members
        }
        claims = [claim for claim in pooled if claim.model == model]
        further = [claim for claim in claims if claim.pair not in of_pair]
        tests = len(members) + len(further)
        p_values = [*(row["p_value"] for row in members), *(claim.p_value for claim in further)]
        adjusted = stats.holm(p_values)
        for row, p_holm in zip(members, adjusted, strict=False):
            row["p_holm"], row["family"] = p_holm, tests
            row["detectable"] = stats.detectable_difference(
                row["gained"] + row["lost"], row["n"], tests
            )
            row["verdict"] = stats.verdict(row["delta"], p_holm, row["detectable"])
        for claim, p_holm in zip(further, adjusted[len(members) :], strict=True):
            claim.judge(p_holm, tests)
        for claim in claims:
            if claim.pair in of_pair:
                claim.judge(of_pair[claim.pair]["p_holm"], tests)


def contrast(
    first: StoredCell, second: StoredCell, task: dict[str, Any], *, resample: bool = True
) -> dict[str, Any] | None:
    """Return one paired comparison, second minus first; None where a side was not scored.

    Args:
        first: Usually the base.
        second: What is compared with it.
        task: Name, metric.
        resample: Draw the bootstrap within subjects (of MMLU) too, an eighth of a second.

    Raises:
        SlimError: If the two did not answer the same questions.
    """
    name, metric = task["task"], task["metric"]
    a, b = first.answers.get(name), second.answers.get(name)
    if a is None or b is None:
        return None
    differing = [key for key in COMPARED_KEYS if a.section.get(key) != b.section.get(key)]
    if differing or not np.array_equal(a.doc_ids_N, b.doc_ids_N):
        what = ", ".join(differing) or "row numbers"
        raise SlimError(f"{name}: {first.name} and {second.name} are not compared: {what} differ")
    parted = a.subjects_N is not None
    strata = a.subjects_N.tolist() if a.subjects_N is not None and resample else None
    first_N, second_N = (answers.right_N[metric].tolist() for answers in (a, b))
    values = asdict(
        stats.paired(
            first_N,
            second_N,
            strata,
            draws=1 if parted and not resample else stats.DRAWS,
            tests=None,
        )
    )
    if parted and not resample:
        values["bootstrap"] = None
    scores = {"first_score": values.pop("first"), "second_score": values.pop("second")}
    return {"first": first.name, "second": second.name, "task": name, **scores, **values}


# ------------------------------------------------------------------------------------- seeds


def seeds_of(rows: list[dict[str, Any]], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over seeds, of methods that ran with several."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    lines = []
    for (model, method), members in groups.items():
        if len(members) < 2:
            continue
        values = {
            task["task"]: [row["scores"][task["task"]]["value"] for row in members]
            for task in tasks
            if all(task["task"] in row["scores"] for row in members)
        }
        lines.append(
            {
                "model": model,
                "method": method,
                "seeds": [row["seed"] for row in members],
                "tasks": {t: {"mean": mean(v), "sd": stdev(v)} for t, v in values.items()},
            }
        )
    return lines
