"""What a matrix will cost, cell by cell, before anything runs.

Invariant: nothing is downloaded but a configuration and nothing is written; a cell that is
predicted not to fit is omitted with both figures, whether it is trained or only scored. Training is
predicted by ``planner/memory.py``; what is not trained needs its weights, as many bits each as it
has; scoring is a count of tokens times the forward fraction of a training step.
Try it: ``mlx-slim compare matrix-14 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from mlx_slim.compare.matrix import Cell, Kind, MatrixPlan, MatrixSpec, prune_options
from mlx_slim.compare.questions import plain_questions
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.footprint import planned_footprint
from mlx_slim.evaluation.scoring.loglikelihood import SCORING_BYTES
from mlx_slim.evaluation.tasks.rows import count_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.models.hub import SMOLLM2_PACKAGE
from mlx_slim.planner.memory import Prediction, predict
from mlx_slim.planner.rows import CHARACTERS_PER_TOKEN
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS, model_config
from mlx_slim.planner.students import predict_run
from mlx_slim.planner.work import Speed, TrainingWork, measure_speed
from mlx_slim.pruning.plan import planned_config
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import memory_budget, resolve_dtype
from mlx_slim.units import human_bytes

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORWARD = 0.3  # of a LoRA step: measured on a CPU, SmolLM2-135M
LOADING = 12.0  # seconds that a cell spends beside training and scoring
GENERATED_TOKENS = 120  # tokens of a generated answer, about
GENERATION_COST = 6.0  # a generated token costs so many times a read one
_UNKNOWN_ROWS = (1_000, 200)  # questions and tokens of a task whose rows are not here


@dataclass(frozen=True)
class Line:
    """The plan of one cell; sizes in bytes, times in seconds, None where not known.

    Attributes:
        cell: Its name.
        kind: Of its method.
        peak_bytes: Predicted peak of training; where nothing is trained, the weights that are
            loaded (of a pruned cell those of the model that it is cut from).
        train_seconds: Training, including its part of the sweep.
        score_seconds: Scoring all tasks.
        why_not: Why it is omitted; empty if it runs.
        memory: Bytes that its process may use: the peak, and what scoring likes to have; 0 where
            no peak is known.
    """

    cell: str
    kind: str
    peak_bytes: int | None
    train_seconds: float | None
    score_seconds: float | None
    why_not: str = ""
    memory: int = 0


@lru_cache(maxsize=4)
def _speed(dtype: str) -> Speed:
    return measure_speed(resolve_dtype(dtype))


def _config(recipe: Recipe) -> ModelConfig:
    if recipe.model == SMOLLM2_PACKAGE:
        return SHIPPED_CONFIGS[SMOLLM2]
    return model_config(recipe)[0]


def _config_or_none(recipe: Recipe) -> ModelConfig | None:
    """Return the configuration of a recipe's model; None if it is not available."""
    try:
        return _config(recipe)
    except SlimError:
        return None


def predicted_run(
    recipe: Recipe, budget: int | None = None, config: ModelConfig | None = None
) -> Prediction | None:
    """Return the prediction of a run on this machine; None if the model's shapes are unknown.

    Args:
        recipe: The run.
        budget: Memory that it may use; None is the device's.
        config: Of the model that it starts from; None looks for the recipe's.

    Raises:
        SlimError: If the model cannot be built.
    """
    config = _config_or_none(recipe) if config is None else config
    if config is None:
        return None
    speed = _speed(recipe.train.dtype)
    return predict_run(config, recipe, _config, speed=speed, budget=budget, suggest=False)


def plan(layout: MatrixPlan, budget: int | None = None) -> list[Line]:
    """Return a line for every cell of the matrix, those that cannot run among them.

    Args:
        layout: The matrix.
        budget: Bytes that a cell may use; None is what the matrix says, on this machine.
    """
    budget = memory_budget(layout.matrix.budget) if budget is None else budget
    configs: dict[str, ModelConfig] = {}  # of the cells that leave other shapes
    lines: dict[str, Line] = {}
    for cell in layout.cells:  # a parent stands before its children
        line = _line(layout.matrix, cell, budget, configs)
        if cell.parent is not None and lines[cell.parent].why_not:
            line = Line(cell.name, cell.kind, None, None, None, f"{cell.parent} is omitted")
        if line.peak_bytes is not None:
            line = replace(line, memory=min(budget, line.peak_bytes + SCORING_BYTES))
        lines[cell.name] = line
    return list(lines.values())


