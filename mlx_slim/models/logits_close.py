"""Whether two computations of one model's logits (or hidden states) are the same up to rounding.

Invariant: one table says how far they may differ, by what differs between the two computations and
by the dtype that they ran in; every command that reloads, converts, exports or probes a model
reads it. A difference is measured against the largest magnitude of the expected values, in float32.
NaN on either side is never close. Try it: ``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import mlx.core as mx

from mlx_slim.runtime import to_float


class Change(Enum):
    """What differs between two computations of the same function."""

    NOTHING = "nothing: the same weights, dtype and shapes"
    FORWARD = "our own forward pass of one layer"
    HEAD = "body and head computed apart"
    SHAPES = "other batches, masks, positions or caches"
    WEIGHTS = "weights rounded or merged another way, over all layers"


# (change) -> (tolerance in float32, in 16 bits), as a fraction of the largest expected magnitude.
TOLERANCES: dict[Change, tuple[float, float]] = {
    # Bit for bit on one device; a kernel may still be chosen anew.
    Change.NOTHING: (1e-4, 1e-4),
    # One layer: sums in another order (float32), one or two roundings of 2**-8 (bfloat16).
    Change.FORWARD: (1e-4, 2e-2),
    # The same operations in the same order; what separates a right split from a wrong one.
    Change.HEAD: (1e-3, 1e-3),
    # Sums in another order (float32); rotary embeddings and softmax of other shapes round
    # differently in every layer (16 bits).
    Change.SHAPES: (1e-3, 5e-2),
    # The least of ``rounding``: the order of sums, and a GPU's own float32 products.
    Change.WEIGHTS: (1e-3, 1e-3),
}


@dataclass(frozen=True)
class Closeness:
    """How two sets of logits compare.

    Attributes:
        gap: Largest magnitude of the difference.
        largest: Largest magnitude of the expected values.
        tolerance: Fraction of ``largest`` that the gap may be.
    """

    gap: float
    largest: float
    tolerance: float

    @property
    def close(self) -> bool:
        """Whether the gap is within the tolerance; False if a value is NaN."""
        return self.gap <= self.tolerance * self.largest

    def __str__(self) -> str:
        """Return the value seen and the value expected, for a message."""
        return (
            f"logits differ by {self.gap:.3g}, expected at most "
            f"{self.tolerance * self.largest:.3g} (largest logit {self.largest:.3g})"
        )


def logits_close(
    actual: mx.array, expected: mx.array, change: Change, *, tolerance: float | None = None
) -> Closeness:
    """Compare two computations of the same logits, of any equal shape.

    Args:
        actual: Any floating dtype.
        expected: Any floating dtype; sets the scale.
        change: What differs between the computations.
        tolerance: Instead of the table's, where the depth of the model decides (``rounding``).
    """
    if tolerance is None:
        wide = actual.dtype == expected.dtype == mx.float32
        tolerance = TOLERANCES[change][0 if wide else 1]
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    # A class may give tokens that do not exist -inf: both the same is no difference.
    gap = to_float(mx.where(actual == expected, 0.0, mx.abs(actual - expected)).max())
    finite = mx.where(mx.isinf(expected), 0.0, mx.abs(expected))
    return Closeness(gap, to_float(finite.max()), tolerance)


def rounding(layers: int, *dtypes: mx.Dtype) -> float:
    """Return the tolerance of ``Change.WEIGHTS`` over a whole model.

    A block rounds what it adds to the residual stream to the unit roundoff u of its dtype, and L
    independent roundings add up to u·√L. Measured between bfloat16 or float16 and float32, the
    largest difference is 1.0 to 2.0 of that (3 blocks, and the 30 of SmolLM2); 4 are allowed.

    Args:
        layers: L.
        dtypes: Those that were computed in, or that weights were rounded to on the way.
    """
    roundoff = max(mx.finfo(dtype).eps for dtype in dtypes) / 2
    return max(TOLERANCES[Change.WEIGHTS][0], 4 * roundoff * layers**0.5)
