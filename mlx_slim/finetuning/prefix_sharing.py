"""Whether the micro-batches of a run can share what their rows begin with, or why not.

Invariant: what the recipe asks for and cannot have is a notice. Try it:
``mlx-slim train smollm2-lora train.prefix_sharing=true -o runs/try``.
"""

from __future__ import annotations

import mlx.nn as nn

from mlx_slim import events
from mlx_slim.config.train import TrainConfig
from mlx_slim.models.prefix_attention import why_not


def can_have_prefix_sharing(
    config: TrainConfig,
    model: nn.Module,
    longest: int,
    mode: str,
    compiled: bool,
    dropout: float,
    observer: events.Observer,
) -> bool:
    """Return whether micro-batches can share what rows begin with; say why they cannot.

    ``dropout`` of the adapters would draw one mask for what is shared: only where it is demanded.
    """
    if config.prefix_sharing is False or (config.prefix_sharing == "auto" and dropout > 0):
        return False
    if compiled or mode == "packed":
        if config.prefix_sharing is True:
            where = "a compiled step" if compiled else "packed sequences"
            text = f"train.prefix_sharing=true has no effect in {where}"
            observer.notify(events.Notice(text, level="warning"))
        return False
    noisy = "each row has noise of its own (train.neftune_alpha)" if config.neftune_alpha else ""
    reason = noisy or why_not(model, longest)
    if reason:
        text = f"rows that begin alike are computed one by one: {reason}"
        observer.notify(events.Notice(text))
    return not reason
