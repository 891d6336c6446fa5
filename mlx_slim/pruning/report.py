"""Three models on the same text and tasks: the original, the pruned and the recovered one.

Invariant: all models are compared on the same rows of text, which the recovery was not trained on
where its recipe has validation rows; every percentage is computed from two stored scores, and the
accuracy of guessing is counted from the questions themselves. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --recover smollm2-lora``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.adapters.store import load_adapter
from mlx_slim.artifacts import SCHEMA_VERSION, load_tensors, provenance
from mlx_slim.config.load import Resolved
from mlx_slim.data.prepare import prepare
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.records import EvalResults
from mlx_slim.evaluation.results import STATE_FILE as EVAL_STATE
from mlx_slim.evaluation.results import read_samples, samples_name
from mlx_slim.evaluation.run import evaluate
from mlx_slim.evaluation.tasks.metrics import Record
from mlx_slim.events import Notice, Observer
from mlx_slim.models import fidelity
from mlx_slim.models.load import load, load_tokenizer, read_config
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.records import (
    MODEL,
    RECOVER,
    ModelRow,
    PruneRecord,
    Recovery,
    RecoveryReport,
    TaskFigures,
    TextFigures,
    ValidationText,
)
from mlx_slim.pruning.run import validation_rows
from mlx_slim.quantization.base import load_base
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.reading import JsonObject, short
from mlx_slim.runtime import memory_limits

SCORES = "scores"


@dataclass(frozen=True)
class RecoverOptions:
    """What happens after pruning.

    Attributes:
        recipe: Name or file of the recipe that tunes the pruned model; None only scores.
        overrides: ``key=value`` for it.
        tasks: Names of tasks and suites to score before, after pruning and after recovery.
        limit: First rows of a task.
        data_dir: Data mirror of the tasks.
    """

    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class _Candidate:
    """One of the models.

    Attributes:
        model: Folder or hub id.
        adapter: Over it; None without one.
        revision: Of a hub id.
    """

    model: str
    adapter: Path | None = None
    revision: str | None = None


@memory_limits()
def make_report(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    record: PruneRecord,
    resolved: Resolved | None,
    tuned: Path | None,
    observer: Observer,
) -> RecoveryReport:
    """Compare the original, the pruned and the recovered model on the same text and tasks."""
    adapter = tuned if tuned is not None and tuned.name == "adapters" else None
    full = tuned if adapter is None else None
    models = {
        "original": _Candidate(str(source), revision=options.revision),
        "pruned": _Candidate(str(out / MODEL)),
    }
    if tuned is not None:
        models["recovered"] = _Candidate(str(full or out / MODEL), adapter)
    rows_NT, text = _validation_rows(out, options, resolved, observer)
    tokens = 0 if rows_NT is None else rows_NT.size
    rows = [
        ModelRow(
            name=name,
            parameters=record.parameters_before if name == "original" else record.parameters_after,
            bytes=(record.bytes_before if name == "original" else record.bytes_after)
            + _bytes_of(candidate.adapter),
            adapter_parameters=_parameters_of(candidate.adapter),
            tasks=_scored(out / SCORES / name, candidate, after, observer),
        )
        for name, candidate in models.items()
    ]
    if rows_NT is not None:
        observer.notify(Notice(f"comparing on {tokens:,} validation tokens: {text}"))
        figures = _compare(models, rows_NT, out)
        rows = [replace(row, text=figures[row.name]) for row in rows]
    summary = record.as_json()
    return RecoveryReport(
        schema_version=SCHEMA_VERSION,
        source=str(source),
        prune={key: summary[key] for key in ("axis", "method", "calibration", "options")},
        recipe=None if resolved is None else resolved.recipe.model_dump(mode="json"),
        validation=ValidationText(text, tokens),
        limit=after.limit,
        rows=with_recovery(rows),
        provenance=provenance(),
    )


def _validation_rows(
    out: Path, options: PruneOptions, resolved: Resolved | None, observer: Observer
) -> tuple[mx.array | None, str]:
    """Return token ids (N, T) and what they are: the recipe's validation rows, if it has any."""
    tokenizer, limit = load_tokenizer(out / MODEL), row_limit(read_config(out / MODEL))
    if resolved is not None:
        recipe = resolved.recipe
        data = prepare(
            recipe.data,
            tokenizer,
            max_length=recipe.train.max_length,
            seed=recipe.rows_seed,
            folder=out / RECOVER,
            unchanged=True,
            limit=limit,
        )
        store = data.validation
        if store is not None:
            ids = np.concatenate([store.row(i)[0] for i in range(len(store))])[: options.held_out]
            return validation_rows(
                mx.array(ids.astype(np.int32)), limit
            ), "the recipe's validation rows"
        observer.notify(
            Notice(
                "the recipe has no validation rows (data.validation=0): perplexity is that of "
                "calibration text, which may be in its training data",
                "warning",
            )
        )
    try:
        calibration = read_calibration(
            options.calibration or DEFAULT_SOURCE,
            tokenizer,
            length=min(64, limit.tokens) if limit else 64,
            seen=0,
            validation=max(1, options.held_out // 64),
        )
    except SlimError as error:
        observer.notify(Notice(f"no validation text: {error.message}", "warning"))
        return None, "none"
    return validation_rows(calibration.validation_NT.reshape(-1), limit), "calibration text"


def _bytes_of(adapter: Path | None) -> int:
    files = [] if adapter is None else adapter.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _parameters_of(adapter: Path | None) -> int:
    if adapter is None:
        return 0
    return sum(value.size for value in load_tensors(adapter / "adapters.safetensors").values())


def _scored(
    folder: Path, candidate: _Candidate, after: RecoverOptions, observer: Observer
) -> dict[str, TaskFigures]:
    """Return each task's figures of one model; none without tasks."""
    if not after.tasks:
        return {}
    options = EvalOptions(
        adapter=candidate.adapter,
        limit=after.limit,
        data_dir=after.data_dir,
        revision=candidate.revision,
    )
    started, tasks = (folder / EVAL_STATE).exists(), list(after.tasks)
    (results,) = evaluate(
        candidate.model, tasks, folder, options, resume=started, observer=observer
    )
    return task_figures(results, folder)


def _compare(models: dict[str, _Candidate], rows_NT: mx.array, out: Path) -> dict[str, TextFigures]:
    """Return perplexity and distance from the original of each model, loaded one at a time."""
    first = models["original"]
    dense = load(first.model, revision=first.revision, dtype=compute_dtype()).model
    original = RecordedLogits(dense.eval(), rows_NT, out)
    free_weights(dense)
    figures = {}
    for name, candidate in models.items():
        other: Callable[..., Any] = original
        if name != "original":
            adapters = [] if candidate.adapter is None else [candidate.adapter]
            loaded = load_base(candidate.model, adapters, dtype=compute_dtype()).model
            if candidate.adapter is not None:
                load_adapter(loaded, candidate.adapter)
            loaded.eval()
            other = loaded
        distance = fidelity.compare(original, other, rows_NT)
        if isinstance(other, nn.Module):
            free_weights(other)
        perplexity = math.exp(min(distance.nll_model, 700.0))
        figures[name] = TextFigures(perplexity, distance.kl, distance.top1)
    return figures


def task_figures(results: JsonObject, folder: Path) -> dict[str, TaskFigures]:
    """Return task -> figures, from a scored folder and its ``results.json``."""
    return {
        task: TaskFigures(
            n=section.n,
            metrics={name: metric.value for name, metric in section.metrics.items()},
            chance=chance(read_samples(folder / samples_name(task))),
        )
        for task, section in EvalResults.read(results, short(folder)).tasks.items()
    }


def chance(samples: list[Record]) -> float:
    """Return the accuracy of guessing: the mean of 1 / choices; 0 for generated answers."""
    counts = [len(sample.get("loglikelihoods") or []) for sample in samples]
    return sum(1 / count for count in counts if count) / max(len(counts), 1)


def with_recovery(rows: list[ModelRow]) -> list[ModelRow]:
    """Return the rows with each task's scores as percentages of the first row's: ``Recovery``."""
    base = rows[0].tasks
    return [
        replace(
            row,
            tasks={
                task: replace(figures, recovery=_recovery(figures, base[task]))
                for task, figures in row.tasks.items()
            },
        )
        for row in rows
    ]


def _recovery(figures: TaskFigures, base: TaskFigures) -> dict[str, Recovery]:
    recovery = {}
    for name, value in figures.metrics.items():
        # The chance of a task is that of its accuracies.
        comparable = name.startswith("acc") or not base.chance
        corrected = _percentage(value, base.metrics[name], base.chance) if comparable else None
        recovery[name] = Recovery(_percentage(value, base.metrics[name], 0.0), corrected)
    return recovery


def _percentage(value: float, base: float, floor: float) -> float | None:
    return 100 * (value - floor) / (base - floor) if base > floor else None
