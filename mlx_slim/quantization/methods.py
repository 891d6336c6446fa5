"""The calibrated methods: AWQ, GPTQ, DWQ and dynamic precision of mlx-lm, and ours (blockwise).

Invariant: what a method cannot do is an error before anything is loaded or computed; the model is
changed in place and what was left out is listed, as with plain rounding. Try it:
``mlx-slim quantize MODEL -o DIR --method awq --calibration notes.txt``.

Sources: AWQ arXiv 2306.00978, GPTQ arXiv 2210.17323; DWQ and dynamic are mlx-lm's own.
Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError, did_you_mean
from mlx_slim.models.quantizable import has_quantized_form
from mlx_slim.models.quantized import (
    LayerFormat,
    quantize_into_fast,
    use_fast_matmul,
)
from mlx_slim.models.save import quantization_of
from mlx_slim.progress import Stage, stage
from mlx_slim.quantization.apply import (
    QuantizeReport,
    parameter_bytes,
    quantize_model,
    refuse_quantized,
    report,
)
from mlx_slim.quantization.policy import (
    RECIPES,
    Decision,
    Skipped,
    count,
    embed_formats,
    leaves,
    skip_reason,
)
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import device_memory, on_gpu
from mlx_slim.units import human_bytes

METHODS = ("rtn", "awq", "gptq", "dwq", "dynamic", "blockwise")
CALIBRATED = METHODS[1:]
HELD = {"awq": 1, "gptq": 1, "dwq": 2, "dynamic": 1}  # dense models that are in memory at least
_GPTQ_BITS = (2, 4, 8)
_EMBED_BITS = {"awq": 4, "gptq": 6, "blockwise": 6}  # at least
_HIGHER = {2: 4, 3: 4, 4: 5, 5: 6, 6: 8}
_DWQ_RATE = 1e-6  # mlx-lm's default, Adam
_DWQ_BATCH = 4


def embed_bits(method: str, quantize: QuantizeConfig, embed: int | None = None) -> int | None:
    """Return the bits of embedding and head that ``method`` takes: those of ``embed``, or its own.

    None are those of ``quantize``. A wrong embedding is wrong in every block.
    """
    least = _EMBED_BITS.get(method)
    return embed if embed is not None or least is None else max(least, quantize.bits)


def check_method(
    method: str,
    quantize: QuantizeConfig,
    recipe: str | None = None,
    model_type: str | None = None,
    embed_bits: int | None = None,
) -> None:
    """Refuse what ``method`` cannot do.

    Args:
        method: One of ``METHODS``.
        quantize: Bits, group size and mode.
        recipe: A mixed recipe, or None.
        model_type: Of the model's config; None leaves that check out.
        embed_bits: Bits of embedding and head, or None for the choice of the method.

    Raises:
        SlimError: With what would work.
    """
    if method not in METHODS:
        raise SlimError(f"unknown method {method!r}", did_you_mean(method, METHODS))
    if recipe is not None and recipe not in RECIPES:
        raise SlimError(f"unknown recipe {recipe!r}", did_you_mean(recipe, RECIPES))
    if embed_bits is not None and (
        method == "dynamic" or recipe is not None or quantize.mode != "affine"
    ):
        raise SlimError(
            f"embed_bits={embed_bits} is for one number of bits in all blocks, of mode affine",
            "drop --embed-bits, or the mode, recipe or method dynamic",
        )
    if method == "rtn":
        return
    if recipe is not None:
        raise SlimError(
            f"method {method} has no recipes, and recipe is {recipe!r}",
            "use --method rtn with a recipe, or --method dynamic for mixed precision",
        )
    if quantize.mode != "affine":
        raise SlimError(
            f"method {method} needs mode affine, not {quantize.mode}",
            f"use --method rtn for {quantize.mode}",
        )
    if method == "gptq" and quantize.bits not in _GPTQ_BITS:
        raise SlimError(
            f"method gptq has 2, 4 or 8 bits, not {quantize.bits}", "use another method, or --bits"
        )
    if method in ("dwq", "dynamic", "blockwise") and quantize.bits == 8:
        raise SlimError(
            f"method {method} needs fewer than 8 bits", "use --method rtn: 8 bits lose next to none"
        )
    if method == "awq" and model_type is not None:
        from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS

        if model_type not in AWQ_MODEL_CONFIGS:
            raise SlimError(
                f"method awq does not support {model_type} models",
                f"it supports {', '.join(sorted(AWQ_MODEL_CONFIGS))}; gptq and dwq take any",
            )


def quantize_with(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    method: str,
    tokens_NT: mx.array,
    embed: int | None = None,
) -> QuantizeReport:
    """Quantize ``model`` in place by a method of mlx-lm; on a CPU its layers become fast ones.

    Args:
        model: A dense model.
        config: Its ``config.json``.
        quantize: Bits and group size (mode affine); ``dynamic`` gives sensitive layers more bits.
        method: One of ``CALIBRATED`` but ``blockwise`` (``quantize_blockwise``).
        tokens_NT: Calibration rows, int32.
        embed: Bits of embedding and head; None is the method's choice.

    Raises:
        ResourceError: If GPTQ's Hessians do not fit in memory.
        SlimError: If the method cannot do it, or the model is quantized already.
    """
    check_method(method, quantize, None, config.get("model_type"), embed)
    refuse_quantized(model, config)
    if not tokens_NT.size:
        raise SlimError(f"method {method} needs calibration text", "give --calibration FILE")
    run: dict[str, Callable[..., QuantizeReport | None]] = {
        "awq": _awq,
        "gptq": _gptq,
        "dwq": _dwq,
        "dynamic": _dynamic,
    }
    _all_divisible(model, quantize, method)
    around = embed_bits(method, quantize, embed)
    before = parameter_bytes(model)
    with _as_library():
        run[method](model, config, quantize, tokens_NT, around)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    skipped = [
        Skipped(path, skip_reason(module, quantize.group_size), count(module))
        for path, module in leaves(model)
        if "scales" not in module and count(module)
    ]
    new_config = {**config, "quantization": quantization_of(model)}
    return report(model, new_config, method, before, skipped)


_COUNTS = re.compile(r"(\d+)/(\d+)")


class _Bars(io.StringIO):
    """Reads progress bars (``12/30``) off the stream that a library draws them on."""

    def __init__(self, opened: Stage) -> None:
        super().__init__()
        self._stage = opened

    def write(self, text: str) -> int:
        """Take what a bar shows."""
        if counts := _COUNTS.search(text):
            self._stage.total = float(counts[2])
            self._stage.reach(float(counts[1]))
        return len(text)


@contextlib.contextmanager
def _as_library() -> Iterator[None]:
    """Let mlx-lm's scripts run quietly: what their progress bars count is a stage of ours.

    Compilation is off on a CPU, where it would need a C++ compiler for a handful of operations.
    """
    compiled = on_gpu() or "MLX_DISABLE_COMPILE" in os.environ
    sink = io.StringIO()
    if not compiled:
        mx.disable_compile()
    try:
        with (
            stage("calibrating", None, "steps") as calibrating,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(_Bars(calibrating)),
        ):
            yield
    finally:
        if not compiled:
            mx.enable_compile()


def _all_divisible(model: nn.Module, quantize: QuantizeConfig, method: str) -> None:
    """Refuse a group size that some layer's input is not divisible by: mlx-lm would crash late."""
    group = quantize.group_size
    for path, module in leaves(model):
        if has_quantized_form(module) and module["weight"].shape[-1] % group:
            raise SlimError(
                f"method {method} quantizes every layer, but the input width of {path}, "
                f"{module['weight'].shape[-1]}, is not divisible by group_size={group}",
                "choose a smaller --group-size, or --method rtn, which leaves such layers out",
            )


