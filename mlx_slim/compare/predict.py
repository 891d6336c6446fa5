"""What a matrix will cost, cell by cell, before anything runs.

Invariant: nothing is downloaded but a configuration and nothing is written; a cell that is
predicted not to fit is omitted with both figures. Training is predicted by ``analyze/memory.py``;
scoring is a count of tokens times the forward share of a training step.
Try it: ``mlx-slim compare matrix-14 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlx_slim.analyze.known_models import KNOWN, model_config
from mlx_slim.analyze.memory import Prediction, predict
from mlx_slim.analyze.rows import CHARACTERS_PER_TOKEN
from mlx_slim.analyze.work import Speed, Work, measure_speed
from mlx_slim.compare.matrix import Cell, Layout, Matrix, prune_options
from mlx_slim.compare.questions import plain_questions
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.evaluate.rows import count_rows
from mlx_slim.evaluate.spec import find_task
from mlx_slim.models.hub import SMOLLM2_PACKAGE
from mlx_slim.runtime import memory_budget, resolve_dtype
from mlx_slim.workflows.mutual import predicted
from mlx_slim.workflows.prune_plan import planned_config

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORWARD = 0.3  # of a LoRA step: measured on a CPU, SmolLM2-135M
LOADING = 12.0  # seconds that a cell spends beside training and scoring
WRITTEN = 120  # tokens of a generated answer, about
WRITING = 6.0  # a generated token costs so many times a read one
_UNKNOWN_ROWS = (1_000, 200)  # questions and tokens of a task whose rows are not here


@dataclass(frozen=True)
class Line:
    """The plan of one cell; sizes in bytes, times in seconds, None where not known.

    Attributes:
        cell: Its name.
        kind: Of its method.
        peak_bytes: Predicted peak of training; of the weights alone where nothing is trained.
        train_seconds: Training, its share of the sweep included.
        score_seconds: Scoring all tasks.
        why_not: Why it is omitted; empty if it runs.
    """

    cell: str
    kind: str
    peak_bytes: int | None
    train_seconds: float | None
    score_seconds: float | None
    why_not: str = ""


@lru_cache(maxsize=4)
def _speed(dtype: str) -> Speed:
    return measure_speed(resolve_dtype(dtype))


def _config(recipe: Recipe) -> dict[str, Any]:
    if recipe.model == SMOLLM2_PACKAGE:
        return KNOWN[SMOLLM2]
    return model_config(recipe)[0]


def predicted_run(
    recipe: Recipe, budget: int | None = None, config: dict[str, Any] | None = None
) -> Prediction | None:
    """Return the prediction of a run on this machine; None if the model's shapes are not to be had.

    Args:
        recipe: The run.
        budget: Memory that it may use; None is the device's.
        config: Of the model that it starts from; None looks for the recipe's.

    Raises:
        SlimError: If the model cannot be built.
    """
    try:
        config = _config(recipe) if config is None else config
    except SlimError:
        return None
    speed = _speed(recipe.train.dtype)
    return predicted(config, recipe, _config, speed=speed, budget=budget, suggest=False)


def plan(layout: Layout) -> list[Line]:
    """Return a line for every cell of the matrix, those that cannot run among them."""
    budget = memory_budget(layout.matrix.budget)
    shapes: dict[str, dict[str, Any]] = {}  # of the cells that leave other shapes
    lines = [_line(layout.matrix, cell, budget, shapes) for cell in layout.cells]
    fits = {line.cell: not line.why_not for line in lines}
    return [
        line
        if cell.parent is None or fits.get(cell.parent, False)
        else Line(line.cell, line.kind, None, None, None, f"{cell.parent} is omitted")
        for cell, line in zip(layout.cells, lines, strict=True)
    ]


def _line(matrix: Matrix, cell: Cell, budget: int, shapes: dict[str, dict[str, Any]]) -> Line:
    """Return the plan of a cell, and note its model's configuration in ``shapes``."""
    recipe = cell.recipe.recipe
    config = shapes.get(cell.parent or "")
    try:
        if cell.kind == "pruned":
            options = prune_options(matrix, cell.method)
            config = planned_config(_config(recipe) if config is None else config, options)
        if config is not None:
            shapes[cell.name] = config
        found = predicted_run(recipe, budget, config)
        tokens = sum(_tokens(entry.task, entry.limit) for entry in matrix.tasks)
    except SlimError as error:
        return Line(cell.name, cell.kind, None, None, None, error.message)
    if found is None:  # whether there is such a model turns out when it runs
        return Line(cell.name, cell.kind, None, None, None)
    if cell.kind != "tuned":
        weights = found.breakdown["weights"]
        return Line(cell.name, cell.kind, weights, None, _scoring(recipe, tokens, config))
    train = found.predicted_seconds
    if train is not None and len(cell.rates) > 1 and cell.seed == matrix.seeds[0]:
        steps = found.tokens or 0
        if matrix.sweep.steps is not None:
            one = recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"steps": matrix.sweep.steps})}
            )
            short = predicted_run(one, budget, config)
            steps = (short.tokens if short else None) or steps
        train += train * len(cell.rates) * steps / max(1, found.tokens or 1)
    why = ""
    if not found.fits:
        why = f"needs {_gb(found.predicted_peak_bytes)}, the budget is {_gb(budget)}"
    peak = found.predicted_peak_bytes
    return Line(cell.name, cell.kind, peak, train, _scoring(recipe, tokens, config), why)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _scoring(recipe: Recipe, tokens: int, config: dict[str, Any] | None) -> float:
    """Return the seconds that reading so many tokens takes: a share of a LoRA step each."""
    plain = recipe.model_copy(update={"method": "lora"})
    speed = _speed(recipe.train.dtype)
    work = Work(tokens, tokens, recipe.train.max_length, "")
    try:
        found = predict(config or _config(recipe), plain, speed=speed, work=work, suggest=False)
    except SlimError:
        return 0.0
    return LOADING + FORWARD * (found.predicted_seconds or 0.0)


@lru_cache(maxsize=64)
def _tokens(name: str, limit: int | None) -> int:
    """Return about how many tokens scoring a task reads, shared prefixes counted once."""
    task = find_task(name)
    if count_rows(task) is None:  # on the hub, perhaps: a plan downloads nothing
        count, length = _UNKNOWN_ROWS
        return (limit or count) * length
    questions = plain_questions(task, limit)
    read = sum(len(q.context) + sum(map(len, q.choices)) for q in questions)
    written = WRITTEN * WRITING * len(questions) if task.kind == "generation" else 0
    return int(read / CHARACTERS_PER_TOKEN + written)
