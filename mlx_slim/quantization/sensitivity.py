"""What each layer loses in fewer bits, measured one layer at a time.

Invariant: KL(original ‖ original with only that layer rounded) in nats a token, on calibration text
alone; the model is afterwards what it was. Losses go to a file in the cache as they come, a layer a
line: a second size of the same model costs nothing, and a killed measurement loses one layer. What
comes before a layer's block is computed once. Try it:
``mlx-slim quantize MODEL -o DIR --bits-per-weight 4.5``.

Shapes: N rows, T tokens a row, C positions compared at a time, V vocabulary, D width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_slim.artifacts import hash_bytes, hash_json, read_records
from mlx_slim.claims import held
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models import structure
from mlx_slim.models.activations import exp
from mlx_slim.models.fidelity import CHUNK
from mlx_slim.models.hub import cache_folder
from mlx_slim.models.load import model_hash
from mlx_slim.models.logits import logsumexp, row_sums
from mlx_slim.models.opening import open_weights
from mlx_slim.models.quantized import LayerFormat
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.models.route import FromBlock, splits_at_blocks
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import compute_dtype
from mlx_slim.progress import tracked
from mlx_slim.quantization.apply import load_quantized, rounded
from mlx_slim.quantization.policy import leaves
from mlx_slim.runtime import device_memory, dtype_name, to_float
from mlx_slim.units import human_bytes

BITS = (2, 3, 4, 5, 6, 8)
# Most bits that are measured: beyond, KL is quadratic in the error of the weights, and so small
# that one rounding of a layer says less than the error does.
_MEASURED = 4
_NEXT_TO_IT = 8  # bits of the other layers, where the dense model does not fit

# Layer -> bits -> loss, nats a token; a dense layer loses nothing.
Losses = dict[str, dict[int, float]]


def measured_losses(
    folder: Path,
    paths: Collection[str],
    group_size: int,
    rows_NT: mx.array,
    stored: mx.Dtype,
    dense: nn.Module | None,
    notify: Callable[[str], None],
) -> Losses:
    """Return the loss of each layer at each of ``BITS``, all others as they are.

    Without room for the dense model the others are in 8 bits, and each layer is read from its file
    when it is measured: a model takes a byte a weight then, and one layer besides.

    Args:
        folder: Of the dense model.
        paths: Of the layers.
        group_size: Of the affine formats.
        rows_NT: Calibration token ids.
        stored: Dtype of scales and biases on disk.
        dense: The model, where it is in memory; unchanged afterwards.
        notify: Told where losses were measured before.

    Raises:
        ResourceError: If the model does not fit in 8 bits either.
        SlimError: If another process measures the same, or a loss is not finite.
    """
    key = {
        "model": model_hash(folder),
        "tokens": hash_bytes(np.array(rows_NT, np.int32).tobytes()),
        "rows": list(rows_NT.shape),
        "group_size": group_size,
        "scales": dtype_name(stored),
        "others": "dense" if dense is not None else _NEXT_TO_IT,
        "computed": dtype_name(compute_dtype() or stored),
    }
    cache = cache_folder() / "sensitivities" / f"{hash_json(key)}.jsonl"
    with held(cache):
        losses = _read(cache)
        if measured := sum(path in losses for path in paths):
            notify(f"losses of {measured} of {len(paths)} layers were measured before: {cache}")
        waiting = [path for path in paths if path not in losses]
        if waiting:
            model = dense or in_eight_bits(folder, group_size)
            modules = dict(leaves(dense or open_weights(folder, dtype=compute_dtype())[0]))
            with cache.open("a") as file:
                _measure(
                    model,
                    {path: modules.pop(path) for path in waiting},
                    group_size,
                    rows_NT,
                    stored,
                    file,
                    opened=dense is None,
                )
            losses = _read(cache)
    return {path: losses[path] for path in paths}


def in_eight_bits(folder: Path, group_size: int) -> nn.Module:
    """Return the model in 8 bits, each layer quantized as it is read.

    Args:
        folder: Of the dense model.
        group_size: Of the format.

    Raises:
        ResourceError: If it does not fit.
    """
    needed = sum(math.prod(tensor.shape) for tensor in folder_tensors(folder).values())
    if needed > device_memory():
        raise ResourceError(
            f"measuring layers takes the model in {_NEXT_TO_IT} bits, {human_bytes(needed)}, this "
            f"device holds {human_bytes(device_memory())}",
            "set --sensitivity rules",
        )
    quantize = QuantizeConfig.model_validate({"bits": _NEXT_TO_IT, "group_size": group_size})
    return load_quantized(folder, quantize, dtype=compute_dtype())[0].model


def _measure(
    model: nn.Module,
    layers: dict[str, nn.Module],
    group_size: int,
    rows_NT: mx.array,
    stored: mx.Dtype,
    file: TextIO,
    *,
    opened: bool,
) -> None:
    """Add a line to ``file`` for each of ``layers``.

    Args:
        model: The original, or one next to it; unchanged afterwards.
        layers: Path -> dense module of the original; it takes the place of the model's meanwhile.
        group_size: Of the formats.
        rows_NT: Calibration token ids.
        stored: Dtype of scales and biases on disk.
        file: Open for writing.
        opened: The weights were opened and not read: each is dropped once it is measured.
    """
    original = _recorded(model, rows_NT, Path(file.name))
    partial = FromBlock(model, rows_NT)
    blocks = structure.block_numbers(model, layers) if splits_at_blocks(model, rows_NT[:1]) else {}
    in_place = dict(leaves(model))
    order = sorted(layers, key=lambda path: blocks.get(path, -1))  # stable: the model's order
    for path in tracked(order, "measuring the loss of each layer", "layers"):
        partial.advance(blocks.get(path, 0))
        module = layers[path]
        weight = module["weight"]
        model.update_modules(tree_unflatten([(path, module)]))
        losses: dict[int, float] = {}
        error = 0.0
        for bits in BITS:
            module["weight"] = rounded(weight, stored, LayerFormat(group_size, bits))
            difference = (module["weight"] - weight).astype(mx.float32)
            former, error = error, to_float(mx.square(difference).sum())
            if bits <= _MEASURED:
                losses[bits] = _mean_kl(original, partial, rows_NT)
            else:
                fewer = max(losses)
                losses[bits] = losses[fewer] * (error / former if former else 0.0)
        module["weight"] = mx.array([]) if opened else weight
        model.update_modules(tree_unflatten([(path, in_place[path])]))
        if not all(map(math.isfinite, losses.values())):
            raise SlimError(
                f"the loss of {path} in fewer bits is not finite",
                "the weights are damaged, or overflow their dtype",
            )
        file.write(json.dumps({"layer": path, "kl": losses}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _recorded(model: Any, rows_NT: mx.array, beside: Path) -> RecordedLogits:
    """Return the model's logits and probabilities (2, T, V) of each row, on disk."""

    def both(tokens_1T: mx.array) -> mx.array:
        logits_TV = model(tokens_1T)[0].astype(mx.float32)
        return mx.stack([logits_TV, exp(logits_TV - logsumexp(logits_TV))])[None]

    return RecordedLogits(both, rows_NT, beside)


