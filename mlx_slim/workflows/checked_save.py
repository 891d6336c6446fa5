"""Save a model so that its folder appears only if it reads back as what was measured.

Invariant: every parameter read back is equal to the one in memory, logits too; else nothing is
left. Models compute in float32 on a CPU and are stored in the dtype that they came in. Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.artifacts import atomic_folder
from mlx_slim.errors import SlimError
from mlx_slim.models.load import Loaded, cast, load
from mlx_slim.models.save import save_model
from mlx_slim.models.tensors import FLOATS, Tensor, common_dtype
from mlx_slim.runtime import DTYPES, on_gpu
from mlx_slim.workflows.task_rows import carry

_PROBE = 16  # tokens on which the saved model is compared


def compute_dtype() -> mx.Dtype | None:
    """Return float32 on a CPU, where only that is fast; None is the stored dtype."""
    return None if on_gpu() else mx.float32


def stored_dtype(tensors: dict[str, Tensor]) -> mx.Dtype:
    """Return the dtype that most floating bytes of the source are stored in."""
    return DTYPES[FLOATS[common_dtype(tensors)]]


def save_checked(
    out: Path,
    loaded: Loaded,
    config: dict[str, Any],
    stored: mx.Dtype,
    beside: Callable[[Path], None] | None = None,
    adapters: Sequence[Path] = (),
) -> None:
    """Save ``loaded.model`` in ``stored``, read it back, compare, and let the folder appear.

    Args:
        out: Must not exist.
        loaded: The model, which is cast to ``stored`` and back, with its tokenizer and source.
        config: Of the model as it is now.
        stored: Dtype of the floating weights on disk.
        beside: Writes what else belongs into the folder.
        adapters: What was folded into the model.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If what is read back differs; nothing is left behind.
    """
    compute = compute_dtype()
    cast(loaded.model, stored)
    with atomic_folder(out) as temporary:
        folder = temporary / "model"
        save_model(folder, loaded.model, loaded.tokenizer, config, code_from=loaded.path)
        again = load(folder, dtype=compute).model
        if compute is not None:
            cast(loaded.model, compute)
        _same(loaded.model, again, out)
        for file in list(folder.iterdir()):
            file.rename(temporary / file.name)
        folder.rmdir()
        carry(temporary, [loaded.path, *adapters])
        if beside is not None:
            beside(temporary)


def _same(model: nn.Module, again: nn.Module, out: Path) -> None:
    """Raise unless both models hold the same parameters and compute the same logits."""
    ours, theirs = (dict(tree_flatten(m.parameters())) for m in (model, again))
    differing = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or not mx.array_equal(ours[name], theirs[name], equal_nan=True)  # pyright: ignore
    ]
    probe_1T = mx.arange(_PROBE)[None]
    logits, expected = (m(probe_1T).astype(mx.float32) for m in (again, model))
    gap = (mx.abs(logits - expected).max() / mx.abs(expected).max()).tolist()
    if differing or not gap <= 1e-4:  # pyright: ignore
        raise SlimError(
            f"{out}: the saved model is not the one that was measured: relative difference of the "
            f"logits {gap:.2g}, {len(differing)} tensors differ {differing[:3]}; it was not kept",
            "the disk may be failing; else please report it",
        )
