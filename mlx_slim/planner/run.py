"""The cost of a run: predicted from shapes, or measured on a few real steps.

Invariant: without a probe nothing is loaded but a config. With one, the peak is the measured one,
and time is the predicted time of all rows, scaled by the time of the largest batch. ``mlx-slim
plan`` and ``mlx_slim.plan`` call this. Try it: ``mlx-slim plan smollm2-lora --probe``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner import macs, time
from mlx_slim.planner.memory import Measurement, Prediction, predict
from mlx_slim.planner.shapes import TrainingShapes, training_shapes
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.planner.students import predict_run
from mlx_slim.planner.suggest import changed
from mlx_slim.planner.work import (
    FILLED,
    Speed,
    TrainingWork,
    expected_work,
    measure_speed,
    operations,
    predicted_seconds,
)
from mlx_slim.runtime import DTYPES, on_gpu, resolve_dtype
from mlx_slim.units import parse_size


@dataclass(frozen=True)
class Probe:
    """Cost of a few real steps: what ``finetuning.profile.probe`` returns.

    Attributes:
        steps: Optimizer steps taken.
        seconds_per_batch: Median time of one micro-batch, without the first (warm-up) step.
        computed_tokens: Positions of that micro-batch.
        length: Positions of its longest sequence.
        peak_memory_bytes: MLX peak of the steps, weights and optimizer included.
        batching: What ``train.batching`` came to.
        lengths: Tokens of each training row.
    """

    steps: int
    seconds_per_batch: float
    computed_tokens: int
    length: int
    peak_memory_bytes: int
    batching: str
    lengths: list[int]


def plan(
    recipe: Recipe,
    *,
    budget: str | int | None = None,
    mac: str | None = None,
    probe: Callable[[Recipe], Probe] | None = None,
    ranks: int = 1,
) -> tuple[Prediction, str]:
    """Predict the cost of ``recipe``; return it, and where the shapes are from, as text.

    Args:
        recipe: Checked recipe.
        budget: Bytes or a size such as ``16GB``; None takes the Mac's, or ``memory.budget``.
        mac: Plan for this Mac (``m2-16gb``) instead of this machine; its time is a range, estimated
            from its published peak.
        ranks: Of the run: what ``train.shard=full`` cuts the model among.
        probe: Takes real steps of the largest batch on this machine; None only predicts.

    Raises:
        SlimError: If the recipe's model or rows cannot be used, the Mac is not in the table, or a
            probe is requested for another machine or for two students.
    """
    if mac is not None and probe is not None:
        raise SlimError(
            f"a probe measures this machine, not {mac}", "leave out either --probe or --for"
        )
    distill = recipe.distill
    if distill is not None and distill.method == "mutual" and probe is not None:
        raise SlimError("a probe cannot measure two students", "leave out --probe")
    config, note = model_config(recipe)
    limit = parse_size(budget) if budget is not None else None
    work = expected_work(recipe)  # refuses rows that training would refuse

    def prediction(speed: Speed | None = None, **device: Any) -> Prediction:
        device |= {"budget": limit, "speed": speed, "work": work, "ranks": ranks}
        return predict_run(config, recipe, **device)

    counted = prediction(suggest=False) if distill is not None and recipe.has_rounds else None
    if counted is not None and "teachers" not in counted.breakdown:
        note += "; the teachers' memory is not counted: their configuration is not here"
    if mac is not None:
        target = macs.find_mac(mac)
        if limit is None:
            limit = macs.budget(target.memory_gb)
        machine = time.apple(target.chip_name, target.chip)
        gpu = {"gpu": True, "gpu_bytes": target.working_set_bytes, "machine": machine}
        return prediction(**gpu), f"{note}; for {target.name}"
    dtype = resolve_dtype(recipe.train.dtype)
    speed = measure_speed(dtype)
    if probe is None:  # a GPU reaches a part of its rates only, which is a range
        machine = time.this_machine(dtype) if on_gpu() else None
        return prediction(speed, machine=machine), note
    measured = probe(recipe)
    recipe = changed(recipe, {"train.batching": measured.batching})
    predicted = predict(config, recipe, lengths=measured.lengths, budget=limit, speed=speed)
    batch = TrainingWork(int(measured.computed_tokens * FILLED), 0, measured.length, "")
    shapes = training_shapes(config, recipe, dtype)
    seconds = predicted_seconds(operations(shapes, recipe, batch), speed, gpu=on_gpu())
    return _corrected(predicted, measured, measured.seconds_per_batch / seconds), note


def shapes_of_run(recipe: Recipe, dtype: str) -> TrainingShapes:
    """Return the sizes of a recipe's model, computed in ``dtype``.

    Raises:
        SlimError: If its configuration cannot be read.
    """
    return training_shapes(model_config(recipe)[0], recipe, DTYPES[dtype])


def _corrected(predicted: Prediction, measured: Probe, slower: float) -> Prediction:
    """Return ``predicted`` with the measured peak, its suggestions and its time scaled alike."""
    peak = measured.peak_memory_bytes
    factor = peak / predicted.predicted_peak_bytes
    seconds = predicted.predicted_seconds
    return replace(
        predicted,
        predicted_peak_bytes=peak,
        fits=peak <= predicted.budget_bytes,
        predicted_seconds=None if seconds is None else seconds * slower,
        measured=Measurement(
            peak_bytes=peak,
            predicted_peak_bytes=predicted.predicted_peak_bytes,
            seconds_per_batch=measured.seconds_per_batch,
            batch_tokens=measured.computed_tokens,
            steps=measured.steps,
        ),
        suggestions=[
            replace(s, predicted_peak_bytes=int(s.predicted_peak_bytes * factor))
            for s in predicted.suggestions
        ],
    )
