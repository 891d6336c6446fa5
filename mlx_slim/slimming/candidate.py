"""One smaller model: its bits, what is cut out of it, and what it costs.

Invariant: plain values, written to ``slim.json`` and read again without importing what counts,
prunes or quantizes. Which ones there are is in ``candidates.py``. Try it: ``mlx-slim report DIR``
on the folder of a search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_slim.pruning.options import PruneOptions
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_slim.config.schema import QuantizeConfig

GROUP = 64


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: Numbers of the dense model.
        weight_bytes: Of all tensors, scales and biases included.
        disk_bytes: Of the folder: tensors, their headers, tokenizer and config.
        cache_bytes: Of keys and values at the context of the budget.
        working_bytes: Activations of a piece of the prompt, and the logits of a token.
    """

    parameters: int
    weight_bytes: int
    disk_bytes: int
    cache_bytes: int
    working_bytes: int

    @property
    def memory_bytes(self) -> int:
        """While answering."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes


@dataclass(frozen=True)
class Cut:
    """One pruning.

    Attributes:
        axis: ``depth``; ``width``, heads and neurons; ``hidden``, the residual stream too; or
            ``experts`` of a mixture.
        layers: Layers to remove (depth).
        target: Most parameters that remain (else).
    """

    axis: str
    layers: int = 0
    target: int = 0

    def options(self, total: int, calibration: str | None, revision: str | None) -> PruneOptions:
        """Return the options of ``mlx-slim prune`` that make it.

        Args:
            total: Layers of the model that is cut.
            calibration: Text to measure importance on.
            revision: Of the source.
        """
        if self.axis == "depth":
            options = PruneOptions(axis="depth", ratio=self.layers / total)
        elif self.axis == "experts":
            options = PruneOptions(method="reap", target_params=self.target)
        else:
            options = PruneOptions(
                axis="width", target_params=self.target, hidden=self.axis == "hidden"
            )
        return replace(options, calibration=calibration, revision=revision)


@dataclass(frozen=True)
class Candidate:
    """A smaller model.

    Attributes:
        bits: Of a weight; None stays as stored.
        cuts: Prunings, one after the other, before it is quantized.
        layers: Layers that remain.
        kv_heads: Key-value heads of a layer that remain; 0 where the config has none.
        neurons: Neurons of a layer that remain; 0 likewise.
        channels: Of the residual stream that remain.
        experts: Of a layer that remain; 0 without a mixture.
        cost: Counted.
        bits_per_weight: Of a model whose layers differ in bits, all parameters counted; None
            gives each layer ``bits``.
    """

    bits: int | None
    cuts: tuple[Cut, ...]
    layers: int
    kv_heads: int
    neurons: int
    channels: int
    experts: int
    cost: Cost
    bits_per_weight: float | None = None

    @property
    def key(self) -> str:
        """A name for folders: equal for equal models."""
        if self.bits_per_weight is not None:
            return f"mixed-{self.bits_per_weight:.2f}bit"
        words = ["dense" if self.bits is None else f"{self.bits}bit"]
        if self.cuts:
            words += [f"{self.layers}l", f"{self.kv_heads}h", f"{self.neurons}n"]
            words += [f"{self.channels}d"] + ([f"{self.experts}e"] if self.experts else [])
        return "-".join(words)

    @property
    def kind(self) -> str:
        """What was done: ``bits``, ``mixed`` bits, or the axes that were cut, such as ``depth``."""
        whole = "bits" if self.bits_per_weight is None else "mixed"
        return "+".join(cut.axis for cut in self.cuts) or whole

    def name(self, original: Candidate) -> str:
        """Return what differs from the original, in words."""
        words = ["as stored" if self.bits is None else f"{self.bits} bits"]
        if self.bits_per_weight is not None:
            words = [f"{self.bits_per_weight:.2f} bits a weight, by layer"]
        for label, mine, its in (
            ("layers", self.layers, original.layers),
            ("kv heads", self.kv_heads, original.kv_heads),
            ("neurons", self.neurons, original.neurons),
            ("channels", self.channels, original.channels),
            ("experts", self.experts, original.experts),
        ):
            if mine != its:
                words.append(f"{mine:,} of {its:,} {label}")
        return ", ".join(words)

    @property
    def quantize(self) -> QuantizeConfig | None:
        """The format of its weights."""
        return None if self.bits is None else format_of(self.bits)

    @classmethod
    def from_json(cls, values: JsonObject) -> Candidate:
        """Return the candidate that ``asdict`` candidate ``values`` of."""
        cuts = tuple(Cut(**cut) for cut in values["cuts"])
        return cls(**{**values, "cuts": cuts, "cost": Cost(**values["cost"])})


def format_of(bits: int) -> QuantizeConfig:
    """Return the format that a number of bits means here."""
    from mlx_slim.config.schema import QuantizeConfig  # pydantic's: no page of a search needs it

    return QuantizeConfig.model_validate({"bits": bits, "group_size": GROUP})
