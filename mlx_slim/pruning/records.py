"""Records of pruning and recovery: what ``prune.json`` and ``report.json`` hold.

Invariant: ``from_json`` of what ``as_json`` returns is the same record; the shape of both files is
read by ``mlx-slim compare`` and by users, so keys are only added. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2``, then look into ``DIR/prune.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from mlx_slim.models.fidelity import Fidelity
from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP
from mlx_slim.reading import JsonObject
from mlx_slim.units import human_bytes, human_duration

RECORD_FILE, REPORT_FILE = "prune.json", "report.json"
MODEL, RECOVER = "model", "recover"  # folders inside that of prune --recover
# Kind -> name in texts.
GROUPS = {HEADS: "kv heads", MLP: "neurons", HIDDEN: "channels", EXPERTS: "experts"}


@dataclass(frozen=True)
class CalibrationRows:
    """The text that a method measured.

    Attributes:
        source: File or data set, as it may be published.
        samples: Rows.
        length: Tokens of a row.
    """

    source: str | None
    samples: int
    length: int


@dataclass(frozen=True)
class PrunedFidelity:
    """The distance of the pruned model from its source, on text that no method measured.

    Attributes:
        distance: KL, top-1 agreement and losses.
        perplexity_before: Of the source.
        perplexity_after: Of the pruned model.
    """

    distance: Fidelity
    perplexity_before: float
    perplexity_after: float

    def as_json(self) -> JsonObject:
        """Return one flat object."""
        return {
            **asdict(self.distance),
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
        }

    @classmethod
    def from_json(cls, values: JsonObject) -> PrunedFidelity:
        """Return the record of such an object."""
        perplexities = ("perplexity_before", "perplexity_after")
        distance = {key: value for key, value in values.items() if key not in perplexities}
        return cls(Fidelity(**distance), *(values[key] for key in perplexities))


@dataclass(frozen=True)
class GroupChange:
    """Groups of one kind in one layer; channels of the residual stream in all of them.

    Attributes:
        before: Groups in the source.
        after: Groups that remain.
        importance_removed: Fraction of their summed importance in the removed groups.
        removed: Numbers of the removed groups, such as ``3,5-9``.
    """

    before: int
    after: int
    importance_removed: float
    removed: str

    def text(self, kind: str) -> str:
        """Return what changed, for groups of ``kind``."""
        return (
            f"{self.before:,} -> {self.after:,} {GROUPS[kind]} "
            f"({self.importance_removed:.1%} of importance)"
        )


@dataclass(frozen=True)
class LayerChange:
    """One layer of the source.

    Attributes:
        layer: Its number, from 0.
        groups: Kind -> change, of width pruning.
        removed: Whether the layer is removed, of depth pruning; None of width pruning.
        score: Its score, where the method gives one.
        step: Its number in the order of removal, where the method removes one by one.
        loss_after_step: Mean loss without it and the layers removed before it, nats.
    """

    layer: int
    groups: dict[str, GroupChange] = field(default_factory=dict)
    removed: bool | None = None
    score: float | None = None
    step: int | None = None
    loss_after_step: float | None = None

    def as_json(self) -> JsonObject:
        """Return the object of the ``layers`` list; what is None is absent."""
        values: JsonObject = {"layer": self.layer}
        for key in ("removed", "score", "step", "loss_after_step"):
            if (value := getattr(self, key)) is not None:
                values[key] = value
        return values | {kind: asdict(change) for kind, change in self.groups.items()}

    @classmethod
    def from_json(cls, values: JsonObject) -> LayerChange:
        """Return the record of such an object."""
        groups = {k: GroupChange(**v) for k, v in values.items() if isinstance(v, dict)}
        return cls(**{k: v for k, v in values.items() if k not in groups}, groups=groups)

    def line(self, meaning: str) -> str | None:
        """Return the layer as a line of text; None if there is nothing to report.

        Args:
            meaning: Of the score.
        """
        if self.removed is None:
            changes = [
                change.text(kind)
                for kind, change in self.groups.items()
                if change.before != change.after
            ]
            if not self.groups:
                return None
            return f"layer {self.layer:>3}  {', '.join(changes) or 'unchanged'}"
        if not self.removed and self.score is None:
            return None
        score = "" if self.score is None else f"  {meaning} {self.score:.4g}"
        return f"layer {self.layer:>3}  {'removed' if self.removed else 'unchanged':<9}{score}"


@dataclass(frozen=True)
class PruneRecord:
    """``prune.json``: what was removed, by what measure, and what it cost.

    Attributes:
        schema_version: Of the file.
        source: The source model, as it may be published.
        revision: Commit of a hub model.
        axis: ``depth`` or ``width``.
        method: Resolved; ``named`` for layers given by number.
        options: ``PruneOptions``.
        calibration: None if the method measures no text.
        score: The meaning of the layers' scores.
        layers: A record a layer of the source.
        parameters_before: Of the source.
        parameters_after: Of the pruned model.
        bytes_before: Weights of the source on disk.
        bytes_after: Weights of the pruned model on disk.
        stock_mlx_lm_reads_it: Whether mlx-lm loads it without mlx-slim.
        fidelity: None if there was no text to compare on.
        notes: For the user, a line each.
        provenance: Versions and machine.
        seconds: Wall time.
        peak_memory_bytes: MLX peak.
        hidden: Channels of the residual stream; None where it is unchanged.
    """

    schema_version: int
    source: str
    revision: str | None
    axis: str
    method: str
    options: JsonObject
    calibration: CalibrationRows | None
    score: str
    layers: list[LayerChange]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    stock_mlx_lm_reads_it: bool
    fidelity: PrunedFidelity | None
    notes: list[str]
    provenance: JsonObject
    seconds: float
    peak_memory_bytes: int
    hidden: GroupChange | None = None

    def as_json(self) -> JsonObject:
        """Return the object of ``prune.json``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **values,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "layers": [layer.as_json() for layer in self.layers],
            "fidelity": None if self.fidelity is None else self.fidelity.as_json(),
            "hidden": None if self.hidden is None else asdict(self.hidden),
        }

    @classmethod
    def from_json(cls, values: JsonObject) -> PruneRecord:
        """Return the record of the object of ``prune.json``."""
        calibration, fidelity = values["calibration"], values["fidelity"]
        hidden = values.get("hidden")  # no earlier version wrote it
        typed = {
            "calibration": None if calibration is None else CalibrationRows(**calibration),
            "layers": [LayerChange.from_json(layer) for layer in values["layers"]],
            "fidelity": None if fidelity is None else PrunedFidelity.from_json(fidelity),
            "hidden": None if hidden is None else GroupChange(**hidden),
        }
        return cls(**{**values, **typed})

    def lines(self) -> list[str]:
        """Return a summary, a fact a line."""
        lines = [line for layer in self.layers if (line := layer.line(self.score)) is not None]
        if self.hidden is not None:
            lines.insert(0, f"all layers {self.hidden.text(HIDDEN)}")
        before, after = self.parameters_before, self.parameters_after
        sizes = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        lines += [
            f"parameters {before:,} -> {after:,} ({1 - after / before:.1%} fewer)",
            f"size       {sizes}",
        ]
        if self.fidelity is not None:
            distance = self.fidelity.distance
            lines.append(
                f"validation perplexity {self.fidelity.perplexity_before:.2f} -> "
                f"{self.fidelity.perplexity_after:.2f}, KL {distance.kl:.4f} nats, same top-1 "
                f"token {distance.top1:.1%} ({distance.tokens:,} tokens)"
            )
        lines += [f"note       {note}" for note in self.notes]
        peak = human_bytes(self.peak_memory_bytes)
        return [*lines, f"time       {human_duration(self.seconds)}, peak memory {peak}"]


