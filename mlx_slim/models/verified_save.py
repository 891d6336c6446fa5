"""Save a model so that its folder appears only if it reads back as what was measured.

Invariant: every parameter read back is equal to the one in memory, logits too; else nothing is
left. One model is in memory at a time: tensors are compared as they are read, one by one, and the
logits are kept while the saved model takes the place of the other. Models compute in float32 on a
CPU and are stored in the dtype that they came in. Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.artifacts import atomic_folder
from mlx_slim.errors import SlimError
from mlx_slim.models.lineage import carry
from mlx_slim.models.load import Loaded, cast, load, open_weights, read_weights
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.save import save_model
from mlx_slim.models.tensors import FLOATS, Tensor, common_dtype
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import DTYPES, on_gpu

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
    config: ModelConfig,
    stored: mx.Dtype,
    beside: Callable[[Path], None] | None = None,
    adapters: Sequence[Path] = (),
) -> None:
    """Save ``loaded.model`` in ``stored``, read it back, compare, and let the folder appear.

    Args:
        out: Must not exist.
        loaded: The model, with its tokenizer and source. Its weights are cast to ``stored`` and
            back, and replaced by those that were read back.
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
    read_weights(loaded.model)
    with atomic_folder(out) as temporary:
        folder = temporary / "model"
        save_model(folder, loaded.model, loaded.tokenizer, config, code_from=loaded.path)
        if compute is not None:
            cast(loaded.model, compute)
            read_weights(loaded.model)
        _same(loaded.model, folder, out)
        for file in list(folder.iterdir()):
            file.rename(temporary / file.name)
        folder.rmdir()
        carry(temporary, [loaded.path, *adapters])
        if beside is not None:
            beside(temporary)


def _same(model: nn.Module, folder: Path, out: Path) -> None:
    """Raise unless ``folder`` holds the parameters of ``model`` and computes the same logits.

    Afterwards ``model`` holds what was read.
    """
    differing = _differing(model, folder)
    probe_1T = mx.arange(_PROBE)[None]
    expected = model(probe_1T)
    mx.eval(expected)
    free_weights(model)
    again = load(folder, dtype=compute_dtype()).model
    difference = logits_close(again(probe_1T), expected, Change.NOTHING)
    if differing or not difference.close:
        raise SlimError(
            f"{out}: the saved model is not the one that was measured: {difference}, "
            f"{len(differing)} tensors differ {differing[:3]}; it was removed",
            "the disk may be failing; else please report it",
        )
    model.update(again.parameters())


def _differing(model: nn.Module, folder: Path) -> list[str]:
    """Return the parameters that ``folder`` lacks, has too much or has otherwise; one is read."""
    ours = dict(tree_flatten(model.parameters()))
    theirs = dict(tree_flatten(open_weights(folder, dtype=compute_dtype())[0].parameters()))
    differing = ours.keys() ^ theirs.keys()
    for name in ours.keys() & theirs.keys():
        # Popped, so that it is freed before the next one is read.
        if not mx.array_equal(ours[name], theirs.pop(name), equal_nan=True):  # pyright: ignore
            differing.add(name)
    return sorted(differing)
