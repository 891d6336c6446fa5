"""What a model costs, counted from its config: bytes on disk, bytes while it answers.

Invariant: no weight is read; bytes of weights are exact, those of the folder are held against the
finished folder, and the cache is that of mlx-lm, which grows in steps of 256 tokens. Try it:
``mlx-slim slim MODEL -o DIR --disk 200MB --task arc_easy --dry-run``.

Source: 2 · layers · kv heads · head size · bytes a token of the cache, windows counted as
min(context, window).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.evaluation.scoring.footprint import STEP
from mlx_slim.models.build import build
from mlx_slim.models.kv_cache import cache_format, cache_widths
from mlx_slim.quantization.policy import make_policy
from mlx_slim.reading import ModelConfig
from mlx_slim.slimming.candidate import Cost

_PREFILL = 2048  # tokens that mlx-lm reads at a time
_ITEM = 2  # bytes of a number while answering, on the machines that this is for
_HEADER = 200  # bytes of a tensor's entries in a safetensors file and its index, at most about


def other_bytes(folder: Path) -> int:
    """Return the bytes of the files of a model's folder that are not weights."""
    names = [path for path in folder.iterdir() if path.is_file()]
    return sum(
        path.stat().st_size
        for path in names
        if path.suffix in (".json", ".jinja", ".model", ".txt")
    )


def cost(
    config: ModelConfig,
    dtype: mx.Dtype,
    quantize: QuantizeConfig | None,
    *,
    context: int,
    kv_bits: int | None,
    others: int,
) -> Cost:
    """Return the cost of the model of ``config``.

    Args:
        config: Of a dense model.
        dtype: That its numbers are stored in.
        quantize: Format; None stays dense.
        context: Tokens of the cache.
        kv_bits: Bits of the cache; None is 16.
        others: Bytes of the other files of its folder (``other_bytes``).

    Raises:
        SlimError: If the cache of this model cannot be quantized.
    """
    model: Any = build(config)
    item_bits = 8.0 * _ITEM
    if kv_bits is not None:
        item_bits = cache_format(model, kv_bits).bits_per_number(_ITEM)
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))  # pyright: ignore
    widths, fixed = cache_widths(model)
    model.update(
        tree_map(
            lambda v: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v,
            model.parameters(),
        )
    )
    if quantize is not None:
        chosen = make_policy(model, quantize).chosen
        nn.quantize(
            model,
            group_size=quantize.group_size,
            bits=quantize.bits,
            mode=quantize.mode,
            class_predicate=lambda path, _: asdict(chosen[path]) if path in chosen else False,
        )
    leaves = tree_flatten(model.parameters())
    weights = sum(value.nbytes for _, value in leaves)  # pyright: ignore
    whole = -(-context // STEP) * STEP
    tokens = sum(width * min(whole, window or whole) for width, window in widths)
    return Cost(
        parameters=parameters,
        weight_bytes=weights,
        disk_bytes=weights + others + _HEADER * len(leaves),
        cache_bytes=round(tokens * item_bits / 8) + fixed * _ITEM,
        working_bytes=_working(config, min(context, _PREFILL)),
    )


def _working(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of the widest moment of a prompt's piece, and of one token's logits.

    In the MLP three arrays of its width exist at a time (gate, up, their product), beside the
    residual stream, its norm and the sum that replaces it.
    """
    text = {**config, **(config.get("text_config") or {})}
    width = int(text.get("hidden_size") or text.get("n_embd") or 0)
    inner = int(text.get("intermediate_size") or 4 * width)
    return tokens * (3 * inner + 3 * width) * _ITEM + 4 * int(text.get("vocab_size") or 0)
