"""How many tokens of a row a model computes as transformers does.

Some classes of mlx-lm attend to the whole row where the config asks for a sliding window, and a
rotary embedding may change with the length of the row (longrope, dynamic NTK), which packed rows
and shared prefixes cannot follow. Invariant: up to the limit every row is computed right, packed,
padded or by itself; longer rows are refused in training and scoring, and generation says so.
Which window each layer keeps to is looked at, not listed (``attention.py``). Try it:
``python -m pytest tests/models/test_row_limits.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache

from mlx_slim.errors import RowLimit
from mlx_slim.models.attention import attention_of
from mlx_slim.models.build import build
from mlx_slim.models.reference import reference_of
from mlx_slim.models.rope import boundary_of
from mlx_slim.reading import ModelConfig


def row_limit(config: ModelConfig, *, restarts: bool = False) -> RowLimit | None:
    """Return the limit of the model of a normalised config; None if there is none.

    Args:
        config: Of the model.
        restarts: Whoever asks computes a sequence anew where it passes the length at which longrope
            changes, as generation does: that is no limit then.

    Raises:
        SlimError: If the config does not fit its class.
    """
    if config.get("model_file"):
        return None  # its own code, of which transformers knows nothing
    dense = {key: value for key, value in config.items() if not key.startswith("quantization")}
    return _limit(json.dumps(dense, sort_keys=True), restarts)


def shortest_limit(configs: Iterable[ModelConfig]) -> RowLimit | None:
    """Return the limit of rows that several models read, of their normalised configs."""
    limits = [limit for config in configs if (limit := row_limit(config))]
    return min(limits, key=lambda limit: limit.tokens, default=None)


@lru_cache(maxsize=16)
def _limit(config_json: str, restarts: bool) -> RowLimit | None:
    config = json.loads(config_json)
    model = build(config)  # not a number of it is computed
    limits = []
    reference = reference_of(config)
    if any(reference.windows):
        attention = attention_of(model)
        seen = None if attention is None else [layer.window for layer in attention]
        wrong = [
            min(width for width in pair if width)
            for pair in zip(
                reference.windows, seen or [None] * len(reference.windows), strict=False
            )
            if pair[0] != pair[1]
        ]
        # Which layers slide is a guess where transformers does not know the type: the class knows.
        if wrong and (reference.from_transformers or not any(seen or ())):
            kind = config.get("model_type")
            width = min(wrong)
            text = f"mlx-lm's class of {kind!r} ignores the sliding window of {width:,} tokens"
            limits.append(RowLimit(width, text))
    if boundary := boundary_of(model, dynamic_only=restarts):
        text = f"the RoPE of this model changes for rows longer than {boundary:,} tokens"
        limits.append(RowLimit(boundary, text))
    return min(limits, key=lambda limit: limit.tokens, default=None)