def _mean_kl(original: RecordedLogits, partial: FromBlock, rows_NT: mx.array) -> float:
    """Return the mean KL(p ‖ q) of all positions, nats: p of the original, q as it is now.

    With d = logits of p − logits of q it is Σ p d + log Σ p exp(−d): one exponential a logit, and
    exact where both are near.
    """
    total = 0.0
    for number, row_T in enumerate(rows_NT):
        logits_TV, probs_TV = original(row_T[None])[0]
        changed_TV = partial.logits(number)
        mx.eval(changed_TV)
        for start in range(0, len(row_T), CHUNK):
            here = slice(start, start + CHUNK)
            d_CV, p_CV = logits_TV[here] - changed_TV[here].astype(mx.float32), probs_TV[here]
            kl_C1 = row_sums(p_CV * d_CV) + mx.log(row_sums(p_CV * exp(-d_CV)))
            total += to_float(kl_C1.sum())
    return max(0.0, total / rows_NT.size)


def _read(cache: Path) -> Losses:
    """Return the complete lines of the file; what a kill left of the last one is removed."""
    if not cache.is_file():
        return {}
    data = cache.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        cache.write_bytes(whole)
    return {
        record["layer"]: {int(bits): float(kl) for bits, kl in record["kl"].items()}
        for record in read_records(cache)
    }
