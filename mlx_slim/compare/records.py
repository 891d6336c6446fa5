"""The JSON records of a matrix folder, as frozen classes: written and read by the same definition.

Invariant: a record that lacks a field or holds another type is refused with one line that names the
file and the field; fields that version 0.1 did not write have a default; an alias is the key on
disk. Files:
``matrix.json`` (MatrixRecord), ``cells/<name>/cell.json`` (CellRecord),
``sweeps/<model>-<method>/sweep.json`` (SweepRecord). Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from mlx_slim.artifacts import SCHEMA_VERSION
from mlx_slim.errors import SlimError
from mlx_slim.models.fidelity import Fidelity
from mlx_slim.reading import JsonObject, read_object, short

FORGETTING = "held_out"  # the text's name in files and folders of a matrix
Kind = Literal["base", "quantized", "pruned", "tuned", "fused"]
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class DiskUse:
    """Bytes of the weights of a cell's model, and of its adapter (0 without one)."""

    model: int
    adapter: int


@dataclass(frozen=True)
class TrainingCost:
    """What a training run cost.

    Attributes:
        method: ``full``, ``lora``, ``qlora`` or ``dora``.
        bits: Of the quantized base; None without one.
        trainable: Parameters that were trained.
        total: Parameters of the model.
        tokens: Real tokens, padding not counted.
        seconds: Wall time of the steps.
        tokens_per_second: Of both.
        peak_memory_bytes: MLX peak.
        predicted_peak_bytes: As predicted before the start; None where it was not.
        steps: Optimizer steps.
        best_validation: Lowest validation loss, nats a token; None without validation rows.
        predicted_seconds: As predicted after the run; None where it could not be.
    """

    method: str
    bits: int | None
    trainable: int
    total: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    steps: int
    best_validation: float | None
    predicted_seconds: float | None = None


@dataclass(frozen=True)
class FuseFidelity:
    """Fidelity of a fused model to base and adapter: fields of ``fuse_audit.Effect``."""

    kl: float
    top1: float
    tokens: int
    retained: Annotated[float, Field(alias="kept")]


@dataclass(frozen=True)
class PrunedDistance(Fidelity):
    """Distance of a pruned model from its source, with the perplexity of each."""

    perplexity_before: float
    perplexity_after: float


@dataclass(frozen=True)
class PruneSummary:
    """What pruning removed: parameters before and after, and the fidelity of the result."""

    axis: str
    method: str
    parameters_before: int
    parameters_after: int
    fidelity: PrunedDistance | None


@dataclass(frozen=True)
class Measured:
    """The measured part of a cell's record.

    Attributes:
        train: None where nothing was trained.
        learning_rate: The one that was used; None likewise.
        bits_per_byte: Of the forgetting text; None without one.
        eval_seconds: Wall time of all evaluations; None if there is none.
        eval_peak_memory_bytes: The most of any evaluation; None likewise.
        fidelity: Of a fused cell.
        pruned: Of a pruned cell.
    """

    train: TrainingCost | None = None
    learning_rate: float | None = None
    bits_per_byte: float | None = None
    eval_seconds: float | None = None
    eval_peak_memory_bytes: int | None = None
    fidelity: FuseFidelity | None = None
    pruned: PruneSummary | None = None


