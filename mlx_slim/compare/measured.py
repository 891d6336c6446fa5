"""What a cell cost and how well it was compressed, read from the files of its run.

Invariant: a function of stored files alone, no model and no clock: the manifest is written from it
and checked against it. Try it: ``mlx-slim report DIR --verify``.
"""

from __future__ import annotations

from pathlib import Path

from mlx_slim.compare.records import (
    FORGETTING,
    FuseFidelity,
    Measured,
    PrunedDistance,
    PruneSummary,
    TrainingCost,
)
from mlx_slim.evaluation.records import Timing
from mlx_slim.evaluation.results import RESULTS_FILE, load_results
from mlx_slim.export.fuse import RECORD as FUSE_FILE
from mlx_slim.finetuning.run_dir import Result, read_result
from mlx_slim.pruning.records import RECORD_FILE as PRUNE_FILE
from mlx_slim.reading import JsonObject, read_object, short

_PRUNED = ("axis", "method", "parameters_before", "parameters_after")
_FUSED = ("kl", "top1", "tokens")


def measured(folder: Path) -> Measured:
    """Return the measured part of the record of the cell in ``folder``.

    Raises:
        SlimError: If a file is missing or no JSON.
    """
    timings = [
        Timing.read(timing, short(path))
        for path in sorted(folder.glob("eval/*/timings.json"))
        for timing in read_object(path, tasks=dict)["tasks"].values()
    ]
    scored = folder / "eval" / FORGETTING
    text = load_results(scored).text if (scored / RESULTS_FILE).is_file() else None
    fused, pruned = (folder / "model" / name for name in (FUSE_FILE, PRUNE_FILE))
    effect = read_object(fused)["effect"] if fused.is_file() else None
    cut = read_object(pruned) if pruned.is_file() else None
    run = folder / "run" / "run.json"
    recipe = read_object(run, recipe=dict)["recipe"] if run.is_file() else None
    return Measured(
        train=_train(recipe, read_result(run.parent)) if recipe else None,
        learning_rate=recipe["train"]["learning_rate"] if recipe else None,
        bits_per_byte=text.metrics["bits_per_byte"].value if text else None,
        eval_seconds=sum(timing.seconds for timing in timings) or None,
        eval_peak_memory_bytes=max((t.peak_memory_bytes for t in timings), default=None),
        fidelity=_fidelity(effect) if effect else None,
        pruned=_pruned(cut) if cut else None,
    )


def _fidelity(effect: JsonObject) -> FuseFidelity:
    """Return the fidelity of a fused model, from its ``fuse.json``."""
    return FuseFidelity(retained=effect["kept"], **{key: effect[key] for key in _FUSED})


def _pruned(cut: JsonObject) -> PruneSummary:
    """Return what pruning removed, from its ``prune.json``."""
    distance = PrunedDistance(**cut["fidelity"]) if cut["fidelity"] else None
    return PruneSummary(**{key: cut[key] for key in _PRUNED}, fidelity=distance)


def _train(recipe: JsonObject, result: Result) -> TrainingCost:
    """Return what a training run cost.

    Args:
        recipe: Of the run, as its version wrote it.
        result: Of the run.
    """
    done = result.done
    return TrainingCost(
        method=recipe["method"],
        bits=recipe["quantize"]["bits"] if recipe["method"] == "qlora" else None,
        trainable=result.trainable,
        total=result.total,
        tokens=done.tokens,
        seconds=done.seconds,
        tokens_per_second=done.tokens / max(1e-9, done.seconds),
        peak_memory_bytes=done.peak_memory_bytes,
        predicted_peak_bytes=result.predicted_peak_bytes,
        steps=done.step,
        best_validation=done.best_validation,
    )
