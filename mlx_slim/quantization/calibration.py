"""Calibration text: token ids that quantization may look at, and others that it may not.

Invariant: nothing is fetched but what the user named; the validation rows are never seen by the
method that they judge. Try it: ``mlx-slim quantize MODEL -o DIR --calibration notes.txt``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.config.schema import DataConfig
from mlx_slim.errors import RowLimit, SlimError

DEFAULT_SOURCE = "tatsu-lab/alpaca"


@dataclass(frozen=True)
class Calibration:
    """Two disjoint sets of rows.

    Attributes:
        seen_NT: For the method, int32; may be empty.
        validation_NT: To measure the result on, int32; at least one row.
    """

    seen_NT: mx.array
    validation_NT: mx.array


def read_calibration(
    source: str,
    tokenizer: Any,
    *,
    length: int,
    seen: int,
    validation: int,
    limit: RowLimit | None = None,
) -> Calibration:
    """Read ``source`` through the model's own template and cut the stream into rows.

    Args:
        source: A data file (``.txt``, ``.jsonl``, …), a mirror's name, or a hub data set.
        tokenizer: The model's.
        length: T, tokens a row.
        seen: Rows for the method, at most.
        validation: Rows to measure the result on, at most.
        limit: The longest row that the model computes right.

    Raises:
        SlimError: If the source cannot be read or has too few tokens, or rows are too long.
    """
    if limit is not None:
        hint = f"give --calibration-length {limit.tokens}"
        limit.check(length, f"a calibration row of {source}", hint)
    needed = (seen + validation) * length
    ids = np.fromiter(_stream(source, tokenizer, needed), np.int32)
    rows = len(ids) // length
    least = 2 if seen else 1
    if rows < least:
        raise SlimError(
            f"{source} gives {len(ids):,} tokens, {least * length:,} are needed",
            f"give more text, or rows shorter than --calibration-length {length}",
        )
    # Validation rows come first, so that they are the same for every method.
    validation_rows = min(validation, rows - min(seen, rows // 2))
    ids_NT = mx.array(ids[: rows * length].reshape(rows, length))
    return Calibration(ids_NT[validation_rows : validation_rows + seen], ids_NT[:validation_rows])


def _stream(source: str, tokenizer: Any, needed: int) -> Iterator[int]:
    """Yield the token ids of the rows one after the other, ``needed`` at most."""
    from mlx_slim.data.ledger import SourceLedger
    from mlx_slim.data.pipeline import Pipeline
    from mlx_slim.data.sources import find
    from mlx_slim.data.tokenize import unwrap

    chat = unwrap(tokenizer).chat_template
    unnamed = isinstance(chat, dict) and "default" not in chat  # none of them is for every row
    config = DataConfig(
        path=source,
        mask_prompt=False,
        truncation="right",
        template="plain" if unnamed else "auto",
    )
    pipeline = Pipeline(config, tokenizer, max_length=max(needed, 8))
    source_rows = find(config.sources[0])
    count = 0
    for row in pipeline.rows(
        source_rows, config.sources[0], SourceLedger(source, source_rows.kind, 1.0, [])
    ):
        ids = row.tokens.ids_T[: needed - count]
        count += len(ids)
        yield from ids.tolist()
        if count >= needed:
            return
