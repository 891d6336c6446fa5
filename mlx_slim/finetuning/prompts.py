"""Prompts of training rows, and a model that answers them while it is trained.

Invariant: answering leaves no trace in the model: its mode is what it was, and dropout takes no
part. Try it: ``mlx-slim train smollm2-lora -o runs/try`` and open ``runs/try/report.html``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def split(ids_T: np.ndarray, supervised_T: np.ndarray) -> tuple[list[int], list[int]]:
    """Return a row's prompt and its last answer, as token ids.

    A text that is learned from its start on is cut in the middle.
    """
    learned = np.flatnonzero(supervised_T)
    end = int(learned[-1]) + 1
    gaps = np.flatnonzero(np.diff(learned) > 1)
    start = int(learned[gaps[-1] + 1] if len(gaps) else learned[0])
    if start <= 1:
        start = max(1, end // 2)
    return ids_T[:start].tolist(), ids_T[start:end].tolist()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let a block use ``model`` without a trace: greedy answers draw no random number."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        mx.clear_cache()
