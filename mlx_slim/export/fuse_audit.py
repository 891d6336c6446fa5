"""How much of a tune survives when its adapter is folded into the weights.

Invariant: three models read the same tokens (the base, the base with its adapter, the fused one),
log-probabilities are float32, and one row's logits of each exist at a time. The effect of the
adapter is the change it makes to the log-probabilities; the fraction retained is the projection of
the fused model's change on it, so orthogonal noise does not count as retained. Try it:
``mlx-slim fuse MODEL --adapter DIR -o OUT``.

Shapes: N rows, T tokens a row, C positions compared at a time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import mlx.core as mx

from mlx_slim.errors import SlimError
from mlx_slim.models.fidelity import CHUNK, Model
from mlx_slim.models.logits import kl_divergence, logsumexp, row_sums
from mlx_slim.runtime import to_float

MIN_RETAINED = 0.5
MIN_LOGIT_FRACTION = 0.99  # of a fold into biases that counts as without loss


class FusingLoses(SlimError):
    """A fused model would not answer as base + adapter do."""


@dataclass(frozen=True)
class Effect:
    """What is left of a tune.

    Attributes:
        retained: Fraction of the adapter's effect on the log-probabilities that the fused model
            has, as a projection weighted by the tuned model's probabilities: 1 is all, 0 none. 1
            for an adapter without an effect.
        kl: Mean KL(tuned ‖ fused), nats a token.
        kl_base: Mean KL(tuned ‖ base), nats a token: the size of the effect.
        logit_fraction: 1 − ‖fused − tuned‖ / ‖tuned − base‖ over all logits, in which noise counts
            as loss; 1 for an adapter without an effect.
        top1: Fraction of positions where tuned and fused model have the same most likely token.
        tokens: Positions compared.
    """

    retained: float
    kl: float
    kl_base: float
    logit_fraction: float
    top1: float
    tokens: int

    def as_record(self) -> dict[str, float]:
        """Return the audit as ``fuse.json`` holds it."""
        values = asdict(self)
        return {"kept": values.pop("retained"), **values}

    def lost(self) -> str:
        """Return why the tune counts as lost, in a few words; empty if it does not.

        Lost: less than half of the effect is kept, or the fused model is no nearer to the tuned one
        than the base was.
        """
        if not self.retained >= MIN_RETAINED:
            return (
                f"it keeps {self.retained:.0%} of the adapter's effect, at least "
                f"{MIN_RETAINED:.0%} is required"
            )
        if self.kl > 1e-6 and self.kl >= self.kl_base:
            return (
                f"it is no nearer to the tuned model (KL {self.kl:.3g}) than the base was "
                f"({self.kl_base:.3g})"
            )
        return ""


def effect(base: Model, tuned: Model, fused: Model, tokens_NT: mx.array) -> Effect:
    """Compare three models over one vocabulary: token ids (1, T) to logits (1, T, V).

    Raises:
        SlimError: If a logit is not finite.
    """
    sums = [0.0] * 7
    for row_T in tokens_NT:
        rows = [model(row_T[None])[0] for model in (base, tuned, fused)]
        mx.eval(rows)
        for start in range(0, row_T.size, CHUNK):
            chunk_sums = _chunk(*(row_TV[start : start + CHUNK] for row_TV in rows))
            sums = [
                total + to_float(chunk_sum)
                for total, chunk_sum in zip(sums, chunk_sums, strict=True)
            ]
    tokens = tokens_NT.size
    along, size, kl, kl_base, agree, lost, moved = sums
    if not mx.isfinite(mx.array(sums)).all():
        raise SlimError(
            "a logit is not finite: the comparison is not valid",
            "the adapter or the base is damaged, or the weights overflow their dtype",
        )
    retained = along / size if size / tokens > 1e-12 else 1.0
    return Effect(
        retained=retained,
        kl=max(0.0, kl / tokens),
        kl_base=max(0.0, kl_base / tokens),
        logit_fraction=1 - math.sqrt(lost / moved) if moved > 0 else 1.0,
        top1=agree / tokens,
        tokens=tokens,
    )


def _chunk(base_CV: mx.array, tuned_CV: mx.array, fused_CV: mx.array) -> tuple[mx.array, ...]:
    """Return sums over C positions.

    They are ⟨fused, tuned⟩, ⟨tuned, tuned⟩ (changes), KL, KL of the base, agreement, and of logits
    ‖fused − tuned‖², ‖tuned − base‖².
    """
    base32_CV, tuned32_CV, fused32_CV = (
        x_CV.astype(mx.float32) for x_CV in (base_CV, tuned_CV, fused_CV)
    )
    log_base_CV, log_tuned_CV, log_fused_CV = (
        x_CV.astype(mx.float32) - logsumexp(x_CV) for x_CV in (base_CV, tuned_CV, fused_CV)
    )
    change_CV = log_tuned_CV - log_base_CV
    weighted_CV = mx.exp(log_tuned_CV) * change_CV
    return (
        row_sums(weighted_CV * (log_fused_CV - log_base_CV)).sum(),
        row_sums(weighted_CV * change_CV).sum(),
        kl_divergence(tuned_CV, fused_CV).sum(),
        kl_divergence(tuned_CV, base_CV).sum(),
        (tuned_CV.argmax(-1) == fused_CV.argmax(-1)).sum(),
        row_sums(mx.square(fused32_CV - tuned32_CV)).sum(),
        row_sums(mx.square(tuned32_CV - base32_CV)).sum(),
    )


def weight_retention(
    triples: Iterable[tuple[str, mx.array, mx.array, mx.array]],
) -> dict[str, float]:
    """Return path -> fraction of each layer's weight change that the fused weight has.

    Args:
        triples: (path, base, tuned, fused) weights of the adapted layers; 1 where nothing changed.
    """
    retained = {}
    for path, base, tuned, fused in triples:
        base, tuned, fused = (weight.astype(mx.float32) for weight in (base, tuned, fused))
        change = tuned - base
        size = to_float(row_sums(mx.square(change)).sum())
        along = to_float(row_sums(change * (fused - base)).sum())
        retained[path] = along / size if size > 0 else 1.0
    return retained