def _awq(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    tokens_NT: mx.array,
    embed: int | None,
) -> None:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    assert embed is not None
    quantize_into_fast(model)  # every block runs twice in its quantized form
    awq_quantize(
        model,
        tokens_NT,
        AWQ_MODEL_CONFIGS[config["model_type"]],
        bits=quantize.bits,
        group_size=quantize.group_size,
        embed_bits=embed,
        embed_group_size=min(32, quantize.group_size),
    )


def _gptq(
    model: nn.Module,
    _config: ModelConfig,
    quantize: QuantizeConfig,
    tokens_NT: mx.array,
    embed: int | None,
) -> None:
    from mlx_lm.quant.gptq import gptq_quantize

    widths = [m["weight"].shape[-1] for _, m in leaves(model) if type(m) is nn.Linear]
    needed = sum(4 * width**2 for width in widths)
    if needed > device_memory():
        raise ResourceError(
            f"gptq keeps a Hessian of every layer: {human_bytes(needed)}, "
            f"this device holds {human_bytes(device_memory())}",
            "use --method awq or dwq",
        )
    gptq_quantize(
        model,
        tokens_NT,
        quantize.bits,
        quantize.group_size,
        fallback_bits=embed,
        fallback_group_size=quantize.group_size,
        batch_size=_DWQ_BATCH,
    )


def _dwq(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    tokens_NT: mx.array,
    embed: int | None,
) -> None:
    import mlx.optimizers as optim
    from mlx_lm.quant.dwq import dwq_quantize

    teacher = copy.deepcopy(model)
    dtype = next(m["weight"].dtype for _, m in leaves(model) if has_quantized_form(m))
    quantize_model(model, config, quantize, None, embed_formats(model, quantize, embed))
    model.freeze()
    use_fast_matmul(model)  # trainable scales take the differentiable way through BLAS
    # One row in eight, one batch at least, measures the progress that mlx-lm reports.
    rows = [(row, 0) for row in tokens_NT.tolist()]  # pyright: ignore
    batch = min(_DWQ_BATCH, max(1, len(rows) // 2))
    validation_count = max(batch, len(rows) // 8) if len(rows) > 1 else 0
    dwq_quantize(
        model,
        lambda batch, *_args, **_kwargs: teacher(batch),
        optim.Adam(learning_rate=_DWQ_RATE, bias_correction=True),
        rows[validation_count:],
        rows[:validation_count] or rows,
        batch_size=batch,
        max_seq_length=tokens_NT.shape[1],
        seed=0,
        dtype=dtype,
    )


def _dynamic(
    model: nn.Module,
    config: ModelConfig,
    quantize: QuantizeConfig,
    tokens_NT: mx.array,
    _embed: int | None,
) -> None:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model as quantize_in_place

    low, high, group = quantize.bits, _HIGHER[quantize.bits], quantize.group_size
    sensitivities = dict(estimate_sensitivities(model, tokens_NT, low, group, high, group))
    scale = next(m["weight"] for _, m in leaves(model) if has_quantized_form(m))
    overhead = 2 * 8 * scale.itemsize / group  # a scale and a bias a group
    threshold = estimate_threshold(
        model,
        sensitivities,
        target_bpw=(low + high) / 2 + overhead,
        low_bits=low,
        low_group_size=group,
        high_bits=high,
        high_group_size=group,
    )

    def decide(path: str, _module: nn.Module) -> Decision:
        if sensitivities[path] > threshold:
            return asdict(LayerFormat(group, high))
        return True

    quantize_in_place(model, config, group, low, quant_predicate=decide)
