"""A training row as the model reads it, what is learned of it marked.

Invariant: the text is that of the tokens, decoded in runs of equal supervision. Try it:
``mlx-slim data preview smollm2-lora --rows 2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from rich.text import Text

from mlx_slim.data.pipeline import PreparedRow


def segments(row: PreparedRow, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the text of a row in runs, each with whether it is learned.

    Args:
        row: As the pipeline gives it.
        tokenizer: A fast Hugging Face tokenizer.
    """
    ids, supervised, _ = row.tokens
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        yield text, bool(supervised[start])


def legend(opening: str, closing: str) -> Text:
    """Return what the marks of ``row_text`` mean."""
    return Text.assemble(
        ("dim text: context, without loss", "dim"),
        "; ",
        (f"{opening}supervised: the loss counts these tokens{closing}", "bold green"),
    )


def row_text(row: PreparedRow, tokenizer: Any, opening: str, closing: str) -> Text:
    """Return a heading with the counts of a row, and its text.

    Args:
        row: As the pipeline gives it.
        tokenizer: A fast Hugging Face tokenizer.
        opening: Stands before what is learned.
        closing: Stands behind it.
    """
    ids, supervised, weights = row.tokens
    heading = f"\n{row.raw.place} · {row.example.kind} · {len(ids)} tokens"
    heading += f", {int(supervised.sum())} supervised"
    if weights is not None:
        least, most = weights[supervised].min(), weights[supervised].max()
        heading += f" (weights {least:g} to {most:g})"
    if row.pieces > 1:
        heading += f" · piece {row.piece + 1} of {row.pieces}"
    if row.length > len(ids):
        heading += f" · TRUNCATED from {row.length}"
    text = Text(heading + "\n", style="")
    for piece, learned in segments(row, tokenizer):
        if learned:
            text.append(f"{opening}{piece}{closing}", style="bold green")
        else:
            text.append(piece, style="dim")
    return text
