"""A model is compared without being there: its logits are recorded, then its weights are freed.

Invariant: one model is in memory at a time; what a recording answers is what the model computed,
bit for bit, and at most one row of it is in memory. The file has no name in any folder, so a
process that is killed leaves nothing. Try it: ``mlx-slim quantize MODEL -o DIR``.

Shapes: N rows, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_slim.artifacts import disk_errors
from mlx_slim.progress import tracked
from mlx_slim.runtime import return_free_memory


class RecordedLogits:
    """Logits of a model on rows of tokens; it is called as the model is, with one of these rows.

    Args:
        model: Token ids (1, T) to logits (1, T, V).
        tokens_NT: The rows.
        beside: The file is stored on the disk of this path: 1 to 4 bytes a logit.

    Raises:
        ResourceError: If that disk is full.
    """

    def __init__(
        self, model: Callable[[mx.array], mx.array], tokens_NT: mx.array, beside: Path
    ) -> None:
        self._rows: dict[bytes, tuple[int, tuple[int, ...], mx.Dtype]] = {}
        places = (beside, *beside.absolute().parents)
        folder = next(place for place in places if place.is_dir())
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open while it lives
            weakref.finalize(self, self._file.close)
            rows = tracked(tokens_NT, "recording what the source answers", "rows", len(tokens_NT))
            for row_T in rows:
                logits_TV = model(row_T[None])[0]
                raw: Any = mx.contiguous(logits_TV.view(mx.uint8))
                mx.eval(raw)
                self._rows[_key(row_T)] = self._file.tell(), logits_TV.shape, logits_TV.dtype
                self._file.write(memoryview(raw))
            self._file.flush()

    def __call__(self, tokens_1T: mx.array) -> mx.array:
        """Return the logits (1, T, V) of a recorded row, in the dtype they were computed in."""
        begin, shape, dtype = self._rows[_key(tokens_1T)]
        self._file.seek(begin)
        raw = np.frombuffer(self._file.read(int(np.prod(shape)) * dtype.size), np.uint8)
        return mx.array(raw).view(dtype).reshape(1, *shape)


def _key(tokens: mx.array) -> bytes:
    return np.array(tokens, np.int64).tobytes()


def free_weights(model: nn.Module) -> None:
    """Free the weights of ``model``, whoever still holds the module; it computes no more."""
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    mx.clear_cache()
    return_free_memory()
