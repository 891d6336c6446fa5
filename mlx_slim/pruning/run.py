"""Prunes a model by depth, width or experts: plan, measure, cut, compare, save, verify.

Invariant: the output folder appears only when its model computes exactly what was measured, in the
dtype of the stored source; ``prune.json`` next to the weights lists what was removed and why,
``prune_scores.safetensors`` has every score. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import (
    SCHEMA_VERSION,
    provenance,
    public_name,
    save_tensors,
    write_json,
)
from mlx_slim.claims import makes_folder
from mlx_slim.errors import ResourceError, RowLimit, SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.models import fidelity
from mlx_slim.models.build import WIDTHS
from mlx_slim.models.kinds import EXPERTS
from mlx_slim.models.load import Loaded, load, read_config, resolve
from mlx_slim.models.opening import cast, read_weights
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.streamed import Unread, answers_of, rounded, unread, weights_of
from mlx_slim.models.tensors import Tensor, folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.pruning import cutting, depth, importance
from mlx_slim.pruning.methods import OF_EXPERTS
from mlx_slim.pruning.options import NAMED, PruneOptions
from mlx_slim.pruning.plan import plan, weight_size
from mlx_slim.pruning.planned import Plan
from mlx_slim.pruning.records import (
    RECORD_FILE,
    CalibrationRows,
    PrunedFidelity,
    PruneRecord,
)
from mlx_slim.pruning.refit import refit_rows
from mlx_slim.quantization.apply import refuse_quantized
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration
from mlx_slim.reading import JsonObject
from mlx_slim.runtime import device_memory, memory_limits, on_gpu
from mlx_slim.units import human_bytes

__all__ = ["PruneOptions", "Pruned", "prune", "validation_rows"]

SCORES_FILE = "prune_scores.safetensors"
VALIDATION_LENGTH = 256  # tokens of a row of validation text


@dataclass(frozen=True)
class Pruned:
    """The result of a pruning.

    Attributes:
        path: The folder.
        details: ``prune.json``, typed.
    """

    path: Path
    details: PruneRecord

    @property
    def record(self) -> JsonObject:
        """``prune.json``, as JSON."""
        return self.details.as_json()

    def lines(self) -> list[str]:
        """Return a summary, a fact a line."""
        heading = f"{self.path}: {self.details.axis} pruned, {self.details.method}"
        return [heading, *self.details.lines()]


@makes_folder("prune", "scores_at")
@memory_limits()
def prune(
    source: str | Path,
    out: Path,
    options: PruneOptions,
    observer: Observer | None = None,
    *,
    scores_at: Path | None = None,
) -> Pruned:
    """Prune ``source`` into the new folder ``out``.

    Args:
        source: MLX or Hugging Face folder, or hub id; not quantized.
        out: Must not exist.
        options: See ``PruneOptions``.
        observer: Gets a ``Notice`` for each stage.
        scores_at: File that the scores are written to as soon as they are measured; if it exists,
            they are read from it.

    Raises:
        ResourceError: If memory or disk do not suffice.
        SlimError: If the model or an option cannot be used, or the saved model differs.
    """

    def notify(message: str, level: str = "info") -> None:
        if observer is not None:
            observer.notify(Notice(message, level))

    start = time.perf_counter()
    config = read_config(source, options.revision)
    plan(config, options, weight_size(config))  # refuses bad options before weights are read
    tensors = folder_tensors(resolve(source, options.revision))
    stored = stored_dtype(tensors)
    planned = plan(config, options, stored.size)
    mx.reset_peak_memory()
    streamed = _check_memory(options, planned, tensors, stored)
    notify(f"{'reading' if streamed else 'loading'} {source}")
    uncut: Loaded | Unread
    if streamed:  # cut as it is stored, and measured in the dtype of computation
        uncut = unread(source, revision=options.revision)
        loaded = replace(uncut, open=rounded(uncut.open, compute_dtype()))
    else:
        uncut = loaded = load(source, revision=options.revision, dtype=compute_dtype())
    refuse_quantized(loaded.model if isinstance(loaded, Loaded) else nn.Module(), loaded.config)
    seen_NT, validation_NT = _text(loaded, options, planned, notify)
    scores = cutting.score(loaded, options, planned, seen_NT, notify, scores_at)
    original = None
    if validation_NT is not None:
        answers = answers_of(weights_of(loaded), validation_NT, "reading the source")
        original = RecordedLogits(answers, validation_NT, out)
        del answers
    refit_NT = None
    if options.compensate:
        refit_NT = refit_rows(loaded, options, 0 if validation_NT is None else validation_NT.size)
    weights, new_config, changes = cutting.cut(uncut, options, planned, scores, refit_NT)
    after: Loaded | Unread
    if isinstance(weights, nn.Module):
        small = weights
        after = Loaded(
            small, loaded.tokenizer, new_config, loaded.path, loaded.source, loaded.revision
        )
        for dtype in () if on_gpu() else (stored, mx.float32):
            cast(small, dtype)  # measured below are the weights as they will be stored
            read_weights(small)
    else:
        assert isinstance(loaded, Unread)
        small = weights()
        after = replace(loaded, open=weights, config=new_config)
    parameters = sum(value.size for value in _arrays(small))
    record = PruneRecord(
        schema_version=SCHEMA_VERSION,
        source=public_name(source),  # the folder may be published
        revision=loaded.revision,
        axis=planned.axis,
        method=planned.method,
        options={**asdict(options), "calibration": _named(options.calibration)},
        calibration=_calibration(options, planned),
        score=cutting.meaning(planned),
        layers=changes.layers,
        parameters_before=planned.before.total,
        parameters_after=parameters,
        bytes_before=sum(tensor.nbytes for tensor in tensors.values()),
        bytes_after=parameters * stored.size,
        stock_mlx_lm_reads_it=WIDTHS not in new_config,
        fidelity=None,
        notes=[*planned.notes, *changes.notes],
        provenance=provenance(),
        seconds=0.0,
        peak_memory_bytes=0,
        hidden=changes.hidden,
    )
    del loaded, uncut, small

    def judge(logits: fidelity.Model) -> None:
        nonlocal record
        if validation_NT is not None and original is not None:
            notify(f"comparing with the source on {validation_NT.size:,} validation tokens")
            measured = fidelity.compare(original, logits, validation_NT)
            record = replace(record, fidelity=_fidelity(measured))

    def add_files(folder: Path) -> None:
        nonlocal record
        seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
        record = replace(record, seconds=seconds, peak_memory_bytes=peak)
        save_tensors(folder / SCORES_FILE, {k: mx.array(v) for k, v in scores.items()})
        write_json(folder / RECORD_FILE, record.as_json())

    notify(f"saving {out} and reading it back")
    save_checked(out, after, new_config, stored, add_files, judged_NT=validation_NT, judge=judge)
    return Pruned(out, record)


def _check_memory(
    options: PruneOptions, planned: Plan, tensors: dict[str, Tensor], stored: mx.Dtype
) -> bool:
    """Return whether a block at a time suffices; refuse what holds a model that does not fit."""
    methods = (NAMED, *(depth if planned.axis == "depth" else importance).STREAMED)
    if planned.method in methods and not options.compensate:
        return True
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    needed = numbers * (compute_dtype() or stored).size
    if needed > device_memory():
        what = f"method {planned.method}" if planned.method not in methods else "--compensate"
        others = "block-influence" if planned.axis == "depth" else "l2 or activation"
        if planned.method in OF_EXPERTS and planned.kinds == (EXPERTS,):
            others = "l2"
        raise ResourceError(
            f"{what} holds the whole model: {human_bytes(needed)}, this device holds "
            f"{human_bytes(device_memory())}",
            f"use --method {others}, which reads a block at a time"
            if planned.method not in methods
            else "leave it out: the method alone reads a block at a time",
        )
    return False


def prune_loaded(loaded: Loaded, options: PruneOptions, *, scores_at: Path | None = None) -> Loaded:
    """Prune a model in memory, as ``prune`` does; ``loaded`` loses its weights.

    Args:
        loaded: A dense model.
        options: See ``PruneOptions``; of the text only the calibration rows are used.
        scores_at: As for ``prune``.

    Raises:
        SlimError: If the model or an option cannot be used.
    """

    def ignore(*_: str) -> None:
        """Say nothing: the caller tells which models it measures."""

    refuse_quantized(loaded.model, loaded.config)
    planned = plan(loaded.config, options, weight_size(loaded.config))
    seen_NT, _ = _text(loaded, options, planned, ignore)
    scores = cutting.score(loaded, options, planned, seen_NT, ignore, scores_at)
    model, config, _ = cutting.cut(loaded, options, planned, scores, None)
    assert isinstance(model, nn.Module)
    return replace(loaded, model=model, config=config)


def _arrays(model: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]  # pyright: ignore


# ----------------------------------------------------------------------------------------- text


def _text(
    loaded: Loaded | Unread, options: PruneOptions, planned: Plan, notify: Callable[..., None]
) -> tuple[mx.array | None, mx.array | None]:
    """Return calibration rows (N, T) for the method, and other rows for validation.

    A method without calibration rows is validated if there is text.
    """
    samples, length = planned.rows
    limit = row_limit(loaded.config)
    width = length or _row_length(limit)
    try:
        text = read_calibration(
            options.calibration or DEFAULT_SOURCE,
            loaded.tokenizer,
            length=width,
            seen=samples,
            validation=max(1, -(-options.held_out // width)),
            limit=limit,
        )
    except SlimError as error:
        if options.calibration is None and not samples:
            notify(f"no validation: {error.message}; give --calibration FILE", "warning")
            return None, None
        raise
    if samples and len(text.seen_NT) < samples:
        notify(f"the text gives {len(text.seen_NT)} of {samples} calibration rows", "warning")
    return (text.seen_NT if samples else None), validation_rows(
        text.validation_NT.reshape(-1), limit
    )


def _row_length(limit: RowLimit | None) -> int:
    return min(VALIDATION_LENGTH, limit.tokens) if limit else VALIDATION_LENGTH


def validation_rows(ids: mx.array, limit: RowLimit | None) -> mx.array:
    """Return a stream of token ids as rows (N, T) of up to ``VALIDATION_LENGTH`` tokens.

    Args:
        ids: The stream.
        limit: The longest row that the model computes right; T is no longer.
    """
    length = min(_row_length(limit), ids.size)
    rows = ids.size // length
    return ids[: rows * length].reshape(rows, length)


def _calibration(options: PruneOptions, planned: Plan) -> CalibrationRows | None:
    samples, length = planned.rows
    if not samples:
        return None
    return CalibrationRows(_named(options.calibration or DEFAULT_SOURCE), samples, length)


def _named(text: str | None) -> str | None:
    return None if text is None else public_name(text)


def _fidelity(measured: fidelity.Fidelity | None) -> PrunedFidelity | None:
    if measured is None:
        return None
    before, after = (math.exp(min(nll, 700.0)) for nll in (measured.nll_source, measured.nll_model))
    return PrunedFidelity(measured, before, after)
