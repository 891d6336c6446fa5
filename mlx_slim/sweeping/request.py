"""What a sweep was started with: how it is resumed, and what its folder says of it.

Invariant: a resume needs the recipe, the space, the rows and the way of proposing that the sweep
was started with; more trials, more seeds and other numbers of workers are free. Used by
``sweeping/run.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import SCHEMA_VERSION
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.finetuning.run_dir import FREE_ON_RESUME, command_words
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.planner.work import expected_work
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.run_dir import RunDir, RunKind, changed_values, option_words
from mlx_slim.sweeping.folder import STATE_FILE, STUDY_FILE, TRIALS
from mlx_slim.sweeping.options import PrunerName, SweepOptions
from mlx_slim.sweeping.records import read_json_record
from mlx_slim.sweeping.space import Parameter, Point, SweepSpace
from mlx_slim.sweeping.study import StudyPlan

SWEEP = RunKind("sweep", "sweep", STATE_FILE, (f"{STUDY_FILE}*", TRIALS))


@dataclass(frozen=True)
class SweepRequest:
    """``request.json``: what a resume must match.

    Attributes:
        schema_version: Of the file.
        name: Of the recipe.
        recipe: Its values that were set.
        space: The parameters.
        origin: The file that they are from.
        objective: What is minimised.
        pruner: As given.
        seed: Of the proposals.
        contents: Of the rows and other files that the recipe names.
    """

    schema_version: int
    name: str
    recipe: JsonObject
    space: tuple[Parameter, ...]
    origin: str
    objective: list[str]
    pruner: PrunerName
    seed: int
    contents: JsonObject

    @property
    def sweep_space(self) -> SweepSpace:
        """The space."""
        return SweepSpace(self.space, from_values(self.recipe, self.name, self.name), self.origin)

    def plan(self, options: SweepOptions | None = None) -> StudyPlan:
        """Return what decides the proposals; ``options`` says how many workers there are."""
        if options is None:
            options = SweepOptions(
                objective=tuple(self.objective), pruner=self.pruner, seed=self.seed
            )
        return plan_of(self.sweep_space, options)

    def fixed(self) -> JsonObject:
        """Return dotted name -> value of what a resume must match."""
        values = self.sweep_space.base.recipe.model_dump(mode="json")
        for key in FREE_ON_RESUME:
            section, _, name = key.partition(".")
            if name:
                values[section].pop(name)
            else:
                values.pop(section)
        flat = dict(_flat(values, ""))
        flat |= {f"space {one.key}": one.text() for one in self.space}
        for name in ("objective", "pruner", "seed"):
            flat[f"--{name}"] = getattr(self, name)
        return {**flat, "contents of the rows": self.contents}


def plan_of(space: SweepSpace, options: SweepOptions) -> StudyPlan:
    """Return what decides the proposals: the recipe's own values are tried first."""
    baseline: Point | None = space.baseline_point()
    every = space.base.recipe.train.validate_every
    return StudyPlan(space.parameters, options, () if baseline is None else (baseline,), every)


def request_of(space: SweepSpace, options: SweepOptions) -> SweepRequest:
    """Return the request; the rows are read."""
    from mlx_slim.finetuning.contents import contents  # mlx-lm's: no page needs it

    base = space.base
    return SweepRequest(
        schema_version=SCHEMA_VERSION,
        name=base.name,
        recipe=base.recipe.model_dump(mode="json", exclude_unset=True),
        space=space.parameters,
        origin=space.origin,
        objective=list(options.objective),
        pruner=options.pruner,
        seed=options.seed,
        contents=contents(base.recipe),
    )


def check_same(out: Path, request: SweepRequest) -> None:
    """Check that the sweep in ``out`` was started so.

    Raises:
        SlimError: With what differs.
    """
    file = out / STATE_FILE
    if read_object(file).get("schema_version") != SCHEMA_VERSION:
        raise SlimError(f"{out} was made by another version", "start a new sweep")
    old, new = read_json_record(file, SweepRequest).fixed(), request.fixed()
    if changed := changed_values(old, new):
        shown = [line for line in changed if not line.startswith("contents")]
        shown += ["the rows have changed"] * (len(shown) < len(changed))
        raise SlimError(
            f"{out} was started with other values: {'; '.join(shown)}",
            "resume with the same values, or start a new sweep",
        )


def check_recipe(recipe: Recipe) -> None:
    """Check that trials of a recipe can be compared, and that its model and rows are there.

    Raises:
        SlimError: No validation rows, rows of a test, or what training would refuse.
    """
    if recipe.data.validation == 0:
        raise SlimError(
            "data.validation is 0, and a sweep compares validation losses",
            "set a share or a number of rows, such as data.validation=0.1, or a file",
        )
    check_unscored(recipe)
    model_config(recipe)
    expected_work(recipe)


def check_unscored(recipe: Recipe) -> None:
    """Check that no rows are of a split that a task is scored on.

    Raises:
        SlimError: If some are.
    """
    from mlx_slim.evaluation.tasks.training_rows import is_scored

    for source in recipe.data.sources:
        if source.task is not None and is_scored(find_task(source.task), source.split):
            raise SlimError(
                f"{source.path}: split {source.split!r} is what the task is scored on, and a sweep "
                "would choose by it",
                "name the task's training split, or a file of other rows",
            )


def sweep_command(base: Resolved, space: str, options: SweepOptions) -> list[str]:
    """Return the command that started a sweep, without its folder."""
    words = ["sweep", *command_words(base)[1:], "--space", space]
    return [*words, *option_words(options)]


def folder_of(out: Path) -> RunDir:
    """Return the folder of a sweep."""
    return RunDir(out, SWEEP)


def _flat(value: Any, path: str) -> Sequence[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [one for key, inner in value.items() for one in _flat(inner, f"{path}.{key}")]
    return [(path.removeprefix("."), value)]
