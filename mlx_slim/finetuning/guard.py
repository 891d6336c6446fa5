"""The guard of a fine-tune: memory and disk are checked before anything is trained.

Invariant: what does not fit is one line with the cheapest setting that does, and nothing is left
behind. Try it: ``mlx-slim train smollm2-lora memory.budget=100MB -o runs/try``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mlx_slim.agreement import refuse_differences
from mlx_slim.artifacts import hash_bytes, hash_file, hash_json, provenance
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.finetuning.run_dir import RECORD, STATE_FILE
from mlx_slim.planner.memory import Prediction
from mlx_slim.runtime import all_gather_bytes, free_disk
from mlx_slim.training import rotation
from mlx_slim.training.loop import Loop
from mlx_slim.units import human_bytes


def check_disk(out: Path, prediction: Prediction) -> None:
    """Refuse to start when the disk cannot hold the run."""
    free = free_disk(out)
    if free < prediction.disk_bytes:
        raise ResourceError(
            f"{out} will need {human_bytes(prediction.disk_bytes)} of disk, "
            f"{human_bytes(free)} are free",
            "free some space, choose another output folder, or keep less with train.keep=1",
        )


def check_loading(recipe: Recipe, prediction: Prediction, budget: int) -> None:
    """Refuse to load a base for which the budget is too small."""
    needed = prediction.loading_peak_bytes
    if needed > budget:
        raise ResourceError(
            f"loading {recipe.model} needs {human_bytes(needed)} (predicted), the budget is "
            f"{human_bytes(budget)}",
            _cheapest_fit(prediction, prediction.predicted_peak_bytes, budget),
        )


def preflight(loop: Loop, prediction: Prediction, budget: int) -> None:
    """Run the largest micro-batch; refuse to start over the budget, or with ranks that differ.

    A prediction of twice the budget is believed without a try, which could exhaust the machine.
    """
    _check_ranks(loop)
    over = prediction.predicted_peak_bytes > 2 * budget
    if loop.sharded is not None:  # ranks that gather from each other all try, or none does
        over = b"1" in all_gather_bytes(b"1" if over else b"0")
    peak = prediction.predicted_peak_bytes if over else loop.preflight()
    of_ranks = [json.loads(each) for each in all_gather_bytes(json.dumps([peak, budget]).encode())]
    for rank, (needed, allowed) in enumerate(of_ranks):
        if needed > allowed:
            where = f" on rank {rank}" * (len(of_ranks) > 1)
            raise ResourceError(
                f"this run needs {human_bytes(needed)} ({'predicted' if over else 'measured'})"
                f"{where}, the budget is {human_bytes(allowed)}",
                _cheapest_fit(prediction, needed, allowed),
            )


def check_folder(out: Path) -> None:
    """Refuse ranks that do not see the run folder of rank 0, where all of them read it.

    Raises:
        SlimError: On every rank.
    """
    states = [
        rotation.path_of(out / "checkpoints", n) / rotation.STATE
        for n in rotation.steps(out / "checkpoints")
    ]
    files = [file for file in (out / STATE_FILE, out / RECORD, *states) if file.exists()]
    seen = hash_json({str(file.relative_to(out)): hash_file(file) for file in files})
    of_ranks = all_gather_bytes(seen.encode())
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            raise SlimError(
                f"{out} on rank {rank} is not the folder that rank 0 has",
                "put it on a disk that all ranks see, or copy it from rank 0's machine first",
            )


def _check_ranks(loop: Loop) -> None:
    """Refuse ranks that would take other steps than rank 0."""
    batcher, installed = loop.batcher, provenance()["versions"]
    rows = np.ascontiguousarray([batcher.rows.lengths, batcher.rows.supervised], np.int64)
    facts = {
        **{name: installed.get(name, "none") for name in ("mlx-slim", "mlx", "mlx-lm", "numpy")},
        "training rows": f"{len(batcher.rows):,} ({hash_bytes(rows.tobytes())[:8]})",
        "batching": batcher.mode,
        "compiled steps": loop.compiled,
        "steps": loop.total,
    }
    refuse_differences(facts)


def _cheapest_fit(prediction: Prediction, peak: int, budget: int) -> str:
    """Return the cheapest suggestion that fits once corrected by what was measured."""
    correction = peak / prediction.predicted_peak_bytes
    for suggestion in prediction.suggestions:
        size = suggestion.predicted_peak_bytes * correction
        if size <= budget:
            return f"fits with {suggestion.set} (about {human_bytes(size)})"
    return "no single change fits: try a smaller model, or see mlx-slim plan"
