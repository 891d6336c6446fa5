"""Which bits each layer gets for a size: the mixes that two kinds of losses give, both tried.

Invariant: of several mixes the one nearest to the source is taken, on calibration text that no loss
was measured on; one model is in memory at a time. Losses of single layers add up where they are
small; with many layers in 2 or 3 bits the sum is far below what the mix loses, and the mix of the
estimated losses can be nearer. Try it: ``mlx-slim quantize MODEL -o DIR --bits-per-weight 3.5``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models import fidelity
from mlx_slim.models.opening import cast, read_weights
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.recorded_logits import RecordedLogits, free_weights
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.quantization.allocation import StoredAs
from mlx_slim.quantization.apply import QuantizeReport, load_quantized, quantize_model
from mlx_slim.quantization.budget import LayerSizes
from mlx_slim.quantization.calibration import Calibration
from mlx_slim.quantization.heuristics import heuristic_losses
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.result import Sized
from mlx_slim.quantization.sensitivity import in_eight_bits, measured_losses
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import on_gpu

CHOICE_ROWS = 4  # calibration rows after those that losses are measured on

Formats = dict[str, LayerFormat | None]


def choose_mix(
    folder: Path,
    space: LayerSizes,
    limit: int,
    options: CompressOptions,
    calibration: Calibration | None,
    dense: nn.Module | None,
    stored: mx.Dtype,
    notify: Callable[[str], None],
    out: Path,
) -> tuple[Formats, Sized]:
    """Return the format of each layer (None leaves it dense), and how it was chosen.

    Args:
        folder: Of the dense model.
        space: The sizes it can have.
        limit: Bytes of all parameters.
        options: ``measures`` says whether losses are measured.
        calibration: Needed where they are: ``sensitivity_samples`` rows, then ``CHOICE_ROWS``.
        dense: The model, where it is in memory; its weights are freed where losses are measured.
        stored: Dtype of the floating parameters on disk.
        notify: Told where losses were measured before.
        out: The recorded logits are on its disk meanwhile.

    Raises:
        ResourceError: If the model does not fit in 8 bits.
        SlimError: As ``measured_losses`` does.
    """
    mixes = {"rules": space.choose(heuristic_losses(space.shapes, space.blocks), limit)}
    if not options.measures:
        return _formats(mixes["rules"]), Sized(limit, "rules", None)
    assert calibration is not None
    samples, size = options.sensitivity_samples, space.group_size
    seen_NT = calibration.seen_NT[:samples]
    losses = measured_losses(folder, space.shapes, size, seen_NT, stored, dense, notify)
    mixes["measured"] = space.choose(losses, limit)
    rows_NT = calibration.seen_NT[samples : samples + CHOICE_ROWS]
    model = dense or in_eight_bits(folder, size)
    original = RecordedLogits(model, rows_NT, out)
    free_weights(model)
    distances = {
        name: _distance(folder, _formats(mix), options, stored, original, rows_NT)
        for name, mix in mixes.items()
    }
    chosen = min(distances, key=lambda name: distances[name])
    loss = sum(choice.loss for choice in mixes["measured"].values())
    return _formats(mixes[chosen]), Sized(limit, chosen, loss, distances)


def _formats(mix: Mapping[str, StoredAs]) -> Formats:
    return {path: choice.format for path, choice in mix.items()}


def _distance(
    folder: Path,
    formats: Formats,
    options: CompressOptions,
    stored: mx.Dtype,
    original: RecordedLogits,
    rows_NT: mx.array,
) -> float:
    """Return the KL divergence of the model in ``formats`` from ``original``, nats a token."""

    def rounding(model: nn.Module, config: ModelConfig) -> QuantizeReport:
        return quantize_model(model, config, options.quantize, None, formats)

    loaded, _ = load_quantized(folder, rounding, dtype=compute_dtype())
    round_to(loaded.model, stored)
    compute_with(loaded.model)
    return fidelity.compare(original, loaded.model, rows_NT).kl


def round_to(model: nn.Module, stored: mx.Dtype) -> None:
    """Round what is not quantized to the dtype that it will be stored in."""
    cast(model, stored)
    read_weights(model)


def compute_with(model: nn.Module) -> None:
    """Make ``model`` compute as it will where it is loaded: in float32 on a CPU."""
    if not on_gpu():
        cast(model, mx.float32)
        read_weights(model)
