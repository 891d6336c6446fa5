"""What ``run.json`` says of a finished run.

Invariant: it is written last, and holds the recipe, what it was run with and how it
ended. Try it: ``python -m pytest tests/finetuning/test_run.py``.
"""

from __future__ import annotations

from dataclasses import asdict

from mlx_slim.artifacts import SCHEMA_VERSION, provenance
from mlx_slim.config.load import Resolved
from mlx_slim.finetuning.run_dir import Result
from mlx_slim.finetuning.strategy import TrainingStrategy
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import dtype_name, resolve_dtype, world
from mlx_slim.training.optim import Extended


def run_record(
    resolved: Resolved,
    strategy: TrainingStrategy,
    result: Result,
    budget: int,
    extended: Extended | None,
) -> JsonObject:
    """Return ``run.json``."""
    files = [p for p in (result.out / result.artifact).rglob("*") if p.is_file()]
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "recipe": resolved.recipe.model_dump(mode="json"),
        "origins": resolved.origins,
        "dtype": dtype_name(resolve_dtype(resolved.recipe.train.dtype)),
        "provenance": provenance(),
        "ranks": world().size(),
        "budget_bytes": budget,
        "artifact_bytes": sum(path.stat().st_size for path in files),
        **({"extended": asdict(extended)} if extended else {}),
        **strategy.record(),
        "result": {
            "done": asdict(result.done),
            "model": result.model,
            "artifact": result.artifact,
            "trainable": result.trainable,
            "total": result.total,
            "predicted_peak_bytes": result.predicted_peak_bytes,
            "on": result.on,
            "base": result.base,
        },
    }
