"""What quantization of a folder adapted, as a record and as lines for a person.

Invariant: keys of the record are only added. Try it: ``mlx-slim quantize MODEL -o DIR --json``.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_slim.artifacts import SCHEMA_VERSION
from mlx_slim.models import fidelity
from mlx_slim.quantization.apply import QuantizeReport
from mlx_slim.quantization.compensation import Compensated
from mlx_slim.reading import JsonObject
from mlx_slim.units import human_bytes, human_duration

ADAPTERS = "adapters"  # folder of the adapter that makes up for the error


@dataclass(frozen=True)
class Sized:
    """How a size was met.

    Attributes:
        limit_bytes: Of all parameters, by the size that was set.
        sensitivity: What chose the bits, ``measured`` or ``rules``.
        loss: Sum of the losses of single layers in the measured mix, nats a token; None where they
            are not measured.
        distances: KL divergence from the source of the mix that each chooses, nats a token, on
            calibration text that no loss was measured on; None where only one was made.
    """

    limit_bytes: int
    sensitivity: str
    loss: float | None
    distances: dict[str, float] | None = None

    def line(self, nbytes: int) -> str:
        """Return it for a person; ``nbytes`` is the size of all parameters."""
        used = f"{human_bytes(nbytes)} of {human_bytes(self.limit_bytes)}"
        tried = ", ".join(f"{name} {kl:.4f}" for name, kl in (self.distances or {}).items())
        why = f" (KL on calibration text: {tried})" if tried else ""
        return f"parameters {used}; bits of each layer: {self.sensitivity}{why}"


@dataclass(frozen=True)
class Compensation:
    """The adapter that makes up for the error.

    Attributes:
        rank: Of it.
        parameters: Numbers of it.
        nbytes: Of them, as they are stored.
        remaining: Mean fraction of the mean square error of the layers' outputs that is left, on
            calibration text.
        left_out: Quantized layers of the blocks without an adapter.
        fidelity: Distance from the source with the adapter; None if there was no text.
    """

    rank: int
    parameters: int
    nbytes: int
    remaining: float
    left_out: list[str]
    fidelity: fidelity.Fidelity | None

    @classmethod
    def of(
        cls, adapted: Compensated, rank: int, stored: mx.Dtype, measured: fidelity.Fidelity | None
    ) -> Compensation:
        """Return the record of adapters whose factors are ``stored``."""
        numbers = adapted.injected.parameters
        return cls(
            rank, numbers, numbers * stored.size, adapted.remaining, adapted.left_out, measured
        )

    def lines(self) -> list[str]:
        """Return what a person reads, one fact a line."""
        lines = [
            f"adapter    rank {self.rank}, {human_bytes(self.nbytes)} besides: "
            f"{self.remaining:.1%} of the layers' square error is left"
        ]
        if self.left_out:
            lines.append(
                f"left out   {len(self.left_out)} layers: {', '.join(_short(self.left_out))}"
            )
        if self.fidelity is not None:
            lines.append(
                f"with it    KL {self.fidelity.kl:.4f} nats, "
                f"same top-1 token {self.fidelity.top1:.1%}"
            )
        return lines


@dataclass(frozen=True)
class Compressed:
    """What came out.

    Attributes:
        path: The folder.
        report: Sizes, layers quantized and layers left out.
        sized: How the size was met; None if none was set.
        fidelity: Distance from the source on validation text; None if there was no text.
        compensated: The adapter in ``path / ADAPTERS``; None if none was adapted.
        method_seconds: Wall time of the quantization itself, seconds.
        seconds: Wall time of everything, seconds.
        peak_memory_bytes: MLX peak, bytes.
    """

    path: Path
    report: QuantizeReport
    sized: Sized | None
    fidelity: fidelity.Fidelity | None
    compensated: Compensation | None
    method_seconds: float
    seconds: float
    peak_memory_bytes: int

    def as_record(self) -> JsonObject:
        """Return what ``--json`` prints."""
        record = asdict(self.report)
        del record["config"]
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            **record,
            "sized": asdict(self.sized) if self.sized else None,
            "fidelity": asdict(self.fidelity) if self.fidelity else None,
            "compensated": asdict(self.compensated) if self.compensated else None,
            "method_seconds": self.method_seconds,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def lines(self) -> list[str]:
        """Return what a person reads, one fact a line."""
        report, fidelity = self.report, self.fidelity
        ratio = report.bytes_before / report.bytes_after
        lines = [
            f"{self.path}: {report.bits_per_weight:.3f} bits per weight",
            f"size       {human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)} "
            f"({ratio:.2f} x smaller)",
        ]
        if self.sized is not None:
            lines.append(self.sized.line(report.bytes_after))
        lines += [f"quantized  {n} layers: {kind}" for kind, n in report.quantized.items()]
        by_reason: dict[str, list[str]] = {}
        for skip in report.skipped:
            by_reason.setdefault(skip.reason, []).append(skip.path)
        for reason, paths in by_reason.items():
            lines.append(f"left out   {len(paths)} layers: {reason}: {', '.join(_short(paths))}")
        if fidelity is not None:
            lines.append(
                f"fidelity   KL {fidelity.kl:.4f} nats, same top-1 token {fidelity.top1:.1%}, "
                f"perplexity {math.exp(fidelity.nll_source):.2f} -> "
                f"{math.exp(fidelity.nll_model):.2f} ({fidelity.tokens:,} validation tokens)"
            )
        if self.compensated is not None:
            lines += self.compensated.lines()
        lines.append(
            f"took       {human_duration(self.seconds)} "
            f"({report.method} {human_duration(self.method_seconds)}), "
            f"peak memory {human_bytes(self.peak_memory_bytes)}"
        )
        return lines


def _short(paths: list[str]) -> list[str]:
    """Return paths with block numbers merged: ``layers.*.mlp.down_proj``, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in paths))
