"""How many tokens of a row a model computes as transformers does.

Some classes of mlx-lm attend to the whole row where the config asks for a sliding window, and a
rotary embedding may change with the length of the row (longrope, dynamic NTK), which packed rows
and shared prefixes cannot follow. Invariant: up to the limit every row is computed right, packed,
padded or by itself; longer rows are refused in training and scoring, and generation says so.
What a class does is looked at, not listed: its graph is built, never computed, with caches that
note which window each layer asks for. Try it: ``python -m pytest tests/models/test_limits.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import RowLimit
from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.reference import reference_of
from mlx_slim.models.rope import boundary_of


def row_limit(config: dict[str, Any], *, restarts: bool = False) -> RowLimit | None:
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


def shortest_limit(configs: Iterable[dict[str, Any]]) -> RowLimit | None:
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
        seen = _windows(model)
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


class _MaskLog:
    """The masks that were requested: which window, and by which layer."""

    def __init__(self) -> None:
        self.window_of: dict[int, int | None] = {}  # id of a mask -> its window
        self.masks: list[mx.array] = []  # so that no id is used twice
        self.layer: int | None = None
        self.windows: dict[int, int | None] = {}

    def make(self, length: int, window: int | None) -> mx.array:
        mask = mx.zeros((length, length), dtype=mx.bool_)
        self.masks.append(mask)
        self.window_of[id(mask)] = window
        if self.layer is not None:
            self.windows[self.layer] = window
        return mask


class _Cache:
    """A key-value cache that records nothing but the masks requested of it."""

    offset = 0
    keys = values = None

    def __init__(self, masks: _MaskLog) -> None:
        self._masks = masks

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array:
        return self._masks.make(N, window_size)


class _Watched:
    """A block that notes the mask it is given, then does what it does."""

    def __init__(self, block: Any, index: int, masks: _MaskLog) -> None:
        self._block, self._index, self._masks = block, index, masks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        masks = self._masks
        for value in (*arguments, *named.values()):
            if id(value) in masks.window_of:
                masks.windows[self._index] = masks.window_of[id(value)]
        masks.layer = self._index
        try:
            return self._block(*arguments, **named)
        finally:
            masks.layer = None


def _windows(model: nn.Module) -> list[int | None] | None:
    """Return the window that each layer of ``model`` keeps to; None if that cannot be seen."""
    masks = _MaskLog()
    blocks = structure.blocks(model)
    caches = [_Cache(masks) for _ in blocks]
    try:
        with _watching(model, masks):
            model(mx.zeros((1, 4), dtype=mx.int32), cache=caches)  # type: ignore[operator]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None  # wants caches of another kind
    return [masks.windows.get(index) for index in range(len(blocks))]


@contextmanager
def _watching(model: nn.Module, masks: _MaskLog) -> Iterator[None]:
    """Put watchers around the blocks, where the model itself looks for them."""
    *path, name = structure.blocks_path(model).split(".")
    owner: Any = model
    for part in path:
        owner = owner[part]
    blocks = owner[name]
    owner[name] = [_Watched(block, index, masks) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        owner[name] = blocks
