"""A recipe for a model and rows, without a recipe file: what fits this machine and these rows.

Invariant: each value that is set is a ``Choice`` with its reason; what the command line sets stays,
and the other values follow from it. The recipe is complete: run again from its file
(``Resolved.text``) it is the same run. Whether it fits is the planner's prediction, which needs no
weights. For memory, time is given up first (smaller micro-batches, recomputed blocks), then bits of
the base, then the longest rows. Values that follow from rows and width: ``hyperparameters.py``.
Try it: ``mlx-slim train MODEL --data rows.jsonl --dry-run``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.config.load import Resolved
from mlx_slim.config.read import parse_scalar
from mlx_slim.config.recipe_file import recipe_text
from mlx_slim.config.schema import Recipe
from mlx_slim.data.pipeline import PreparedRow
from mlx_slim.errors import ResourceError, SlimError, TimeLimitError
from mlx_slim.planner import hyperparameters
from mlx_slim.planner.choice_inputs import ChoiceInputs, read_inputs, user_recipe
from mlx_slim.planner.draft import Choice, Draft, complete, start
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.planner.students import teacher_passes
from mlx_slim.planner.suggest import Overrides, changed
from mlx_slim.planner.time import Range
from mlx_slim.planner.work import FILLED
from mlx_slim.reading import ModelConfig
from mlx_slim.units import human_bytes, human_duration, parse_duration

RESERVE = 1.1  # a prediction may be too low by this factor
BITS = (8, 4)  # of a base that does not fit otherwise, best first
TEXT_ROWS = (2048, 1024, 512, 256)  # tokens of the rows that a long text is cut into
QUANTILES = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5)  # of the lengths of rows, for the longest one
FORWARD = 1 / 3  # time of a validated token, or of a teacher's, as a fraction of a trained one's
LEAST_STEPS = 10  # of a run that a limit of time shortens
ORDER = (
    *("data.path", "data.validation", "method", "quantize.bits", "memory.budget"),
    *("adapter.rank", "adapter.alpha", "train.max_length", "train.epochs", "train.batch_tokens"),
    *("train.accumulate", "train.grad_checkpoint", "train.learning_rate", "train.schedule"),
    *("train.warmup", "train.validate_every", "train.early_stopping", "train.save_every"),
)


@dataclass(frozen=True)
class Chosen:
    """A recipe, and how it came about.

    Attributes:
        resolved: The recipe; its origins are the reasons, its text is the file.
        choices: One for each key that is set.
        example: The first row that can be used.
        tokenizer: Of the model.
        prediction: Cost of the recipe on this machine.
        budget: Bytes that it may use.
        time: Predicted, of training, validation and teachers; on a GPU a range.
    """

    resolved: Resolved
    choices: list[Choice]
    example: PreparedRow
    tokenizer: Any
    prediction: Prediction
    budget: int
    time: Range

    @property
    def cost_line(self) -> str:
        """Predicted memory and time."""
        peak, budget = map(human_bytes, (self.prediction.predicted_peak_bytes, self.budget))
        low, high = map(human_duration, (self.time.low, self.time.high))
        between = f"about {high}" if low == high else f"{low} to {high}"
        return f"predicted: {peak} of {budget}, {between}"


def choose(
    model: str,
    data: str,
    *,
    out: Path,
    method: str | None = None,
    budget: str | None = None,
    time: str | None = None,
    overrides: Sequence[str] = (),
) -> Chosen:
    """Return a recipe that trains ``model`` on ``data`` on this machine.

    The rows are tokenised once, into a temporary folder, to count them.

    Args:
        model: Hub id or folder.
        data: Rows, as ``data.path``.
        out: The run folder; nothing is put there.
        method: Of the recipe; None chooses.
        budget: Memory, such as ``12GB``; None is ``memory.budget``.
        time: Longest predicted time, such as ``2h``; None is as long as the rows are worth.
        overrides: ``key=value``: values that are not chosen.

    Raises:
        SlimError: If model, rows or values cannot be used, or the time is too short.
        ResourceError: If nothing fits the budget.
    """
    seconds = None if time is None else parse_duration(time)
    base, every_override = user_recipe(model, data, method, budget, overrides)
    if seconds is not None and (long := {"train.epochs", "train.steps"} & base.overridden):
        raise SlimError(f"--time and {long.pop()} both limit the training", "keep one of them")
    limits = {"--method": method, "--budget": budget, "--time": time}
    options = [word for name, value in limits.items() if value for word in (name, value)]
    words = ["mlx-slim", "train", model, "--data", data, *options, *overrides, "-o", str(out)]
    task, example, tokenizer = read_inputs(base, every_override)
    chosen = _fitting(task, None)
    if seconds is not None:
        chosen = _within(task, chosen, seconds, str(time))
    draft, prediction, total = chosen
    choices = [draft.choices[key] for key in ORDER if key in draft.choices]
    resolved = draft.resolved()
    reasons = {one.key: one.reason for one in choices}
    source = out / "recipe.yaml"
    header = [
        f"Chosen by: {shlex.join(words)}",
        f"Change it and run it again: mlx-slim train {shlex.quote(str(source))} -o ANOTHER",
    ]
    text = recipe_text(resolved.recipe, reasons, header)
    resolved = replace(resolved, name=out.name or base.name, source=str(source), text=text)
    return Chosen(resolved, choices, example, tokenizer, prediction, task.budget, total)


_Fitting = tuple[Draft, Prediction, Range]


def _fitting(task: ChoiceInputs, most_epochs: float | None, why: str = "") -> _Fitting:
    """Return the best recipe that fits the budget, its cost, and its seconds with validation.

    Raises:
        ResourceError: If none does; with what the smallest needs.
    """
    least = math.inf
    for length in _lengths(task):
        tried: list[str] = []
        lengths = task.fitted(length)
        draft = start(task, length, most_epochs, why)
        recipe = draft.resolved().recipe
        for change, label in _methods(task, recipe):
            trial = changed(recipe, change)
            limit = int(task.budget / RESERVE)
            prediction = predict(task.config, trial, lengths=lengths.tolist(), budget=limit)
            peaks = []
            for step, peak in _variants(task, prediction):
                peaks.append(peak)
                if peak <= limit:
                    tried.append(f"{label} fits: {human_bytes(peak)} of {human_bytes(task.budget)}")
                    complete(draft, changed(trial, step), change, step, tried)
                    return _costed(task, draft, lengths)
            tried.append(f"{label} needs {human_bytes(min(peaks))}")
            least = min(least, *peaks)
    raise ResourceError(
        f"{task.base.recipe.model} needs at least {human_bytes(least)} (predicted), the budget is "
        f"{human_bytes(task.budget)} with a tenth in reserve",
        "use a smaller model, shorter rows (train.max_length), or a larger --budget",
    )


def _lengths(task: ChoiceInputs) -> Iterator[int]:
    """Yield longest rows to try: all of them first."""
    if task.is_fixed("train.max_length"):
        yield task.longest
        return
    sizes = np.where(task.splits, np.minimum(task.lengths, TEXT_ROWS[0]), task.lengths)
    quantiles = [np.quantile(sizes, quantile, method="inverted_cdf") for quantile in QUANTILES]
    least = math.inf
    for tokens in [*quantiles, *TEXT_ROWS] if task.splits.any() else quantiles:
        length = min(task.longest, max(32, 16 * math.ceil(float(tokens) / 16)))
        if length < least:
            least = length
            yield length


def _methods(task: ChoiceInputs, recipe: Recipe) -> Iterator[tuple[Overrides, str]]:
    """Yield methods to try, each with its name: the one that keeps most of the base first."""
    if "quantization" in task.config:
        method = recipe.method if task.is_fixed("method") else "qlora"
        yield {"method": method}, f"{method} over the {_bits(task.config)}-bit base"
        return
    if task.is_fixed("method") and recipe.method != "qlora":
        yield {"method": recipe.method}, recipe.method
        return
    if not task.is_fixed("method"):
        most = hyperparameters.capacity(hyperparameters.MOST_RANK, task.parameters_per_rank)
        if most < task.supervised.sum():
            yield {"method": "full"}, "full (more to learn than an adapter stores)"
        yield {"method": "lora"}, "lora"
    fixed = task.is_fixed("quantize.bits") or task.is_fixed("quantize.mode")
    for bits in (recipe.quantize.bits,) if fixed else BITS:
        yield {"method": "qlora", "quantize.bits": bits}, f"qlora with {bits} bits"


def _bits(config: ModelConfig) -> int:
    return int(config["quantization"].get("bits", 0))


def _variants(task: ChoiceInputs, prediction: Prediction) -> Iterator[tuple[Overrides, int]]:
    """Yield changes that only take longer, with their peaks: none first, then the fastest."""
    yield {}, prediction.predicted_peak_bytes
    for suggestion in prediction.suggestions:
        pairs = (word.partition("=") for word in suggestion.set.split())
        change = {key: parse_scalar(value) for key, _, value in pairs}
        if not suggestion.changes_result and not any(map(task.is_fixed, change)):
            yield change, suggestion.predicted_peak_bytes


def _costed(task: ChoiceInputs, draft: Draft, lengths: np.ndarray) -> _Fitting:
    recipe = draft.resolved().recipe
    prediction = predict(
        task.config,
        recipe,
        lengths=lengths.tolist(),
        budget=task.budget,
        speed=task.speed,
        machine=task.machine,
        suggest=False,
    )
    seconds, tokens = prediction.predicted_seconds or 0.0, prediction.tokens or 1
    time = prediction.time_range or Range(seconds, seconds)
    validated = 0.0
    if task.validation[0]:
        validated = task.validation[1] * (1 + _steps(recipe, tokens) / recipe.train.validate_every)
    read = min(int(lengths.sum()), tokens) + task.validation[1]
    teacher_tokens = teacher_passes(recipe, task.config) * read
    longer = 1 + FORWARD * (validated + teacher_tokens) / tokens
    return draft, prediction, Range(longer * time.low, longer * time.high)


def _steps(recipe: Recipe, tokens: int) -> float:
    if recipe.train.steps is not None:
        return recipe.train.steps
    return tokens / (FILLED * recipe.train.batch_tokens * recipe.train.accumulate)


def _within(task: ChoiceInputs, fitting: _Fitting, limit: float, text: str) -> _Fitting:
    """Return the recipe with so few epochs that its predicted time is within ``limit`` seconds.

    Raises:
        TimeLimitError: If that leaves too few steps.
    """
    why = f"as many as --time {text} is enough for, predicted"
    while fitting[2].high > limit:
        draft, prediction, time = fitting
        seconds = time.high
        epochs = draft.choices["train.epochs"].value * 0.98 * limit / seconds
        epochs = float(f"{epochs:.3g}")
        steps = _steps(draft.resolved().recipe, prediction.tokens or 1) * limit / seconds
        if steps < LEAST_STEPS:
            least = human_duration(1.1 * limit * LEAST_STEPS / max(steps, 1e-9))
            raise TimeLimitError(
                f"--time {text} is enough for {int(steps)} steps of {task.base.recipe.model}, "
                f"at least {LEAST_STEPS} are needed",
                f"give it about {least}, or a smaller model",
            )
        fitting = _fitting(task, epochs, why)
    return fitting
