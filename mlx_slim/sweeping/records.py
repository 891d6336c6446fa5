"""Records of a sweep: what a trial is to do, how it ended, and the report of all.

Invariant: each is a frozen class that reads and writes its JSON by one definition; ``sweep.json``
is the last file of a finished sweep. Try it: ``mlx-slim report DIR`` on the folder of a sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from mlx_slim.reading import JsonObject, library_errors, read_object, short
from mlx_slim.sweeping.folder import REPORT_FILE, STATE_FILE
from mlx_slim.sweeping.options import PrunerName

Curve = list[tuple[int, float]]  # optimizer step, validation loss in nats per token
# ``failed``: its input cannot be used, and no trial before it says that another one would work;
# ``killed``: it is to be started again.
State = Literal["complete", "pruned", "diverged", "infeasible", "failed", "running", "killed"]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended: ``outcome.json`` in its folder.

    Attributes:
        state: ``pruned`` by the pruner; ``diverged`` where a loss was not finite; ``infeasible``
            where its values cannot be used or do not fit the memory.
        loss: Its best validation loss, nats per token; None unless ``complete`` or ``pruned``.
        predicted_peak_bytes: As predicted; None unless ``complete``.
        peak_memory_bytes: As measured; likewise.
        steps: Optimizer steps taken.
        seconds: Of these steps.
        validated_tokens: Supervised tokens of the validation rows; None without a validation.
        curve: Its validations in order.
        why: One line, unless ``complete``.
        hint: What to do about it; of ``failed``.
    """

    state: State
    loss: float | None = None
    predicted_peak_bytes: int | None = None
    peak_memory_bytes: int | None = None
    steps: int = 0
    seconds: float = 0.0
    validated_tokens: int | None = None
    curve: Curve = field(default_factory=list)
    why: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        """Refuse a complete trial without a loss."""
        if self.state == "complete" and not (self.loss is not None and math.isfinite(self.loss)):
            raise ValueError(f"a complete trial with the loss {self.loss}")


@dataclass(frozen=True)
class PastTrial:
    """What proposals and the pruner need to know of a trial.

    Attributes:
        state: ``running`` for one that has not ended.
        values: Of the objectives; empty unless ``complete``.
        curve: As in ``TrialOutcome``; empty for one that is neither ``complete`` nor ``pruned``.
        params: Optuna's parameters.
    """

    state: State
    values: list[float] = field(default_factory=list)
    curve: Curve = field(default_factory=list)
    params: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRequest:
    """What a trial is to do besides its recipe: ``trial.json`` in its folder.

    Attributes:
        pruner: ``median``, ``hyperband`` or ``none``.
        least_steps: Steps between two validations: the least that Hyperband gives.
        past: The trials before, by number; what they lack is not known yet.
    """

    pruner: PrunerName
    least_steps: int
    past: list[PastTrial]


@dataclass(frozen=True)
class TrialRow:
    """A trial in the report.

    Attributes:
        number: From 0.
        values: Dotted key -> JSON value.
        outcome: How it ended.
        attempts: How often it was started; above 1 after kills.
    """

    number: int
    values: JsonObject
    outcome: TrialOutcome
    attempts: int = 1


@dataclass(frozen=True)
class SeedRow:
    """The best trial on another seed."""

    seed: int
    outcome: TrialOutcome


@dataclass(frozen=True)
class SweepReport:
    """``sweep.json``.

    Attributes:
        schema_version: Of the file.
        recipe: Name of the recipe.
        space: The parameters, as ``SweepSpace.as_json``.
        objectives: What is minimised.
        pruner: Which one; ``none`` with several objectives.
        seed: Of the proposals.
        train_seed: Of every trial.
        workers: Trials at the same time, at most.
        rows: Every trial that has ended, by number.
        best: Number of the trial with the lowest validation loss; None if none is complete.
        front: Numbers of the trials that no other beats in all objectives, by loss.
        baseline: Number of the trial with the recipe's own values; None if there is none.
        seeds: The best trial on other seeds.
        importances: Key -> fraction of what explains the loss (PED-ANOVA, arXiv 2304.10255); empty
            where too few trials are complete.
        headline: The result in one line.
        notes: A line each.
        provenance: Versions and machine.
    """

    schema_version: int
    recipe: str
    space: list[JsonObject]
    objectives: list[str]
    pruner: str
    seed: int
    train_seed: int
    workers: int
    rows: list[TrialRow]
    best: int | None
    front: list[int]
    baseline: int | None
    seeds: list[SeedRow]
    importances: dict[str, float]
    headline: str
    notes: list[str]
    provenance: JsonObject


@lru_cache(maxsize=8)
def _adapter(kind: type[_Record]) -> TypeAdapter[_Record]:
    return TypeAdapter(kind)


def to_json(record: object) -> Any:
    """Return the JSON value of a record."""
    return _adapter(type(record)).dump_python(record, mode="json")


def from_json(
    values: Any,
    kind: type[_Record],
    what: str,
    hint: str = "remove it and resume with --resume",
) -> _Record:
    """Return the record that ``to_json`` gave ``values`` for.

    Args:
        values: JSON.
        kind: Of the record.
        what: Names it in the error.
        hint: What to do about it.

    Raises:
        SlimError: If it is none.
    """
    with library_errors(f"{what} is damaged", hint):
        return _adapter(kind).validate_python(values)


def read_json_record(file: Path, kind: type[_Record]) -> _Record:
    """Return the record in a file.

    Raises:
        SlimError: If it is missing or damaged.
    """
    again = ("start a new sweep",) if file.name == STATE_FILE else ()
    return from_json(read_object(file), kind, short(file), *again)


def read_report(folder: Path) -> SweepReport:
    """Return the report of a finished sweep.

    Raises:
        SlimError: If it is damaged.
    """
    return read_json_record(folder / REPORT_FILE, SweepReport)