def _line(matrix: MatrixSpec, cell: Cell, budget: int, configs: dict[str, ModelConfig]) -> Line:
    """Return the plan of a cell, and note its model's configuration in ``configs``."""
    recipe = cell.recipe.recipe
    config = source = configs.get(cell.parent or "")
    try:
        if cell.kind == "pruned":
            options = prune_options(matrix, cell.method)
            config = planned_config(_config(recipe) if config is None else config, options)
        if config is not None:
            configs[cell.name] = config
        tokens = sum(_tokens(entry.task, entry.limit) for entry in matrix.tasks)
        if cell.kind != "tuned":
            peak = _loaded(recipe, cell.kind, source)
            if peak is None:
                return Line(cell.name, cell.kind, None, None, None)
            scoring = _scoring(recipe, tokens, config)
            lengths = [_positions(entry.task, entry.limit) for entry in matrix.tasks]
            dtype = resolve_dtype(recipe.train.dtype)
            shapes = _config(recipe) if config is None else config
            peak += planned_footprint(shapes, dtype.size).least(max(lengths, default=1))
            return Line(cell.name, cell.kind, peak, None, scoring, _over(peak, budget))
        prediction = predicted_run(recipe, budget, config)
    except SlimError as error:
        return Line(cell.name, cell.kind, None, None, None, error.message)
    if prediction is None:  # whether there is such a model turns out when it runs
        return Line(cell.name, cell.kind, None, None, None)
    train = prediction.predicted_seconds
    if train is not None and len(cell.rates) > 1 and cell.seed == matrix.seeds[0]:
        steps = prediction.tokens or 0
        if matrix.sweep.steps is not None:
            one = recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"steps": matrix.sweep.steps})}
            )
            short = predicted_run(one, budget, config)
            steps = (short.tokens if short else None) or steps
        train += train * len(cell.rates) * steps / max(1, prediction.tokens or 1)
    peak = prediction.predicted_peak_bytes
    scoring = _scoring(recipe, tokens, config)
    return Line(cell.name, cell.kind, peak, train, scoring, _over(peak, budget))


def _loaded(recipe: Recipe, kind: Kind, config: ModelConfig | None) -> int | None:
    """Return the bytes of the weights that a cell which trains nothing loads; None if not known.

    Args:
        recipe: What it is quantized with, and the dtype.
        kind: Of the cell.
        config: Of the model that it is made from; None looks for the recipe's.

    Raises:
        SlimError: If the model cannot be built.
    """
    config = _config_or_none(recipe) if config is None else config
    if config is None:
        return None
    rounds = recipe.quantize.model_copy(update={"qat": False})
    method = "qlora" if kind == "quantized" else "lora"
    plain = recipe.model_copy(update={"method": method, "quantize": rounds})
    return training_shapes(config, plain, resolve_dtype(recipe.train.dtype)).base_bytes


def _over(peak: int, budget: int) -> str:
    if peak <= budget:
        return ""
    return f"needs {human_bytes(peak)}, the budget is {human_bytes(budget)}"


def _scoring(recipe: Recipe, tokens: int, config: ModelConfig | None) -> float:
    """Return the seconds that reading so many tokens takes: a fraction of a LoRA step each."""
    plain = recipe.model_copy(update={"method": "lora"})
    speed = _speed(recipe.train.dtype)
    work = TrainingWork(tokens, tokens, recipe.train.max_length, "")
    try:
        prediction = predict(
            config or _config(recipe), plain, speed=speed, work=work, suggest=False
        )
    except SlimError:
        return 0.0
    return LOADING + FORWARD * (prediction.predicted_seconds or 0.0)


@lru_cache(maxsize=64)
def _positions(name: str, limit: int | None) -> int:
    """Return about how many positions the longest question of a task has, its answer included."""
    task = find_task(name)
    if count_rows(task) is None:
        return _UNKNOWN_ROWS[1]
    read = max(len(q.context) + sum(map(len, q.readable)) for q in plain_questions(task, limit))
    generated = task.spec.max_tokens if task.kind == "generation" else 0
    return int(read / CHARACTERS_PER_TOKEN) + generated


@lru_cache(maxsize=64)
def _tokens(name: str, limit: int | None) -> int:
    """Return about how many tokens scoring a task reads, shared prefixes counted once."""
    task = find_task(name)
    if count_rows(task) is None:  # on the hub, perhaps: a plan downloads nothing
        count, length = _UNKNOWN_ROWS
        return (limit or count) * length
    questions = plain_questions(task, limit)
    read = sum(len(q.context) + sum(map(len, q.readable)) for q in questions)
    generated = (
        GENERATED_TOKENS * GENERATION_COST * len(questions) if task.kind == "generation" else 0
    )
    return int(read / CHARACTERS_PER_TOKEN + generated)
