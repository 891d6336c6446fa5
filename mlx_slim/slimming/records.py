"""Records of a search: every candidate, why it fell, and the claim about the winner.

Invariant: ``as_json`` is ``slim.json``; every figure is one of a file beside it or follows from
such files (``verify.py``). Try it: ``mlx-slim report DIR`` on the folder of a finished search.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_slim.reading import JsonObject, library_errors, read_object
from mlx_slim.slimming.candidate import Candidate
from mlx_slim.slimming.folder import REPORT_FILE
from mlx_slim.slimming.proof import Retention


@dataclass(frozen=True)
class MeasuredSpeed:
    """Tokens per second, and as a multiple of the original's in the same minutes."""

    prefill: float
    generation: float
    prefill_ratio: float
    generation_ratio: float


@dataclass(frozen=True)
class CandidateRow:
    """A candidate and what was measured of it.

    Attributes:
        candidate: What it is, and its counted cost.
        name: In words.
        kl: KL(original ‖ candidate) before recovery, nats a token; None if it was not measured.
        top1: Retention of positions with the same likeliest token, likewise.
        recovered: Method of the recovery (``full``, ``lora``, ``blocks``), empty without.
        selection: Retention kept on the selection questions; None if it was not scored.
        speed: None if not measured.
        disk_bytes: Of its folder; None if it was not made.
        verdict: Why it was chosen, or fell.
    """

    candidate: Candidate
    name: str
    kl: float | None = None
    top1: float | None = None
    recovered: str = ""
    selection: Retention | None = None
    speed: MeasuredSpeed | None = None
    disk_bytes: int | None = None
    verdict: str = ""

    @classmethod
    def from_json(cls, values: JsonObject) -> CandidateRow:
        """Return the row that ``asdict`` made ``values`` of."""
        selection, speed = values["selection"], values["speed"]
        return cls(
            **{
                **values,
                "candidate": Candidate.from_json(values["candidate"]),
                "selection": None if selection is None else retention_from_json(selection),
                "speed": None if speed is None else MeasuredSpeed(**speed),
            }
        )


@dataclass(frozen=True)
class TaskClaim:
    """A task's part of the claim.

    Attributes:
        task: Its name.
        metric: What is counted.
        n: Claim questions.
        first: Accuracy of the original.
        second: Of the winner.
        delta: ``second - first``, paired.
        interval: 95%, of ``delta``.
        chance: Expected accuracy of guessing.
    """

    task: str
    metric: str
    n: int
    first: float
    second: float
    delta: float
    interval: tuple[float, float]
    chance: float


@dataclass(frozen=True)
class SlimReport:
    """``slim.json``.

    Attributes:
        schema_version: Of the file.
        source: The original, without its place.
        revision: Of a hub model.
        options: What was demanded.
        original: Its cost.
        questions: Task -> (selection, claim) questions.
        provable: Largest share that the claim questions can show.
        rows: Every candidate.
        winner: Its key; None if none was chosen.
        claim: Retention of the score that the winner keeps on questions that chose nothing.
        tasks: The claim by task.
        demand_met: Whether ``keep`` is shown; None if it was not demanded.
        headline: The result in one line.
        forgotten: Bits per byte of a text of another kind, original and winner; None if not
            measured.
        forgotten_text: Its name.
        commands: What makes the winner again.
        notes: A line each.
        provenance: Versions and machine.
    """

    schema_version: int
    source: str
    revision: str | None
    options: JsonObject
    original: Candidate
    questions: dict[str, tuple[int, int]]
    provable: float
    rows: list[CandidateRow]
    winner: str | None
    claim: Retention | None
    tasks: list[TaskClaim]
    demand_met: bool | None
    headline: str
    forgotten: tuple[float, float] | None
    forgotten_text: str
    commands: list[list[str]]
    notes: list[str] = field(default_factory=list)
    provenance: JsonObject = field(default_factory=dict)

    def as_json(self) -> JsonObject:
        """Return the file's content."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonObject) -> SlimReport:
        """Return the report that ``as_json`` gave."""
        forgotten: Any = values["forgotten"]
        claim = values["claim"]
        return cls(
            **{
                **values,
                "original": Candidate.from_json(values["original"]),
                "questions": {name: tuple(sizes) for name, sizes in values["questions"].items()},
                "rows": [CandidateRow.from_json(row) for row in values["rows"]],
                "claim": None if claim is None else retention_from_json(claim),
                "tasks": [
                    TaskClaim(**{**task, "interval": tuple(task["interval"])})
                    for task in values["tasks"]
                ],
                "forgotten": None if forgotten is None else tuple(forgotten),
            }
        )


def retention_from_json(values: JsonObject) -> Retention:
    """Return the share that ``asdict`` made ``values`` of."""
    interval = values["interval"]
    return Retention(**{**values, "interval": None if interval is None else tuple(interval)})


def read_report(folder: Path) -> SlimReport:
    """Return the report of a finished search.

    Raises:
        SlimError: If it is damaged.
    """
    values = read_object(folder / REPORT_FILE)
    with library_errors(f"{folder / REPORT_FILE} is damaged", "search again"):
        return SlimReport.from_json(values)
