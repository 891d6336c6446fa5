"""A row as text, with the character ranges of its answers and what each counts in the loss.

Invariant: every answer of a row has its span, one that is not learned too (weight 0); the tokenizer
sees exactly ``text``. Try it: ``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: All of it.
        spans: Character ranges [start, end) of the answers, each with what closes it.
        has_bos: The template writes the BOS token itself, if the model wants one.
        weights: Loss weight of each span; None is 1 for all.
        notes: What the template left out that the row has, for the ledger.
    """

    text: str
    spans: list[tuple[int, int]]
    has_bos: bool = False
    weights: list[float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def weighted(self) -> list[tuple[int, int, float]]:
        """Start, end and weight of every span."""
        weights = self.weights or [1.0] * len(self.spans)
        return [(a, b, weight) for (a, b), weight in zip(self.spans, weights, strict=True)]

    def cut(self, start: int, end: int, head: int = 0) -> Rendered:
        """Return the first ``head`` characters, then [start, end) and the spans in them."""
        text, shift = self.text[:head] + self.text[start:end], head - start
        inside = [(max(a, start) + shift, min(b, end) + shift, w) for a, b, w in self.weighted]
        clipped = [(a, b, w) for a, b, w in inside if a < b]
        weights = [w for *_, w in clipped] if self.weights else None
        return replace(self, text=text, spans=[(a, b) for a, b, _ in clipped], weights=weights)


def join_pieces(pieces: list[tuple[str, float | None]]) -> Rendered:
    """Join (text, weight) pieces; an answer has a weight, everything else None."""
    text, spans, weights = "", [], []
    for piece, weight in pieces:
        if weight is not None:
            spans.append((len(text), len(text) + len(piece)))
            weights.append(weight)
        text += piece
    return Rendered(text, spans, weights=weights)
