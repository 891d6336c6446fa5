"""What pruning took and recovery brought back: three models on the same text and tasks.

Invariant: all rows are judged on the same rows of text, which the recovery was not trained on where
its recipe holds rows back; every share is computed from two stored scores, and the level of chance
is counted from the questions themselves. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2 --recover smollm2-lora``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
from mlx_slim.evaluation.plan import EvalOptions
from mlx_slim.evaluation.results import STATE_FILE as EVAL_STATE
from mlx_slim.evaluation.results import read_samples, samples_name
from mlx_slim.evaluation.run import evaluate
from mlx_slim.events import Notice, Observer
from mlx_slim.models import fidelity
from mlx_slim.models.limits import limit_of
from mlx_slim.models.load import load, load_tokenizer, read_config
from mlx_slim.models.recorded import RecordedLogits, release
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.pruning.run import held_out_rows
from mlx_slim.quantization.base import load_base
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.runtime import human_bytes

MODEL, RECOVER, SCORES = "model", "recover", "scores"
_PREFERRED = ("acc_norm", "acc")  # of a task's metrics, in the table


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


def make_report(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    after: RecoverOptions,
    record: dict[str, Any],
    resolved: Resolved | None,
    tuned: Path | None,
    observer: Observer,
) -> dict[str, Any]:
    """Judge the original, the pruned and the recovered model on the same text and tasks."""
    adapter = tuned if tuned is not None and tuned.name == "adapters" else None
    full = tuned if adapter is None else None
    models: dict[str, tuple[str, Path | None]] = {
        "original": (str(source), None),
        "pruned": (str(out / MODEL), None),
    }
    if tuned is not None:
        models["recovered"] = (str(full or out / MODEL), adapter)
    judged_NT, text = _judged_rows(out, options, resolved, observer)
    rows: list[dict[str, Any]] = []
    for name, (model, worn) in models.items():
        pruned = name != "original"
        rows.append(
            {
                "name": name,
                "parameters": record["parameters_after" if pruned else "parameters_before"],
                "bytes": record["bytes_after" if pruned else "bytes_before"] + _bytes_of(worn),
                "adapter_parameters": _parameters_of(worn),
                "tasks": _scored(out / SCORES / name, model, worn, options, after, observer, name),
            }
        )
    if judged_NT is not None:
        observer.notify(Notice(f"comparing on {judged_NT.size:,} held-out tokens: {text}"))
        _judge(rows, models, judged_NT, options, out)
    add_recovery(rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(source),
        "prune": {key: record[key] for key in ("axis", "method", "calibration", "options")},
        "recipe": None if resolved is None else resolved.recipe.model_dump(mode="json"),
        "held_out": {"text": text, "tokens": 0 if judged_NT is None else judged_NT.size},
        "limit": after.limit,
        "rows": rows,
        "provenance": provenance(),
    }


def _judged_rows(
    out: Path, options: PruneOptions, resolved: Resolved | None, observer: Observer
) -> tuple[mx.array | None, str]:
    """Return token ids (N, T) and what they are: the recipe's validation rows, if it has any."""
    tokenizer, limit = load_tokenizer(out / MODEL), limit_of(read_config(out / MODEL))
    if resolved is not None:
        recipe = resolved.recipe
        data = prepare(
            recipe.data,
            tokenizer,
            max_length=recipe.train.max_length,
            seed=recipe.train.seed,
            folder=out / RECOVER,
            unchanged=True,
            limit=limit,
        )
        store = data.validation
        if store is not None:
            ids = np.concatenate([store.row(i)[0] for i in range(len(store))])[: options.held_out]
            return held_out_rows(
                mx.array(ids.astype(np.int32)), limit
            ), "the recipe's validation rows"
        observer.notify(
            Notice(
                "the recipe holds no rows back (data.validation=0): perplexity is that of "
                "calibration text, which it may have been trained on",
                "warning",
            )
        )
    try:
        found = read_calibration(
            options.calibration or DEFAULT_SOURCE,
            tokenizer,
            length=min(64, limit.tokens) if limit else 64,
            seen=0,
            held_out=max(1, options.held_out // 64),
        )
    except SlimError as error:
        observer.notify(Notice(f"no held-out text: {error.message}", "warning"))
        return None, "none"
    return held_out_rows(found.held_out_NT.reshape(-1), limit), "calibration text"


def _bytes_of(adapter: Path | None) -> int:
    files = [] if adapter is None else adapter.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _parameters_of(adapter: Path | None) -> int:
    if adapter is None:
        return 0
    return sum(value.size for value in load_tensors(adapter / "adapters.safetensors").values())


def _scored(
    folder: Path,
    model: str,
    adapter: Path | None,
    options: PruneOptions,
    after: RecoverOptions,
    observer: Observer,
    name: str,
) -> dict[str, Any]:
    """Return each task's figures of one model; nothing without tasks."""
    if not after.tasks:
        return {}
    wanted = EvalOptions(
        adapter=adapter,
        limit=after.limit,
        data_dir=after.data_dir,
        revision=options.revision if name == "original" else None,
    )
    begun = (folder / EVAL_STATE).exists()
    (results,) = evaluate(model, list(after.tasks), folder, wanted, resume=begun, observer=observer)
    return task_figures(results, folder)


def _judge(
    rows: list[dict[str, Any]],
    models: dict[str, tuple[str, Path | None]],
    judged_NT: mx.array,
    options: PruneOptions,
    out: Path,
) -> None:
    """Add perplexity and distance from the original to each row; one model at a time."""
    dense = load(models["original"][0], revision=options.revision, dtype=compute_dtype()).model
    original = RecordedLogits(dense.eval(), judged_NT, out)
    release(dense)
    for row in rows:
        model, adapter = models[row["name"]]
        other: Callable[..., Any] = original
        if row["name"] != "original":
            worn = [] if adapter is None else [adapter]
            loaded = load_base(model, worn, dtype=compute_dtype()).model
            if adapter is not None:
                load_adapter(loaded, adapter)
            loaded.eval()
            other = loaded
        found = fidelity.compare(original, other, judged_NT)
        if isinstance(other, nn.Module):
            release(other)
        row["perplexity"] = math.exp(min(found.nll_model, 700.0))
        row["kl"], row["top1"] = found.kl, found.top1


def task_figures(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return task -> ``n``, ``metrics`` (name -> value) and ``chance``, from a scored folder."""
    figures = {}
    for task, section in results["tasks"].items():
        figures[task] = {
            "n": section["n"],
            "metrics": {name: found["value"] for name, found in section["metrics"].items()},
            "chance": chance(read_samples(folder / samples_name(task))),
        }
    return figures


def chance(samples: list[dict[str, Any]]) -> float:
    """Return the accuracy of guessing: the mean of 1 / choices; 0 where answers are written."""
    counts = [len(sample.get("loglikelihoods") or []) for sample in samples]
    return sum(1 / count for count in counts if count) / max(len(counts), 1)


def add_recovery(rows: list[dict[str, Any]]) -> None:
    """Add to each row's tasks how much of the first row's score it has, in percent.

    ``plain`` is 100 · score / score of the original (arXiv 2410.19185); ``chance_corrected`` takes
    the level of chance off both, for accuracies. None where the original is not above it.
    """
    base = rows[0]["tasks"]
    for row in rows:
        for task, figures in row["tasks"].items():
            figures["recovery"] = {
                name: {
                    "plain": _share(value, base[task]["metrics"][name], 0.0),
                    "chance_corrected": _share(
                        value, base[task]["metrics"][name], base[task]["chance"]
                    )
                    if name.startswith("acc") or not base[task]["chance"]
                    else None,
                }
                for name, value in figures["metrics"].items()
            }


def _share(value: float, base: float, floor: float) -> float | None:
    return 100 * (value - floor) / (base - floor) if base > floor else None


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return ``report.json`` as an aligned table, a row a model."""
    rows = report["rows"]
    tasks = list(rows[0]["tasks"])
    heading = ["", "parameters", "size", "perplexity", "KL"]
    for task in tasks:
        heading += [f"{task} {_metric(rows[0]['tasks'][task])}", "recovery", "above chance"]
    table = [heading]
    for row in rows:
        own = f"{row['parameters']:,}"
        if row["adapter_parameters"]:
            own += f" + {row['adapter_parameters']:,}"
        cells = [row["name"], own, human_bytes(row["bytes"])]
        cells += [_number(row.get("perplexity"), ".2f"), _number(row.get("kl"), ".4f")]
        for task in tasks:
            figures = row["tasks"][task]
            metric = _metric(figures)
            recovery = figures["recovery"][metric]
            cells += [
                _number(figures["metrics"][metric], ".4f"),
                _number(recovery["plain"], ".1f", "%"),
                _number(recovery["chance_corrected"], ".1f", "%"),
            ]
        table.append(cells)
    widths = [max(len(line[i]) for line in table) for i in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    held = report["held_out"]
    return [*lines, f"perplexity and KL on {held['tokens']:,} tokens: {held['text']}"]


def _metric(figures: dict[str, Any]) -> str:
    metrics = figures["metrics"]
    return next((name for name in _PREFERRED if name in metrics), next(iter(metrics)))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
