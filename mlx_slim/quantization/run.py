"""A dense model in, a smaller folder out: load, quantize, measure, save, reload and compare.

Invariant: the output folder appears only when what it holds computes exactly what was measured; a
failure leaves nothing behind. Rounding reads, judges and writes a block at a time; a method that
holds the dense model (``methods.HELD``) is refused before where that does not fit. Try it:
``mlx-slim quantize MODEL -o DIR --bits 4``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_slim.adapters.inject import Injected, adapters_of, remove_adapters
from mlx_slim.adapters.store import save_adapter
from mlx_slim.artifacts import public_name
from mlx_slim.claims import makes_folder
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import ResourceError, RowLimit, SlimError
from mlx_slim.events import Notice, Observer
from mlx_slim.models import fidelity
from mlx_slim.models.load import Loaded, load, read_config, resolve
from mlx_slim.models.opening import open_weights
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.models.row_limits import row_limit
from mlx_slim.models.streamed import Unread, answers_of, rounded, unread
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype, save_checked, stored_dtype
from mlx_slim.quantization.apply import (
    Quantizer,
    QuantizeReport,
    bits_per_weight,
    load_quantized,
    parameter_bytes,
    quantize_model,
    refuse_quantized,
)
from mlx_slim.quantization.blockwise import quantize_blockwise
from mlx_slim.quantization.budget import check_size, space_of
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, Calibration, read_calibration
from mlx_slim.quantization.compensation import compensate
from mlx_slim.quantization.methods import HELD, check_method, embed_bits, quantize_with
from mlx_slim.quantization.mixes import CHOICE_ROWS, choose_mix, compute_with, round_to
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.policy import embed_formats, leaves
from mlx_slim.quantization.result import ADAPTERS, Compensation, Compressed
from mlx_slim.reading import ModelConfig, short
from mlx_slim.runtime import device_memory, memory_limits
from mlx_slim.units import human_bytes


@makes_folder("quantize")
@memory_limits()
def compress(
    source: str | Path, out: Path, options: CompressOptions, observer: Observer | None = None
) -> Compressed:
    """Quantize ``source`` into the new folder ``out``.

    Args:
        source: MLX or Hugging Face folder, or hub id, of a dense model.
        out: Must not exist.
        options: See ``CompressOptions``.
        observer: Receives a ``Notice`` for each stage.

    Raises:
        ResourceError: If memory or disk do not suffice.
        SlimError: If anything given cannot be used, or the saved model is not the measured one.
    """

    def notify(message: str, level: str = "info") -> None:
        if observer is not None:
            observer.notify(Notice(message, level))

    start = time.perf_counter()
    others = {"awq": "scales", "blockwise": "trains"}
    if options.compensate is not None and options.method in others:
        raise SlimError(
            f"--compensate corrects the error of each weight, and {options.method} "
            f"{others[options.method]} the weights besides",
            "use --method rtn, gptq, dwq or dynamic",
        )
    how = options.method, options.quantize, options.recipe
    check_method(*how, None, options.embed_bits)
    check_size(options)
    config = read_config(source, options.revision)  # refuse what cannot work before the weights
    check_method(*how, config.get("model_type"), options.embed_bits)
    if "quantization" in config:
        refuse_quantized(nn.Module(), config)
    mx.reset_peak_memory()
    notify(f"loading {source}")
    revision, dtype = options.revision, compute_dtype()
    folder = resolve(source, revision)
    tensors = folder_tensors(folder)
    stored = stored_dtype(tensors)
    space = limit = None
    if options.sized:
        shapes_alone = open_weights(folder)[0]
        space = space_of(shapes_alone, options.quantize, stored, options.compensate)
        limit = space.limit(options)
    dense_bytes = (
        sum(math.prod(tensor.shape) for tensor in tensors.values()) * (dtype or stored).size
    )
    _check_memory(options, dense_bytes)
    opened = unread(source, revision=revision, dtype=dtype)
    calibration = _calibration(opened.tokenizer, row_limit(config), options, notify)
    dense = original = None

    def record(source: fidelity.Model) -> None:
        nonlocal original
        assert calibration is not None
        original = RecordedLogits(source, calibration.validation_NT, out)

    if options.method in HELD or (options.measures and dense_bytes <= device_memory()):
        dense = load(source, revision=revision, dtype=dtype)
        refuse_quantized(dense.model, dense.config)
    if calibration is not None and options.fidelity_samples and options.method != "blockwise":
        record(
            dense.model
            if dense is not None
            else answers_of(
                opened.open, calibration.validation_NT, "reading the source", short(folder)
            )
        )

    tic = time.perf_counter()
    formats = sized = None
    if space is not None and limit is not None:
        formats, sized = choose_mix(
            folder, space, limit, options, calibration, dense and dense.model, stored, notify, out
        )
        dense = None  # its weights are freed where losses were measured
    notify(f"quantizing: {options.method}, {_format(options)}")
    quantizer = _quantizer(options, calibration, stored, formats, record)
    quantized: Loaded | Unread
    if options.method == "rtn" and options.compensate is None:
        quantized, report = _unread_quantized(opened, quantizer)
        shapes = rounded(quantized.open, stored)()
    else:
        if dense is None:
            quantized, report = load_quantized(source, quantizer, revision=revision, dtype=dtype)
        else:
            quantized, report = dense, quantizer(dense.model, dense.config)
        shapes = quantized.model
        round_to(shapes, stored)  # what is measured below is what will be stored
    method_seconds = time.perf_counter() - tic
    report = _sizes(shapes, report, sum(tensor.nbytes for tensor in tensors.values()))

    measured = None

    def judge(logits: fidelity.Model) -> None:
        nonlocal measured, method_seconds
        method_seconds = time.perf_counter() - tic
        if calibration is not None and original is not None:
            tokens = f"{calibration.validation_NT.size:,} validation tokens"
            notify(f"comparing with the source on {tokens}")
            measured = fidelity.compare(original, logits, calibration.validation_NT)

    compensation, add_adapter = None, None
    if isinstance(quantized, Loaded):
        compute_with(quantized.model)
        judge(quantized.model)  # type: ignore[arg-type]
        if options.compensate is not None:
            assert calibration is not None
            originals = dict(leaves(open_weights(folder, dtype=mx.float32)[0]))
            adapted = compensate(
                quantized.model, originals, calibration.seen_NT, options.compensate, stored
            )
            better = None
            if original is not None:
                better = fidelity.compare(original, quantized.model, calibration.validation_NT)
            compensation = Compensation.of(adapted, options.compensate, stored, better)
            add_adapter = _adapter_writer(
                quantized.model, adapted.injected, options.compensate, out
            )
        notify(f"saving {out} and reading it back")
        save_checked(out, quantized, report.config, stored, add_adapter)
    else:
        notify(f"saving {out} and reading it back")
        judged_NT = None
        if calibration is not None and original is not None:
            judged_NT = calibration.validation_NT
        save_checked(out, quantized, report.config, stored, judged_NT=judged_NT, judge=judge)
    return Compressed(
        path=out,
        report=report,
        sized=sized,
        fidelity=measured,
        compensated=compensation,
        method_seconds=method_seconds,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=mx.get_peak_memory(),
    )


def _unread_quantized(source: Unread, quantizer: Quantizer) -> tuple[Unread, QuantizeReport]:
    """Return ``source`` quantized where it is read, and the report of that."""

    def open_model() -> nn.Module:
        model = source.open()
        quantizer(model, source.config)
        return model

    report = quantizer(source.open(), source.config)
    return replace(source, open=open_model, config=report.config), report


def _quantizer(
    options: CompressOptions,
    calibration: Calibration | None,
    stored: mx.Dtype,
    formats: Mapping[str, LayerFormat | None] | None,
    record: Callable[[fidelity.Model], None],
) -> Quantizer:
    """Return what quantizes a model as ``options`` say."""
    quantize = options.quantize
    embed = embed_bits(options.method, quantize, options.embed_bits)
    if options.method == "rtn":

        def rounding(model: nn.Module, config: ModelConfig) -> QuantizeReport:
            decided = {**embed_formats(model, quantize, embed), **(formats or {})}
            read = options.compensate is not None  # else where it is written
            return quantize_model(model, config, quantize, options.recipe, decided, read=read)

        return rounding
    assert calibration is not None
    if options.method == "blockwise":
        return partial(
            quantize_blockwise,
            quantize=quantize,
            tokens_NT=calibration.seen_NT,
            stored=stored,
            embed_bits=embed,
            formats=formats,
            judged_NT=calibration.validation_NT if options.fidelity_samples else None,
            judge=record if options.fidelity_samples else None,
        )
    return partial(
        quantize_with,
        quantize=quantize,
        method=options.method,
        tokens_NT=calibration.seen_NT,
        embed=options.embed_bits,
    )


def _adapter_writer(
    model: nn.Module, injected: Injected, rank: int, out: Path
) -> Callable[[Path], None]:
    """Take the adapters off ``model``, and return what writes them beside it."""
    adapters = adapters_of(model)
    remove_adapters(model)

    def write(folder: Path) -> None:
        model.update_modules(tree_unflatten(adapters))  # pyright: ignore[reportArgumentType]
        config = AdapterConfig(rank=rank, alpha=rank)
        name = public_name(out)
        save_adapter(folder / ADAPTERS, model, config, injected, dora=False, base=name)

    return write


def _check_memory(options: CompressOptions, dense_bytes: int) -> None:
    """Refuse a method that holds the dense model where that does not fit."""
    needed = HELD.get(options.method, 0) * dense_bytes
    if needed > device_memory():
        raise ResourceError(
            f"method {options.method} holds the whole model: {human_bytes(needed)}, this device "
            f"holds {human_bytes(device_memory())}",
            "use --method rtn, which reads a block at a time",
        )


def _format(options: CompressOptions) -> str:
    if options.recipe:
        return options.recipe
    if options.sized:
        return f"affine, group {options.quantize.group_size}, each layer in bits of its own"
    quantize = options.quantize
    return f"{quantize.bits}-bit {quantize.mode}, group {quantize.group_size}"


def _calibration(
    tokenizer: Any, limit: RowLimit | None, options: CompressOptions, notify: Callable[..., None]
) -> Calibration | None:
    """Return calibration rows; None if nothing needs them, or the default is not to be had."""
    seen = 0 if options.method == "rtn" and options.compensate is None else options.samples
    if options.measures:
        seen = max(seen, options.sensitivity_samples + CHOICE_ROWS)
    if not seen and not options.fidelity_samples:
        return None
    source = options.calibration or DEFAULT_SOURCE
    try:
        return read_calibration(
            source,
            tokenizer,
            length=options.length,
            seen=seen,
            validation=max(1, options.fidelity_samples),
            limit=limit,
        )
    except SlimError as error:
        if options.calibration is None and not seen:
            notify(f"fidelity is not measured: {error.message}; give --calibration FILE", "warning")
            return None
        raise


def _sizes(model: nn.Module, report: QuantizeReport, bytes_before: int) -> QuantizeReport:
    """Return ``report`` with the sizes of ``model`` as it will be stored."""
    return replace(
        report,
        bytes_before=bytes_before,
        bytes_after=parameter_bytes(model),
        bits_per_weight=bits_per_weight(model),
    )
