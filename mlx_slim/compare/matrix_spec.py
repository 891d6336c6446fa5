"""What a matrix file may hold: its sections, frozen, each key with its range.

Invariant: only shapes and ranges are checked here; what concerns the whole matrix is in
``compare/matrix.py``. Try it: ``mlx-slim compare matrix-tiny --dry-run``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mlx_slim.compare.records import Kind
from mlx_slim.config.section import Section
from mlx_slim.config.values import MOST_SHOTS, Bytes, PositiveInt, Rate, Seed
from mlx_slim.reading import JsonObject


class ModelEntry(Section):
    """A model of the matrix.

    Attributes:
        source: Hub id, folder, ``.gguf`` file, or the package that carries SmolLM2.
        revision: Commit or tag of a hub model.
        recipe: Recipe keys for this model alone, such as ``train.batch_tokens``.
        methods: Which methods; None is all of them.
    """

    source: str
    revision: str | None = None
    recipe: JsonObject = Field(default_factory=dict)
    methods: list[str] | None = None


class MethodEntry(Section):
    """A method: a way to make a cell out of a model.

    Attributes:
        kind: ``base`` (as it is), ``quantized`` (rounded, untrained), ``pruned`` (smaller,
            untrained), ``tuned`` (a recipe; with ``distill`` its teachers are the model itself
            unless named), or ``fused`` (the adapters of ``of`` merged, the model dequantized).
        extends: Shipped recipe or part that a tuned method starts from.
        recipe: Recipe keys for this method alone.
        learning_rates: Tried on validation loss, when there are several; the best one is used.
        prune: Of a pruned method: the options of ``mlx-slim prune``.
        of: The method above this one whose adapters a fused one merges, and whose model the other
            kinds start from; None is the model itself.
    """

    kind: Kind = "tuned"
    extends: str | None = None
    recipe: JsonObject = Field(default_factory=dict)
    learning_rates: list[Rate] = Field(default_factory=list)
    prune: JsonObject = Field(default_factory=dict)
    of: str | None = None


class TaskEntry(Section):
    """A task that every cell is scored on.

    Attributes:
        task: Name, or path of a task file.
        limit: First questions of it (of each subject); None takes all.
        num_fewshot: Solved examples before a question; None takes the task's own number.
    """

    task: str
    limit: PositiveInt | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=MOST_SHOTS)] | None = None


class SweepEntry(Section):
    """The learning-rate sweep, on validation loss.

    Attributes:
        steps: Optimizer steps of each candidate; None is a whole run.
        seed: Of all candidates.
    """

    steps: PositiveInt | None = None
    seed: Seed = 0


class ForgettingEntry(Section):
    """Text to measure forgetting on, in bits per byte.

    Attributes:
        path: Text file, or JSON lines with ``text``.
        task: A task instead: its questions with their answers.
        rows: First documents of it; None takes all.
    """

    path: str | None = None
    task: str | None = None
    rows: PositiveInt | None = None


class OmitEntry(Section):
    """A cell that is left out on purpose, and why.

    Attributes:
        model: Key of ``models``.
        method: Key of ``methods``.
        why: The reason, shown in the report.
    """

    model: str
    method: str
    why: str


class MatrixSpec(Section):
    """A whole comparison.

    Attributes:
        title: Of the report.
        note: A sentence or two under the title: what the reader should know of the setting.
        recipe: Recipe keys that all cells share; ``recipe.data`` stands here only.
        models: Name -> model.
        methods: Name -> method, in the order of the tables.
        tasks: What every cell is scored on.
        seeds: Each tuned cell is trained once with each.
        sweep: How learning rates are chosen.
        forgetting: Text for forgetting; None leaves it out.
        omit: Cells left out on purpose.
        intruders: Count intruder dimensions of tuned cells.
        budget: Memory a cell may use; one that is predicted to need more is omitted.
    """

    title: str
    note: str = ""
    recipe: JsonObject = Field(default_factory=dict)
    models: Annotated[dict[str, ModelEntry], Field(min_length=1)]
    methods: Annotated[dict[str, MethodEntry], Field(min_length=1)]
    tasks: Annotated[list[TaskEntry], Field(min_length=1)]
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    sweep: SweepEntry = SweepEntry()
    forgetting: ForgettingEntry | None = None
    omit: list[OmitEntry] = Field(default_factory=list)
    intruders: bool = True
    budget: str | Bytes = "auto"