@dataclass(frozen=True)
class Recovery:
    """A score as a percentage of the original model's.

    Attributes:
        plain: 100 · score / score of the original (arXiv 2410.19185).
        chance_corrected: The same with the score of guessing subtracted from both; None where the
            original is not above it.
    """

    plain: float | None
    chance_corrected: float | None


@dataclass(frozen=True)
class TaskFigures:
    """Scores of one model on one task.

    Attributes:
        n: Questions.
        metrics: Name -> value.
        chance: Accuracy of guessing; 0 where answers are generated.
        recovery: Name of the metric -> percentage of the original model's score.
    """

    n: int
    metrics: dict[str, float]
    chance: float
    recovery: dict[str, Recovery] = field(default_factory=dict)


@dataclass(frozen=True)
class TextFigures:
    """One model on the validation text.

    Attributes:
        perplexity: Of the model.
        kl: Mean KL(original ‖ model), nats.
        top1: Fraction of positions with the same most likely token as the original.
    """

    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True)
class ModelRow:
    """One model of ``report.json``.

    Attributes:
        name: ``original``, ``pruned`` or ``recovered``.
        parameters: Without an adapter.
        bytes: On disk, with an adapter.
        adapter_parameters: 0 without an adapter.
        tasks: Name -> figures.
        text: None without validation text.
    """

    name: str
    parameters: int
    bytes: int
    adapter_parameters: int
    tasks: dict[str, TaskFigures]
    text: TextFigures | None = None

    def as_json(self) -> JsonObject:
        """Return the object of the ``rows`` list."""
        values = asdict(self)
        text = values.pop("text") or {}
        return {**values, **text}

    @classmethod
    def from_json(cls, values: JsonObject) -> ModelRow:
        """Return the record of such an object."""
        names = ("perplexity", "kl", "top1")
        text = TextFigures(*(values[name] for name in names)) if "kl" in values else None
        tasks = {}
        for task, figures in values["tasks"].items():
            recovery = {metric: Recovery(**part) for metric, part in figures["recovery"].items()}
            tasks[task] = TaskFigures(**{**figures, "recovery": recovery})
        others = {k: v for k, v in values.items() if k not in names}
        return cls(**{**others, "tasks": tasks}, text=text)


@dataclass(frozen=True)
class ValidationText:
    """The text that all models are compared on.

    Attributes:
        text: What it is.
        tokens: Of all rows.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class RecoveryReport:
    """``report.json``: the original, the pruned and the recovered model, compared.

    Attributes:
        schema_version: Of the file.
        source: The original model.
        prune: Axis, method, calibration and options of the pruning.
        recipe: Of the recovery; None without one.
        validation: The text that they are compared on.
        limit: First questions of a task; None for all.
        rows: A record a model.
        provenance: Versions and machine.
    """

    schema_version: int
    source: str
    prune: JsonObject
    recipe: JsonObject | None
    validation: ValidationText
    limit: int | None
    rows: list[ModelRow]
    provenance: JsonObject

    def as_json(self) -> JsonObject:
        """Return the object of ``report.json``."""
        return {
            "schema_version": self.schema_version,
            "source": self.source,
            "prune": self.prune,
            "recipe": self.recipe,
            "held_out": asdict(self.validation),
            "limit": self.limit,
            "rows": [row.as_json() for row in self.rows],
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, values: JsonObject) -> RecoveryReport:
        """Return the record of the object of ``report.json``."""
        others = {key: value for key, value in values.items() if key != "held_out"}
        rows = [ModelRow.from_json(row) for row in values["rows"]]
        return cls(**{**others, "rows": rows}, validation=ValidationText(**values["held_out"]))
