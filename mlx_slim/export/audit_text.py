"""Text on which models are compared after a change.

Invariant: there is always one: what the user named, else Alpaca where a mirror or the hub has it,
else the demo's rows, which ship with the package; which one it was is part of the result. Try it:
``mlx-slim fuse MODEL --adapter DIR -o OUT --calibration notes.txt``.

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_slim.config import library
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.quantization.calibration import DEFAULT_SOURCE, read_calibration

ROWS = 4
LENGTH = 256


def audit_tokens(
    tokenizer: Any,
    source: str | None,
    rows: int = ROWS,
    length: int = LENGTH,
    limit: RowLimit | None = None,
) -> tuple[mx.array, str]:
    """Return token ids (N, T) and the name of the text they come from.

    Args:
        tokenizer: The model's.
        source: Text file or data set; None takes the default.
        rows: N, at most.
        length: T, at most.
        limit: The longest row that the model computes correctly; T is at most that.

    Raises:
        SlimError: If ``source`` cannot be read or is too short.
    """
    length = min(length, limit.tokens) if limit else length
    names = (
        [source] if source else [DEFAULT_SOURCE, str(library.folder("evals") / "demo/test.jsonl")]
    )
    for name in names:
        try:
            calibration = read_calibration(name, tokenizer, length=length, seen=0, validation=rows)
        except SlimError:
            if name == names[-1]:
                raise
            continue
        text = (
            Path(source).name if source else ("Alpaca" if name == names[0] else "the demo's rows")
        )
        return calibration.validation_NT, text
    raise AssertionError("unreachable")
