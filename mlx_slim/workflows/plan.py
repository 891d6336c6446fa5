"""What a run will cost: predicted from shapes, or measured on a few real steps.

Invariant: without a probe nothing is loaded but a config. With one, the peak is the measured one,
and time is the predicted time of all rows, scaled by what the largest batch took. This is what
``mlx-slim plan`` and ``mlx_slim.plan`` call. Try it: ``mlx-slim plan smollm2-lora --probe``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_slim import events
from mlx_slim.config.schema import Recipe
from mlx_slim.distillation.mutual import predicted
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.profile import STEPS, Probe, probe
from mlx_slim.planner import macs
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.planner.work import (
    FILLED,
    Speed,
    TrainingWork,
    expected_work,
    measure_speed,
    predicted_seconds,
)
from mlx_slim.runtime import on_gpu, parse_size, resolve_dtype


def plan(
    recipe: Recipe,
    *,
    budget: str | int | None = None,
    mac: str | None = None,
    measure: bool = False,
    steps: int = STEPS,
    observer: events.Observer | None = None,
) -> tuple[Prediction, str]:
    """Predict what ``recipe`` costs; return it, and in words where the shapes are from.

    Args:
        recipe: Checked recipe.
        budget: Bytes or a size such as ``16GB``; None takes the Mac's, or ``memory.budget``.
        mac: Plan for this Mac (``m2-16gb``) instead of this machine; its time is not predicted.
        measure: Take real steps of the largest batch here.
        steps: How many.
        observer: Hears what the probe does.

    Raises:
        SlimError: If the recipe's model or rows cannot be used, the Mac is not known, or a probe is
            wanted for another machine.
    """
    if mac is not None and measure:
        raise SlimError(f"a probe runs here, not on {mac}", "leave out --probe, or --for")
    distill = recipe.distill
    if distill is not None and distill.method == "mutual" and measure:
        raise SlimError("two students are not probed together", "leave out --probe")
    config, note = model_config(recipe)
    limit = parse_size(budget) if budget is not None else None
    work = expected_work(recipe)  # refuses rows that training would refuse

    def found(speed: Speed | None = None, **device: Any) -> Prediction:
        return predicted(config, recipe, budget=limit, speed=speed, work=work, **device)

    if mac is not None:
        target = macs.find_mac(mac)
        if limit is None:
            limit = macs.budget(target.memory_gb)
        gpu = {"gpu": True, "gpu_bytes": target.working_set_bytes}
        return found(**gpu), f"{note}; for {target.name}"
    dtype = resolve_dtype(recipe.train.dtype)
    speed = measure_speed(dtype)
    if not measure:
        return found(speed), note
    seen = probe(recipe, observer or events.Broadcast([]), steps=steps)
    guessed = predict(config, recipe, lengths=seen.lengths, budget=limit, speed=speed)
    batch = TrainingWork(int(seen.computed_tokens * FILLED), 0, seen.length, "")
    shape = training_shapes(config, recipe, dtype)
    guess = predicted_seconds(shape, recipe, batch, speed, gpu=on_gpu())
    return _corrected(guessed, seen, seen.seconds_per_batch / guess), note


def _corrected(found: Prediction, seen: Probe, slower: float) -> Prediction:
    """Return ``found`` with the measured peak, its suggestions and its time scaled alike."""
    peak = seen.peak_memory_bytes
    factor = peak / found.predicted_peak_bytes
    seconds = found.predicted_seconds
    return replace(
        found,
        predicted_peak_bytes=peak,
        fits=peak <= found.budget_bytes,
        predicted_seconds=None if seconds is None else seconds * slower,
        measured={
            "peak_bytes": peak,
            "predicted_peak_bytes": found.predicted_peak_bytes,
            "seconds_per_batch": seen.seconds_per_batch,
            "batch_tokens": seen.computed_tokens,
            "steps": seen.steps,
        },
        suggestions=[
            replace(s, predicted_peak_bytes=int(s.predicted_peak_bytes * factor))
            for s in found.suggestions
        ],
    )