@dataclass(frozen=True)
class IntruderCounts:
    """Intruder dimensions of a tuned cell (arXiv 2410.21228), over all matrices."""

    count: int
    directions: int
    matrices: int
    matrices_with: int
    energy: float
    relative_norm: float
    effective_rank: float
    k: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class CellRecord(Measured):
    """``cell.json``: one complete cell; written last.

    Attributes:
        schema_version: Of the format.
        name: The cell's folder.
        model: Key of ``MatrixSpec.models``.
        method: Key of ``MatrixSpec.methods``.
        kind: Of the method.
        seed: Of training; None where nothing is trained.
        parent: The cell that it starts from, or None.
        keys: What the model is made of, and each evaluation, as hashes of their inputs.
        recipe: The resolved recipe, without folders of the machine.
        dtype: In which it was scored.
        tasks: Those scored.
        disk: Bytes of weights.
        intruders: Of a tuned cell; None where they are not counted.
        weights_sha256: Of the model of the matrix.
        code: Version and hash of the source.
        provenance: Machine and versions; None in a folder without them.
    """

    schema_version: int
    name: str
    model: str
    method: str
    kind: Kind
    seed: int | None
    parent: str | None = None
    keys: dict[str, str]
    recipe: JsonObject
    dtype: str
    tasks: list[str]
    disk: DiskUse
    intruders: IntruderCounts | None = None
    weights_sha256: str
    code: str | None = None
    provenance: JsonObject | None = None


@dataclass(frozen=True)
class ModelRecord:
    """A model of a matrix; ``hub_id`` is the hub id of one that the package brings."""

    source: str
    revision: str | None = None
    hub_id: Annotated[str | None, Field(alias="known_as")] = None


@dataclass(frozen=True)
class OmittedCell:
    """A combination that is left out, and why."""

    model: str
    method: str
    why: str


@dataclass(frozen=True)
class ForgettingText:
    """The text for forgetting, in words and bytes of UTF-8."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MatrixRecord:
    """``matrix.json``: what a matrix folder is for; written before its first cell.

    Attributes:
        schema_version: Of the format.
        name: Of the matrix file.
        title: Of the report.
        note: Under the title.
        matrix: The matrix as read; None in folders that do not hold it.
        models: Name -> model.
        methods: Names, in the order of the tables.
        tasks: Names under which results are stored.
        cells: Names, in the order to run.
        refused: (cell, why) of those that are wrong in the file.
        omitted: Those left out on purpose or for lack of memory.
        code: Version and hash of the source.
        provenance: Machine and versions.
        requests: What identifies each task's questions; None in a folder made by version 0.1.
        questions_sha256: Of each file of questions.
        forgetting: The text for forgetting, or None.
    """

    schema_version: int
    name: str
    title: str
    note: str = ""
    matrix: JsonObject | None = None
    models: dict[str, ModelRecord]
    methods: list[str]
    tasks: list[str]
    cells: list[str]
    refused: list[tuple[str, str]]
    omitted: list[OmittedCell]
    code: str | None = None
    provenance: JsonObject
    requests: Annotated[dict[str, JsonObject] | None, Field(alias="asked")] = None
    questions_sha256: dict[str, str] = field(default_factory=dict)
    forgetting: Annotated[ForgettingText | None, Field(alias=FORGETTING)] = None


@dataclass(frozen=True)
class TriedRate:
    """A learning rate of a sweep, and its best validation loss; None if it diverged."""

    learning_rate: float
    validation_loss: float | None


@dataclass(frozen=True)
class SweepRecord:
    """``sweep.json``: the learning rates tried for a model and a method, and the one chosen."""

    schema_version: int
    model: str
    method: str
    steps: int | str
    seed: int
    rates: list[TriedRate]
    chosen: float
    keys: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _adapter(kind: type[_Record]) -> TypeAdapter[_Record]:
    return TypeAdapter(kind)


def as_json(record: object) -> JsonObject:
    """Return the JSON object of a record, under the keys on disk."""
    return _adapter(type(record)).dump_python(record, by_alias=True)


def read_record(file: Path, kind: type[_Record]) -> _Record:
    """Return the record in a JSON file.

    Raises:
        SlimError: If it is missing, no JSON, of another version, or a field is missing or wrong.
    """
    values = read_object(file)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SlimError(
            f"{short(file)} was made by another version: schema_version {version!r}, expected "
            f"{SCHEMA_VERSION}",
            "report it with the version that made it, or run the matrix again",
        )
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SlimError(
            f"{short(file)} is damaged: {where}: {first['msg']}",
            "run the matrix again with --resume",
        ) from error
