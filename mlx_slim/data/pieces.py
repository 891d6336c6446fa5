"""A long row as several of at most ``max_length`` tokens, with a context in common.

Invariant: every supervised token of the row is supervised in exactly one piece, and predicted there
from at least one token before it. Context is not supervised again. A BOS in front of the row is in
front of every piece. With at most 5 tokens, a context of 2 and BOS ``^``::

    row      ^ a b c d e f g        learned   a b c d e f g
    pieces   ^ a b c d                        a b c d
             ^ c d e f                            · · e f
             ^ e f g                                  · · g

Try it: ``mlx-slim data preview smollm2-lora data.path=book.txt train.max_length=64``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_slim.data.tokenize import Tokens
from mlx_slim.errors import SlimError


def context_tokens(overlap: float, max_length: int) -> int:
    """Return ``data.split_overlap`` in tokens, for rows of ``max_length``.

    Raises:
        SlimError: If no room is left for a new token.
    """
    most = max_length - 2  # a BOS and a new token besides
    if overlap < 1:
        return max(1, min(round(overlap * max_length), most))
    if overlap > most:
        raise SlimError(
            f"data.split_overlap={overlap:g} leaves no new token in a row of "
            f"train.max_length={max_length}, expected at most {most}",
            "a share of the row is simplest: data.split_overlap=0.125",
        )
    return int(overlap)


class Piece(NamedTuple):
    """Tokens [start, stop) of a row behind its BOS; the first ``context`` are not learned."""

    start: int
    stop: int
    context: int


def pieces(length: int, max_length: int, context: int, head: int) -> list[Piece]:
    """Return where a row is cut.

    Args:
        length: Tokens of the row.
        max_length: Most tokens of a piece, with the head.
        context: Tokens that a piece repeats of the one before; at least 1, at most
            ``max_length − 2``.
        head: 1 if the row begins with a BOS, which every piece repeats; else 0.
    """
    room = max_length - head
    cuts = [Piece(head, min(length, max_length), 0)]
    while cuts[-1].stop < length:
        start = cuts[-1].stop - min(context, cuts[-1].stop - head)
        cuts.append(Piece(start, min(length, start + room), cuts[-1].stop - start))
    return cuts


def split(row: Tokens, max_length: int, context: int, bos: int | None) -> list[Tokens]:
    """Return the pieces of a row as rows."""
    head = int(bos is not None and len(row.ids_T) > 0 and row.ids_T[0] == bos)
    rows = []
    for piece in pieces(len(row.ids_T), max_length, context, head):
        span = np.r_[:head, piece.start : piece.stop]
        learned = np.arange(len(span)) >= head + piece.context
        supervised = row.supervised_T[span] & learned
        weights = None if row.weights_T is None else row.weights_T[span] * learned
        rows.append(Tokens(row.ids_T[span], supervised, weights))
    return rows
