"""The end of a quantization-aware run: round for real, save, and see that nothing changed.

Invariant: the saved model answers as the model did in training and validation, where its weights
were only rounded (``training/qat.py``); it is saved as ``mlx-slim quantize`` saves, and stock
mlx-lm reads it. Try it: ``mlx-slim train smollm2-qat -o runs/qat``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_slim.adapters.merge import merge
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.build import Tuned
from mlx_slim.models import structure
from mlx_slim.models.logits_close import Change, logits_close, rounding
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import save_checked, stored_dtype
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.training.callbacks import computing

_PROBE = 16  # tokens on which the rounded and the quantized model are compared


def save_quantized(target: Path, recipe: Recipe, tuned: Tuned) -> None:
    """Quantize the tuned model in memory (adapters merged first) and write it to ``target``.

    Args:
        target: Replaced if it exists.
        recipe: Says how to quantize.
        tuned: Its model is quantized in place.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If the quantized model answers otherwise than the rounded one.
    """
    model = tuned.model.eval()
    tokens_1T = mx.arange(_PROBE)[None] % max(2, tuned.config.get("vocab_size", _PROBE))
    with computing(tuned.callbacks):
        trained = model(tokens_1T)
        mx.eval(trained)
    tuned.callbacks.clear()  # with the rounded copies that they keep
    merge(model)
    report = quantize_model(model, tuned.config, recipe.quantize)
    stored = stored_dtype(folder_tensors(tuned.loaded.path))
    shutil.rmtree(target, ignore_errors=True)
    save_checked(target, tuned.loaded, report.config, stored)
    saved = model(tokens_1T)
    # Stored in 16 bits, norms, biases and layers without codes are rounded once more.
    depth, dtypes = len(structure.blocks(model)), (trained.dtype, saved.dtype, stored)
    tolerance = rounding(depth, *dtypes)
    difference = logits_close(saved, trained, Change.WEIGHTS, tolerance=tolerance)
    if not difference.close:
        raise SlimError(
            f"{target}: the quantized model differs from the trained one: {difference}",
            "this is a bug: please report it with run.json",
        )
